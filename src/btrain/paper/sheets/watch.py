"""A sweep followed in the terminal: what is done, what runs, and how long the rest will take."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from btrain.pages import tables
from btrain.paper.plan import Plan, find_plans
from btrain.paper.sheets.notes import expected
from btrain.runs.read import FAILED, FINISHED, RUNNING, Run, Runs
from btrain.terminal import clear, lasting, show

REFRESH_SECONDS = 3.0


@dataclass(frozen=True)
class Progress:
    """A target's runs.

    Attributes:
        rows_done, rows: rows of which every seed is done.
        done, trained, running, failed, runs: runs; done are those trained and evaluated, trained
            those that wait for their evaluation.
        seconds_left: by the mean times of the done to train and to evaluate; None where none is
            done.
    """

    target: str
    rows_done: int
    rows: int
    done: int
    trained: int
    running: int
    failed: int
    runs: int
    seconds_left: float | None

    @property
    def left(self) -> int:
        """Return the number of runs that are neither done nor failed."""
        return self.runs - self.done - self.failed


def progress(plan: Plan, folder: Path, runs_of: Runs) -> Progress:
    """Return where a target's runs stand now."""
    runs, done, left, rows_done = [], [], [], 0
    for row in plan.rows:
        theirs = [runs_of.read(folder / path) for path in row.runs.values()]
        attacks = expected(theirs, plan, row)
        finished = [run for run in theirs if _is_done(run, attacks)]
        left += [run for run in theirs if run.state != FAILED and not _is_done(run, attacks)]
        rows_done += len(finished) == len(theirs)
        runs += theirs
        done += finished
    running = [run for run in left if run.state == RUNNING]
    return Progress(
        target=plan.target,
        rows_done=rows_done,
        rows=len(plan.rows),
        done=len(done),
        trained=sum(run.state == FINISHED for run in left),
        running=len(running),
        failed=sum(run.state == FAILED for run in runs),
        runs=len(runs),
        seconds_left=_seconds_left(done, left, max(1, len(running))),
    )


def _is_done(run: Run, attacks: Sequence[str]) -> bool:
    return run.state == FINISHED and all(run.evaluation(name) for name in attacks)


def _seconds_left(done: Sequence[Run], left: Sequence[Run], at_once: int) -> float | None:
    """Return the seconds left: of training by its epochs, shared by the runs made at once."""
    if not left:
        return 0.0
    if not done:
        return None
    training = statistics.fmean(run.number("train_seconds") or 0.0 for run in done)
    evaluation = statistics.fmean(run.evaluation_seconds() for run in done)
    work = 0.0
    for run in left:
        epochs, planned = run.epochs
        share = 0.0 if run.state == FINISHED else 1 - min(1.0, epochs / planned) if planned else 1.0
        work += share * training + evaluation
    return work / at_once


def table(found: Sequence[Progress]) -> str:
    """Return a line a target."""
    head = ["target", "rows done", "runs done", "to evaluate", "running", "failed", "missing"]
    rows = []
    for p in found:
        missing = p.left - p.running - p.trained
        done = [f"{p.rows_done} of {p.rows}", f"{p.done} of {p.runs}"]
        counts = map(str, (p.trained, p.running, p.failed, missing))
        left = tables.NONE if p.seconds_left is None else lasting(p.seconds_left)
        rows.append([p.target, *done, *counts, left])
    return tables.text([*head, "left"], rows)


def watch(folder: Path, targets: Sequence[str] | None = None) -> None:
    """Show a folder's plans until no run is left, or Ctrl-C; once where nobody watches.

    Raises:
        UserError: there is no plan, or none of a target's name.
    """
    live, runs_of = sys.stdout.isatty(), Runs()
    while True:
        plans = find_plans(folder, targets)  # the runner may write plans meanwhile
        found = [progress(plan, folder, runs_of) for plan in plans.values()]
        if live:
            clear()
        show(table(found), flush=True)
        if not live or not any(p.left for p in found):
            return
        show("\nCtrl-C ends this view; the runs go on.", flush=True)
        try:
            time.sleep(REFRESH_SECONDS)
        except KeyboardInterrupt:
            return
