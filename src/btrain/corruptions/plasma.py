"""The plasma fractal: clouds by midpoint displacement on a torus."""

from __future__ import annotations

import numpy as np

from btrain.corruptions.arrays import Floats

_FIRST_WIBBLE = 100.0


def plasma(n: int, side: int, decay: float, rng: np.random.Generator) -> Floats:
    """Return diamond-square heights, each map stretched to [0, 1].

    A point is the mean of its four neighbours at the current distance plus w·U(-w, w), where w is
    divided by `decay` whenever the distance is halved.

    Args:
        n: how many.
        side: a power of two.
        decay: the larger, the smoother.
        rng: of the displacements.

    Returns:
        (n, side, side).
    """
    heights = np.zeros((n, side, side))
    step, wibble = side, _FIRST_WIBBLE
    while step > 1:
        half = step // 2
        corners = heights[:, ::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=2)
        middles = _displaced(pairs + np.roll(pairs, -1, axis=1), wibble, rng)
        heights[:, half::step, half::step] = middles
        # The points between two corners lie between two middles the other way.
        across = pairs + middles + np.roll(middles, 1, axis=1)
        heights[:, ::step, half::step] = _displaced(across, wibble, rng)
        down = corners + np.roll(corners, -1, axis=1) + middles + np.roll(middles, 1, axis=2)
        heights[:, half::step, ::step] = _displaced(down, wibble, rng)
        step, wibble = half, wibble / decay
    heights -= heights.min(axis=(1, 2), keepdims=True)
    return np.asarray(heights / heights.max(axis=(1, 2), keepdims=True))


def _displaced(sums_of_four: Floats, wibble: float, rng: np.random.Generator) -> Floats:
    return sums_of_four / 4 + wibble * rng.uniform(-wibble, wibble, sums_of_four.shape)
