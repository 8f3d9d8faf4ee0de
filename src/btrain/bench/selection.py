"""The part of a step that only chooses: metric, classes, sort and indexing."""

from __future__ import annotations

import torch
from torch import Tensor

from btrain.allocation import predicted, step_sizes
from btrain.attacks import by_steps
from btrain.bench.lane import Lane
from btrain.data import Batch
from btrain.training.augmix_step import AugMixMethod


def select(lane: Lane, batch: Batch, z: Tensor) -> None:
    """What the step does between the clean logits z (m, K) and the attack, or the views."""
    method, generator = lane.method, lane.generator
    score = method.metric(z, batch.labels)
    allocation = predicted(
        "bullettrain", score, lane.memory["robust_fraction"], method.budget, generator
    )
    order, counts = by_steps(allocation.steps)
    allocation = allocation.ordered(order)
    rows = [batch.x, batch.labels, z]
    if not isinstance(method, AugMixMethod):
        rows.append(torch.empty_like(batch.x))  # the noise
        step_sizes(
            allocation.steps,
            n_b=method.n_b,
            epsilon=method.epsilon,
            step_size_b=method.step_size_b,
        )
    for tensor in rows:
        tensor[order]
    counts()
