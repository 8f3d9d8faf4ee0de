"""The effects of cameras, codecs and screens: contrast, saturation, warping, pixels, JPEG."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from btrain.corruptions.arrays import Floats, Images, to_unit


def contrast(images: Images, severity: int, rng: np.random.Generator) -> Floats:
    """Draw pixels towards each channel's mean. (n, H, W, C) -> (n, H, W, C)"""
    del rng
    kept = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    x = to_unit(images)
    mean = x.mean(axis=(1, 2), keepdims=True)
    return np.asarray(((x - mean) * kept + mean) * 255)


def saturate(images: Images, severity: int, rng: np.random.Generator) -> Floats:
    """Set the saturation of HSV to a factor of it plus an amount. (n, H, W, C) -> (n, H, W, C)

    A grey pixel of a colour image has hue 0 and turns reddish where something is added, as in the
    original; grey images stay as they are.
    """
    del rng
    factor, amount = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[severity - 1]
    x = to_unit(images)
    if x.shape[-1] == 1:
        return x * 255
    value = x.max(axis=-1, keepdims=True)
    below = value - x
    chroma = below.max(axis=-1, keepdims=True)
    below = np.where(chroma > 0, below, value * (0, 1, 1))  # grey counts as a red of saturation 0
    saturation = chroma / np.maximum(value, 1 / 255)
    wanted = np.clip(saturation * factor + amount, 0, 1)
    growth = np.where(chroma > 0, wanted / np.maximum(saturation, 1 / 255), wanted)
    return np.asarray((value - below * growth) * 255)


def pixelate(images: Images, severity: int, rng: np.random.Generator) -> Images:
    """Resize to a share of the side and back, by box. (n, H, W, C) -> (n, H, W, C)"""
    del rng
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    height, width = images.shape[1:3]
    small = int(width * share), int(height * share)
    box = Image.Resampling.BOX
    return _by_pillow(images, lambda image: image.resize(small, box).resize((width, height), box))


def jpeg_compression(images: Images, severity: int, rng: np.random.Generator) -> Images:
    """Send images through a JPEG file of some quality. (n, H, W, C) -> (n, H, W, C)"""
    del rng
    quality = (80, 65, 58, 50, 40)[severity - 1]

    def through_a_file(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _by_pillow(images, through_a_file)


def _by_pillow(images: Images, change: Callable[[Image.Image], Image.Image]) -> Images:
    pillow = images[..., 0] if images.shape[3] == 1 else images
    changed = [np.asarray(change(Image.fromarray(pixels))) for pixels in pillow]
    return np.stack(changed).reshape(images.shape)


def elastic_transform(images: Images, severity: int, rng: np.random.Generator) -> Floats:
    """Apply a random affine map, then smooth random shifts. (n, H, W, C) -> (n, H, W, C)

    Amplitude and smoothness of the shifts and the jitter of the affine map are shares of the
    shorter side.
    """
    amplitude, smoothness, jitter = (
        min(images.shape[1:3]) * np.array(shares)
        for shares in ((0, 0.05, 0.08, 0.1, 0.1), (0, 0.2, 0.06, 0.04, 0.03),
                       (0.08, 0.07, 0.06, 0.05, 0.03))
    )  # fmt: skip
    n, height, width, _ = images.shape
    x = to_unit(images).astype(np.float32)
    x = _sampled(x, *_affine_places(n, height, width, jitter[severity - 1], rng), "mirror")
    if amplitude[severity - 1] > 0:
        shifts = rng.uniform(-1, 1, size=(2, n, height, width))
        deviation = smoothness[severity - 1]
        shifts = ndimage.gaussian_filter(shifts, deviation, axes=(2, 3), mode="reflect", truncate=3)
        rows, columns = np.arange(height)[:, None], np.arange(width)
        right, down = amplitude[severity - 1] * shifts
        x = _sampled(x, rows + down, columns + right, "reflect")
    return x * 255


def _affine_places(
    n: int, height: int, width: int, jitter: float, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Return where an affine map finds each pixel: rows and columns, (n, H, W) each.

    The map moves three corners of a square of 2/3 of the side around the middle, each coordinate by
    up to `jitter`.
    """
    middle = np.array([width // 2, height // 2])
    reach = min(height, width) // 3
    corners = middle + reach * np.array([[1, 1], [1, -1], [-1, -1]])
    lower_right, upper_right, upper_left = np.moveaxis(
        corners + rng.uniform(-jitter, jitter, size=(n, 3, 2)), 1, 0
    )
    # The images of a step to the right and of one down, (n, 2) each.
    right, down = (
        (upper_right - upper_left) / (2 * reach),
        (lower_right - upper_right) / (2 * reach),
    )
    determinant = (right[:, 0] * down[:, 1] - right[:, 1] * down[:, 0])[:, None, None]
    x = np.arange(width) - upper_left[:, 0, None, None]
    y = np.arange(height)[:, None] - upper_left[:, 1, None, None]
    right, down = right[:, :, None, None], down[:, :, None, None]
    columns = (x * down[:, 1] - y * down[:, 0]) / determinant + corners[2, 0]
    rows = (y * right[:, 0] - x * right[:, 1]) / determinant + corners[2, 1]
    return rows, columns


def _sampled(x: Floats, rows: Floats, columns: Floats, border: str) -> Floats:
    """Interpolate bilinearly at places of each image.

    (n, H, W, C), (n, H, W), (n, H, W) -> (n, H, W, C)
    """
    n, height, width, channels = x.shape
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    lower = (rows - top)[..., None].astype(x.dtype)
    right = (columns - left)[..., None].astype(x.dtype)
    pixels = x.reshape(-1, channels)
    first = np.arange(n)[:, None, None] * height * width
    row_starts = [first + width * _folded(top + i, height, border) for i in (0, 1)]
    places = [_folded(left + i, width, border) for i in (0, 1)]
    upper_line, lower_line = (
        pixels[start + places[0]] * (1 - right) + pixels[start + places[1]] * right
        for start in row_starts
    )
    return np.asarray(upper_line * (1 - lower) + lower_line * lower)


def _folded(index: npt.NDArray[np.int64], side: int, border: str) -> npt.NDArray[np.int64]:
    """Reflect indices beyond the border about the last pixel (mirror) or its edge (reflect)."""
    if border == "mirror":
        distance = np.abs(index) % (2 * side - 2)
        return np.asarray(np.minimum(distance, 2 * side - 2 - distance))
    distance = index % (2 * side)
    return np.asarray(np.minimum(distance, 2 * side - 1 - distance))
