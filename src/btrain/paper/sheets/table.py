"""The words and numbers of a sheet for people: its table or grids, its legend, its claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from btrain.pages.tables import NONE
from btrain.paper.sheets import bounded, cost, sparse
from btrain.paper.sheets.arithmetic import FEWEST_DIFFERING, Spread, interval, spread
from btrain.paper.sheets.sheet import FLOPS, MEASURED, Line, Sheet, Verdict
from btrain.runs.json_fields import is_number
from btrain.runs.read import FINISHED
from btrain.settings.evaluation import VERIFIED

PAPER, GAP = "paper", "ours − paper"  # heads of columns that belong to the one before
_STEPS = {"bt.n_b": "N_B", "bt.n_o": "N_O", "bt.n_r": "N_R"}  # in the order of Figure 2
_NAMES = {
    "pgd20": "PGD-20",
    "pgd100x10": "PGD-100×10",
    "pgd1000x5": "PGD-1000×5",
    "autoattack": "AutoAttack",
    "corruptions": "corruptions",
    "clean_acc": "clean",
    "theoretical_speedup": "speedup, eq. 7",
    FLOPS: "speedup, FLOPs",
    MEASURED: "speedup, measured",
    "train_seconds": "training time",
    **sparse.METRICS,
    **cost.METRICS,
    **bounded.METRICS,
    **bounded.NAMES,
}


def head_and_rows(sheet: Sheet) -> tuple[list[str], list[list[str]]]:
    """Return head and rows: a column a number, the paper's beside it where it has one.

    Once a run is finished, numbers that no row has are left out.
    """
    columns = [("", [line.row.label for line in sheet.lines])]
    columns.append(("seeds", [f"{line.finished} of {len(line.runs)}" for line in sheet.lines]))
    columns += _sparse(sheet) if sheet.plan.kind == "sparse" else _of_a_table(sheet)
    if sheet.plan.kind not in bounded.KINDS:
        seconds = [spread(line.values["train_seconds"]) for line in sheet.lines]
        columns.append(("training s", [text(found, ".1f") for found in seconds]))
    if any(line.finished for line in sheet.lines):
        columns = _known(columns)
    head = [name for name, _ in columns]
    return head, [list(cells) for cells in zip(*(cells for _, cells in columns), strict=True)]


def _known(columns: Sequence[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Return the columns without those that hold no value, a number's and the paper's together."""
    kept: list[tuple[str, list[str]]] = []
    together: list[tuple[str, list[str]]] = []
    for column, (after, _) in zip(columns, [*columns[1:], ("", [])], strict=True):
        together.append(column)
        if after in (PAPER, GAP):
            continue
        if any(cell != NONE for _, cells in together for cell in cells):
            kept += together
        together = []
    return kept


def _of_a_table(sheet: Sheet) -> list[tuple[str, list[str]]]:
    """Return accuracies, fractions and speedups."""
    columns = []
    for metric in ("clean_acc", sheet.robust, *sheet.attacks):
        columns += _accuracy(sheet, metric)
        if metric == sheet.robust and any(line.test for line in sheet.lines):
            columns.append(("p", [_p(line) for line in sheet.lines]))
    if sheet.plan.kind in bounded.KINDS:
        return columns + _bounded(sheet)
    columns += _fractions(sheet)
    if sheet.plan.kind == cost.KIND:
        return columns + _costs(sheet, (cost.UNITS, cost.ALL_UNITS, cost.TIMES, cost.MEMORY))
    for metric in ("theoretical_speedup", FLOPS, MEASURED):
        columns += _speedup(sheet, metric)
    return columns


def _sparse(sheet: Sheet) -> list[tuple[str, list[str]]]:
    """Return accuracies of the best and the last epoch, what is between them, and three costs."""
    columns = []
    for metric in ("best_robust_acc", "robust_acc", "overfitting", "gap", "clean_acc"):
        columns += _accuracy(sheet, metric)
    for attack in sheet.attacks:
        columns += _accuracy(sheet, attack)
    for metric in ("density", "macs_share", "counted", "executed"):
        found = [spread(line.values.get(metric, {})) for line in sheet.lines]
        columns.append((metric_name(sheet, metric), [text(ours, ".3f") for ours in found]))
        papers = [line.row.paper.get(metric) for line in sheet.lines]
        if any(theirs is not None for theirs in papers):
            columns.append((PAPER, [NONE if p is None else f"{p:.3f}" for p in papers]))
    return columns + _speedup(sheet, MEASURED)


