"""One batch of Algorithm 2: the same code for the plain defense and for BulletTrain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from btrain.allocation import (
    BOUNDARY,
    OUTLIER,
    ROBUST,
    Allocator,
    Budget,
    update_robust_fraction,
)
from btrain.attacks import active_counts, evaluation_mode, prefix_pgd
from btrain.defenses import Defense


@dataclass(frozen=True)
class Method:
    """What a run chooses once: the defense, the allocation and the attack's constants."""

    defense: Defense
    allocate: Allocator
    budget: Budget
    epsilon: float
    start: str
    start_std: float
    gamma: float
    momentum: float
    share_clean_forward: bool
    forward_unperturbed: bool


class StepStats(NamedTuple):
    """Sums over the examples of a batch, 0-d tensors on the device."""

    examples: Tensor
    loss: Tensor
    boundary: Tensor
    robust: Tensor
    outlier: Tensor
    steps: Tensor
    clean_correct: Tensor
    robust_correct: Tensor


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
    robust_fraction: Tensor,
    *,
    method: Method,
    generator: torch.Generator,
) -> tuple[Tensor, StepStats]:
    """Lines 11 to 16 of Algorithm 2: updates the weights, returns the new F_R and the statistics.

    From line 13 on the batch is in the order of descending step count; the sort copies the m step
    counts to the host, the only copy of a step.
    """
    noise = start_noise(x, method, generator)
    if method.share_clean_forward:
        clean_logits = model(x)  # line 11, to the letter
        z = clean_logits.detach()
    else:
        with evaluation_mode(model), torch.no_grad():
            z = model(x)  # line 11, in the mode of the attack

    classes = method.allocate(z, labels, robust_fraction)  # line 12
    steps = method.budget.steps[classes]
    order = torch.argsort(steps, descending=True, stable=True)
    active = active_counts(steps[order].tolist())
    x, labels, z = x[order], labels[order], z[order]

    with evaluation_mode(model):  # line 13
        x_adv = prefix_pgd(
            model,
            x,
            labels,
            z,
            active=active,
            step_size=method.budget.step_size[classes[order]],
            inner_loss=method.defense.inner_loss,
            epsilon=method.epsilon,
            noise=None if noise is None else noise[order],
        )

    clean_logits = clean_logits[order] if method.share_clean_forward else model(x)
    perturbed = len(x) if method.forward_unperturbed else sum(active[:1])
    adv_logits = forward_prefix(model, x_adv, perturbed, clean_logits)  # line 14
    robust_fraction = update_robust_fraction(  # line 15
        robust_fraction, adv_logits, labels, momentum=method.momentum, gamma=method.gamma
    )
    loss = method.defense.outer_loss(clean_logits, adv_logits, labels)  # line 16
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return robust_fraction, step_stats(classes, steps, loss, clean_logits, adv_logits, labels)


def start_noise(x: Tensor, method: Method, generator: torch.Generator) -> Tensor | None:
    """What the attack adds to x before its first step, like x; None for a start at x itself."""
    if method.start == "clean":
        return None
    noise = torch.empty_like(x)
    if method.start == "uniform":
        return noise.uniform_(-method.epsilon, method.epsilon, generator=generator)
    return noise.normal_(0, method.start_std, generator=generator)


def forward_prefix(model: nn.Module, x_adv: Tensor, perturbed: int, clean_logits: Tensor) -> Tensor:
    """Logits (m, K) of the first `perturbed` examples; the others keep their clean logits.

    A single example takes an unperturbed one along, for BatchNorm cannot normalise it alone.
    """
    if perturbed == 0:
        return clean_logits
    rows = min(max(perturbed, 2), len(x_adv))
    return torch.cat([model(x_adv[:rows]), clean_logits[rows:]])


@torch.no_grad()
def step_stats(
    classes: Tensor,
    steps: Tensor,
    loss: Tensor,
    clean_logits: Tensor,
    adv_logits: Tensor,
    labels: Tensor,
) -> StepStats:
    """The sums that an epoch's averages are made of."""
    examples = torch.ones_like(labels).sum()
    return StepStats(
        examples=examples,
        loss=loss * examples,
        boundary=(classes == BOUNDARY).sum(),
        robust=(classes == ROBUST).sum(),
        outlier=(classes == OUTLIER).sum(),
        steps=steps.sum(),
        clean_correct=(clean_logits.argmax(dim=1) == labels).sum(),
        robust_correct=(adv_logits.argmax(dim=1) == labels).sum(),
    )
