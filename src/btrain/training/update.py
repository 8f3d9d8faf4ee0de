"""The one place where weights move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from btrain.controllers.base import Controller
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
) -> StepStats:
    """Learn from one batch: one update, or several; the gradients of the last one stay.

    Args:
        network: as a step sees it (see `fast_paths`).
        memory: of the method, which changes it.
        generator: of all random choices, on the device.
        world: the processes that share the batch, if there are several.
        controllers: what acts on the weights behind each update.

    Returns:
        The sums over the batch, of all processes.
    """
    shown = []
    for examples in method.examples(network, batch, memory, generator):
        loss, stats, share = method.loss(network, examples, memory, generator)
        descend(optimizer, loss if world is None else world.weighted(loss, share))
        for controller in controllers:
            controller.after_update(optimizer)
        if stats is not None:
            shown.append(stats)
    stats = shown[0] if len(shown) == 1 else summed(shown)
    if world is None:
        return stats
    world.average_statistics(network)
    return StepStats._make(world.sum(stacked(stats)))


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Update the weights once."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
