"""Several batches of Algorithm 2 attacked at once, then learnt from one after the other.

On a device that a small batch's attack does not fill, one large attack takes less time than several
small ones. Its weights are those ahead of the pool's first update.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn

from btrain.allocation import Allocation
from btrain.attacks import active_counts
from btrain.data.augmentation import batch_slices
from btrain.training.generation import (
    Method,
    allocate,
    clean_forward,
    perturb,
    score_of,
    start_noise,
)
from btrain.training.statistics import StepStats
from btrain.training.step import Generated, learn


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
    allocations = [
        allocate(score[own], labels[own], robust_fraction, method, generator) for own in batches
    ]
    allocation = Allocation(
        torch.cat([each.classes for each in allocations]),
        torch.cat([each.steps for each in allocations]),
    )
    # This process' share of every batch, as that batch alone would deal it out.
    steps: list[int] = allocation.steps.tolist()
    dealt = [
        sorted(range(whole)[own], key=lambda i: -steps[i])[world.share(own.stop - own.start)]
        for own in batches
    ]
    ends = list(accumulate(map(len, dealt)))
    mine = torch.tensor([i for each in dealt for i in each], device=x.device)
    # All of it in descending order of steps, for the attack.
    order = torch.argsort(allocation.steps[mine], descending=True, stable=True)
    together = mine[order]
    active = active_counts(sorted((steps[i] for each in dealt for i in each), reverse=True))
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
