"""One batch of AugMix: views of all examples, or with BulletTrain of those near the boundary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btrain import precision
from btrain.allocation import (
    BOUNDARY,
    Allocation,
    predicted,
    uniform,
    update_robust_fraction,
)
from btrain.attacks import by_steps
from btrain.defenses import augmix_loss
from btrain.training.statistics import StepStats, step_stats
from btrain.training.step import descend


@dataclass(frozen=True)
class AugMixMethod:
    """What a run of AugMix chooses once.

    Attributes:
        make_views: one AugMix view of each image, (n, C, H, W) -> (n, C, H, W).
        allocator: bullettrain, uniform or random.
        fractions: F_B, F_R, F_O of `random`; None for those of BulletTrain's rule.
        budget: N_O, N_R, N_B = 0, 0, 1, (3,) int64 on the device.
        jsd: False for the paper's "– JSD loss": cross-entropy on one view of each image.
    """

    make_views: Callable[[Tensor, torch.Generator], Tensor]
    allocator: str
    metric: Callable[[Tensor, Tensor], Tensor]
    budget: Tensor
    fractions: tuple[float, float, float] | None
    jsd: bool
    jsd_weight: float
    gamma: float
    momentum: float


def augmix_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
    robust_fraction: Tensor,
    generator: torch.Generator,
    *,
    method: AugMixMethod,
) -> tuple[Tensor, StepStats]:
    """Updates the weights; returns the new F_R, of the accuracy on the views, and the statistics.

    Plain AugMix sends an image and its two views through one forward pass of 3m, so that they share
    BatchNorm's statistics. With BulletTrain one train-mode forward of the clean images decides who
    gets views and enters the loss; the views follow in a pass of their own.
    """
    if not method.jsd:
        return _one_view_step(model, optimizer, x, labels, robust_fraction, generator, method)
    if method.allocator == "uniform":
        allocation = uniform(labels, method.budget)
        views = method.make_views(x.repeat(2, 1, 1, 1), generator)
        clean, view1, view2 = model(torch.cat([x, views])).chunk(3)
        passes = 3 * len(x)
    else:
        clean = model(x)  # Algorithm 2, line 11
        score = method.metric(clean.detach(), labels)
        allocation = predicted(
            method.allocator, score, robust_fraction, method.budget, generator, method.fractions
        )
        order, active = by_steps(allocation.steps)
        n = sum(active)
        x, labels, clean = x[order], labels[order], clean[order]
        allocation = allocation.ordered(order)
        passes = len(x) + 2 * n
        view1 = view2 = clean
        if n:
            views = method.make_views(x[:n].repeat(2, 1, 1, 1), generator)
            view1, view2 = (torch.cat([logits, clean[n:]]) for logits in model(views).chunk(2))
    loss = augmix_loss(clean, view1, view2, labels, jsd_weight=method.jsd_weight)
    made = allocation._replace(steps=2 * allocation.steps)  # the views of each example
    return _update(optimizer, loss, made, clean, view1, labels, robust_fraction, passes, method)


def _one_view_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
    robust_fraction: Tensor,
    generator: torch.Generator,
    method: AugMixMethod,
) -> tuple[Tensor, StepStats]:
    logits = model(method.make_views(x, generator))
    loss = F.cross_entropy(precision.full(logits), labels)
    # No pass beyond ordinary training: no step in the sense of eq. 7.
    nothing = Allocation(torch.full_like(labels, BOUNDARY), torch.zeros_like(labels))
    unread = x.new_empty(len(x), 0)
    return _update(
        optimizer, loss, nothing, unread, logits, labels, robust_fraction, len(x), method
    )


def _update(
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    allocation: Allocation,
    clean_logits: Tensor,
    view_logits: Tensor,
    labels: Tensor,
    robust_fraction: Tensor,
    passes: int,
    method: AugMixMethod,
) -> tuple[Tensor, StepStats]:
    """The update, after `passes` training passes of one image each."""
    descend(optimizer, loss)
    score = method.metric(clean_logits.detach(), labels) if clean_logits.shape[1] else None
    robust_fraction = update_robust_fraction(
        robust_fraction, view_logits, labels, momentum=method.momentum, gamma=method.gamma
    )
    return robust_fraction, step_stats(
        allocation, loss, clean_logits, score, clean_logits, view_logits, labels, units=3 * passes
    )
