"""The weather: snow, frost, fog, and more light."""

from __future__ import annotations

import numpy as np

from btrain.corruptions.arrays import Floats, Images, like, luminance, to_unit
from btrain.corruptions.blur import smear, zoomed
from btrain.corruptions.frost import synthesised
from btrain.corruptions.plasma import plasma

_SNOW = (  # mean, deviation, zoom, threshold, radius, deviation of the smear, share of the image
    (0.10, 0.2, 1.00, 0.60, 8, 3, 0.95),
    (0.10, 0.2, 1.00, 0.50, 10, 4, 0.90),
    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.90),
    (0.25, 0.3, 2.25, 0.60, 12, 6, 0.85),
    (0.30, 0.3, 1.25, 0.65, 14, 12, 0.80),
)


def snow(images: Images, severity: int, rng: np.random.Generator) -> Floats:
    """Draw steeply falling flakes, twice (once upside down), over a whitened image. Like images"""
    mean, deviation, zoom, threshold, radius, smearing, share = _SNOW[severity - 1]
    flakes: Floats = rng.normal(mean, deviation, size=(*images.shape[:3], 1))
    flakes = zoomed(flakes, (zoom,))
    flakes[flakes < threshold] = 0
    degrees = rng.uniform(-135, -45, size=len(images))
    levels = (flakes.clip(0, 1) * 255).astype(np.uint8)
    flakes = smear(levels, degrees, radius=radius, deviation=smearing) / 255

    x = to_unit(images)
    white = np.maximum(x, luminance(x) * 1.5 + 0.5)
    x = share * x + (1 - share) * white
    return np.asarray((x + flakes + flakes[:, ::-1, ::-1]) * 255)


def frost(
    images: Images,
    severity: int,
    rng: np.random.Generator,
    *,
    photographs: tuple[Images, ...] | None = None,
) -> Floats:
    """Return a weighted sum with a random crop of a photograph of frost.

    (n, H, W, C) -> (n, H, W, C)

    Args:
        images, severity, rng: see `btrain.corruptions.corrupt`.
        photographs: (h, w, 3) each, at least H×W; by default synthesised ones.
    """
    image_share, frost_share = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[
        severity - 1
    ]
    height, width = images.shape[1:3]
    photographs = photographs or synthesised(height, width)
    chosen = rng.integers(len(photographs), size=len(images))
    places = rng.random((len(images), 2))
    crops = np.empty((*images.shape[:3], 3), dtype=np.uint8)
    for crop, choice, place in zip(crops, chosen, places, strict=True):
        photograph = photographs[choice]
        room = np.array(photograph.shape[:2]) - (height - 1, width - 1)
        top, left = (place * room).astype(int)
        crop[:] = photograph[top : top + height, left : left + width]
    return image_share * images + frost_share * like(crops.astype(float), images)


def fog(images: Images, severity: int, rng: np.random.Generator) -> Floats:
    """Add clouds; the highest sum there can be is scaled to the image's maximum. Like images"""
    amount, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    n, height, width, _ = images.shape
    side = 1 << (max(height, width) - 1).bit_length()
    clouds = plasma(n, side, decay, rng)[:, :height, :width, None]
    x = to_unit(images)
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    return np.asarray((x + amount * clouds) * brightest / (brightest + amount) * 255)


def brightness(images: Images, severity: int, rng: np.random.Generator) -> Floats:
    """Raise the value of HSV, hue and saturation kept. (n, H, W, C) -> (n, H, W, C)"""
    del rng
    x = to_unit(images)
    value = x.max(axis=-1, keepdims=True)
    raised = np.minimum(value + (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1], 1)
    growth = raised / np.maximum(value, 1 / 255)  # black has no hue and becomes grey
    return np.asarray((raised - (value - x) * growth) * 255)
