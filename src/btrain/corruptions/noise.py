"""The noises, each on every channel of every pixel."""

from __future__ import annotations

import numpy as np

from btrain.corruptions.arrays import Floats, Images, to_unit


def gaussian_noise(images: Images, severity: int, rng: np.random.Generator) -> Floats:
    """Return x + N(0, σ²). (n, H, W, C) -> (n, H, W, C)"""
    deviation = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return (to_unit(images) + deviation * rng.standard_normal(images.shape)) * 255


def shot_noise(images: Images, severity: int, rng: np.random.Generator) -> Floats:
    """Return Poisson(x·c) / c, the noise of counting c photons at full brightness. Like images"""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return rng.poisson(to_unit(images) * photons) / photons * 255


def impulse_noise(images: Images, severity: int, rng: np.random.Generator) -> Images:
    """Add salt and pepper in equal parts, on a share of the values. Like images"""
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    drawn = rng.random(images.shape)
    noisy = np.where(drawn < share / 2, np.uint8(0), images)
    return np.where((drawn >= share / 2) & (drawn < share), np.uint8(255), noisy)


def speckle_noise(images: Images, severity: int, rng: np.random.Generator) -> Floats:
    """Return x + x·N(0, σ²). (n, H, W, C) -> (n, H, W, C)"""
    deviation = (0.06, 0.10, 0.12, 0.16, 0.20)[severity - 1]
    x = to_unit(images)
    return (x + x * deviation * rng.standard_normal(images.shape)) * 255
