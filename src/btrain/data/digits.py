"""The handwritten digits of scikit-learn: real images that come with the installation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from btrain.data.source import Source, in_memory

CLASSES = tuple(str(digit) for digit in range(10))
_BRIGHTEST = 16
_TEST_EVERY = 5


def read() -> tuple[Source, Source]:
    """Return 1,797 grey images of 8×8 in two parts; every fifth of a class is a test image."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images[:, None] * 255 / _BRIGHTEST).astype(np.uint8)
    labels = bunch.target
    test = np.zeros(len(labels), dtype=bool)
    for digit in range(len(CLASSES)):
        test[np.flatnonzero(labels == digit)[_TEST_EVERY - 1 :: _TEST_EVERY]] = True
    origin = Path("sklearn.datasets.load_digits")
    return (
        in_memory(images[~test], labels[~test], CLASSES, origin),
        in_memory(images[test], labels[test], CLASSES, origin),
    )
