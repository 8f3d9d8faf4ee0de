"""Several batches of Algorithm 2 attacked at once, then learnt from one after the other.

On a device that a small batch's attack does not fill, one large attack takes less time than several
small ones. Its weights are those ahead of the pool's first update.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from btrain.allocation import Allocation
from btrain.attacks import active_counts
from btrain.data.augmentation import batch_slices
from btrain.training.statistics import StepStats
from btrain.training.step import (
    Generated,
    Method,
    allocate,
    clean_forward,
    learn,
    perturb,
    start_noise,
)


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
    batches = batch_slices(len(x), batch_size)
    _, z = clean_forward(model, x, method)
    noise = start_noise(x, method, generator)
    allocations = [
        allocate(
            model, x[own], labels[own], z[own], robust_fraction, noise[own], method, generator
        )
        for own in batches
    ]  # fmt: skip
    allocation = Allocation(
        torch.cat([each.classes for each in allocations]),
        torch.cat([each.steps for each in allocations]),
    )
    steps: list[int] = allocation.steps.tolist()
    order = torch.argsort(allocation.steps, descending=True, stable=True)
    ordered = (x[order], labels[order], z[order], allocation.ordered(order))
    x_adv, allocation, forwarded = perturb(
        model, *ordered, active_counts(sorted(steps, reverse=True)), noise[order], method
    )
    # Back to the batches, in each of which the order of descending steps remains.
    number = torch.arange(len(x), device=x.device) // batch_size
    number = number.clamp_(max=len(batches) - 1)  # of a single last example
    back = torch.argsort(number[order], stable=True)
    order, x_adv, allocation = order[back], x_adv[back], allocation.ordered(back)
    spent = 2 * forwarded / len(x) + (1 if z.shape[1] else 0)
    return [
        Generated(
            x=x[order[own]],
            labels=labels[order[own]],
            x_adv=x_adv[own],
            clean_logits=None,
            z=z[order[own]],
            allocation=Allocation(allocation.classes[own], allocation.steps[own]),
            perturbed=sum(step > 0 for step in steps[own]),
            units=spent * len(steps[own]),
        )
        for own in batches
    ]
