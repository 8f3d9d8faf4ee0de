"""Finished runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from btrain.errors import UserError
from btrain.run_folder import RunFolder

_COLUMNS = (
    "run",
    "clean %",
    "PGD %",
    "F_B",
    "F_R",
    "F_O",
    "speedup (eq. 7)",
    "training s",
    "measured speedup",
)


def compare(runs: Sequence[str | Path]) -> str:
    """A Markdown table of run folders; measured speedups are over the first one's training time.

    A time from another device than the first one's gives no speedup.

    Raises:
        UserError: a folder holds no finished run.
    """
    folders = [RunFolder(Path(run)) for run in runs]
    summaries = [_finished(folder) for folder in folders]
    rows = [
        _row(folder.path.name, summary, summaries[0])
        for folder, summary in zip(folders, summaries, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join([first, *others])} |"

    ruler = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return "\n".join([line(_COLUMNS), ruler, *map(line, rows)])


def _finished(folder: RunFolder) -> dict[str, Any]:
    summary = folder.summary()
    if summary is None:
        raise UserError(f"{folder.path} holds no finished run (there is no summary.json).")
    return summary


def _row(name: str, summary: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    same_device = summary["device"] == baseline["device"]
    measured = baseline["train_seconds"] / summary["train_seconds"]
    return [
        name,
        f"{summary['clean_acc']:.2f}",
        f"{summary['robust_acc']:.2f}",
        f"{summary['f_b']:.2f}",
        f"{summary['f_r']:.2f}",
        f"{summary['f_o']:.2f}",
        f"{summary['theoretical_speedup']:.2f}×",
        f"{summary['train_seconds']:.1f}",
        f"{measured:.2f}×" if same_device else "other device",
    ]
