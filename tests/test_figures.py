"""Drawings against the numbers they show."""

from __future__ import annotations

import re

import numpy as np
import pytest

from btrain.report import pictures as figures


@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_curve_is_drawn_where_its_numbers_are(logarithmic: bool) -> None:
    points = [(1.0, 90.0), (2.0, 70.5), (4.0, 20.0), (8.0, 0.0)]
    drawing = figures.accuracy_curve(
        {"": points[::-1]}, x_label="x", logarithmic=logarithmic, mark=(2.0, "here"),
        description="d",
    )  # fmt: skip
    (path,) = (
        path
        for path in re.findall(r'<path d="([^"]*)"[^>]*var\(--series\)', drawing)
        if path.count("L") == len(points) - 1 and "C" not in path
    )
    drawn = np.array(re.findall(r"[ML] ([0-9.]+) ([0-9.]+)", path), dtype=float)
    x, y = np.array(points).T
    for pixels, values in ((drawn[:, 0], np.log2(x) if logarithmic else x), (drawn[:, 1], -y)):
        slope = np.diff(pixels) / np.diff(values)
        assert (slope > 0).all()
        assert np.ptp(slope) < 1e-3 * slope.mean()


def test_heat_cells_can_be_read() -> None:
    """WCAG 2's contrast is at least 4.5, and lightness rises with accuracy for grey eyes, too."""

    def luminance(colour: str) -> float:
        parts = colour * 2 if len(colour) == 3 else colour
        channels = np.array([int(parts[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return float(linear @ [0.2126, 0.7152, 0.0722])

    brightness = []
    for percent in range(101):
        found = re.fullmatch(r"background:#(\w{6});color:#(\w{3})", figures.heat(percent))
        assert found is not None
        cell, ink = luminance(found[1]), luminance(found[2])
        assert (max(cell, ink) + 0.05) / (min(cell, ink) + 0.05) >= 4.5
        brightness.append(cell)
    assert sorted(brightness) == brightness
