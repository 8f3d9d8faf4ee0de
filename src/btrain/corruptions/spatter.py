"""The drops of water or splashes of mud on the lens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from btrain.corruptions.arrays import Floats, Images, like, to_unit

_SPATTER = (  # mean, deviation, smoothing, threshold, intensity of water or smoothing of mud, mud
    (0.62, 0.1, 0.7, 0.70, 0.5, False),
    (0.65, 0.1, 0.8, 0.70, 0.5, False),
    (0.65, 0.3, 1.0, 0.69, 0.5, False),
    (0.65, 0.1, 0.7, 0.69, 0.6, True),
    (0.65, 0.1, 0.5, 0.68, 0.6, True),
)
_PALE_TURQUOISE = np.array([175, 238, 238]) / 255
_MUD_BROWN = np.array([63, 42, 20]) / 255
_WEAK_EDGE, _STRONG_EDGE = 50, 150
_FARTHEST = 20
_SOBEL = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
_RELIEF = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])


def spatter(images: Images, severity: int, rng: np.random.Generator) -> Floats:
    """Add water (severities 1 to 3) or mud (4 and 5) where smoothed noise is high. Like images"""
    mean, deviation, smoothing, threshold, strength, mud = _SPATTER[severity - 1]
    noise = rng.normal(mean, deviation, size=images.shape[:3])
    liquid = ndimage.gaussian_filter(noise, smoothing, axes=(1, 2), mode="nearest")
    x = to_unit(images)
    if mud:
        wet = (liquid > threshold).astype(float)
        share = ndimage.gaussian_filter(wet, strength, axes=(1, 2), mode="nearest")[..., None]
        share[share < 0.8] = 0
        return np.asarray((x * (1 - share) + like(_MUD_BROWN, images) * share) * 255)
    liquid[liquid < threshold] = 0
    drops = _drops((liquid.clip(0, 1) * 255).astype(np.uint8))[..., None]
    return (x + strength * drops * like(_PALE_TURQUOISE, images)) * 255


def _drops(liquid: npt.NDArray[np.uint8]) -> Floats:
    """Return how bright water is: its depth, lit from the upper left by the distance to its edges.

    The distance is exact where the original's is approximated: some drops differ a little.

    (n, H, W) -> (n, H, W) in [0, 1]; 0 for an image without a drop.
    """
    edges = _edges(liquid)
    if not edges.any():
        return np.zeros(liquid.shape)
    # The next image is so far away that its edges do not count.
    distance = ndimage.distance_transform_edt(~edges, sampling=(_FARTHEST, 1, 1))
    distance = _box(np.minimum(distance, _FARTHEST)).astype(np.uint8)
    lit = ndimage.correlate(_equalised(distance).astype(int), _RELIEF[None], mode="mirror")
    brightness = liquid * np.rint(_box(lit.clip(0, 255).astype(float)))
    brightest = brightness.max(axis=(1, 2), keepdims=True)
    return np.asarray(brightness / np.maximum(brightest, 1))


def _box(x: Floats) -> Floats:
    """Return the mean of 3×3 pixels. (n, H, W) -> (n, H, W)"""
    return np.asarray(ndimage.uniform_filter(x, (1, 3, 3), mode="mirror"))


def _edges(levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Return Canny's edges: ridges of the Sobel gradient, weak ones where they meet a strong one.

    (n, H, W) -> (n, H, W)
    """
    x = levels.astype(np.int32)
    across = ndimage.correlate(x, _SOBEL[None], mode="nearest")
    down = ndimage.correlate(x, _SOBEL.T[None], mode="nearest")
    steepness = np.abs(across) + np.abs(down)
    padded = np.pad(steepness, ((0, 0), (1, 1), (1, 1)))
    height, width = levels.shape[1:]

    def at(row: int, column: int) -> npt.NDArray[np.int32]:
        return padded[:, 1 + row : 1 + row + height, 1 + column : 1 + column + width]

    # A ridge is higher than its neighbours along the gradient, which is taken as one of four lines.
    slope = np.abs(down), np.abs(across) * np.tan(np.pi / 8), np.abs(across) * np.tan(3 * np.pi / 8)
    ridge = np.select(
        [slope[0] < slope[1], slope[0] > slope[2], (across < 0) == (down < 0)],
        [
            (steepness > at(0, -1)) & (steepness >= at(0, 1)),
            (steepness > at(-1, 0)) & (steepness >= at(1, 0)),
            (steepness > at(-1, -1)) & (steepness > at(1, 1)),
        ],
        (steepness > at(-1, 1)) & (steepness > at(1, -1)),
    )
    ridge &= steepness > _WEAK_EDGE
    within_an_image = np.zeros((3, 3, 3), dtype=bool)
    within_an_image[1] = True
    labels, count = ndimage.label(ridge, within_an_image)
    kept = np.zeros(count + 1, dtype=bool)
    kept[labels[ridge & (steepness > _STRONG_EDGE)]] = True
    return np.asarray(kept[labels])


def _equalised(levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Make each image's histogram flat, from its darkest level at 0. (n, H, W) -> (n, H, W)"""
    pixels = levels.reshape(len(levels), -1)
    image = np.arange(len(levels))
    counts = np.zeros((len(levels), 256))
    np.add.at(counts, (image[:, None], pixels), 1)
    counts[image, pixels.min(axis=1)] = 0
    others = counts.sum(axis=1, keepdims=True)
    table = np.rint(counts.cumsum(axis=1) * 255 / np.maximum(others, 1)).astype(np.uint8)
    table = np.where(others > 0, table, np.arange(256, dtype=np.uint8))  # one level alone stays
    return np.take_along_axis(table, pixels, axis=1).reshape(levels.shape)
