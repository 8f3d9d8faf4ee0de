"""One batch of Algorithm 2: the same code for the plain defense and for BulletTrain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from btrain.allocation import Allocation, filled_up, update_robust_fraction
from btrain.attacks.pgd import by_steps
from btrain.methods.generation import (
    Method,
    allocate,
    clean_forward,
    perturb,
    score_of,
    start_noise,
    true_allocation,
)
from btrain.methods.gradalign import misalignment
from btrain.methods.statistics import StepStats, step_stats
from btrain.processes.world import ALONE, World


class Generated(NamedTuple):
    """A batch after line 13 of Algorithm 2, in descending order of steps.

    Attributes:
        clean_logits, z, score: as `clean_forward` and `score_of` return them.
        perturbed: how many examples took a step.
        units: what all this has cost.
        share: of the whole batch, which several processes share.
    """

    x: Tensor
    labels: Tensor
    x_adv: Tensor
    clean_logits: Tensor | None
    z: Tensor
    score: Tensor
    allocation: Allocation
    perturbed: int
    units: float
    share: float = 1.0


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
    robust_fraction: Tensor,
    generator: torch.Generator,
    *,
    method: Method,
) -> tuple[Tensor, StepStats]:
    """Lines 11 to 16 of Algorithm 2: updates the weights, returns the new F_R and the statistics.

    From line 13 on the batch is in the order of descending step count; the m step counts are copied
    to the host while the batch is put in order, the only copy of a step but for `early_exit`. Of
    several processes each gets the whole batch, decides the same for it, and from line 13 on works
    on its share: of every group as many examples as the others, or with a shared clean forward
    those that it has forwarded.
    """
    batch = generate(model, x, labels, robust_fraction, generator, method)
    return learn(model, optimizer, batch, robust_fraction, generator, method)


def generate(
    model: nn.Module, x: Tensor, labels: Tensor, robust_fraction: Tensor,
    generator: torch.Generator, method: Method,
) -> Generated:  # fmt: skip
    """Lines 11 to 13: finds out who is attacked for how long, and attacks."""
    world, whole = method.world, len(x)
    own = world.share(whole)
    clean_logits, z = clean_forward(model, x[own], method)  # line 11
    z = world.gathered(z, whole)
    score = score_of(z, labels, method)
    noise = start_noise(x, method, generator)
    if method.allocator == "oracle":  # line 12
        allocation = true_allocation(model, x, labels, z, noise, method)
    else:
        allocation = allocate(score, labels, robust_fraction, method, generator)
    if clean_logits is not None:  # an example stays where its graph is
        x, labels, z, score, noise = x[own], labels[own], z[own], score[own], noise[own]
        allocation = allocation.ordered(own)
    shared = [] if clean_logits is None else [clean_logits]
    (x, labels, z, score, noise, *shared), allocation, active = put_in_order(
        [x, labels, z, score, noise, *shared], score, allocation, method, ALONE if shared else world
    )
    clean_logits, m = shared[0] if shared else None, len(x)
    x_adv, allocation, forwarded = perturb(model, x, labels, z, allocation, active, noise, method)
    units = 2 * forwarded + (m if z.shape[1] and clean_logits is None else 0)
    units += m * (2 * allocation.overhead + 1) if allocation.overhead else 0
    return Generated(
        x=x,
        labels=labels,
        x_adv=x_adv,
        clean_logits=clean_logits,
        z=z,
        score=score,
        allocation=allocation,
        perturbed=sum(active[:1]),
        units=units,
        share=m / whole,
    )


def put_in_order(
    parts: Sequence[Tensor], score: Tensor, allocation: Allocation, method: Method, world: World
) -> tuple[list[Tensor], Allocation, list[int]]:
    """This process' share of a batch in descending order of steps.

    Args:
        parts: what the batch consists of, (m, …) each.
        score: as of `score_of`, (m,).

    Returns:
        The parts' rows, their allocation, with groups rounded up as the method wants, and how many
        of them take the first attack step, the second, …
    """
    order, counts = by_steps(allocation.steps, _distance(score, method))
    rows = order[world.share(len(order))]
    parts = [part[rows] for part in parts]
    active = counts()
    if method.multiple > 1:
        allocation, active = filled_up(allocation, order, active, method.multiple)
    return parts, allocation.ordered(rows), world.dealt(active)


def _distance(score: Tensor, method: Method) -> Tensor | None:
    """How far from the boundary examples are, (m,): who is next where a group is rounded up.

    None where no group is, or where chance decides, as it does by the batch's order.
    """
    return None if method.multiple == 1 or method.allocator == "random" else score.abs()


def learn(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Generated, robust_fraction: Tensor,
    generator: torch.Generator, method: Method,
) -> tuple[Tensor, StepStats]:  # fmt: skip
    """Lines 14 to 16: the training passes, the new F_R, the update of the weights."""
    x, labels, x_adv, clean_logits, z, score, allocation, perturbed, units, share = batch
    m = len(x)
    if method.defense.outer_reads_clean:  # line 14
        clean_logits = model(x) if clean_logits is None else clean_logits
        rows = rows_to_forward(m if method.forward_unperturbed else perturbed, m)
        adv_logits = forward_prefix(model, x_adv, rows, clean_logits)
        trained = m + rows
    else:
        clean_logits, adv_logits, trained = z, model(x_adv), m
    robust_fraction = update_robust_fraction(  # line 15
        robust_fraction,
        adv_logits,
        labels,
        momentum=method.momentum,
        gamma=method.gamma,
        mean=method.world.mean,
    )
    loss = method.defense.outer_loss(clean_logits, adv_logits, labels)  # line 16
    units += 3 * trained
    if method.grad_align_weight:
        around = torch.empty_like(x).uniform_(-method.epsilon, method.epsilon, generator=generator)
        loss = loss + method.grad_align_weight * misalignment(model, x, labels, around)
        units += 8 * m  # two gradients of the images, one of them differentiated again
    descend(optimizer, method.world.weighted(loss, share))
    return robust_fraction, step_stats(
        allocation, loss, z, score, clean_logits, adv_logits, labels, units=units
    )


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One update of the weights."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def rows_to_forward(perturbed: int, m: int) -> int:
    """How many examples share the adversarial forward pass when so many are perturbed.

    A single one takes an unperturbed one along, for BatchNorm cannot normalise it alone.
    """
    return min(max(perturbed, 2), m) if perturbed else 0


def forward_prefix(model: nn.Module, x_adv: Tensor, rows: int, clean_logits: Tensor) -> Tensor:
    """Logits (m, K) of the first `rows` examples; the others keep their clean logits."""
    return torch.cat([model(x_adv[:rows]), clean_logits[rows:]]) if rows else clean_logits
