"""Pictures of what happens during training: fractions, scores, and one batch's allocation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from btrain.paper.sheets import drawing
from btrain.paper.sheets.drawing import CLASSES, GREY, SOFT
from btrain.paper.sheets.notes import IMAGES
from btrain.paper.sheets.sheet import Line, Sheet
from btrain.runs.json_fields import is_number
from btrain.runs.read import Run
from btrain.untrusted import read_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LARGEST = 4 << 20  # bytes


def fractions(sheet: Sheet) -> Figure | None:
    """The share of each class over the epochs."""
    keys = {"boundary": "f_b", "robust": "f_r", "outlier": "f_o"}
    return _over_training(sheet, keys, "fraction of the examples", iterations=False)


def scores(sheet: Sheet) -> Figure | None:
    """The mean signed prediction variance of each class: of single batches, where all runs logged
    them (`train.score_every`), else of epochs."""
    keys = {name: f"score_{name}" for name in CLASSES}
    return _over_training(sheet, keys, "mean signed prediction variance", iterations=True)


def _over_training(
    sheet: Sheet, keys: dict[str, str], label: str, *, iterations: bool
) -> Figure | None:
    lines = [line for line in sheet.lines if any(run.metrics for run in line.runs.values())][:4]
    if not lines:
        return None
    single = iterations and all(map(_logs_batches, lines))
    below = f"lines: mean over seeds, bands: lowest to highest; {drawing.scale_words(sheet)}"
    if single:
        below = f"a point is one mini-batch; {below}"
    elif iterations:
        below = f"a point is the mean of an epoch, for the runs logged no single batches; {below}"
    columns = min(len(lines), 2)
    rows = -(-len(lines) // columns)
    figure = drawing.new(8, 1.0 + 3.6 * rows, sheet.plan.title, below)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in panels.flat[len(lines) :]:
        axes.set_visible(False)
    for line, axes in zip(lines, panels.flat, strict=False):
        batches = _batches(line) if iterations else None
        for name, key in keys.items():
            _band(
                axes, name, _by_batch(line, name) if single else _by_epoch(line, key, batches or 1)
            )
        axes.set_xlabel("training iterations" if batches or single else "epoch")
        if len(lines) > 1:
            axes.set_title(line.row.label)
        if iterations:
            axes.axhline(0, color=GREY, linewidth=0.8)
        else:
            axes.set_ylim(0, 1)
        axes.locator_params(axis="x", integer=True)
        axes.grid(axis="y")
        axes.margins(x=0.02)
    for axes in panels[:, 0]:
        axes.set_ylabel(label)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    panels[0, 0].legend(
        handles, labels, loc="lower left", bbox_to_anchor=(0, 1.06 if len(lines) > 1 else 1.0),
        ncols=3, borderaxespad=0.3, fontsize=9,
    )  # fmt: skip
    return figure


def _batches(line: Line) -> int | None:
    """Batches an epoch, where the settings tell."""
    config = next(run.config for run in line.runs.values() if run.metrics)
    images: Any = config.get("dataset.train_examples")
    if images is None:
        images, _ = IMAGES.get(str(config.get("dataset.name")), (None, None))
    size: Any = config.get("train.batch_size")
    known = is_number(images) and is_number(size) and size > 0
    return -(-int(images) // int(size)) if known else None


def _logs_batches(line: Line) -> bool:
    """Whether all runs that have begun logged the scores of single batches."""
    return all("scores" in run.metrics[0] for run in line.runs.values() if run.metrics)


def _by_batch(line: Line, name: str) -> dict[int, list[float]]:
    """A class' mean scores by iteration, of the seeds that know it; what is unsound is left out."""
    column, points = 1 + list(CLASSES).index(name), dict[int, list[float]]()
    for metrics in (metrics for run in line.runs.values() for metrics in run.metrics):
        rows = metrics.get("scores")
        for row in rows if isinstance(rows, list) else []:
            if (
                isinstance(row, list)
                and len(row) == 4
                and all(map(is_number, (row[0], row[column])))
            ):
                points.setdefault(int(row[0]), []).append(float(row[column]))
    return points


