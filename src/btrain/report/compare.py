"""Finished runs side by side."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from btrain.durable import real
from btrain.errors import UserError
from btrain.evaluation import chain
from btrain.evaluation.result import (
    WEIGHTS,
    Result,
    agree,
    hardly_above_chance,
    student,
    weights_in,
    wilson,
)
from btrain.pages.tables import NONE, markdown, plain
from btrain.runs.folder import RunFolder, flat
from btrain.runs.json_fields import is_count
from btrain.runs.read import images_of, network_of
from btrain.settings.evaluation import VERIFIED
from btrain.settings.names import ANY, ENGINES
from btrain.settings.run import CLASSES
from btrain.terminal import counted

Runs = Sequence[dict[str, Any]]
"""The summaries of one row: of one run, or of runs that differ in their seed."""

Cell = Callable[[Runs, Runs], str]
"""(runs of a row, runs of the first row) -> a cell of the table."""


def compare(runs: Sequence[str | Path], *, merge_seeds: bool = False) -> str:
    """Return a Markdown table of runs, and below it what all of them share.

    Accuracies and times are always there, AutoAttack and each engine's verified share if one of the
    runs has them; no column is empty, and of several rows no other one is the same in all. Networks
    hardly better than guessing are marked and have no speedup. Where one of the runs is sparse, all
    are shown with their counted work and their robust overfitting. Times are compared
    with the first row's where device, data, network and epochs are its; elsewhere the column says
    what is not. The other speedups are each run's own, over the plain defense: by counted FLOPs,
    and measured by its probe.

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
        row.append(_with_interval(summary) | _beside(folder))
    baseline = next(iter(rows.values()))
    known = {key for summaries in rows.values() for run in summaries for key in run}
    left_out = set() if merge_seeds else {"seeds"}
    left_out |= set() if _AUTOATTACK in known else {"AutoAttack %", "AutoAttack 95 %"}
    sparse = "macs_share" in known
    columns = [
        (head, cells)
        for head, cell in [*_with_engines(known), *(_SPARSE if sparse else [])]
        if head not in left_out
        and {*(cells := [told(head, cell, runs, baseline) for runs in rows.values()])} != {NONE}
    ]
    shared = {
        head: cells[0] for head, cells in columns if len({*cells}) == 1 and _may_go(head, cells)
    }
    names = [marked(Path(name).name, summaries) for name, summaries in rows.items()]
    shown = [("run", names), *(column for column in columns if column[0] not in shared)]
    table = markdown([head for head, _ in shown], zip(*(cells for _, cells in shown), strict=True))
    alike = [f"{head} {value}" for head, value in shared.items() if value != NONE]
    notes = [f"The same in all rows: {plain('; '.join(alike))}."] if alike and len(rows) > 1 else []
    notes += [_intervals(rows.values())] if any(_is_interval(head) for head, _ in shown) else []
    notes += [_TOO_FEW] if any(len(summaries) == 2 for summaries in rows.values()) else []
    older = [name for runs in rows.values() for run in runs for name in run[_OLDER]]
    notes += [_LEFT_OUT.format(", ".join(older))] if older else []
    notes += [_AT_CHANCE] if any(map(_at_chance, rows.values())) else []
    notes += [_MASKED_KERNELS] if sparse else []
    return "\n\n".join([table, *(["\n".join(notes)] if notes else [])])


def _may_go(head: str, cells: Sequence[str]) -> bool:
    """Return whether a column need not be drawn, all of whose cells are the same."""
    if _is_interval(head) or head.startswith(_ENGINE):
        return False
    return head == "PGD's ball" if len(cells) == 1 else head not in _ALWAYS


_ENGINE = "verified by"
_ALWAYS = (
    *(
        "seeds",
        "clean %",
        "PGD %",
        "AutoAttack %",
        "training s",
        "times faster than row 1",
    ),
    *("best − final", "train − test"),
)


def _is_interval(head: str) -> bool:
    return head.endswith("95 %")


def _intervals(rows: Iterable[Runs]) -> str:
    """Return what the intervals of the rows tell of."""
    several = {len(runs) > 1 for runs in rows}
    one, more = "of a run over other test images (Wilson)", "of several over other seeds (Student)"
    kinds = [one] * (False in several) + [more] * (True in several)
    return f"95 %: the interval {', '.join(kinds)}."


