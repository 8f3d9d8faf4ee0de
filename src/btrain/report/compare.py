"""Finished runs side by side."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from btrain.durable import real
from btrain.errors import UserError
from btrain.pages.tables import NONE, markdown
from btrain.runs.folder import RunFolder

Runs = Sequence[dict[str, Any]]
"""The summaries of one row: of one run, or of runs that differ in their seed."""

_Cell = Callable[[Runs, Runs], str]


def compare(runs: Sequence[str | Path], *, merge_seeds: bool = False) -> str:
    """Return a Markdown table of runs, with measured speedups over the first row's training time.

    A time from another device than the first row's gives no speedup.

    Args:
        runs: run folders, or folders of them, which stand for their runs in the order of time.
        merge_seeds: one row for the runs whose names differ in `-seed<n>` only: mean ± standard
            deviation.

    Raises:
        UserError: a folder holds no finished run.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for folder in (folder for run in runs for folder in _run_folders(Path(run))):
        path, summary = real(folder.path), _finished(folder)
        name = re.sub(r"-seed\d+$", "", str(path)) if merge_seeds else str(path)
        row = rows.setdefault(name, [])
        if summary.get("seed") in [other.get("seed") for other in row]:
            raise UserError(f"{folder.path} has the seed of another run in its row.")
        row.append(summary)
    baseline = next(iter(rows.values()))
    columns = _COLUMNS if merge_seeds else [column for column in _COLUMNS if column[0] != "seeds"]
    return markdown(
        ["run", *(head for head, _ in columns)],
        [
            [Path(name).name, *(cell(summaries, baseline) for _, cell in columns)]
            for name, summaries in rows.items()
        ],
    )


def _run_folders(path: Path) -> list[RunFolder]:
    """Return the folder, or the finished runs in it by age if it is not one of a run."""
    inside = [] if (path / "config.yaml").is_file() else list(path.glob("*/summary.json"))
    if not inside:
        return [RunFolder(path)]
    inside.sort(key=lambda file: (file.stat().st_mtime, file))
    return [RunFolder(file.parent) for file in inside]


def _finished(folder: RunFolder) -> dict[str, Any]:
    summary = folder.summary()
    if summary is None:
        raise UserError(f"{folder.path} holds no finished run (there is no summary.json).")
    return summary


def _mean(key: str, form: str, unit: str = "", divisor: float = 1) -> _Cell:
    """Return the cell of a number: mean ± standard deviation of several runs, – of unknown ones."""

    def cell(runs: Runs, baseline: Runs) -> str:
        del baseline
        values = [run.get(key) for run in runs]
        known = [value / divisor for value in values if value is not None]
        return _spread(known, form) + unit if len(known) == len(values) else NONE

    return cell


def _spread(values: Sequence[float], form: str) -> str:
    mean = f"{statistics.fmean(values):{form}}"
    return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean


def _measured(runs: Runs, baseline: Runs) -> str:
    if {run["device"] for run in (*runs, *baseline)} != {baseline[0]["device"]}:
        return "other device"
    ours, theirs = (
        statistics.fmean(run["train_seconds"] for run in rows) for rows in (runs, baseline)
    )
    return f"{theirs / ours:.2f}×" if ours else NONE


_COLUMNS: list[tuple[str, _Cell]] = [
    ("seeds", lambda runs, baseline: str(len(runs))),
    ("clean %", _mean("clean_acc", ".2f")),
    ("PGD %", _mean("robust_acc", ".2f")),
    ("F_B", _mean("f_b", ".2f")),
    ("F_R", _mean("f_r", ".2f")),
    ("F_O", _mean("f_o", ".2f")),
    ("mean steps", _mean("attack_steps_mean", ".1f")),
    ("TFLOP", _mean("flops", ".3g", divisor=1e12)),
    ("speedup (eq. 7)", _mean("theoretical_speedup", ".2f", "×")),
    ("training s", _mean("train_seconds", ".1f")),
    ("measured speedup", _measured),
]
