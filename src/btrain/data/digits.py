"""The 1,797 handwritten digits of the UCI repository: real images that come with btrain.

They are the test set of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits"
(1998), doi.org/10.24432/C50P49, under CC BY 4.0, in the order in which scikit-learn has them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from btrain.data.source import Source, in_memory

CLASSES = tuple(str(digit) for digit in range(10))
_FILE = Path(__file__).with_name("digits.npz")
_BRIGHTEST = 16
_TEST_EVERY = 5


def read() -> tuple[Source, Source]:
    """Return 1,797 grey images of 8×8 in two parts; every fifth of a class is a test image."""
    with np.load(_FILE) as arrays:
        levels, labels = arrays["images"], arrays["labels"].astype(np.int64)
    images = np.rint(levels[:, None] * (255 / _BRIGHTEST)).astype(np.uint8)
    test = np.zeros(len(labels), dtype=bool)
    for digit in range(len(CLASSES)):
        test[np.flatnonzero(labels == digit)[_TEST_EVERY - 1 :: _TEST_EVERY]] = True
    return (
        in_memory(images[~test], labels[~test], CLASSES, _FILE),
        in_memory(images[test], labels[test], CLASSES, _FILE),
    )
