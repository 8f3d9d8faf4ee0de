"""Drawings for a page: curves as SVG in the page's own colours, heat colours, images as PNG."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from btrain.errors import UserError
from btrain.pages import pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-ins that matplotlib accepts as colours; the page's style sheet says what they are, so that
# one drawing is readable on light and on dark paper.
_INK, _RULE, _SERIES, _MARK, _GOOD = "#010101", "#020202", "#030303", "#040404", "#050505"
_IN_PAGE = {
    _INK: "currentColor",
    _RULE: "var(--rule)",
    _SERIES: "var(--series)",
    _MARK: "var(--mark)",
    _GOOD: "var(--good)",
}
_LINES = (
    (_SERIES, "o", "-"), (_GOOD, "^", "--"), (_GOOD, "s", ":"), (_GOOD, "D", "-."),
    (_INK, "v", "--"), (_INK, "P", ":"),
)  # fmt: skip
_OWN = {
    "svg.fonttype": "none",  # text stays text: small, and readable by a screen reader
    "font.family": ["sans-serif"],
    "font.size": 11.5,
    "axes.titlesize": 11.5,
}
Picture = NDArray[np.floating]
"""(C, H, W) in [0, 1], C = 1 or 3."""

LARGEST_SIDE = 112
"""Pixels; larger images are averaged down, or sixteen photographs would fill megabytes."""


def _matplotlib() -> Any:
    if not pictures.is_available():
        raise UserError("The page's figures need matplotlib: pip install 'btrain[report]'.")
    import matplotlib
    import matplotlib.figure

    return matplotlib


def accuracy_curve(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    logarithmic: bool,
    mark: tuple[float, str] | None,
    description: str,
) -> Markup:
    """Return accuracy (percent, 0 to 100) over x as an <svg> that follows the page's colours.

    Args:
        lines: by their names, (x, accuracy) in any order; those with a name have a legend.
        logarithmic: x is a count that grows by factors; 0 is allowed.
        mark: an x to point out, and what to write there.
        description: for those who cannot see it.

    Raises:
        UserError: matplotlib is missing.
    """
    matplotlib = _matplotlib()
    x = tuple(sorted({place for points in lines.values() for place, _ in points}))
    with pictures.look(_INK, _RULE, _RULE, {**_OWN, "svg.hashsalt": description}):
        figure = matplotlib.figure.Figure(figsize=(5.2, 3.3), dpi=72)
        figure.subplots_adjust(left=0.08, right=0.97, top=0.91, bottom=0.16)
        axes = figure.add_subplot(
            xlabel=x_label, title="accuracy (%)", ylim=(0, 100), yticks=range(0, 101, 20)
        )
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.locator_params(axis="x", nbins=5)
        if logarithmic:
            _count_axis(axes, x)
        if mark is not None:
            position, label = mark
            axes.axvline(position, color=_MARK, linewidth=1.2, linestyle=(0, (4, 3)))
            right = position > (x[0] + x[-1]) / 2
            place = {"xytext": (-5 if right else 5, -2), "ha": "right" if right else "left"}
            axes.annotate(
                label,
                (position, 100),
                textcoords="offset points",
                va="top",
                color=_MARK,
                **place,
            )
        for (name, points), (colour, marker, style) in zip(lines.items(), cycle(_LINES)):
            axes.plot(
                *zip(*sorted(points), strict=True), color=colour, linewidth=2, marker=marker,
                markersize=5, linestyle=style, clip_on=False, label=name,
            )  # fmt: skip
        if any(lines):
            axes.legend(loc="upper right", bbox_to_anchor=(1, 0.93), frameon=False)
        return _svg(figure, description)


def _count_axis(axes: Axes, counts: tuple[float, ...]) -> None:
    """Put ticks at the counts themselves, but for those too close to the one before."""
    ticks: list[float] = []
    for count in counts:
        if not ticks or count >= 1.4 * max(ticks[-1], 0.5):
            ticks.append(count)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _svg(figure: Figure, description: str) -> Markup:
    drawing = pictures.drawn(figure, "svg", transparent=True).decode()
    drawing = drawing[drawing.index("<svg") :].strip()
    for stand_in, colour in _IN_PAGE.items():
        drawing = drawing.replace(stand_in, colour)
    # Every drawing calls its parts the same, and an id may occur once in a page.
    used = set(re.findall(r'#([^")]+)[")]', drawing))
    drawing = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", drawing)
    drawing = re.sub(r' (?:width|height)="[0-9.]+pt"', "", drawing)
    label = Markup('<svg role="img" aria-label="{}"').format(description)
    return Markup(drawing.replace("<svg", label, 1))


def heat(percent: float) -> str:
    """Return the style of a cell that shows 0 to 100 percent: a colour, and ink to read on it.

    viridis, whose steps colour-blind eyes tell apart, in grey print too.

    Raises:
        UserError: matplotlib is missing.
    """
    red, green, blue, _ = _matplotlib().colormaps["viridis"](percent / 100)
    luminance = sum(
        share * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
        for share, c in ((0.2126, red), (0.7152, green), (0.0722, blue))
    )  # relative luminance and, below, the contrast of WCAG 2
    ink = "#000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#fff"
    colour = "".join(f"{round(255 * c):02x}" for c in (red, green, blue))
    return f"background:#{colour};color:{ink}"


def heat_scale() -> str:
    """Return the style of a strip that shows `heat`'s colours from 0 to 100 percent."""
    stops = ",".join(heat(percent).split(";")[0].split(":")[1] for percent in range(0, 101, 10))
    return f"background:linear-gradient(to right,{stops})"


def png(picture: Picture) -> Markup:
    """Return an image as a data URI, averaged down by a whole factor to `LARGEST_SIDE` at most."""
    from PIL import Image

    pixels = (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
    drawn = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    factor = reduction(picture.shape)
    file = io.BytesIO()
    (drawn.reduce(factor) if factor > 1 else drawn).save(file, "PNG", optimize=True)
    return Markup("data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii"))


def reduction(shape: tuple[int, ...]) -> int:
    """Return the factor by which `png` shrinks an image of this shape (…, H, W)."""
    return -(-max(shape[-2:]) // LARGEST_SIDE)
