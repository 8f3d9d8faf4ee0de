"""The picture of a sheet, by its kind."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from btrain.pages.pictures import drawn, look
from btrain.paper.batch import Batch, read_batch
from btrain.paper.sheets import bounded
from btrain.paper.sheets.arithmetic import Spread, spread
from btrain.paper.sheets.notes import data_name, model_name
from btrain.paper.sheets.sheet import Line, Sheet
from btrain.paper.sheets.table import attack_words, grids, metric_name, paper
from btrain.runs.json_fields import is_number
from btrain.settings.run import IMAGES
from btrain.terminal import counted, plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind eyes tell apart; shapes and lines differ as well.
INK, SOFT, RULE = "#1b1e23", "#5b626d", "#d5d9df"
BLUE, VERMILLION, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#8a9099"
CLASSES = {
    "boundary": ("boundary", VERMILLION, "o", "-"),
    "robust": ("robust", BLUE, "s", "--"),
    "outlier": ("outlier", GREEN, "^", "-."),
}
"""class -> its name, colour, marker and line."""

_OWN = {
    "svg.fonttype": "path",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "hatch.color": GREY,
}
_DPI = 144


def draw(sheet: Sheet) -> dict[str, bytes]:
    """Return the sheet's figure as "png" and "svg"; empty while there is nothing to draw.

    matplotlib must be installed.
    """
    kinds: dict[str, Callable[[Sheet], Figure | None]] = {
        "heatmaps": heatmaps,
        "tradeoff": _tradeoff,
        "fractions": fractions,
        "scores": scores,
        "allocation": allocation,
        "sparse": sparse,
        "verified": _verified,
        "front": _front,
    }
    with styled():
        figure = kinds.get(sheet.plan.kind, _table)(sheet)
        return {kind: drawn(figure, kind, dpi=_DPI) for kind in ("png", "svg")} if figure else {}


def styled() -> Any:
    """Return a context in which figures have the look of the sheets."""
    return look(INK, GREY, RULE, _OWN)


def _table(sheet: Sheet) -> Figure | None:
    """Draw robust accuracy of every row: mean, standard deviation and seeds, beside the paper's."""
    lines = [line for line in sheet.lines if line.values.get(sheet.robust)]
    if not lines:
        return None
    height = 1.5 + 0.46 * len(sheet.lines)
    below = scale_words(sheet)
    if sheet.notes:
        below = f"{seed_words(sheet)}. Unlike the paper: {', '.join(sheet.notes)}."
    figure = _new(8, height, sheet.plan.title, below)
    axes = figure.add_subplot()
    for y, line in enumerate(sheet.lines):
        values = list(line.values.get(sheet.robust, {}).values())
        ours, theirs = spread(line.values.get(sheet.robust, {})), paper(line, sheet.robust)
        if ours is not None:
            axes.plot(values, [y] * len(values), "|", color=BLUE, markersize=9, alpha=0.6)
            axes.errorbar(
                ours.mean, y, xerr=ours.sd, fmt="o", color=BLUE, capsize=3, markersize=6.5
            )
        if theirs is not None:
            axes.plot(theirs, y, "D", color=VERMILLION, markersize=6.5, fillstyle="none")
    axes.set_yticks(
        range(len(sheet.lines)), [textwrap.fill(line.row.label, 34) for line in sheet.lines]
    )
    axes.set_ylim(len(sheet.lines) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.margins(x=0.06)
    axes.set_xlabel(f"robust accuracy (%), {metric_name(sheet, sheet.robust)}")
    axes.plot([], [], "o", color=BLUE, label="ours: mean ± standard deviation, | a seed")
    if any(paper(line, sheet.robust) is not None for line in sheet.lines):
        axes.plot([], [], "D", color=VERMILLION, fillstyle="none", label="the paper")
    _legend_above(axes)
    return figure


def _verified(sheet: Sheet) -> Figure | None:
    """Draw each row's clean accuracy, that under PGD, and the verified one, which enclose truth."""
    if not any(line.values.get("clean_acc") for line in sheet.lines):
        return None
    shown = (
        ("clean_acc", "clean", VERMILLION, "s"),
        (sheet.robust, metric_name(sheet, sheet.robust), BLUE, "o"),
        (bounded.BEST, metric_name(sheet, bounded.BEST), GREEN, "^"),
    )
    below = scale_words(sheet)
    figure = _new(8.6, 1.6 + 0.3 * len(sheet.lines), sheet.plan.title, below)
    axes = figure.add_subplot()
    for y, line in enumerate(sheet.lines):
        means = []
        for metric, _, colour, marker in shown:
            if (found := spread(line.values.get(metric, {}))) is not None:
                means.append(found.mean)
                axes.errorbar(
                    found.mean, y, xerr=found.sd, fmt=marker, color=colour, capsize=2.5,
                    markersize=5.5, elinewidth=1,
                )  # fmt: skip
        if means:
            axes.plot([min(means), max(means)], [y, y], color=RULE, linewidth=1.2, zorder=0)
    for _, name, colour, marker in shown:
        axes.plot([], [], marker, color=colour, label=name)
    axes.set_yticks(range(len(sheet.lines)), [line.row.label for line in sheet.lines])
    axes.set_ylim(len(sheet.lines) - 0.5, -0.5)
    axes.set_xlim(-3, 103)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel("accuracy (%): mean ± standard deviation over seeds")
    _legend_above(axes)
    return figure


def _front(sheet: Sheet) -> Figure | None:
    """Draw verified over clean accuracy, a line for each method's settings.

    Methods of a single setting have no front, and are left out where others have one.
    """
    methods: dict[str, list[tuple[Spread, Spread, str]]] = {}
    for line in sheet.lines:
        x, y = spread(line.values["clean_acc"]), spread(line.values.get(bounded.BEST, {}))
        if x is not None and y is not None:
            name, _, value = line.row.label.partition(", ")
            methods.setdefault(name, []).append((x, y, value))
    methods = {name: points for name, points in methods.items() if len(points) > 1} or methods
    if not methods:
        return None
    figure = _new(8, 5.4, sheet.plan.title, scale_words(sheet))
    axes = figure.add_subplot()
    colours = (BLUE, VERMILLION, GREEN, "#cc79a7", "#e69f00", INK)
    for (name, points), colour, marker in zip(methods.items(), colours, "osD^vP", strict=False):
        points.sort(key=lambda point: point[0].mean)
        axes.errorbar(
            [x.mean for x, _, _ in points], [y.mean for _, y, _ in points],
            xerr=[x.sd or 0 for x, _, _ in points], yerr=[y.sd or 0 for _, y, _ in points],
            color=colour, marker=marker, linestyle="-", linewidth=1.4, elinewidth=0.8, capsize=2,
            markersize=6, label=name,
        )  # fmt: skip
        for x, y, value in points:
            axes.annotate(
                value, (x.mean, y.mean), textcoords="offset points", xytext=(5, 5), fontsize=7.5,
                color=SOFT,
            )  # fmt: skip
    axes.set(xlabel="clean accuracy (%)", ylabel="verified accuracy (%), best engine")
    axes.grid()
    axes.margins(0.1)
    _legend_above(axes)
    return figure


def _legend_above(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.3, fontsize=9)


def heatmaps(sheet: Sheet) -> Figure | None:
    """Draw three grids on one scale, and in the fourth quarter their legend."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    found = grids(sheet)
    values = [value for grid in found for value in grid.cells.values()]
    if not values:
        return None
    low, high = 5 * int(min(values) // 5), 5 * -int(-max(values) // 5)
    below = f"robust accuracy under {attack_words(sheet)}; {scale_words(sheet)}"
    figure = _new(8.4, 8.6, sheet.plan.title, below)
    panels = figure.subplots(2, 2)
    image, colours = None, colormaps["viridis"].resampled(60)
    for grid, axes, letter in zip(found, panels.flat, "abc", strict=False):
        steps = grid.steps
        table = [[grid.cells.get((x, y), float("nan")) for x in steps] for y in steps]
        edges = [position - 0.5 for position in range(len(steps) + 1)]
        top = max(high, low + 5)
        image = axes.pcolormesh(edges, edges, table, cmap=colours, vmin=low, vmax=top)
        axes.set_aspect("equal")
        for row, y in enumerate(steps):
            for column, x in enumerate(steps):
                value = grid.cells.get((x, y))
                if value is None:
                    place = (column - 0.5, row - 0.5)
                    axes.add_patch(Rectangle(place, 1, 1, fill=False, hatch="////", linewidth=0))
                    continue
                share = (value - low) / max(high - low, 5)
                ink = "white" if share < 0.55 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink)
        axes.set(xlabel=f"attack steps {grid.x}", ylabel=f"attack steps {grid.y}")
        axes.set_title(f"({letter}) {grid.zero} = 0")
        axes.set_xticks(range(len(steps)), steps)
        axes.set_yticks(range(len(steps)), steps)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    _heat_legend(figure, panels.flat[3], image, sheet)
    return figure


def _heat_legend(figure: Figure, axes: Axes, image: object, sheet: Sheet) -> None:
    """Draw the colour bar, and the words that stand beside the colours."""
    axes.axis("off")
    inside = axes.inset_axes((0.05, 0.86, 0.9, 0.06))
    bar = figure.colorbar(image, cax=inside, orientation="horizontal")  # type: ignore[arg-type]
    bar.set_label(f"robust accuracy (%), mean over seeds,\n{attack_words(sheet)}")
    if bar.solids is not None:
        bar.solids.set_rasterized(False)  # an SVG of shapes alone
    bar.outline.set_visible(False)
    words = []
    base = next((line for line in sheet.lines if line.row.name == line.baseline), None)
    found = spread(base.values[sheet.robust]) if base else None
    if base is not None and found is not None:
        deviation = "" if found.sd is None else f" ± {found.sd:.1f}"
        theirs = paper(base, "robust_acc")
        told = "" if theirs is None else f"; the paper’s: {theirs:g} %"
        words.append(f"{base.row.label}: {found.mean:.1f}{deviation} % (triangle){told}")
        inside.plot(
            found.mean, 1, "v", color=INK, clip_on=False, transform=inside.get_xaxis_transform()
        )
    if any(len(grid.cells) < len(grid.steps) ** 2 for grid in grids(sheet)):
        words.append("hatched: no finished run")
    text = "\n\n".join(textwrap.fill(sentence, 46) for sentence in words)
    axes.text(0.05, 0.62, text, va="top", fontsize=10, color=SOFT, transform=axes.transAxes)


def _tradeoff(sheet: Sheet) -> Figure | None:
    """Draw accuracies over eq. 7's speedup, a point a value of the axis."""
    points = [(line, spread(line.values["theoretical_speedup"])) for line in sheet.lines]
    known = [(line, x) for line, x in points if x and line.values["clean_acc"]]
    if not known:
        return None
    axis = sheet.plan.axis or ""
    named = {"bt.gamma": "γ", "bt.n_r": "N_R", "bt.n_b": "N_B"}.get(axis, axis)
    below = f"beside the points: {named}, bars: standard deviation; {scale_words(sheet)}"
    theirs = _printed(sheet)
    figure = _new(9.6 if theirs else 8, 5, sheet.plan.title, below)
    axes, *beside = figure.subplots(
        1, 2 if theirs else 1, squeeze=False, width_ratios=[2.6, 1] if theirs else None
    ).flat
    for panel in beside:
        _paper_points(panel, theirs, axis)
    swept = [(line, x) for line, x in known if axis in line.row.swept]
    swept.sort(key=lambda point: _value(point[0].row.swept[axis]))
    for metric, name, colour, marker, style in (
        ("clean_acc", "clean", VERMILLION, "s", "--"),
        (sheet.robust, f"robust ({metric_name(sheet, sheet.robust)})", BLUE, "o", "-"),
    ):
        _series(axes, swept, metric, f"{name} accuracy", colour, marker, style)
        for line, x in known:
            if line.row.name == line.baseline and (line, x) not in swept:
                _series(axes, [(line, x)], metric, None, colour, "*", "none")
    base = [(line, x) for line, x in known if line.row.name == line.baseline]
    for line, x in [point for point in base if point not in swept]:
        axes.plot([], [], "*", color=GREY, markersize=11, label=f"{line.row.label} (baseline)")
        axes.axvline(x.mean, color=RULE, linewidth=0.8, zorder=0)
    _name_points(axes, swept, axis, sheet.robust)
    axes.set(xlabel="theoretical speedup, eq. 7 (×)", ylabel="accuracy (%)")
    axes.grid(axis="y")
    axes.margins(x=0.07, y=0.12)
    _legend_above(axes)
    return figure


def _printed(sheet: Sheet) -> list[tuple[Line, float]]:
    """Return the rows of which the paper prints both accuracies, with its speedup by eq. 7."""
    found = []
    for line in sheet.lines:
        speedup = line.row.paper.get("theoretical_speedup")
        if speedup is None and line.row.name == line.baseline:
            speedup = 1.0
        if speedup is not None and None not in (
            paper(line, "clean_acc"),
            paper(line, "robust_acc"),
        ):
            found.append((line, speedup))
    return sorted(found, key=lambda point: point[1])


def _paper_points(axes: Axes, points: list[tuple[Line, float]], axis: str) -> None:
    """Draw the numbers that the paper prints of these rows, on axes of their own."""
    for metric, colour, marker in (("clean_acc", VERMILLION, "s"), ("robust_acc", BLUE, "o")):
        for line, x in points:
            y, swept = paper(line, metric) or math.nan, line.row.swept.get(axis)
            shape = marker if swept is not None else "*"
            size = 7 if swept is not None else 11
            axes.plot(x, y, shape, color=colour, fillstyle="none", markersize=size)
            if swept is not None:
                axes.annotate(
                    swept, (x, y), textcoords="offset points", xytext=(0, 8), ha="center",
                    fontsize=9, color=INK,
                )  # fmt: skip
    axes.set_title("the paper’s numbers")
    axes.set_xlabel("speedup, eq. 7 (×)")
    axes.grid(axis="y")
    axes.margins(x=0.2, y=0.12)


def _series(
    axes: Axes,
    points: list[tuple[Line, Spread]],
    metric: str,
    label: str | None,
    colour: str,
    marker: str,
    style: str,
) -> None:
    ys = [(x, y) for line, x in points if (y := spread(line.values.get(metric, {})))]
    if ys:
        axes.errorbar(
            [x.mean for x, _ in ys],
            [y.mean for _, y in ys],
            xerr=[x.sd or 0 for x, _ in ys],
            yerr=[y.sd or 0 for _, y in ys],
            color=colour,
            marker=marker,
            linestyle=style,
            markersize=10 if marker == "*" else 6,
            linewidth=1.8,
            elinewidth=1,
            capsize=2.5,
            label=label,
        )


def _value(swept: str) -> float:
    try:
        return float(swept)
    except ValueError:
        return 0.0


def _name_points(axes: Axes, points: list[tuple[Line, Spread]], axis: str, robust: str) -> None:
    """Write the swept value at each robust point, above and below in turn: they may be close."""
    places = sorted(
        (x.mean, y.mean + (y.sd or 0), y.mean - (y.sd or 0), line.row.swept[axis])
        for line, x in points
        if (y := spread(line.values.get(robust, {})))
    )
    for i, (x, top, bottom, value) in enumerate(places):
        above = i % 2 == 0
        axes.annotate(
            value,
            (x, top if above else bottom),
            textcoords="offset points",
            xytext=(0, 7 if above else -7),
            ha="center",
            va="bottom" if above else "top",
            fontsize=9,
            color=INK,
        )


def fractions(sheet: Sheet) -> Figure | None:
    """Draw the share of each class over the epochs."""
    keys = {"boundary": "f_b", "robust": "f_r", "outlier": "f_o"}
    return _over_training(sheet, keys, "fraction of the examples", iterations=False)


def scores(sheet: Sheet) -> Figure | None:
    """Draw the mean signed prediction variance of each class.

    Of single batches, where all runs logged them (`train.score_every`), else of epochs.
    """
    keys = {name: f"score_{name}" for name in CLASSES}
    return _over_training(sheet, keys, "mean signed prediction variance", iterations=True)


def _over_training(
    sheet: Sheet, keys: dict[str, str], label: str, *, iterations: bool
) -> Figure | None:
    lines = [line for line in sheet.lines if any(run.metrics for run in line.runs.values())][:4]
    if not lines:
        return None
    single = iterations and all(map(_logs_batches, lines))
    below = f"lines: mean over seeds, bands: lowest to highest; {scale_words(sheet)}"
    if single:
        below = f"a point is one mini-batch; {below}"
    elif iterations:
        below = f"a point is the mean of an epoch, for the runs logged no single batches; {below}"
    columns = min(len(lines), 2)
    rows = -(-len(lines) // columns)
    figure = _new(8, 1.0 + 3.6 * rows, sheet.plan.title, below)
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
    """Return the batches of an epoch, where the settings tell."""
    config = next(run.config for run in line.runs.values() if run.metrics)
    images: Any = config.get("dataset.train_examples")
    if images is None:
        sizes = {name.value: size for name, size in IMAGES.items()}
        images, _ = sizes.get(str(config.get("dataset.name")), (None, None))
    size: Any = config.get("train.batch_size")
    known = is_number(images) and is_number(size) and size > 0
    return -(-int(images) // int(size)) if known else None


def _logs_batches(line: Line) -> bool:
    """Return whether all runs that have begun logged the scores of single batches."""
    return all("scores" in run.metrics[0] for run in line.runs.values() if run.metrics)


def _by_batch(line: Line, name: str) -> dict[int, list[float]]:
    """Return a class's mean scores by iteration, of the seeds that know them; unsound ones not."""
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
    """Return a number of the epochs by the iterations at their ends, of the seeds that know it."""
    points: dict[int, list[float]] = {}
    for metrics in (metrics for run in line.runs.values() for metrics in run.metrics):
        if is_number(metrics.get(key)):
            points.setdefault(int(metrics["epoch"]) * batches, []).append(float(metrics[key]))
    return points


def _band(axes: Axes, name: str, points: dict[int, list[float]]) -> None:
    """Draw one class over training."""
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


def allocation(sheet: Sheet) -> Figure | None:
    """Draw the distribution of SVar in a batch, and the steps that its examples were given."""
    runs = ((line, seed, run) for line in sheet.lines for seed, run in line.runs.items())
    batches = ((line, seed, read_batch(run.folder)) for line, seed, run in runs)
    first = next(((line, seed, batch) for line, seed, batch in batches if batch is not None), None)
    if first is None:
        return None
    line, seed, batch = first
    below = f"one batch of {counted(len(batch.svar), 'example')}, {line.row.label}, seed {seed}; "
    below += scale_words(sheet)
    figure = _new(9, 4.4, sheet.plan.title, below)
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


def sparse(sheet: Sheet) -> Figure | None:
    """Draw train and held-out robust accuracy over the epochs, and the best and the last epoch.

    The courses are those of the rows that the paper has, of the baseline's data.
    """
    lines = [line for line in sheet.lines if any(run.metrics for run in line.runs.values())]
    own = [line for line in lines if line.baseline == sheet.plan.baseline]
    courses = [line for line in own if line.row.paper][: len(_COURSES)]
    if not courses:
        return None
    below = "dashed: running accuracy on training batches, solid: held-out images, means over "
    below += f"seeds; bands: lowest to highest; {scale_words(sheet)}"
    figure = _new(11, 1.6 + max(4.0, 0.36 * len(lines)), sheet.plan.title, below)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    for line, (colour, marker) in zip(courses, _COURSES, strict=False):
        _course(left, line, "robust_acc_train", colour, marker, "--")
        _course(left, line, "val_robust_acc", colour, marker, "-")
    left.set(xlabel="epoch", ylabel="robust accuracy (%)")
    left.set_title("(a) over training", pad=40)
    left.grid(axis="y")
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.3, fontsize=9)
    _best_and_last(right, sheet, lines)
    return figure


_COURSES = ((VERMILLION, "o"), (GREEN, "^"), (BLUE, "s"), ("#cc79a7", "D"))
"""Colours and markers of the courses."""


def _course(axes: Axes, line: Line, key: str, colour: str, marker: str, style: str) -> None:
    points = _by_epoch(line, key, 1)
    x = sorted(points)
    if not x:
        return
    held_out = style == "-"
    axes.plot(
        x, [np.mean(points[place]) for place in x], color=colour, linestyle=style, linewidth=1.7,
        marker=marker if held_out else None, markersize=4.5, markevery=max(1, len(x) // 8),
        label=line.row.label if held_out else None,
    )  # fmt: skip
    if held_out:
        low, high = ([of(points[place]) for place in x] for of in (min, max))
        axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)


def _best_and_last(axes: Axes, sheet: Sheet, lines: list[Line]) -> None:
    """Draw a row's robust accuracy at its best and at its last epoch, and the seeds of the last."""
    known = [line for line in lines if line.values.get("best_robust_acc")]
    if not known:
        axes.set_visible(False)
        return
    for y, line in enumerate(known):
        best, last = (spread(line.values[key]) for key in ("best_robust_acc", "robust_acc"))
        if best is None or last is None:
            continue
        values = list(line.values["robust_acc"].values())
        axes.plot([best.mean, last.mean], [y, y], "-", color=GREY, linewidth=1.2)
        axes.plot(values, [y] * len(values), "|", color=BLUE, markersize=8, alpha=0.6)
        axes.plot(best.mean, y, "o", color=INK, fillstyle="none", markersize=7)
        axes.plot(last.mean, y, "o", color=BLUE, markersize=6)
    axes.set_yticks(range(len(known)), [line.row.label for line in known], fontsize=8.5)
    axes.set_ylim(len(known) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.margins(x=0.06)
    axes.set_xlabel(f"robust accuracy on the test set (%), PGD-{sheet.pgd_steps or '?'}")
    axes.plot([], [], "o", color=INK, fillstyle="none", label="best epoch")
    axes.plot([], [], "o", color=BLUE, label="last epoch, | a seed")
    axes.set_title("(b) best and last epoch", pad=40)
    _legend_above(axes)


def _new(width: float, height: float, title: str, below: str) -> Figure:
    """Return an empty figure, inches, with its title above and its scale below in small print."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    wide = int(width * 9.2)
    figure.suptitle(textwrap.fill(title, wide), x=0.01, ha="left", fontsize=11.5, weight="bold")
    small = textwrap.fill(below, int(width * 14))
    figure.supxlabel(small, x=0.01, ha="left", fontsize=8.5, color=SOFT)
    return figure


def scale_words(sheet: Sheet) -> str:
    """Return the size of what is drawn: data, training images, epochs and seeds."""
    runs = [run for line in sheet.lines for run in line.runs.values() if run.config]
    words = [", ".join(sorted({data_name(run.config) for run in runs}))]
    words.append(", ".join(sorted({model_name(run.config) for run in runs})))
    sizes = {run.config.get("dataset.train_examples") for run in runs}
    words.append(_range(sizes, "training image") if sizes != {None} else "all training images")
    words.append(_range({run.config.get("train.epochs") for run in runs}, "epoch"))
    return f"{', '.join(words)}, {seed_words(sheet)}"


def seed_words(sheet: Sheet) -> str:
    """Return the number of seeds, and the profile."""
    seeds = {line.finished for line in sheet.lines if line.finished}
    return f"{_range(seeds, 'seed')}; profile {sheet.plan.profile}"


def _range(values: set[Any], of: str) -> str:
    """Return the ends of some numbers of things, `2 to 5 seeds`."""
    numbers = sorted(value for value in values if is_number(value))
    ends = [*dict.fromkeys((numbers[0], numbers[-1]))] if numbers else []
    shown = " to ".join(f"{number:,}" for number in ends) or "?"
    return f"{shown} {plural(ends[0] if len(ends) == 1 else None, of)}"
