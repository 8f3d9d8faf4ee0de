"""Several batches of Algorithm 2 attacked at once, then learnt from one after the other.

On a device that a small batch's attack does not fill, one large attack takes less time than several
small ones. Its weights are those ahead of the pool's first update.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from btrain.allocation import Allocation
from btrain.attacks.pgd import active_counts
from btrain.data.augmentation import batch_slices
from btrain.methods.bullettrain import Generated, learn
from btrain.methods.generation import (
    Method,
    allocate,
    clean_forward,
    perturb,
    score_of,
    start_noise,
)
from btrain.methods.statistics import StepStats
from btrain.processes.world import World


def pooled_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
    robust_fraction: Tensor,
    generator: torch.Generator,
    *,
    method: Method,
    batch_size: int,
) -> tuple[Tensor, StepStats]:
    """One update for every `batch_size` of the examples; the new F_R and the sums of statistics."""
    all_stats = []
    for batch in generate_pool(
        model, x, labels, robust_fraction, generator, method=method, batch_size=batch_size
    ):
        robust_fraction, stats = learn(model, optimizer, batch, robust_fraction, generator, method)
        all_stats.append(stats)
    sums = (torch.stack(values).sum(0) for values in zip(*all_stats, strict=True))
    return robust_fraction, StepStats._make(sums)


def generate_pool(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    robust_fraction: Tensor,
    generator: torch.Generator,
    *,
    method: Method,
    batch_size: int,
) -> list[Generated]:
    """Lines 11 to 13 for all batches of a pool, with the weights and the F_R of now.

    Each batch has its own percentile (eq. 6) and gets the classes that it would get alone. One copy
    to the host, of the step counts.
    """
    world, whole = method.world, len(x)
    batches = batch_slices(whole, batch_size)
    _, z = clean_forward(model, x[world.share(whole)], method)
    z = world.gathered(z, whole)
    score = score_of(z, labels, method)
    noise = start_noise(x, method, generator)
    allocation = allocate_each(score, labels, robust_fraction, generator, method, batches)
    steps, dealt, mine, order, active = deal(allocation, batches, world)
    ends = list(accumulate(map(len, dealt)))
    together = mine[order]
    x_adv, attacked, forwarded = perturb(
        model,
        x[together],
        labels[together],
        z[together],
        allocation.ordered(together),
        active,
        noise[together],
        method,
    )
    # Back to the batches, in each of which the order of descending steps remains.
    back = torch.argsort(order)
    x_adv, attacked = x_adv[back], attacked.ordered(back)
    spent = 2 * forwarded / len(mine) + (1 if z.shape[1] else 0)
    return [
        Generated(
            x=x[mine[own]],
            labels=labels[mine[own]],
            x_adv=x_adv[own],
            clean_logits=None,
            z=z[mine[own]],
            score=score[mine[own]],
            allocation=Allocation(attacked.classes[own], attacked.steps[own]),
            perturbed=sum(steps[i] > 0 for i in each),
            units=spent * len(each),
            share=len(each) / (batch.stop - batch.start),
        )
        for batch, each, own in zip(batches, dealt, map(slice, [0, *ends], ends), strict=True)
    ]


def allocate_each(
    score: Tensor,
    labels: Tensor,
    robust_fraction: Tensor,
    generator: torch.Generator,
    method: Method,
    batches: Sequence[slice],
) -> Allocation:
    """Classes and steps of a pool, (m,): of each of its batches what that gets alone."""
    each = [
        allocate(score[own], labels[own], robust_fraction, method, generator) for own in batches
    ]
    return Allocation(
        torch.cat([allocation.classes for allocation in each]),
        torch.cat([allocation.steps for allocation in each]),
    )


class Dealt(NamedTuple):
    """Which examples of a pool are this process'.

    Attributes:
        steps: of all examples, on the host.
        batches: of each batch the examples, as that batch alone would deal them out.
        rows: the same, one batch after the other, (n,) int64.
        order: of `rows`, by descending steps, (n,) int64.
        active: how many of them take the first attack step, the second, …
    """

    steps: list[int]
    batches: list[list[int]]
    rows: Tensor
    order: Tensor
    active: list[int]


def deal(allocation: Allocation, batches: Sequence[slice], world: World) -> Dealt:
    """This process' share of every batch, and all of it in the attack's order."""
    steps: list[int] = allocation.steps.tolist()
    dealt = [
        sorted(range(own.start, own.stop), key=lambda i: -steps[i])[
            world.share(own.stop - own.start)
        ]
        for own in batches
    ]
    rows = [i for each in dealt for i in each]
    mine = torch.tensor(rows, device=allocation.steps.device)
    order = torch.argsort(allocation.steps[mine], descending=True, stable=True)
    active = active_counts(sorted((steps[i] for i in rows), reverse=True))
    return Dealt(steps, dealt, mine, order, active)
