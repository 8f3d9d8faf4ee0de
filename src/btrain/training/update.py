"""The one place where weights move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from btrain.controllers.base import Controller, Gradients
from btrain.data import Batch
from btrain.methods.base import Memory, Method
from btrain.methods.statistics import StepStats, stacked, summed
from btrain.processes.world import World


def train_batch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: Method,
    batch: Batch,
    memory: Memory,
    generator: torch.Generator,
    world: World | None = None,
    controllers: Sequence[Controller] = (),
    clip_norm: float | None = None,
) -> StepStats:
    """Learn from one batch: one update, or several; the gradients of the last one stay.

    An update may follow several losses, whose gradients are added.

    Args:
        network: as a step sees it (see `fast_paths`).
        memory: of the method, which changes it.
        generator: of all random choices, on the device.
        world: the processes that share the batch, if there are several.
        controllers: what acts on the weights behind each update.
        clip_norm: the largest norm of the gradient that an update follows; None for any.

    Returns:
        The sums over the batch, of all processes.
    """
    shown, begins = [], True
    for examples in method.examples(network, batch, memory, generator):
        loss, stats, share, last = method.loss(network, examples, memory, generator)
        loss = loss if world is None else world.weighted(loss, share)
        descend(optimizer, loss, clip_norm, controllers, begins=begins, ends=last)
        begins = last
        for controller in controllers if last else ():
            controller.after_update(optimizer)
        if stats is not None:
            shown.append(stats)
    stats = shown[0] if len(shown) == 1 else summed(shown)
    if world is None:
        return stats
    world.average_statistics(network)
    return StepStats._make(world.sum(stacked(stats)))


def descend(
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    clip_norm: float | None = None,
    controllers: Sequence[Controller] = (),
    *,
    begins: bool = True,
    ends: bool = True,
) -> None:
    """Update the weights once, along the loss's gradient, clipped by its norm.

    Args:
        clip_norm: the largest norm; None for any.
        controllers: what acts on the weights behind the update: what that undoes does not count.
        begins: whether the loss is the first one of the update; else its gradient is added.
        ends: whether it is the last one; else the weights stay.
    """
    if begins:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    if not ends:
        return
    if clip_norm is not None:
        weights = (weight for group in optimizer.param_groups for weight in group["params"])
        gradients = {weight: weight.grad for weight in weights if weight.grad is not None}
        active: Gradients = gradients
        for controller in controllers:
            active = controller.active(active)
        clip([*gradients.values()], [*active.values()], clip_norm)
    optimizer.step()


@torch.no_grad()
def clip(gradients: list[Tensor], active: list[Tensor], max_norm: float) -> None:
    """Clip gradients by norm, in place, without a copy to the host.

    All are multiplied by max_norm over the Euclidean norm of all entries of `active` together,
    but by 1 at most. They stay as they are if that norm is not finite, so that the log can name the
    gradient that was so first. torch's `clip_grad_norm_` makes all of them NaN there, adds 1e-6
    to the norm, and cannot leave masked entries out of it.

    Args:
        gradients: of any shapes.
        active: the same, with zeros where an update is undone.
    """
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(active)))
    factor = (max_norm / norm).clamp(max=1)
    torch._foreach_mul_(gradients, torch.where(torch.isfinite(norm), factor, 1.0))
