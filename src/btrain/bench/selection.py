"""The part of a step that only chooses: metric, classes, sort and indexing."""

from __future__ import annotations

import torch
from torch import Tensor

from btrain.allocation import Scored
from btrain.attacks.pgd import by_steps
from btrain.data import Batch
from btrain.data.augmentation import batch_slices
from btrain.methods.augmix import AugMix
from btrain.methods.pool import Pool, deal, no_attack
from btrain.processes.world import ALONE
from btrain.training.timing.lane import Lane


def select(lane: Lane, batch: Batch, z: Tensor) -> None:
    """Do what the step does between the clean logits z (m, K) and the attack, or the views."""
    x, labels, _ = batch
    chooser = lane.chooser
    score = chooser.metric(z, labels)
    robust_fraction = lane.memory["robust_fraction"]
    scored = Scored(score, z, labels, robust_fraction, lane.generator, no_attack)
    if isinstance(chooser, AugMix):
        allocation = chooser.allocator(scored)
        order, counts = by_steps(allocation.steps)
        allocation.ordered(order)
        _gathered([x, labels, z], order)
        counts()
        return
    noise = torch.empty_like(x)
    if isinstance(lane.method, Pool):
        slices = batch_slices(len(z), lane.method.batch_size)
        allocation = lane.method.allocate(scored, slices)
        dealt = deal(allocation, slices, ALONE)
        together = dealt.rows[dealt.order]
        x_adv, *_ = _gathered([x, labels, z, noise], together)
        chooser.attack.sizes(allocation.ordered(together).steps)
        _gathered([x_adv], torch.argsort(dealt.order))
        _gathered([x, labels, z, score], dealt.rows)
        return
    allocation = chooser.allocator(scored)
    _, _, allocation, _ = chooser.in_order([x, labels, z, score, noise], None, allocation)
    chooser.attack.sizes(allocation.steps)


def _gathered(parts: list[Tensor], rows: Tensor) -> list[Tensor]:
    return [part[rows] for part in parts]
