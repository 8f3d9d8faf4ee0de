"""The plan of a run: how long and in what portions it trains, and its learning rate on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from btrain.data.augmentation import batch_slices
from btrain.methods.make import make_guard
from btrain.settings import Config, OnNonfinite, ScheduleName
from btrain.settings.method import FreeConfig

Schedule = Callable[[float], float]
"""The share of the run that is done, in [0, 1], -> the factor on the initial learning rate."""

_COSINE_END = 1e-5
_ROUNDING = 1e-9  # epochs


def step_decay(milestones: Sequence[float], factors: Sequence[float]) -> Schedule:
    """Return a schedule: 1, and from each milestone on, a share of the run, its factor."""
    levels = [1.0, *factors]
    return lambda progress: levels[sum(progress >= milestone for milestone in milestones)]


def cyclic(peak: float) -> Schedule:
    """Return a schedule that rises linearly from 0 to 1 at the share `peak`, and falls to 0."""
    return lambda progress: progress / peak if progress < peak else (1 - progress) / (1 - peak)


def cosine() -> Schedule:
    """Return a schedule that falls along half a cosine to almost 0."""
    return lambda progress: _COSINE_END + (1 - _COSINE_END) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Plan:
    """The length of a run and the portions in which it trains.

    Attributes:
        schedule: factor on lr for the share of the run that is done.
        max_seconds: of training, over all its sessions; None for no limit.
        skip_nonfinite: whether a step with a number that is not finite is undone instead of ending
            the run.
        before: epochs ahead of those that the run counts, of a search.
        score_every: batches from one whose scores the log shows to the next; None for none.
        clip_norm: the largest norm of the gradient that an update follows; None for any.
        skip: the share of the examples far from the boundary that an epoch leaves out.
        skip_last: the share of the run, at its end, in which no epoch does.
        guard: the largest F_O with which an epoch leaves examples out; 1 for any.
        plain_epochs: the first epochs, whose allocator has no classes, so that F_O is not counted.
    """

    seed: int
    epochs: int
    batch_size: int
    lr: float
    schedule: Schedule
    crop_padding: int
    flip: bool
    max_seconds: float | None
    skip_nonfinite: bool = False
    score_every: int | None = None
    before: int = 0
    clip_norm: float | None = None
    skip: float = 0.0
    skip_last: float = 0.0
    guard: float = 1.0
    plain_epochs: int = 0

    def may_leave_out(self, epoch: int) -> bool:
        """Return whether an epoch, from 0, may leave examples out."""
        left = self.epochs - epoch - 1
        late = left < self.skip_last * self.epochs - _ROUNDING
        counted = self.guard == 1 or epoch > self.plain_epochs
        return self.skip > 0 and epoch > 0 and not late and counted


def make_plan(config: Config) -> Plan:
    """Return the plan of a run, whose portions are batches, or pools of them attacked at once."""
    recipe, guard = config.recipe, make_guard(config.bt)
    milestones = [milestone / recipe.epochs for milestone in recipe.milestones]
    schedules = {
        ScheduleName.step: step_decay(milestones, recipe.lr_factors),
        ScheduleName.cyclic: cyclic(recipe.peak),
        ScheduleName.cosine: cosine(),
    }
    return Plan(
        seed=config.seed,
        epochs=config.train.epochs,
        batch_size=config.train.batch_size * config.bt.pool,
        lr=recipe.lr,
        schedule=schedules[recipe.schedule],
        crop_padding=recipe.crop_padding,
        flip=recipe.flip,
        max_seconds=config.train.max_seconds,
        skip_nonfinite=config.train.on_nonfinite is OnNonfinite.skip,
        score_every=config.train.score_every,
        clip_norm=recipe.clip_norm,
        skip=config.train.skip,
        skip_last=config.train.skip_last,
        guard=1.0 if guard is None else guard.share,
        plain_epochs=config.bt.plain_epochs,
    )


def is_over(config: Config, progress: Mapping[str, Any]) -> bool:
    """Return whether nothing is left to train, by a state's numbers, live or from a file."""
    limit = config.train.max_seconds
    timed_out = limit is not None and progress["train_seconds"] >= limit
    return bool(timed_out or progress["collapsed"] or progress["epoch"] >= config.train.epochs)


def updates_per_epoch(config: Config, examples: int) -> int:
    """Return how often an epoch of so many examples moves the weights: a batch once, but for Free.

    A pool of batches moves them once for each of its batches.
    """
    size = config.train.batch_size
    pools = batch_slices(examples, size * config.bt.pool)
    batches = sum(len(batch_slices(pool.stop - pool.start, size)) for pool in pools)
    return batches * (config.rival.replays if isinstance(config.rival, FreeConfig) else 1)
