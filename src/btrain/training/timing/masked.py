"""The negative control: each example stops after its own steps, but the work is not left out.

Every example goes through every pass, as a batch with masks does. That must cost what the plain
defense costs: if it measures faster, the measurement is wrong.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from btrain.allocation import BOUNDARY, by_class, step_sizes, update_robust_fraction
from btrain.attacks.pgd import box, per_image
from btrain.attacks.shadow import attacked
from btrain.data import Batch
from btrain.defenses import augmix_loss
from btrain.methods.augmix import AugMixMethod
from btrain.methods.base import Memory, Step
from btrain.methods.bullettrain import descend
from btrain.methods.generation import Method, clean_forward, start_noise
from btrain.methods.statistics import StepStats, step_stats


def masked_step(method: Method | AugMixMethod) -> Step:
    """One update by masks; the classes, decided before, are `memory["classes"]`, (m,) int64."""
    if isinstance(method, AugMixMethod):
        return partial(_masked_views, method=method)
    return partial(_masked_attack, method=method)


def _masked_attack(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    memory: Memory,
    generator: torch.Generator,
    *,
    method: Method,
) -> StepStats:
    x, labels, _ = batch
    m = len(x)
    clean_logits, z = clean_forward(model, x, method)
    units = m if z.shape[1] and clean_logits is None else 0
    allocation = by_class(memory["classes"], method.budget)
    noise = start_noise(x, method, generator)
    x_adv = _masked_pgd(model, x, labels, z, allocation.steps, noise, method)
    if method.defense.outer_reads_clean:
        clean_logits = model(x) if clean_logits is None else clean_logits
        trained = 2 * m
    else:
        clean_logits, trained = z, m
    adv_logits = model(x_adv)
    memory["robust_fraction"] = update_robust_fraction(
        memory["robust_fraction"], adv_logits, labels, momentum=method.momentum, gamma=method.gamma
    )
    loss = method.defense.outer_loss(clean_logits, adv_logits, labels)
    descend(optimizer, loss)
    units += 2 * method.n_b * m + 3 * trained
    return step_stats(
        allocation, loss, z, None, clean_logits.detach(), adv_logits, labels, units=units
    )


def _masked_pgd(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    z: Tensor,
    steps: Tensor,
    noise: Tensor,
    method: Method,
) -> Tensor:
    """PGD in which an example's last steps have length 0. Like x"""
    sizes = step_sizes(
        steps, n_b=method.n_b, epsilon=method.epsilon, step_size_b=method.step_size_b
    )
    lower, upper = box(x, method.epsilon)
    x_adv = x + noise * per_image(steps > 0, x)
    with attacked(model) as network:
        for step in range(method.n_b):
            images = x_adv.detach().requires_grad_()
            with torch.enable_grad():
                loss = method.defense.inner_loss(network(images), z, labels).sum()
            (gradient,) = torch.autograd.grad(loss, [images])
            length = per_image(sizes * (steps > step), x)
            x_adv = torch.clamp(images.detach() + length * gradient.sign(), lower, upper)
    return x_adv


def _masked_views(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    memory: Memory,
    generator: torch.Generator,
    *,
    method: AugMixMethod,
) -> StepStats:
    x, labels, _ = batch
    allocation = by_class(memory["classes"], method.budget)
    views = method.make_views(x.repeat(2, 1, 1, 1), generator, None)
    clean, view1, view2 = model(torch.cat([x, views])).chunk(3)
    seen = (allocation.classes == BOUNDARY)[:, None]
    view1, view2 = torch.where(seen, view1, clean), torch.where(seen, view2, clean)
    loss = augmix_loss(clean, view1, view2, labels, jsd_weight=method.jsd_weight)
    descend(optimizer, loss)
    memory["robust_fraction"] = update_robust_fraction(
        memory["robust_fraction"], view1, labels, momentum=method.momentum, gamma=method.gamma
    )
    z = clean.detach()
    return step_stats(allocation, loss, z, None, z, view1, labels, units=9 * len(x))
