"""Finished runs side by side."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from btrain.durable import real
from btrain.errors import UserError
from btrain.evaluation.result import Result
from btrain.pages.tables import NONE, markdown
from btrain.runs.folder import RunFolder, flat

Runs = Sequence[dict[str, Any]]
"""The summaries of one row: of one run, or of runs that differ in their seed."""

Cell = Callable[[Runs, Runs], str]
"""(runs of a row, runs of the first row) -> a cell of the table."""


def compare(runs: Sequence[str | Path], *, merge_seeds: bool = False) -> str:
    """Return a Markdown table of runs; its last column compares training times with the first's.

    Times are compared where device, data, network and epochs are the first row's; elsewhere the
    column says what is not. The other speedups are each run's own, over the plain defense: by
    eq. 7, by counted FLOPs, and measured by its probe. AutoAttack's column is there if it has been
    run on one of them, that of the ball and the steps of PGD where they differ; where one of them
    is sparse, all are shown with their counted work and their robust overfitting.

    Args:
        runs: run folders, or folders of them, which stand for their runs in the order of time.
        merge_seeds: one row for the runs whose names differ in `-seed<n>` only: mean ± standard
            deviation.

    Raises:
        UserError: a folder holds no finished run.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    seen: set[Path] = set()
    for folder in (folder for run in runs for folder in _run_folders(Path(run))):
        path, summary = real(folder.path), _finished(folder)
        if path in seen:
            raise UserError(f"{folder.path} is given twice.")
        seen.add(path)
        name = re.sub(r"-seed\d+$", "", str(path)) if merge_seeds else str(path)
        row = rows.setdefault(name, [])
        if summary.get("seed") in [other.get("seed") for other in row]:
            raise UserError(f"{folder.path} has the seed of another run in its row.")
        row.append(summary | _beside(folder))
    baseline = next(iter(rows.values()))
    known = {key for summaries in rows.values() for run in summaries for key in run}
    left_out = set() if merge_seeds else {"seeds"}
    left_out |= set() if _AUTOATTACK in known else {"AutoAttack %"}
    if len({str(run.get(_THREAT)) for summaries in rows.values() for run in summaries}) == 1:
        left_out.add("PGD's ball")
    sparse = "macs_share" in known
    columns = [column for column in COLUMNS if column[0] not in left_out]
    columns += _SPARSE if sparse else []
    table = markdown(
        ["run", *(head for head, _ in columns)],
        [
            [
                with_cut(Path(name).name, summaries),
                *(cell(summaries, baseline) for _, cell in columns),
            ]
            for name, summaries in rows.items()
        ],
    )
    return f"{table}\n\n{_MASKED_KERNELS}" if sparse else table


def with_cut(name: str, runs: Runs) -> str:
    """Return a row's name, with a word on runs that were cut ahead of their end."""
    cut = any(isinstance(run.get("cut"), str) for run in runs)
    return f"{name}{' (cut)' if cut else ''}"


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


def _mean(key: str, form: str, unit: str = "", divisor: float = 1) -> Cell:
    """Return the cell of a number: mean ± standard deviation of several runs, – of unknown ones."""

    def cell(runs: Runs, baseline: Runs) -> str:
        del baseline
        values = [run.get(key) for run in runs]
        known = [value / divisor for value in values if value is not None]
        return _spread(known, form) + unit if len(known) == len(values) else NONE

    return cell


def _less(key: str, other: str) -> Cell:
    """Return the cell of a difference of two numbers of each run."""

    def cell(runs: Runs, baseline: Runs) -> str:
        del baseline
        pairs = [(run.get(key), run.get(other)) for run in runs]
        known = [a - b for a, b in pairs if a is not None and b is not None]
        return _spread(known, ".2f") if len(known) == len(pairs) else NONE

    return cell


def _or_dense(key: str, form: str, dense: str | float, divisor: float = 1) -> Cell:
    """Return the cell of a number that a dense run lacks: it is another one's, or fixed."""
    shown = _mean("value", form, divisor=divisor)

    def cell(runs: Runs, baseline: Runs) -> str:
        values = [
            run[key] if key in run else run.get(dense) if isinstance(dense, str) else dense
            for run in runs
        ]
        return shown([{"value": value} for value in values], baseline)

    return cell


