"""One batch of AugMix: views of all examples, or with BulletTrain of those near the boundary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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
from btrain.attacks.pgd import by_steps
from btrain.defenses import augmix_loss
from btrain.methods.bullettrain import descend
from btrain.methods.statistics import StepStats, step_stats
from btrain.processes.world import ALONE, World


@dataclass(frozen=True)
class AugMixMethod:
    """What a run of AugMix chooses once.

    Attributes:
        make_views: one AugMix view of each image, (m, C, H, W) -> (m, C, H, W), or of some rows.
        allocator: bullettrain, uniform or random.
        fractions: F_B, F_R, F_O of `random`; None for those of BulletTrain's rule.
        budget: N_O, N_R, N_B = 0, 0, 1, (3,) int64 on the device.
        jsd: False for the paper's "– JSD loss": cross-entropy on one view of each image.
        world: the processes that a batch is dealt out to.
    """

    make_views: Callable[[Tensor, torch.Generator, Tensor | None], Tensor]
    allocator: str
    metric: Callable[[Tensor, Tensor], Tensor]
    budget: Tensor
    fractions: tuple[float, float, float] | None
    jsd: bool
    jsd_weight: float
    gamma: float
    momentum: float
    world: World = ALONE


class _Passed(NamedTuple):
    """This process' part of a batch behind the network.

    Attributes:
        loss: of the whole batch where `share` is 1, else of this part.
        allocation: the steps are the views of each example.
        score: by the clean logits, (m,), or None.
        passes: training passes of one image each that this process has made.
        share: of the whole batch, by which this loss counts among those of all processes.
    """

    loss: Tensor
    allocation: Allocation
    clean_logits: Tensor
    view_logits: Tensor
    labels: Tensor
    score: Tensor | None
    passes: int
    share: float


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
    gets views and enters the loss; the views follow in a pass of their own. Of several processes
    each gets the whole batch and makes views of its share alone.
    """
    if not method.jsd:
        passed = _one_view(model, x, labels, generator, method)
    elif method.allocator == "uniform":
        passed = _two_views_of_all(model, x, labels, generator, method)
    else:
        passed = _two_views_of_some(model, x, labels, robust_fraction, generator, method)
    return _update(optimizer, passed, robust_fraction, method)


def _one_view(
    model: nn.Module, x: Tensor, labels: Tensor, generator: torch.Generator, method: AugMixMethod
) -> _Passed:
    m, own = len(x), method.world.share(len(x))
    logits = model(method.make_views(x, generator, method.world.rows(m, x.device)))
    labels = labels[own]
    loss = F.cross_entropy(precision.full(logits), labels)
    # No pass beyond ordinary training: no step in the sense of eq. 7.
    nothing = Allocation(torch.full_like(labels, BOUNDARY), torch.zeros_like(labels))
    unread = x.new_empty(len(labels), 0)
    return _Passed(loss, nothing, unread, logits, labels, None, len(labels), len(labels) / m)


def _two_views_of_all(
    model: nn.Module, x: Tensor, labels: Tensor, generator: torch.Generator, method: AugMixMethod
) -> _Passed:
    m, own = len(x), method.world.share(len(x))
    views = _pairs_of_views(x, generator, method)
    x, labels = x[own], labels[own]
    clean, view1, view2 = model(torch.cat([x, views])).chunk(3)
    loss = augmix_loss(clean, view1, view2, labels, jsd_weight=method.jsd_weight)
    allocation = uniform(labels, method.budget)
    score = method.metric(clean.detach(), labels)
    return _Passed(loss, allocation, clean, view1, labels, score, 3 * len(x), len(x) / m)


def _two_views_of_some(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    robust_fraction: Tensor,
    generator: torch.Generator,
    method: AugMixMethod,
) -> _Passed:
    """BulletTrain, or the control `random`.

    The clean logits decide where an example's views are made, so that of several processes one may
    hold the clean logits of an example and another those of its views. All logits are gathered and
    every process has the loss of the whole batch, and its gradient for the logits that are its own.
    """
    world, m = method.world, len(x)
    own = world.share(m)
    clean = world.attached(model(x[own]), m)  # Algorithm 2, line 11
    score = method.metric(clean.detach(), labels)
    allocation = predicted(
        method.allocator,
        score,
        robust_fraction,
        method.budget,
        generator,
        method.fractions,
    )
    order, counts = by_steps(allocation.steps)
    x, labels, clean = x[order], labels[order], clean[order]
    n = sum(counts())
    view1 = view2 = clean
    made = 0
    if n:
        views = _pairs_of_views(x[:n], generator, method)
        made = len(views) // 2
        logits = model(views) if made else clean.new_empty(0, clean.shape[1])
        view1, view2 = (
            torch.cat([world.attached(part, n), clean[n:]])
            for part in (logits[:made], logits[made:])
        )
    loss = augmix_loss(clean, view1, view2, labels, jsd_weight=method.jsd_weight)
    rows = order[own]
    passes = len(rows) + 2 * made
    allocation, score = allocation.ordered(rows), score[rows]
    return _Passed(loss, allocation, clean[own], view1[own], labels[own], score, passes, share=1.0)


def _pairs_of_views(x: Tensor, generator: torch.Generator, method: AugMixMethod) -> Tensor:
    """Two views of each image of this process' share, all first ones first.

    (m, C, H, W) -> (2n, C, H, W)
    """
    rows = method.world.rows(len(x), x.device)
    both = None if rows is None else torch.cat([rows, len(x) + rows])
    return method.make_views(x.repeat(2, 1, 1, 1), generator, both)


def _update(
    optimizer: torch.optim.Optimizer,
    passed: _Passed,
    robust_fraction: Tensor,
    method: AugMixMethod,
) -> tuple[Tensor, StepStats]:
    loss, allocation, clean_logits, view_logits, labels, score, passes, share = passed
    descend(optimizer, method.world.weighted(loss, share))
    robust_fraction = update_robust_fraction(
        robust_fraction,
        view_logits,
        labels,
        momentum=method.momentum,
        gamma=method.gamma,
        mean=method.world.mean,
    )
    made = allocation._replace(steps=2 * allocation.steps)
    return robust_fraction, step_stats(
        made, loss, clean_logits, score, clean_logits, view_logits, labels, units=3 * passes
    )