def _by_epoch(line: Line, key: str, batches: int) -> dict[int, list[float]]:
    """A number of the epochs by what was done at their ends, of the seeds that know it."""
    points: dict[int, list[float]] = {}
    for metrics in (metrics for run in line.runs.values() for metrics in run.metrics):
        if is_number(metrics.get(key)):
            points.setdefault(int(metrics["epoch"]) * batches, []).append(float(metrics[key]))
    return points


def _band(axes: Axes, name: str, points: dict[int, list[float]]) -> None:
    """One class over training."""
    title, colour, marker, style = CLASSES[name]
    x = np.array(sorted(points))
    values = [points[place] for place in sorted(points)]
    if not values:
        return
    sparse = max(1, len(x) // 12)
    axes.plot(
        x, [np.mean(v) for v in values], color=colour, linestyle=style, linewidth=1.8,
        marker=marker, markersize=5, markevery=sparse, label=f"{title} x_{title[0].upper()}",
    )  # fmt: skip
    axes.fill_between(
        x, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.18, linewidth=0
    )


@dataclass(frozen=True)
class Batch:
    """One batch: of each of m examples the SVar, the outcome of its attack and its steps."""

    svar: list[float]
    outcome: list[str]
    steps: list[int]


def read_batch(run: Run) -> Batch | None:
    """A run's `allocation.json`, or None where there is no sound one."""
    try:
        content = json.loads(read_text(run.folder / "allocation.json", _LARGEST))
        svar, outcome, steps = content["svar"], content["outcome"], content["steps"]
        sound = (
            len(svar) == len(outcome) == len(steps) > 0
            and all(is_number(value) for value in (*svar, *steps))
            and set(outcome) <= CLASSES.keys()
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return Batch(svar, outcome, steps) if sound else None


def allocation(sheet: Sheet) -> Figure | None:
    """The distribution of SVar in a batch, and the steps that its examples were given."""
    runs = [(line, seed, run) for line in sheet.lines for seed, run in line.runs.items()]
    drawn = next(((*found, b) for found in runs if (b := read_batch(found[2])) is not None), None)
    if drawn is None:
        return None
    line, seed, _, batch = drawn
    below = f"one batch of {len(batch.svar)} examples, {line.row.label}, seed {seed}; "
    below += drawing.scale_words(sheet)
    figure = drawing.new(9, 4.4, sheet.plan.title, below)
    left, right = figure.subplots(1, 2)
    _distribution(left, batch)
    _steps(right, batch)
    return figure


def _distribution(axes: Axes, batch: Batch) -> None:
    svar, outcome = np.array(batch.svar), np.array(batch.outcome)
    names = list(CLASSES)[::-1]  # outliers first: at the bottom, where SVar is lowest
    bins = np.histogram_bin_edges(svar, bins=30)
    axes.hist(
        [svar[outcome == name] for name in names],
        bins=bins.tolist(),
        stacked=True,
        color=[CLASSES[name][1] for name in names],
        label=[CLASSES[name][0] for name in names],
        edgecolor="white",
        linewidth=0.4,
    )
    axes.locator_params(axis="x", nbins=6)
    axes.set(xlabel="signed prediction variance (SVar)", ylabel="examples")
    axes.set_title("(a) SVar by the attack’s outcome")
    axes.legend(fontsize=9)
    axes.grid(axis="y")


def _steps(axes: Axes, batch: Batch) -> None:
    order = np.argsort(batch.svar, kind="stable")
    svar, outcome = np.array(batch.svar)[order], np.array(batch.outcome)[order]
    rank = np.arange(len(order))
    for name, (title, colour, marker, _) in CLASSES.items():
        of = outcome == name
        axes.plot(rank[of], svar[of], marker, color=colour, markersize=3.5, label=title)
    axes.set(xlabel="examples, sorted by SVar", ylabel="signed prediction variance (SVar)")
    axes.set_title("(b) the steps that each was given")
    steps = axes.twinx()
    steps.step(rank, np.array(batch.steps)[order], where="mid", color=GREY, linewidth=1.8)
    steps.set_ylabel("attack steps (grey line)", color=SOFT)
    steps.set_ylim(bottom=-0.4)
    steps.locator_params(axis="y", integer=True)
    steps.spines["right"].set_visible(True)
    axes.set_zorder(steps.get_zorder() + 1)
    axes.patch.set_visible(False)
