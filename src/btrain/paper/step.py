"""The cost of training a finished run: what a step holds, and its time over another's."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from btrain.attacks.fast_paths import make_fast_paths
from btrain.build import find_device
from btrain.data.augmentation import batch_slices
from btrain.data.splits import load_configured
from btrain.durable import write_file
from btrain.errors import UserError
from btrain.exchange.from_run import read_config
from btrain.methods.make import make_method
from btrain.paper.plan import STEP
from btrain.paper.sheets.cost import Step, read_step
from btrain.runs.folder import RunFolder
from btrain.training.epochs import batches_in, train_epoch
from btrain.training.resume import load_newest
from btrain.training.schedule import make_plan
from btrain.training.setup import known_of, make_state
from btrain.training.timing.look import MEGABYTE, look

_WATCHED = 5  # steps: a method that bounds in some batches alone does so in one of these
_TURN = 5  # steps of the run, then as many of the baseline
_SECONDS, _TURNS = 4.0, 40


class _Steps:
    """The training steps of a finished run's middle epoch, on a copy whose weights stay."""

    def __init__(self, folder: Path) -> None:
        run = RunFolder(folder)
        config = read_config(run.settings(), folder / "config.yaml")
        saved, _ = load_newest(run)
        if saved is None:
            raise UserError(f"{folder} holds no checkpoint to take a step from.")
        device = find_device(config.device)
        data = load_configured(config.dataset, device)
        self._state = make_state(config, data, device)
        self._state.load_state_dict(saved["state"])
        self._state.epoch = self.epoch = config.train.epochs // 2
        plan = make_plan(config)
        self._plan = replace(plan, lr=0.0, max_seconds=None, score_every=None)
        self._paths = make_fast_paths(config.train, device)
        self._method = make_method(config, device, paths=self._paths, known=known_of(data))
        self._split = data.train
        self._tried = self._state.throw_away_copy()
        shares = [share for share in run.logged("left_out") if 0 <= share < 1]
        used = [round(len(self._split) * (1 - share)) for share in shares]
        steps = [len(batch_slices(many, plan.batch_size)) for many in used]
        if len(steps) < config.train.epochs:  # it has none, or its first epochs are older
            steps = [batches_in(self._tried, self._split, plan)]
        self.an_epoch = sum(steps) / len(steps)
        """The mean number of steps of an epoch, fewer where images are left out of some."""

    def take(self, many: int) -> float:
        """Take so many steps, or fewer to the end of an epoch; return the seconds of one."""
        tried = self._tried
        if tried.batch == batches_in(tried, self._split, self._plan):
            self._state.generator = tried.generator  # other draws than before
            tried = self._tried = self._state.throw_away_copy()
        first, before = tried.batch, tried.epoch_work or 0.0
        train_epoch(
            tried, self._split, self._method, self._plan, see=self._paths.view,
            tick=lambda: None, show=lambda means: None,
            stopped=lambda: tried.batch >= first + many,
        )  # fmt: skip
        return ((tried.epoch_work or 0.0) - before) / (tried.batch - first)

    def peak_memory_mb(self) -> float:
        """Return the most that some steps hold at a time, beside the data set."""

        def from_a_copy() -> None:
            self._tried = self._state.throw_away_copy()
            self.take(_WATCHED)

        return look(from_a_copy, self._state.device).peak_bytes / MEGABYTE


def write_step(folder: Path, baseline: Path) -> Path:
    """Write `<folder>/step.json` of a finished run, unless it is there, says all and is newer.

    Args:
        baseline: the run whose steps are timed beside its own, if that is finished.

    Raises:
        UserError: a run cannot be read, or the file not be written.
    """
    path, known = folder / STEP, read_step(folder)
    trained = (baseline / "summary.json").is_file()
    if (
        known is not None
        and (known.times_baseline is not None or not trained)
        and path.stat().st_mtime >= (folder / "summary.json").stat().st_mtime
    ):
        return path
    with torch.random.fork_rng():
        own = _Steps(folder)
        peak = own.peak_memory_mb()
        ratio, timed = _times(own, _Steps(baseline)) if trained else (None, 0)
    write_file(path, json.dumps(asdict(Step(peak, ratio, timed, own.epoch + 1))).encode() + b"\n")
    return path


def _times(own: _Steps, base: _Steps) -> tuple[float, int]:
    """Return the ratio of their seconds an epoch, and how many steps of either were timed."""
    base.take(_TURN)  # neither's first steps count
    spent = [0.0, 0.0]
    turns = 0
    while turns < _TURNS and sum(spent) * _TURN < _SECONDS:
        for i, steps in enumerate((own, base)):
            spent[i] += steps.take(_TURN)
        turns += 1
    return spent[0] * own.an_epoch / (spent[1] * base.an_epoch), turns * _TURN
