"""The types and small arithmetic that the corruptions share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
"""(n, H, W, C), C = 1 or 3"""
Floats = npt.NDArray[np.floating[Any]]

Corruption = Callable[[Images, int, np.random.Generator], Images | Floats]
"""(images, severity 1 to 5, generator) -> levels from 0 to 255, neither clipped nor truncated"""

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601


def to_unit(images: Images) -> Floats:
    """Return [0, 1] in float64: the way back, ·255 and truncation, loses nothing. Like images"""
    return images / 255.0


def luminance(pixels: Floats) -> Floats:
    """Return the luminance of colours; grey is its own. (…, 3) -> (…, 1)"""
    if pixels.shape[-1] == 1:
        return pixels
    red, green, blue = (pixels[..., channel, None] * share for channel, share in enumerate(_LUMA))
    return np.asarray(red + green + blue)


def like(colour: Floats, images: Images) -> Floats:
    """Return a colour (…, 3) for images of three channels, its luminance (…, 1) for grey ones."""
    return luminance(colour) if images.shape[-1] == 1 else colour
