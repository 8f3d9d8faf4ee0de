"""Single training steps and epochs for tests, by a configuration or by a method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from btrain.attacks.fast_paths import make_fast_paths
from btrain.data import Batch, Data, Split
from btrain.methods.base import Memory, Method
from btrain.methods.make import make_method
from btrain.methods.statistics import StepStats
from btrain.processes.world import ALONE, World
from btrain.settings import Config, OnNonfinite
from btrain.training.epochs import Averages, train_epoch
from btrain.training.schedule import make_plan
from btrain.training.state import TrainState
from btrain.training.update import train_batch

Step = Callable[[nn.Module, torch.optim.Optimizer, Batch, Memory, torch.Generator], StepStats]


def step_of(
    config: Config,
    device: torch.device,
    *,
    plain: bool = False,
    share: float = 1.0,
    world: World = ALONE,
) -> Step:
    """Return what a run of this configuration does with a batch."""
    paths = make_fast_paths(config.train, device)
    method = make_method(config, device, plain=plain, share=share, paths=paths, world=world)
    several = None if world.size == 1 else world

    def step(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: Batch,
        memory: Memory,
        generator: torch.Generator,
    ) -> StepStats:
        network = paths.view(world.wrapped(model))
        return train_batch(network, optimizer, method, batch, memory, generator, several)

    return step


def epoch_of(
    config: Config,
    state: TrainState,
    split: Split,
    *,
    tick: Callable[[], None] = lambda: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Averages | None:
    """Train to the end of the epoch, or until stopped, as a run of this configuration does."""
    paths = make_fast_paths(config.train, state.device)
    method = make_method(config, state.device, paths=paths)
    return train_epoch(
        state, split, method, make_plan(config), see=paths.view,
        tick=tick, show=lambda means: None, stopped=stopped,
    )  # fmt: skip


def memory_of(config: Config, data: Data, device: torch.device) -> Memory:
    """Return what a run of this configuration remembers before its first batch."""
    memory = make_method(config, device).memory(data, device)
    if config.train.on_nonfinite is OnNonfinite.skip:
        memory["skipped"] = torch.zeros((), dtype=torch.int64, device=device)
    return memory


def take(
    method: Method,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
    robust_fraction: Tensor,
    generator: torch.Generator,
    **memory: Any,
) -> tuple[Tensor, StepStats]:
    """Take one step of a method; return the new F_R and the statistics."""
    remembered: Memory = {"robust_fraction": robust_fraction, **memory}
    batch = Batch(x, labels, torch.arange(len(x), device=x.device))
    stats = train_batch(model, optimizer, method, batch, remembered, generator)
    return remembered["robust_fraction"], stats