def metric_name(sheet: Sheet, metric: str) -> str:
    """Return a metric's name for people; PGD with the steps that the runs' own evaluation had."""
    if metric == "robust_acc" and sheet.plan.kind == "sparse":
        return f"final, {_NAMES['pgd20'] if sheet.pgd_steps == 20 else 'PGD'}"
    if metric == "robust_acc":
        return "PGD" if sheet.pgd_steps is None else f"PGD-{sheet.pgd_steps}"
    if metric.startswith(VERIFIED):
        return f"verified, {metric.removeprefix(VERIFIED)}"
    return _NAMES.get(metric, metric)


def text(found: Spread | None, form: str, unit: str = "") -> str:
    """Return mean ± standard deviation."""
    if found is None:
        return NONE
    deviation = "" if found.sd is None else f" ± {found.sd:{form}}"
    return f"{found.mean:{form}}{deviation}{unit}".replace("-", "−")


def signed(value: float, form: str = ".2f") -> str:
    """Return a number with its sign, and a minus as wide as the plus."""
    return f"{value:+{form}}".replace("-", "−")


def _accuracy(sheet: Sheet, metric: str) -> list[tuple[str, list[str]]]:
    found = [spread(line.values.get(metric, {})) for line in sheet.lines]
    papers = [paper(line, metric) for line in sheet.lines]
    columns = [(f"{metric_name(sheet, metric)} %", [text(ours, ".2f") for ours in found])]
    if any(theirs is not None for theirs in papers):
        columns.append((PAPER, [NONE if p is None else f"{p:.2f}" for p in papers]))
        gaps = [
            NONE
            if ours is None or theirs is None or not line.on_the_papers_data
            else signed(ours.mean - theirs)
            for line, ours, theirs in zip(sheet.lines, found, papers, strict=True)
        ]
        if set(gaps) != {NONE}:
            columns.append((GAP, gaps))
    return columns


def paper(line: Line, metric: str) -> float | None:
    """Return the paper's number; robust accuracy may stand under the name of its attack."""
    other = {"robust_acc": "pgd20", "corruptions": "robust_acc"}.get(metric)
    found = line.row.paper.get(metric)
    return found if found is not None or other is None else line.row.paper.get(other)


def _p(line: Line) -> str:
    if line.test is None:
        return "baseline" if line.row.name == line.baseline else NONE
    if line.test.p is None:
        return NONE
    return "< 0.001" if line.test.p < 0.001 else f"{line.test.p:.3f}"


def _fractions(sheet: Sheet) -> list[tuple[str, list[str]]]:
    keys = ("f_b", "f_r", "f_o")
    ours, theirs = [], []
    for line in sheet.lines:
        means = [spread(line.values[key]) for key in keys]
        ours.append(" / ".join(NONE if m is None else f"{m.mean:.2f}" for m in means))
        papers = [line.row.paper.get(key) for key in keys]
        theirs.append(" / ".join(NONE if p is None else f"{p:.2f}" for p in papers))
    empty = " / ".join([NONE] * 3)
    columns = [("F_B / F_R / F_O", [NONE if cell == empty else cell for cell in ours])]
    if set(theirs) != {empty}:
        columns.append((PAPER, [NONE if cell == empty else cell for cell in theirs]))
    return columns


def _bounded(sheet: Sheet) -> list[tuple[str, list[str]]]:
    """Return the columns of training by bounds behind the accuracies: who is bounded, and time."""
    found = [spread(line.values[bounded.BOUNDED]) for line in sheet.lines]
    share = (metric_name(sheet, bounded.BOUNDED), [text(ours, ".2f") for ours in found])
    return [share, *_costs(sheet, (bounded.EPOCH, cost.TIMES, cost.MEMORY))]


