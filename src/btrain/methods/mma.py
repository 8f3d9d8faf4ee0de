"""MMA training (Ding et al., "MMA Training: Direct Input Space Margin Maximization …")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btrain import precision
from btrain.allocation import BOUNDARY, OUTLIER, ROBUST, Allocation
from btrain.attacks.pgd import by_steps, evaluation_mode, per_image, prefix_pgd
from btrain.methods.bullettrain import descend
from btrain.methods.statistics import StepStats, step_stats

_STEP = 2.5  # a step is 2.5·ε/N
_BEYOND = 1.05  # the search goes to 1.05·d_max


@dataclass(frozen=True)
class MMAMethod:
    """The constants of MMA.

    Attributes:
        max_margin: d_max; an example whose margin is larger is left out of the loss.
        first_margin: the least radius of an attack, and where an example begins.
        steps: N of the attack.
        bisections: of the search for the margin.
        clean_weight: of the cross-entropy on clean images beside the margin loss, in [0, 1].
    """

    max_margin: float
    first_margin: float
    steps: int
    bisections: int
    clean_weight: float


def mma_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
    margin: Tensor,
    generator: torch.Generator,
    *,
    method: MMAMethod,
) -> tuple[Tensor, StepStats]:
    """One update with each example at its own margin.

    A correct example is trained on its shortest adversarial perturbation found, a wrong one as it
    is; as published, correct means p_y > 1/2. Attack and search are in eval mode, and their result
    stays in the box; the published code searches in train mode and does not clip. One copy from
    the device to the host.

    Args:
        margin: each example's when it was last seen, (m,).

    Returns:
        The margins found, (m,), 0 for wrong examples, and the statistics: outliers are wrong,
        robust examples lie beyond d_max, and no outcome is known.
    """
    clean_logits = model(x)
    correct = soft_logit_margin(clean_logits.detach(), labels) < 0
    order, counts = by_steps(method.steps * correct)
    x, labels, clean_logits = x[order], labels[order], clean_logits[order]
    n = sum(counts()[:1])
    radius = margin[order].clamp(min=method.first_margin)[:n]
    found = torch.zeros_like(margin)
    x_adv = x.clone()
    if n:
        with evaluation_mode(model):
            x_adv[:n], found[:n] = shortest_attack(
                model, x[:n], labels[:n], radius, generator, method=method
            )
    trained = torch.arange(len(x), device=x.device) >= n
    trained |= found < method.max_margin
    logits = model(x_adv)
    each = F.cross_entropy(precision.full(logits), labels, reduction="none")
    clean = F.cross_entropy(precision.full(clean_logits), labels)
    loss = method.clean_weight * clean + (1 - method.clean_weight) * (each * trained).mean()
    descend(optimizer, loss)
    classes = torch.where(trained, BOUNDARY, ROBUST)
    classes[n:] = OUTLIER
    steps = method.steps * (classes != OUTLIER)
    z, unread = clean_logits.detach(), x.new_empty(len(x), 0)  # x' lies on the boundary itself
    units = 6.0 * len(x) + (2 * method.steps + 1 + method.bisections) * n
    stats = step_stats(
        Allocation(classes, steps), loss.detach(), z, None, z, unread, labels, units=units
    )
    return torch.zeros_like(found).index_copy_(0, order, found), stats


def shortest_attack(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    radius: Tensor,
    generator: torch.Generator,
    *,
    method: MMAMethod,
) -> tuple[Tensor, Tensor]:
    """Adaptive-norm PGD (Algorithm 1 of Ding et al.): a direction, and how far the boundary is.

    PGD within each example's radius gives the direction; bisection between 0 and the radius, or
    where that does not fool between the radius and 1.05·d_max, gives the length.
    (n, C, H, W), (n,), (n,) -> adversarial examples like x in the box, and margins (n,)
    """
    noise = torch.rand(x.shape, generator=generator, device=x.device)
    noise = (2 * noise - 1) * per_image(radius, x)
    x_adv = prefix_pgd(
        model,
        x,
        labels,
        x.new_empty(len(x), 0),
        active=[len(x)] * method.steps,
        step_size=_STEP * radius / method.steps,
        inner_loss=lambda logits, clean, labels: soft_logit_margin(logits, labels),
        epsilon=radius,
        noise=(x + noise).clamp(0, 1) - x,
    )
    direction = (x_adv - x) / per_image(radius, x)

    def at(length: Tensor) -> Tensor:
        return (x + per_image(length, x) * direction).clamp(0, 1)

    def fools(length: Tensor) -> Tensor:
        with torch.no_grad():
            return soft_logit_margin(model(at(length)), labels) >= 0

    furthest = torch.full_like(radius, _BEYOND * method.max_margin)
    fooled = fools(radius)
    near = torch.where(fooled, torch.zeros_like(radius), radius)
    far = torch.where(fooled, radius, furthest)
    for _ in range(method.bisections):
        middle = (near + far) / 2
        fooled = fools(middle)
        near, far = torch.where(fooled, near, middle), torch.where(fooled, middle, far)
    margin = (near + far) / 2
    return at(margin), margin


def soft_logit_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """log Σ_{j≠y} exp(f_j) − f_y, negative where p_y > 1/2. (m, K), (m,) -> (m,)"""
    logits, index = precision.full(logits), labels[:, None]
    others = logits.scatter(1, index, -torch.inf).logsumexp(dim=1)
    return others - logits.gather(1, index).squeeze(1)
