"""The picture of a sheet, by its kind."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING

from btrain.paper.sheets import drawing, heat, training_pictures
from btrain.paper.sheets.arithmetic import Spread, spread
from btrain.paper.sheets.drawing import BLUE, GREY, INK, SOFT, VERMILLION
from btrain.paper.sheets.sheet import Line, Sheet
from btrain.paper.sheets.table import metric_name, paper

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(sheet: Sheet) -> dict[str, bytes]:
    """The sheet's figure as "png" and "svg"; empty while there is nothing to draw.

    matplotlib must be installed.
    """
    kinds: dict[str, Callable[[Sheet], Figure | None]] = {
        "heatmaps": heatmaps,
        "tradeoff": _tradeoff,
        "fractions": training_pictures.fractions,
        "scores": training_pictures.scores,
        "allocation": training_pictures.allocation,
    }
    with drawing.styled():
        figure = kinds.get(sheet.plan.kind, _table)(sheet)
        return {} if figure is None else drawing.files(figure)


def _table(sheet: Sheet) -> Figure | None:
    """Robust accuracy of every row: mean, standard deviation and seeds, beside the paper's."""
    lines = [line for line in sheet.lines if line.values.get(sheet.robust)]
    if not lines:
        return None
    height = 1.5 + 0.46 * len(sheet.lines)
    below = drawing.scale_words(sheet)
    if sheet.notes:
        below = f"{drawing.seed_words(sheet)}. Unlike the paper: {', '.join(sheet.notes)}."
    figure = drawing.new(8, height, sheet.plan.title, below)
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


def _legend_above(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.3, fontsize=9)


def heatmaps(sheet: Sheet) -> Figure | None:
    """Three grids on one scale, and in the fourth quarter what they show."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    found = heat.grids(sheet)
    values = [value for grid in found for value in grid.cells.values()]
    if not values:
        return None
    low, high = 5 * int(min(values) // 5), 5 * -int(-max(values) // 5)
    below = f"robust accuracy under {heat.attack_words(sheet)}; {drawing.scale_words(sheet)}"
    figure = drawing.new(8.4, 8.6, sheet.plan.title, below)
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
    """The colour bar, and what stands beside the colours."""
    axes.axis("off")
    inside = axes.inset_axes((0.05, 0.86, 0.9, 0.06))
    bar = figure.colorbar(image, cax=inside, orientation="horizontal")  # type: ignore[arg-type]
    bar.set_label(f"robust accuracy (%), mean over seeds,\n{heat.attack_words(sheet)}")
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
    if any(len(grid.cells) < len(grid.steps) ** 2 for grid in heat.grids(sheet)):
        words.append("hatched: no finished run")
    text = "\n\n".join(textwrap.fill(sentence, 46) for sentence in words)
    axes.text(0.05, 0.62, text, va="top", fontsize=10, color=SOFT, transform=axes.transAxes)


def _tradeoff(sheet: Sheet) -> Figure | None:
    """Accuracies over eq. 7's speedup, a point a value of the axis."""
    points = [(line, spread(line.values["theoretical_speedup"])) for line in sheet.lines]
    known = [(line, x) for line, x in points if x and line.values["clean_acc"]]
    if not known:
        return None
    axis = sheet.plan.axis or ""
    named = {"bt.gamma": "γ", "bt.n_r": "N_R", "bt.n_b": "N_B"}.get(axis, axis)
    below = f"beside the points: {named}, bars: standard deviation; {drawing.scale_words(sheet)}"
    theirs = _printed(sheet)
    figure = drawing.new(9.6 if theirs else 8, 5, sheet.plan.title, below)
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
        axes.axvline(x.mean, color=drawing.RULE, linewidth=0.8, zorder=0)
    _name_points(axes, swept, axis, sheet.robust)
    axes.set(xlabel="theoretical speedup, eq. 7 (×)", ylabel="accuracy (%)")
    axes.grid(axis="y")
    axes.margins(x=0.07, y=0.12)
    _legend_above(axes)
    return figure


def _printed(sheet: Sheet) -> list[tuple[Line, float]]:
    """The rows of which the paper prints both accuracies, with its speedup by eq. 7."""
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
    """The numbers that the paper prints of these rows, on axes of their own."""
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
    """The swept value at each robust point, above and below in turn: they may be close."""
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