def _spread(values: Sequence[float], form: str) -> str:
    mean = f"{statistics.fmean(values):{form}}"
    return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean


def _beside(folder: RunFolder) -> dict[str, Any]:
    """Return what else a run folder tells: AutoAttack's result, and the settings of `_SAME`."""
    found: dict[str, Any] = {}
    evaluated = Result.read(folder.path / "eval", _AUTOATTACK)
    if evaluated is not None:
        found[_AUTOATTACK] = evaluated.accuracy
    with suppress(UserError):  # the table needs no settings
        settings = flat(folder.settings())
        found |= {f"of {word}": [settings.get(key) for key in keys] for word, keys in _SAME.items()}
        found[_THREAT] = _threat(settings)
    return found


def _threat(settings: Mapping[str, Any]) -> str:
    """Return what PGD attacks with, `L∞ 0.031, 20 steps`."""
    norm = _NORMS.get(str(settings.get("attack.name")), "L∞")
    epsilon, steps = settings.get("eval.epsilon"), settings.get("eval.steps")
    if epsilon is None or steps is None:
        return NONE
    length = f"{epsilon:.3g}" if isinstance(epsilon, float) else epsilon
    return f"{norm} {length}, {steps} steps"


def _ball(runs: Runs, baseline: Runs) -> str:
    del baseline
    threats = {str(run.get(_THREAT, NONE)) for run in runs}
    return threats.pop() if len(threats) == 1 else "several"


_THREAT = "threat"
_NORMS = {"l2_pgd": "L2", "own": "own ball"}


_AUTOATTACK = "autoattack"
_SAME = {
    "data": ("dataset.name", "dataset.factory", "dataset.train_examples"),
    "network": ("model.name", "model.factory", "model.width", "model.depth"),
}
"""Settings that must be the same for times to be compared, by a word for the table."""


def _against_first(runs: Runs, baseline: Runs) -> str:
    for word, key in (("device", "device"), ("epochs", "epochs"), *((w, f"of {w}") for w in _SAME)):
        if any(run.get(key) != baseline[0].get(key) for run in (*runs, *baseline)):
            return f"other {word}"
    ours, theirs = (
        statistics.fmean(run["train_seconds"] for run in rows) for rows in (runs, baseline)
    )
    return f"{theirs / ours:.2f}×" if ours else NONE


COLUMNS: list[tuple[str, Cell]] = [
    ("seeds", lambda runs, baseline: str(len(runs))),
    ("clean %", _mean("clean_acc", ".2f")),
    ("PGD %", _mean("robust_acc", ".2f")),
    ("PGD's ball", _ball),
    ("AutoAttack %", _mean(_AUTOATTACK, ".2f")),
    ("F_B", _mean("f_b", ".2f")),
    ("F_R", _mean("f_r", ".2f")),
    ("F_O", _mean("f_o", ".2f")),
    ("mean steps", _mean("attack_steps_mean", ".1f")),
    ("TFLOP", _mean("flops", ".3g", divisor=1e12)),
    ("speedup (eq. 7)", _mean("theoretical_speedup", ".2f", "×")),
    ("speedup (FLOPs)", _mean("speedup_flops", ".2f", "×")),
    ("speedup (measured)", _mean("speedup_measured", ".2f", "×")),
    ("training s", _mean("train_seconds", ".1f")),
    ("first row's time", _against_first),
]

_SPARSE: list[tuple[str, Cell]] = [
    ("best PGD %", _mean("best_robust_acc", ".2f")),
    ("best − final", _less("best_robust_acc", "robust_acc")),
    ("train − test", _less("train_robust_acc", "robust_acc")),
    ("density", _or_dense("density", ".3f", 1.0)),
    ("share of MACs", _or_dense("macs_share", ".3f", 1.0)),
    ("TFLOP executed", _or_dense("flops_executed", ".3g", "flops", divisor=1e12)),
    ("TFLOP counted", _or_dense("flops_counted", ".3g", "flops", divisor=1e12)),
]
_MASKED_KERNELS = (
    "Counted TFLOP leave out multiply-adds by weights that are 0; masks of single weights do not "
    "speed up dense kernels, which execute them."
)