def marked(name: str, runs: Runs) -> str:
    """Return a row's name, with a word on runs that ended early or are no better than guessing."""
    early = {"cut": "cut", "collapse": "ended by a collapse"}
    said = [
        word for key, word in early.items() if any(isinstance(run.get(key), str) for run in runs)
    ]
    said += ["at chance"] if _at_chance(runs) else []
    return "".join([name, *(f" ({word})" for word in said)])


def told(head: str, cell: Cell, runs: Runs, baseline: Runs) -> str:
    """Return a cell; none of a speedup where the network hardly does better than guessing."""
    speedup = head.startswith(("speedup", "times faster"))
    return NONE if speedup and _at_chance(runs) else cell(runs, baseline)


def _at_chance(runs: Runs) -> bool:
    """Return whether one of the runs says at its end that its numbers say nothing."""
    return any(
        is_count(run.get("classes"))
        and run["classes"] > 1
        and run.get("clean_acc") is not None
        and hardly_above_chance(run["clean_acc"], run["classes"])
        for run in runs
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


def _mean(key: str, form: str, unit: str = "", divisor: float = 1) -> Cell:
    """Return the cell of a number: mean ± standard deviation of several runs, – of unknown ones."""

    def cell(runs: Runs, baseline: Runs) -> str:
        del baseline
        values = [run.get(key) for run in runs]
        known = [value / divisor for value in values if value is not None]
        return _spread(known, form) + unit if len(known) == len(values) else NONE

    return cell


def _interval(key: str) -> Cell:
    """Return the cell of a 95 % interval: over seeds, or of the only run over test images."""

    def cell(runs: Runs, baseline: Runs) -> str:
        del baseline
        values = [run.get(key) for run in runs]
        known = [value for value in values if value is not None]
        ends = runs[0].get(f"{key} 95") if len(runs) == 1 else None
        if len(known) > 2 and len(known) == len(values):
            ends = student(statistics.fmean(known), statistics.stdev(known), len(known))
        if ends is None:
            return NONE
        return f"{max(ends[0], 0):.1f} to {min(ends[1], 100):.1f}"

    return cell


def _less(key: str, other: str) -> Cell:
    """Return the cell of a difference of two numbers of each run."""

    def cell(runs: Runs, baseline: Runs) -> str:
        del baseline
        pairs = [(run.get(key), run.get(other)) for run in runs]
        known = [a - b for a, b in pairs if a is not None and b is not None]
        return _spread(known, ".2f") if len(known) == len(pairs) else NONE

    return cell


def _or_dense(key: str, form: str, dense: str | float, unit: str = "", divisor: float = 1) -> Cell:
    """Return the cell of a number that a dense run lacks: it is another one's, or fixed."""
    shown = _mean("value", form, unit, divisor)

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


def _with_interval(summary: dict[str, Any]) -> dict[str, Any]:
    """Return a summary with the interval of its robust accuracy, where it tells the images."""
    n, robust = summary.get("test_examples"), summary["robust_acc"]
    if type(n) is not int or n < 1 or robust is None:
        return summary
    low, high = wilson(round(min(max(robust / 100, 0.0), 1.0) * n), n)
    return summary | {"robust_acc 95": (100 * low, 100 * high)}


def _beside(folder: RunFolder) -> dict[str, Any]:
    """Return what else a run folder tells: evaluations, and the settings of `_SAME`."""
    found: dict[str, Any] = {}
    results = _results(folder.path / "eval")
    weights = weights_in(folder.last) if results else {}
    ours = {n: of for n, of in results.items() if agree(of.settings, weights, [WEIGHTS])}
    found |= {name: result.accuracy for name, result in ours.items()}
    found[_OLDER] = [f"{n} of {real(folder.path).name}" for n in results if n not in ours]
    if _AUTOATTACK in ours:
        found[f"{_AUTOATTACK} 95"] = ours[_AUTOATTACK].ci95
    with suppress(UserError):  # the table needs no settings
        settings = flat(folder.settings())
        if (classes := _CLASSES.get(str(settings.get("dataset.name")))) is not None:
            found["classes"] = classes
        found |= {f"of {word}": part(settings) for word, part in _SAME.items()}
        found[_THREAT] = threat(settings)
    return found


def _results(folder: Path) -> dict[str, Result]:
    """Return AutoAttack's and each engine's result by its name.

    Raises:
        UserError: an image is verified and yet broken by an attack.
    """
    names = {file.stem for file in folder.glob(f"{VERIFIED}*.json")}
    engines = {n for n in names if {*n.removeprefix(VERIFIED).split("-")} <= {*ENGINES, ANY}}
    if engines:
        chain.check(folder)
    results = {name: Result.read(folder, name) for name in (_AUTOATTACK, *sorted(engines))}
    return {name: result for name, result in results.items() if result is not None}


def threat(settings: Mapping[str, Any]) -> str:
    """Return what a run's PGD attacks with, `L∞ 0.031, 20 steps`."""
    norm = _NORMS.get(str(settings.get("attack.name")), "L∞")
    epsilon, steps = settings.get("eval.epsilon"), settings.get("eval.steps")
    if epsilon is None or steps is None:
        return NONE
    length = f"{epsilon:.3g}" if isinstance(epsilon, float) else epsilon
    return f"{norm} {length}, {counted(steps, 'step')}"


def _ball(runs: Runs, baseline: Runs) -> str:
    del baseline
    threats = {str(run.get(_THREAT, NONE)) for run in runs}
    return threats.pop() if len(threats) == 1 else "several"


def _fractions(runs: Runs, baseline: Runs) -> str:
    """Return the shares of boundary, robust and outlier examples, means over the runs."""
    del baseline
    keys = ("f_b", "f_r", "f_o")
    if any(run.get(key) is None for run in runs for key in keys):
        return NONE
    return "/".join(f"{statistics.fmean(run[key] for run in runs):.2f}" for key in keys)


_CLASSES = {name.value: count for name, count in CLASSES.items()}
_THREAT = "threat"
_NORMS = {"l2_pgd": "L2", "own": "own ball"}


_AUTOATTACK = "autoattack"
_OLDER = "results of older weights"
_SAME = {"data": images_of, "network": network_of}
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
    ("PGD 95 %", _interval("robust_acc")),
    ("PGD's ball", _ball),
    ("AutoAttack %", _mean(_AUTOATTACK, ".2f")),
    ("AutoAttack 95 %", _interval(_AUTOATTACK)),
    ("F_B/F_R/F_O", _fractions),
    ("mean steps", _mean("attack_steps_mean", ".1f")),
    ("TFLOP", _mean("flops", ".3g", divisor=1e12)),
    ("speedup (FLOPs)", _mean("speedup_flops", ".2f", "×")),
    ("speedup (measured)", _mean("speedup_measured", ".2f", "×")),
    ("training s", _mean("train_seconds", ".1f")),
    ("times faster than row 1", _against_first),
]


