"""The plain defense, timed beside a run on a copy that is thrown away."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from btrain.attacks.fast_paths import make_fast_paths
from btrain.attacks.kept import KNOWN, STORE
from btrain.data import Split
from btrain.errors import UserError
from btrain.methods.cost import Costs
from btrain.methods.make import Known, make_method, plain_defense
from btrain.methods.statistics import EXAMPLES, UNITS
from btrain.processes.world import ALONE, World
from btrain.settings import Config
from btrain.settings.method import FreeConfig
from btrain.training.epochs import train_epoch
from btrain.training.safety.out_of_memory import ran_out
from btrain.training.schedule import make_plan
from btrain.training.state import TrainState

_SHARE = 0.01  # of the training time
_STEPS = 5


class Probe:
    """The speed of an epoch's steps beside the plain defense's, here and now.

    After an epoch the plain defense takes up to five steps from the epoch's beginning, as the epoch
    itself did: the same loop, clock and batches. Their weights do not move, and nothing of the run
    does. All this takes at most 1 % of the training time so far; until there is room for one step
    to warm up and one to time, nothing is measured. Only the first warm-up, with `train.compile` a
    compilation, may take longer than was reckoned with; those behind it wait until as much fits.
    Both speeds are by the device's own time, on a CPU that of this process.
    With several processes each does so for itself, on batches as large as its share and without the
    others: one that fails or has no time keeps nobody waiting.
    """

    def __init__(
        self, config: Config, split: Split, costs: Costs, known: Known, world: World = ALONE
    ) -> None:
        self._split, self._lean = split, costs.lean
        self._plain, self._known = plain_defense(config), known
        self._images = len(split) / world.size  # of an epoch, this process'
        # An epoch of Free is many epochs of others, and so is its time.
        free = isinstance(config.rival, FreeConfig)
        self._every = 0 if free else config.bt.probe_every or 0
        plan = make_plan(self._plain)
        self._plan = replace(
            plan,
            batch_size=plan.batch_size // world.size,
            lr=0.0,
            max_seconds=None,
            score_every=None,
        )
        self._trained = self._spent = 0.0
        self._work = self._probed = 0.0
        self._step: float | None = None
        self._warm_up = 0.0  # the longest

    def speedup(self, state: TrainState) -> float | None:
        """Return the plain defense's seconds over those of the last epoch, for the same images.

        None where it is not time, where that would take too long, or where the steps failed.
        """
        self._trained += state.epoch_seconds
        if not self._every or (state.epoch + 1) % self._every or not state.epoch_work:
            return None
        began = time.perf_counter()
        cuda = [state.device] if state.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=cuda):  # of networks that draw numbers themselves
                plain = self._plain_seconds(state)
        except UserError:
            return None
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            return None
        finally:
            self._spent += time.perf_counter() - began
        return None if plain is None else plain * self._images / state.epoch_work

    def _plain_seconds(self, state: TrainState) -> float | None:
        """Return the seconds of work an image, over all probes so far.

        One more step to five are taken if there is time for that, else it returns None.
        """
        units = float(state.epoch_sums[UNITS]) / len(self._split)
        share = self._plan.batch_size / self._images
        expected = self._step or state.epoch_seconds * share * self._lean / units
        ends = time.perf_counter() + _SHARE * self._trained - self._spent
        began = time.perf_counter()
        if began + max(expected, self._warm_up) + expected > ends:
            return None
        tried = state.throw_away_copy(without=(STORE, KNOWN))
        paths = make_fast_paths(self._plain.train, state.device)
        method = make_method(self._plain, state.device, paths=paths, known=self._known)

        def take(enough: Callable[[], bool]) -> tuple[float, float, float]:
            train_epoch(
                tried, self._split, method, self._plan, see=paths.view,
                tick=lambda: None, show=lambda means: None, stopped=enough,
            )  # fmt: skip
            assert tried.epoch_work is not None
            return tried.train_seconds, tried.epoch_work, float(tried.epoch_sums[EXAMPLES])

        def timed_enough() -> bool:
            late = time.perf_counter() + expected > ends
            return tried.batch > 1 and (late or tried.batch > _STEPS)

        warm = take(lambda: tried.batch == 1)
        self._warm_up = max(self._warm_up, time.perf_counter() - began)
        seconds, work, images = (b - a for a, b in zip(warm, take(timed_enough), strict=True))
        if images == 0:  # the epoch is one batch
            return None
        self._work += work
        self._probed += images
        self._step = seconds / images * self._plan.batch_size
        return self._work / self._probed
