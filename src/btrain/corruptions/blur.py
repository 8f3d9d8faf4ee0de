"""The blurs: out of focus, through frosted glass, by motion, by zooming in, and Gaussian."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import scipy.sparse
from scipy import ndimage

from btrain.corruptions.arrays import Floats, Images, to_unit


def defocus_blur(images: Images, severity: int, rng: np.random.Generator) -> Floats:
    """Correlate with a disk whose edge is smoothed. (n, H, W, C) -> (n, H, W, C)"""
    del rng
    radius, smoothing = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    kernel = disk(radius, smoothing)
    reach, (height, width) = len(kernel) // 2, images.shape[1:3]
    around = ((0, 0), (reach, reach), (reach, reach), (0, 0))
    padded = np.pad(to_unit(images), around, mode="reflect")
    blurred = np.zeros(images.shape)
    for row, column in np.argwhere(kernel > 0):
        shifted = padded[:, row : row + height, column : column + width]
        blurred += kernel[row, column] * shifted
    return blurred * 255


def disk(radius: float, smoothing: float) -> Floats:
    """Return the pixels within `radius`, then a 3×3 Gaussian of deviation `smoothing`; sum 1.

    Returns:
        (2r + 3, 2r + 3) with r = ⌊radius⌋.
    """
    reach = int(radius) + 1
    squares = np.arange(-reach, reach + 1) ** 2
    inside = (squares[:, None] + squares <= radius**2).astype(float)
    side = np.exp(-0.5 / smoothing**2)
    line = np.array([side, 1, side]) / (1 + 2 * side)
    for axis in (0, 1):
        inside = ndimage.correlate1d(inside, line, axis=axis, mode="constant")
    return np.asarray(inside / inside.sum())


def glass_blur(images: Images, severity: int, rng: np.random.Generator) -> Floats:
    """Apply a Gaussian, take pixels from neighbours, apply a Gaussian. (n, H, W, C) -> (n, H, W, C)

    The original means to swap a pixel with a neighbour above or left of it, but numpy's views make
    it a copy of that neighbour. As it goes from the last row and column to the third, it copies
    what it has not touched yet: all pixels can be taken at once.
    """
    deviation, rounds = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[severity - 1]
    n, height, width, _ = images.shape
    pixels = (_gaussian(to_unit(images), deviation) * 255).astype(np.uint8)
    image, row, column = np.ogrid[:n, 2:height, 2:width]
    for _ in range(rounds):
        up, left = rng.integers(0, 2, size=(2, n, height - 2, width - 2))
        pixels[:, 2:, 2:] = pixels[image, row - up, column - left]
    return _gaussian(to_unit(pixels), deviation) * 255


def gaussian_blur(images: Images, severity: int, rng: np.random.Generator) -> Floats:
    """Blur by a Gaussian, the border pixels continued. (n, H, W, C) -> (n, H, W, C)"""
    del rng
    deviation = (0.4, 0.6, 0.7, 0.8, 1)[severity - 1]
    return _gaussian(to_unit(images), deviation) * 255


def _gaussian(x: Floats, deviation: float) -> Floats:
    blurred = ndimage.gaussian_filter(x, deviation, axes=(1, 2), mode="nearest", truncate=4)
    return np.asarray(blurred)


def motion_blur(images: Images, severity: int, rng: np.random.Generator) -> Floats:
    """Smear along a line within 45° of the horizontal. (n, H, W, C) -> (n, H, W, C)"""
    radius, deviation = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[severity - 1]
    degrees = rng.uniform(-45, 45, size=len(images))
    return smear(images, degrees, radius=radius, deviation=deviation)


def smear(images: Images, degrees: Floats, *, radius: int, deviation: float) -> Floats:
    """Blur as ImageMagick's motion blur: a pixel takes from those ahead of it along a line.

    The weights are one half of a Gaussian, 2·radius + 1 of them, on whole pixels; the border pixels
    are continued.

    Args:
        images: (n, H, W, C) uint8.
        degrees: of the line, from the horizontal towards the bottom, (n,).
        radius: in pixels.
        deviation: of the Gaussian, in pixels.

    Returns:
        (n, H, W, C), whole levels from 0 to 255: other than the rest, rounded.
    """
    distance = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (distance / deviation) ** 2)
    weights = weights / weights.sum()
    distance = distance[weights > 1e-7]  # the others do not make up a level
    reach = int(distance[-1])
    angle = np.deg2rad(degrees)[:, None]
    # Halves are rounded down: (n, taps, 2), rows and columns.
    line = distance[:, None] * np.stack([np.sin(angle), np.cos(angle)], axis=-1)
    taps = np.ceil(line - 0.5).astype(int) + reach

    height, width = images.shape[1:3]
    around = ((0, 0), (reach, reach), (reach, reach), (0, 0))
    padded = np.pad(images, around, mode="edge")
    smeared = np.zeros(images.shape)
    for tap, weight in enumerate(weights[: len(distance)]):
        shifts, group = np.unique(taps[:, tap], axis=0, return_inverse=True)
        for index, (row, column) in enumerate(shifts):
            members = np.flatnonzero(group == index)
            smeared[members] += (
                weight * padded[members, row : row + height, column : column + width]
            )
    return np.rint(smeared)


def zoom_blur(images: Images, severity: int, rng: np.random.Generator) -> Floats:
    """Average an image with itself zoomed in step by step. (n, H, W, C) -> (n, H, W, C)"""
    del rng
    highest = (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1]
    # Counted in floating point as the original does: for some of them the end is among the factors.
    factors = tuple(np.arange(1, highest, 0.01))
    return zoomed(to_unit(images).astype(np.float32), (1.0, *factors)) * 255


def zoomed(x: Floats, factors: tuple[float, ...]) -> Floats:
    """Return the mean of x's middles, each enlarged linearly by a factor to the size of x.

    (n, H, W, C) -> (n, H, W, C)
    """
    n, height, width, channels = x.shape
    operator = _mean_zoom(height, width, factors).astype(x.dtype)
    pixels = x.transpose(1, 2, 0, 3).reshape(height * width, n * channels)
    result = (operator @ pixels).reshape(height, width, n, channels)
    return np.asarray(result.transpose(2, 0, 1, 3))


@lru_cache(maxsize=8)
def _mean_zoom(height: int, width: int, factors: tuple[float, ...]) -> scipy.sparse.csr_array:
    """Return what `zoomed` does to an image as one matrix, (H·W, H·W)."""
    zooms = (scipy.sparse.kron(_zoom(height, factor), _zoom(width, factor)) for factor in factors)
    return scipy.sparse.csr_array(sum(zooms) / len(factors))


def _zoom(side: int, factor: float) -> scipy.sparse.csr_array:
    """Return a line's zoom: its middle ⌈side / factor⌉ pixels, linearly on side·factor points, of
    these the middle.

    (side, side), each row the weights of one pixel.
    """
    crop = int(np.ceil(side / factor))
    points = round(crop * factor)
    first = (points - side) // 2
    place = np.arange(first, first + side) * ((crop - 1) / max(points - 1, 1))
    left = np.minimum(place.astype(int), crop - 2)
    share = place - left
    start = (side - crop) // 2
    rows = np.tile(np.arange(side), 2)
    columns = start + np.concatenate([left, left + 1])
    weights = np.concatenate([1 - share, share])
    return scipy.sparse.csr_array((weights, (rows, columns)), shape=(side, side))