def _costs(sheet: Sheet, metrics: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the columns of what training costs; memory only if a row has a number for it."""
    columns = []
    for metric in metrics:
        found = [spread(line.values[metric]) for line in sheet.lines]
        short = metric == cost.UNITS or (metric == cost.TIMES and sheet.plan.kind == cost.KIND)
        cells = [text(ours, ".2f" if short else ".1f") for ours in found]
        if metric == cost.MEMORY and set(cells) == {NONE}:
            continue
        if metric == cost.TIMES:
            cells = [line.refused or cell if cell == NONE else cell
                     for line, cell in zip(sheet.lines, cells, strict=True)]  # fmt: skip
        columns.append((metric_name(sheet, metric), cells))
    return columns


def _speedup(sheet: Sheet, metric: str) -> list[tuple[str, list[str]]]:
    cells = []
    for line in sheet.lines:
        found = spread(line.values[metric])
        refused = line.refused if metric == MEASURED and found is None else None
        cells.append(refused or text(found, ".2f", "×"))
    columns = [(metric_name(sheet, metric), cells)]
    papers = [line.row.paper.get(metric) for line in sheet.lines]
    if any(theirs is not None for theirs in papers):
        columns.append((PAPER, [NONE if p is None else f"{p:.1f}×" for p in papers]))
    return columns


@dataclass(frozen=True)
class Grid:
    """A leave-one-out grid of Figure 2: one class's steps are 0, the other two vary.

    Attributes:
        zero, x, y: N_B, N_R or N_O.
        steps: of either axis, rising.
        cells: (steps of x, steps of y) -> mean robust accuracy over seeds, percent.
    """

    zero: str
    x: str
    y: str
    steps: list[int]
    cells: dict[tuple[int, int], float]


def grids(sheet: Sheet) -> list[Grid]:
    """Return the three grids: of the class whose steps a row does not sweep, or sweeps to 0."""
    steps = sorted({n for line in sheet.lines for n in _swept(line).values()})
    return [_grid(sheet, zero, steps) for zero in _STEPS]


def _grid(sheet: Sheet, zero: str, steps: list[int]) -> Grid:
    x, y = (key for key in ("bt.n_b", "bt.n_r", "bt.n_o") if key != zero)
    cells = {}
    for line in sheet.lines:
        budget = _swept(line)
        found = spread(line.values[sheet.robust])
        if {x, y} <= budget.keys() and not budget.get(zero) and found is not None:
            cells[budget[x], budget[y]] = found.mean
    return Grid(_STEPS[zero], _STEPS[x], _STEPS[y], steps, cells)


def _swept(line: Line) -> dict[str, int]:
    """Return the steps of the classes that a row sweeps, by their keys."""
    swept = line.row.swept
    return {key: int(swept[key]) for key in _STEPS if swept.get(key, "").isdecimal()}


def attack_words(sheet: Sheet) -> str:
    """Return the attack of the grids with ε of the evaluations or settings: "PGD-20, ε = 0.2"."""
    radii: set[float] = set()
    for run in (run for line in sheet.lines for run in line.runs.values()):
        if run.state == FINISHED:
            told: Any = run.config.get("eval.epsilon")
            if sheet.robust != "robust_acc":
                found = run.evaluation(sheet.robust)
                told = found and found[1].get("epsilon")
            radii |= {float(told)} if is_number(told) else set()
    name = metric_name(sheet, sheet.robust)
    values = " or ".join(f"{radius:.4g}" for radius in sorted(radii))
    return f"{name}, ε = {values}" if values else name


def grid_table(grid: Grid) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of a grid, the steps of y downwards."""
    head = [f"{grid.y} ↓ {grid.x} →", *map(str, grid.steps)]
    rows = []
    for y in grid.steps:
        cells = (grid.cells.get((x, y)) for x in grid.steps)
        rows.append([str(y), *(NONE if cell is None else f"{cell:.1f}" for cell in cells)])
    return head, rows


def legend(sheet: Sheet) -> list[str]:
    """Return what a reader must know to read the table, a sentence each."""
    under = (
        "the mean over corruptions" if sheet.robust == "corruptions" else "accuracy under PGD-20"
    )
    sentences = ["Numbers are means ± sample standard deviations over seeds."]
    baselines = list(dict.fromkeys(line.baseline for line in sheet.lines if line.baseline))
    labels = {line.row.name: line.row.label for line in sheet.lines}
    named = f"Baseline: {' and '.join(labels[name] for name in baselines)}."
    if sheet.plan.kind == "sparse":
        sentences += [named, sparse.LEGEND]
    elif sheet.plan.kind in bounded.KINDS:
        sentences += [named, bounded.LEGEND]
    elif sheet.plan.kind == cost.KIND:
        sentences += [named, cost.LEGEND]
    elif baselines:
        sentences.append(
            f"{named} Speedups by FLOPs and "
            "by time are the baseline's over the row's own, seed by seed, of an epoch over as many "
            "images: counted FLOPs, seconds of training on the same machine, as many runs at a "
            "time where their folders tell that."
        )
    else:
        sentences.append(
            "Speedups by FLOPs are over the plain defense of the same settings, nothing computed "
            "twice; there is no baseline to divide times by."
        )
    if any(line.test for line in sheet.lines):
        sentences.append(
            f"p: a paired test of {under} against the baseline on the same test examples; "
            f"{_test_words(sheet)}; it does not tell what other seeds would give."
        )
    return sentences


def _test_words(sheet: Sheet) -> str:
    """Return how the p of the rows were computed."""
    exact = "McNemar's exact test"
    several = (
        "the normal tail of z = Σd/√Σd², d an example's difference in the mean over the common "
        f"seeds, {NONE} where fewer than {FEWEST_DIFFERING} examples differ"
    )
    seeds = {line.test.seeds == 1 for line in sheet.lines if line.test}
    if seeds == {True} and sheet.robust != "corruptions":
        return exact
    if True in seeds and sheet.robust != "corruptions":
        return f"with one common seed {exact}, with several {several}"
    return several


CLAIMS = (
    "A claim holds if the whole 95 % interval of the difference (Student's t over the seeds) lies "
    "within its limits, fails if the whole interval lies outside, and is undecided otherwise, also "
    "where all differences are the limit itself or the networks are less than twice as good as "
    "guessing. The interval knows of other seeds only, not of other test images."
)
"""The meaning of the verdicts, for readers."""


def machines(sheet: Sheet) -> list[str]:
    """Return the machines of the finished runs, the most frequent first."""
    counts: dict[str, int] = {}
    for run in (run for line in sheet.lines for run in line.runs.values() if run.summary):
        name = ", ".join(run.machine) if run.machine else str(run.summary.get("device"))
        name += "" if run.jobs is None else f", {run.jobs} at a time"
        counts[name] = counts.get(name, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [f"{name} ({count} run{'s' if count > 1 else ''})" for name, count in ordered]


def claim_text(sheet: Sheet, verdict: Verdict) -> str:
    """Return a claim's evidence: the mean difference, its interval and the differences by seed."""
    found, ends = spread(verdict.differences), interval(verdict.differences)
    what = metric_name(sheet, verdict.claim.metric)
    limits = _limits(verdict.claim.at_least, verdict.claim.at_most)
    if found is None:
        return f"{what}, {limits}"
    mean = signed(found.mean) if verdict.claim.than else f"{found.mean:.2f}".replace("-", "−")
    each = ", ".join(f"{value:.2f}".replace("-", "−") for value in verdict.differences.values())
    span = f", 95 % interval {signed(ends[0])} to {signed(ends[1])}" if ends else ""
    return f"{what}, {limits}: {mean}{span} (by seed: {each})"


def _limits(at_least: float | None, at_most: float | None) -> str:
    sides = [(at_least, "at least"), (at_most, "at most")]
    words = [f"{side} {limit:g}".replace("-", "−") for limit, side in sides if limit is not None]
    return " and ".join(words) or "any difference"


def status(sheet: Sheet) -> str:
    """Return in one line how much of the sheet is there."""
    runs = [run for line in sheet.lines for run in line.runs.values()]
    rows = sum(line.finished == len(line.runs) for line in sheet.lines)
    words = [f"{rows} of {len(sheet.lines)} rows done"]
    done = sum(line.finished for line in sheet.lines)
    words.append(f"{done} of {len(runs)} runs finished")
    for state in ("running", "failed", "unfinished"):
        if count := sum(run.state == state for run in runs):
            words.append(f"{count} {state}")
    for word in ("holds", "fails"):
        if count := sum(verdict.verdict == word for verdict in sheet.verdicts):
            verb = word if count == 1 else {"holds": "hold", "fails": "fail"}[word]
            words.append(f"{count} of {len(sheet.verdicts)} claims {verb}")
    return ", ".join(words)
