"""The part of a step that only chooses: metric, classes, sort and indexing."""

from __future__ import annotations

import torch
from torch import Tensor

from btrain.allocation import predicted, step_sizes
from btrain.attacks.pgd import by_steps
from btrain.data import Batch
from btrain.data.augmentation import batch_slices
from btrain.methods.augmix import AugMixMethod
from btrain.methods.bullettrain import put_in_order
from btrain.methods.generation import Method, allocate
from btrain.methods.pool import allocate_each, deal
from btrain.processes.world import ALONE
from btrain.training.timing.lane import Lane


def select(lane: Lane, batch: Batch, z: Tensor) -> None:
    """What the step does between the clean logits z (m, K) and the attack, or the views."""
    method = lane.method
    score = method.metric(z, batch.labels)
    if isinstance(method, AugMixMethod):
        _for_views(lane, method, batch, z, score)
    elif lane.config.bt.pool > 1:
        _for_a_pool(lane, method, batch, z, score)
    else:
        _for_an_attack(lane, method, batch, z, score)


def _for_views(lane: Lane, method: AugMixMethod, batch: Batch, z: Tensor, score: Tensor) -> None:
    allocation = predicted(
        "bullettrain", score, lane.memory["robust_fraction"], method.budget, lane.generator
    )
    order, counts = by_steps(allocation.steps)
    allocation.ordered(order)
    _gathered([batch.x, batch.labels, z], order)
    counts()


def _for_an_attack(lane: Lane, method: Method, batch: Batch, z: Tensor, score: Tensor) -> None:
    allocation = allocate(
        score, batch.labels, lane.memory["robust_fraction"], method, lane.generator
    )
    noise = torch.empty_like(batch.x)
    parts = [batch.x, batch.labels, z, score, noise]
    _, allocation, _ = put_in_order(parts, score, allocation, method, ALONE)
    _sizes(allocation.steps, method)


def _for_a_pool(lane: Lane, method: Method, batch: Batch, z: Tensor, score: Tensor) -> None:
    batches = batch_slices(len(z), lane.config.train.batch_size)
    allocation = allocate_each(
        score, batch.labels, lane.memory["robust_fraction"], lane.generator, method, batches
    )
    dealt = deal(allocation, batches, ALONE)
    together = dealt.rows[dealt.order]
    noise = torch.empty_like(batch.x)
    x_adv, *_ = _gathered([batch.x, batch.labels, z, noise], together)
    _sizes(allocation.ordered(together).steps, method)
    _gathered([x_adv], torch.argsort(dealt.order))
    _gathered([batch.x, batch.labels, z, score], dealt.rows)


def _gathered(parts: list[Tensor], rows: Tensor) -> list[Tensor]:
    return [part[rows] for part in parts]


def _sizes(steps: Tensor, method: Method) -> Tensor:
    return step_sizes(steps, n_b=method.n_b, epsilon=method.epsilon, step_size_b=method.step_size_b)
