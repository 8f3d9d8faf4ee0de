"""TRADES in the step structure of its published code, to measure what leaving it gains.

The clean images are forwarded again in every attack step, and twice in the loss: 3 units an attack
step and 9 for the update where 2 and 7 do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from btrain.allocation import uniform
from btrain.attacks.pgd import box
from btrain.attacks.shadow import attacked
from btrain.data import Batch
from btrain.defenses import kl_inner_loss
from btrain.methods.base import Memory
from btrain.methods.bullettrain import descend
from btrain.methods.generation import Method, start_noise
from btrain.methods.statistics import StepStats, step_stats


def official_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    memory: Memory,
    generator: torch.Generator,
    *,
    method: Method,
    beta: float,
) -> StepStats:
    """One update like plain TRADES' up to rounding, without BatchNorm; `memory` stays as it is."""
    del memory
    x, labels, _ = batch
    m = len(x)
    lower, upper = box(x, method.epsilon)
    x_adv = x + start_noise(x, method, generator)
    with attacked(model) as network:
        for _ in range(method.n_b):
            x_adv = x_adv.detach().requires_grad_()
            with torch.enable_grad():
                divergence = F.kl_div(
                    F.log_softmax(network(x_adv), dim=1),
                    F.softmax(network(x), dim=1),
                    reduction="sum",
                )
            (gradient,) = torch.autograd.grad(divergence, [x_adv])
            x_adv = x_adv.detach() + method.step_size_b * gradient.sign()
            x_adv = torch.clamp(x_adv, lower, upper)
    clean_logits, adv_logits, again = model(x), model(x_adv), model(x)
    divergence = kl_inner_loss(adv_logits, again, labels).mean()
    loss = F.cross_entropy(clean_logits, labels) + beta * divergence
    descend(optimizer, loss)
    units = (3 * method.n_b + 9) * m
    z = clean_logits.detach()
    allocation = uniform(labels, method.budget)
    return step_stats(allocation, loss, z, None, z, adv_logits, labels, units=units)