def _with_engines(known: Iterable[str]) -> list[tuple[str, Cell]]:
    """Return the columns with one for each engine that has verified, behind the attacks'."""
    names = sorted(key for key in known if key.startswith(VERIFIED))
    engines = [(f"{_ENGINE} {n.removeprefix(VERIFIED)} %", _mean(n, ".2f")) for n in names]
    at = [head for head, _ in COLUMNS].index("AutoAttack 95 %") + 1
    return [*COLUMNS[:at], *engines, *COLUMNS[at:]]


_SPARSE: list[tuple[str, Cell]] = [
    ("best PGD %", _mean("best_robust_acc", ".2f")),
    ("best − final", _less("best_robust_acc", "robust_acc")),
    ("train − test", _less("train_robust_acc", "robust_acc")),
    ("density", _or_dense("density", ".3f", 1.0)),
    ("share of MACs", _or_dense("macs_share", ".3f", 1.0)),
    ("TFLOP executed", _or_dense("flops_executed", ".3g", "flops", divisor=1e12)),
    ("TFLOP counted", _or_dense("flops_counted", ".3g", "flops", divisor=1e12)),
    ("speedup (counted)", _or_dense("speedup_counted", ".2f", "speedup_flops", unit="×")),
]
_LEFT_OUT = "Left out, of other weights than the run's last: {}; btrain eval makes them anew."
_TOO_FEW = "Two seeds are too few for an interval over seeds."
_AT_CHANCE = (
    "At chance: the clean accuracy is hardly above that of guessing, so that nothing can be read "
    "from robust accuracy and speedup."
)
_MASKED_KERNELS = (
    "speedup (FLOPs) is the allocator's part, speedup (counted) that of the zeros with it. Counted "
    "TFLOP leave out multiply-adds by weights that are 0; masks of single weights do not speed up "
    "dense kernels, which execute them."
)
