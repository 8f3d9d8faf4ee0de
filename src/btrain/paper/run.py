"""The runs of a table or figure: `btrain train` and `btrain eval` as a user would call them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from btrain import cli
from btrain.errors import Interrupted, UserError
from btrain.paper.job import Job
from btrain.paper.left import unfinished
from btrain.paper.plan import Plan
from btrain.paper.target import Sweep, row_name, run_name
from btrain.report.command import write
from btrain.runs.folder import RunFolder
from btrain.runs.read import Runs
from btrain.settings import compose as configs

_T = TypeVar("_T")
_FROM_SIGNALS = 128  # exit statuses of commands that a signal ended
_OFFICIAL = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}


def reproduce(job: Job, plan: Plan, known: Runs) -> tuple[int, bool]:
    """Trains and evaluates what is not there yet, and reports.

    A run that fails leaves its log and stops no other.

    Args:
        known: the runs that the reports have read before.

    Returns:
        How many of the wanted runs are not trained, or not evaluated, at the least; and whether the
        report was written.

    Raises:
        SystemExit: a signal came; the same command goes on from there.
    """
    failed = 0
    for sweep in job.sweeps:
        wanted_sweep = replace(sweep, experiments=job.wanted(sweep.experiments))
        if (left := unfinished(job, wanted_sweep)) is not None:
            failed += not _command("train", *_training(job, *left))
    wanted = set(job.wanted(row.experiment for row in plan.rows))
    runs = [
        _evaluate(job, plan, row.experiment, job.out / folder)
        for row in plan.rows
        if row.experiment in wanted
        for folder in row.runs.values()
    ]
    words = f"btrain report {shlex.quote(str(job.out))} target={job.target.name}"
    reported = _guarded(
        words, lambda: write(job.out, job.out / "report", [job.target.name], known.read)
    )
    # A finished run of other settings is not what is wanted.
    return max(runs.count(False), failed), reported is not None


def _training(job: Job, sweep: Sweep, seeds: Sequence[int]) -> list[str]:
    """The arguments of the multirun that makes a sweep's runs, all of one seed before the next."""
    name = row_name("${hydra:runtime.choices.experiment}", {k: f"${{{k}}}" for k in sweep.values})
    return [
        "--multirun",
        f"seed={','.join(map(str, seeds))}",
        f"experiment={','.join(sweep.experiments)}",
        *job.settings,
        *(f"{key}={','.join(values)}" for key, values in sweep.values.items()),
        f"logger.group={configs.quoted(name)}",
        f"logger.tags=[{job.target.name},{job.profile.name}]",
        f"run.dir={configs.quoted(str(job.out / run_name(name, '${seed}')))}",
    ]


def _evaluate(job: Job, plan: Plan, experiment: str, folder: Path) -> bool:
    """Whether a run is trained and all its evaluations are there, after making them."""
    if not (folder / "summary.json").is_file():
        return False
    try:
        done = [
            _command("eval", f"checkpoint={folder}", *_corruptions(job, folder, settings))
            for settings in job.profile.evaluations(job.target, experiment)
        ]
        if plan.kind == "allocation":
            from btrain.paper.batch import write_allocation

            write_allocation(folder)
    except UserError as error:
        print(f"btrain: {error}", file=sys.stderr)
        return False
    return all(done)


def _corruptions(job: Job, folder: Path, settings: Sequence[str]) -> list[str]:
    """An evaluation's settings with the corrupted images that it needs, made where there are none.

    Raises:
        UserError: the run's settings cannot be read, or there are no official images of its data.
    """
    if "attack=corruptions" not in settings:
        return list(settings)
    dataset = RunFolder(folder).settings()["dataset"]
    if job.corruptions_root is None:
        root = _regenerated(job, dataset)
    elif dataset["name"] in _OFFICIAL:
        root = job.corruptions_root / _OFFICIAL[dataset["name"]]
    else:
        raise UserError(f"corruptions_root= holds no images of dataset={dataset['name']}.")
    return [*settings, f"dataset.corruptions_root={root}"]


def _regenerated(job: Job, dataset: dict[str, Any]) -> Path:
    """The corrupted test set of a data set, made unless it is there."""
    root = job.out / "corrupted" / str(dataset["name"])
    if not (root / "labels.npy").is_file():
        given = [f"dataset={dataset['name']}", f"dataset.root={dataset['root']}"]
        given += [
            f"dataset.{key}={dataset[key]}"
            for key in ("test_examples", "image_size")
            if dataset[key] is not None
        ]
        _command("data", "corrupt", *given, f"corrupt.out={root}")
    return root


def _command(*arguments: str) -> bool:
    """Runs a command of btrain's; whether it did what it should. One that fails has said why.

    Raises:
        SystemExit: a signal ended it.
    """
    status = _guarded(f"btrain {shlex.join(arguments)}", lambda: cli.main(list(arguments)))
    if status is not None and status > _FROM_SIGNALS:
        raise SystemExit(status)
    return status == 0


def _guarded(words: str, what: Callable[[], _T]) -> _T | None:
    """Says and does it; a mistake or a defect is told, and is no reason to lose other runs."""
    print(f"$ {words}", flush=True)
    try:
        return what()
    except (Interrupted, KeyboardInterrupt):
        raise
    except UserError as error:
        print(f"btrain: {error}", file=sys.stderr)
    except Exception as error:
        print(f"btrain: {type(error).__name__}: {error}", file=sys.stderr)
    return None
