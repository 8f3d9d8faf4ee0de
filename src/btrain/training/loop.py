"""The epochs of a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from btrain.attacks import evaluation_mode
from btrain.data import Split, batches
from btrain.data.augmentation import Batch, batch_slices, to_unit
from btrain.errors import UserError
from btrain.training.schedule import Schedule
from btrain.training.state import TrainState
from btrain.training.statistics import StepStats, averages

Averages = dict[str, float | None]

Memory = dict[str, Tensor]
"""What a method remembers between batches, F_R and more, by name; a step changes it in place."""

Step = Callable[
    [nn.Module, torch.optim.Optimizer, Batch, Memory, torch.Generator],
    StepStats,
]
"""One batch: (model, optimizer, batch, memory, generator) -> statistics."""

_HEARTBEAT_SECONDS = 1.0
_CHECKED = 64  # training images


@dataclass(frozen=True)
class Plan:
    """How long and in what portions a run trains.

    Attributes:
        schedule: factor on lr for the share of the run that is done.
        max_seconds: of training, over all its sessions; None for no limit.
    """

    seed: int
    epochs: int
    batch_size: int
    lr: float
    schedule: Schedule
    crop_padding: int
    flip: bool
    max_seconds: float | None


@dataclass
class Heartbeat:
    """Looks at the running sums once a second, for the progress bar and for a NaN or infinite loss.

    Every look is a copy from the device; in between, the first bad batch is remembered there.
    """

    show: Callable[[Averages], None]
    first_bad: Tensor
    last: float = field(default_factory=time.perf_counter)

    def step(self, state: TrainState, loss: Tensor) -> None:
        """Called after each batch."""
        bad = (self.first_bad == 0) & ~torch.isfinite(loss)
        self.first_bad = torch.where(bad, state.batch, self.first_bad)
        if time.perf_counter() - self.last >= _HEARTBEAT_SECONDS:
            self.look(state)

    def look(self, state: TrainState) -> Averages:
        """Returns the epoch's averages so far.

        Raises:
            UserError: a loss was NaN or infinite.
        """
        means = averages(state.epoch_sums)
        if step := int(self.first_bad):
            raise UserError(
                f"The loss is no finite number in epoch {state.epoch + 1}, step {step}; "
                "a smaller recipe.lr may help."
            )
        self.show(means)
        self.last = time.perf_counter()
        return means


def epoch_order(examples: int, seed: int, epoch: int) -> Tensor:
    """The permutation of an epoch, a function of seed and epoch alone. -> (examples,)"""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(examples, generator=generator)


def train_epoch(
    state: TrainState,
    split: Split,
    step: Step,
    plan: Plan,
    *,
    tick: Callable[[], None],
    show: Callable[[Averages], None],
) -> Averages | None:
    """Trains from `state.batch` to the end of the epoch, or to the time limit.

    Args:
        step: what is done with a batch.
        tick: called after each batch.
        show: called about once a second with the epoch's averages so far.

    Returns:
        The epoch's averages with the last learning rate, F_R and the seconds spent in the epoch;
        None when the time was up before its first batch.

    Raises:
        UserError: the loss is NaN or infinite.
    """
    device = split.images.device
    steps_per_epoch = len(batch_slices(len(split), plan.batch_size))
    order = epoch_order(len(split), plan.seed, state.epoch).to(device)
    began, before = _clock(device), state.train_seconds
    heartbeat = Heartbeat(show, torch.zeros((), dtype=torch.int64, device=device))
    state.model.train()
    for batch in batches(
        split,
        order,
        plan.batch_size,
        crop_padding=plan.crop_padding,
        flip=plan.flip,
        generator=state.generator,
        first=state.batch,
    ):
        if (
            plan.max_seconds is not None
            and before + time.perf_counter() - began >= plan.max_seconds
        ):
            break
        done = (state.epoch * steps_per_epoch + state.batch) / (plan.epochs * steps_per_epoch)
        lr = plan.lr * plan.schedule(done)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        stats = step(state.model, state.optimizer, batch, state.memory, state.generator)
        state.add(stats)
        heartbeat.step(state, stats.loss)
        tick()
    elapsed = _clock(device) - began
    state.train_seconds += elapsed
    state.epoch_seconds += elapsed
    if state.batch == 0:
        return None
    return heartbeat.look(state) | {
        "lr": state.optimizer.param_groups[0]["lr"],
        "robust_fraction": float(state.memory["robust_fraction"]),
        "train_seconds": state.epoch_seconds,
    }


def check_weights(state: TrainState, split: Split) -> None:
    """Looks at the weights through one forward pass: the last update's loss was taken before it.

    Raises:
        UserError: the logits of some training images are not finite.
    """
    with evaluation_mode(state.model), torch.no_grad():
        logits = state.model(to_unit(split.images[:_CHECKED]))
    if not torch.isfinite(logits).all():
        raise UserError(
            f"The weights are ruined after epoch {state.epoch + 1}, step {state.batch}; "
            "a smaller recipe.lr may help."
        )


def _clock(device: torch.device) -> float:
    """Seconds, with the device's work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
