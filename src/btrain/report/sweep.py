"""The end of a sweep: one table of its runs."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from btrain.durable import real
from btrain.pages.tables import text
from btrain.report.compare import COLUMNS, Cell, marked, told
from btrain.runs.read import FINISHED, Run, read_run
from btrain.runs.sweep import Job
from btrain.terminal import counted

_WIDTH = 80
_NARROWEST = 16  # of a name
_OF_NO_RESULT = ("run.", "logger", "hydra")
_MANY = 8  # runs that a command does not name one by one


def sweep_table(jobs: Sequence[Job]) -> str:
    """Return a row for every setting of a sweep, and what became of the jobs that did not finish.

    Numbers are those of `btrain report`: where seeds vary, mean ± standard deviation over them. A
    row is named by the settings that vary.
    """
    names = _names(jobs)
    rows: dict[str, list[dict[str, Any]]] = {}
    unfinished, seen = [], set()
    for job in jobs:
        run = _run(job)
        if run is None or run.state != FINISHED:
            why = job.failed or (run and run.reason) or "it ended without a result"
            unfinished.append(f"{' '.join(_varying(job, jobs)) or 'The run'}: {why}")
        elif (path := real(run.folder)) not in seen:
            seen.add(path)
            rows.setdefault(names[job.number], []).append({"classes": run.classes} | run.summary)
    parts = [_table(rows)] if rows else []
    if unfinished:
        count = f"{len(unfinished)} of {len(jobs)} runs did not finish:"
        parts.append("\n".join([count, *unfinished]))
    return "\n\n".join(parts)


def _run(job: Job) -> Run | None:
    """Return the run of a job; None of one that failed."""
    return None if job.folder is None or job.failed else read_run(Path(job.folder))


def _table(rows: dict[str, list[dict[str, Any]]]) -> str:
    several = any(len(runs) > 1 for runs in rows.values())
    measured = all(run.get("speedup_measured") for runs in rows.values() for run in runs)
    heads = [*(["seeds"] if several else []), "clean %", "PGD %", "speedup (FLOPs)"]
    heads += ["speedup (measured)"] if measured else []
    columns: list[tuple[str, Cell]] = [(head, cell) for head, cell in COLUMNS if head in heads]
    cells = [[told(head, cell, runs, runs) for head, cell in columns] for runs in rows.values()]
    shown = [head.removesuffix(" (FLOPs)") for head, _ in columns]
    shown = [head.replace("speedup (measured)", "measured") for head in shown]
    widths = [max(map(len, column)) + 2 for column in zip(shown, *cells, strict=True)]
    room = max(_WIDTH - sum(widths), _NARROWEST)
    lines: list[list[str]] = []
    for (name, runs), numbers in zip(rows.items(), cells, strict=True):
        first, *others = textwrap.wrap(marked(name, runs), room) or [""]
        lines += [[first, *numbers], *([other] for other in others)]
    steps = {run.get("eval_steps") for runs in rows.values() for run in runs}
    step = f"{counted(steps.pop(), 'step')} " if len(steps) == 1 else ""
    attack = f"{step}on the test set"
    work = "in FLOPs, and measured" if measured else "in FLOPs"
    over = "over each row's own defense with all its steps for everybody"
    note = f"PGD: {attack}; speedup: {over}, {work}."
    return f"{text(['setting', *shown], lines)}\n\n{note}"


def _names(jobs: Sequence[Job]) -> dict[int, str]:
    """Return the name of each job's row: its settings that vary, without the seed."""
    found = {}
    for job in jobs:
        varying = _varying(job, jobs)
        name = " ".join(word for word in varying if not word.startswith("seed="))
        found[job.number] = name or ("all seeds" if varying else "the run")
    return found


def _varying(job: Job, jobs: Sequence[Job]) -> list[str]:
    return [
        word
        for word in job.overrides
        if not word.startswith(_OF_NO_RESULT) and any(word not in other.overrides for other in jobs)
    ]


def next_commands(jobs: Sequence[Job]) -> list[str]:
    """Return what a user types next: the whole comparison, and an attack on the first run."""
    looked_at = {
        run.folder: job.looked_at
        for job in jobs
        if (run := _run(job)) is not None and run.state == FINISHED
    }
    if not looked_at:
        return []
    finished = [str(folder) for folder in looked_at]
    folders = {str(folder.parent) for folder in looked_at}
    seeds = any(word.startswith("seed=") for job in jobs for word in _varying(job, jobs))
    merge = "--merge-seeds " if seeds else ""
    alone = len(folders) == 1 and _runs_in(Path(min(folders))) <= len(finished)
    told = folders if alone or len(finished) > _MANY else finished
    return [
        f"btrain report {merge}{shlex.join(told)}",
        f"btrain eval checkpoint={shlex.quote(finished[0])} {next(iter(looked_at.values()))}",
    ]


def _runs_in(folder: Path) -> int:
    return len(list(folder.glob("*/summary.json")))
