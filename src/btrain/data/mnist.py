"""The reader of MNIST from its IDX files, and of the part of it that comes with btrain.

MNIST is Y. LeCun's, C. Cortes' and C. Burges', under CC BY-SA 3.0, and so is that part.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from btrain.data.source import Source, in_memory
from btrain.errors import UserError

FOLDER = Path("MNIST") / "raw"
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte",
         "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")  # fmt: skip
CLASSES = tuple(str(digit) for digit in range(10))
_UBYTE = 0x08
_SAMPLE = Path(__file__).with_name("mnist_sample.npz")


def missing_file(root: Path) -> Path | None:
    """Return the first file of the data set that is not there."""
    return next(
        (root / FOLDER / name for name in FILES if not (root / FOLDER / name).is_file()), None
    )


def read(root: Path) -> tuple[Source, Source]:
    """Return the training and the test part.

    Raises:
        UserError: a file is damaged, or a label is not a digit.
    """
    images, labels, test_images, test_labels = (root / FOLDER / name for name in FILES)
    return (
        in_memory(read_idx(images, 3)[:, None], read_idx(labels, 1), CLASSES, labels),
        in_memory(
            read_idx(test_images, 3)[:, None], read_idx(test_labels, 1), CLASSES, test_labels
        ),
    )


def read_sample() -> tuple[Source, Source]:
    """Return 10,000 training and 2,000 test images of MNIST, as many of each digit.

    They are those of `dataset=mnist dataset.train_examples=10000 dataset.test_examples=2000`.
    """
    with np.load(_SAMPLE) as arrays:
        x, y, x_test, y_test = (arrays[name] for name in ("x", "y", "x_test", "y_test"))
    return (
        in_memory(x[:, None], y, CLASSES, _SAMPLE),
        in_memory(x_test[:, None], y_test, CLASSES, _SAMPLE),
    )


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """Return the bytes of an IDX file as an array of so many dimensions.

    Raises:
        UserError: the header does not announce bytes, or not as many as the file holds.
    """
    length = 4 + 4 * dimensions
    with path.open("rb") as file:
        header = file.read(length)
        if len(header) < length or header[:4] != bytes([0, 0, _UBYTE, dimensions]):
            raise UserError(f"{path} is not an IDX file of bytes in {dimensions} dimensions.")
        shape = struct.unpack(f">{dimensions}I", header[4:])
        available = path.stat().st_size - length
        expected = math.prod(shape)
        if available != expected:
            raise UserError(f"{path} is damaged: {available} bytes of data, not {expected}.")
        if expected == 0:
            raise UserError(f"{path} holds no data.")
        content = file.read()
    if len(content) != expected:
        raise UserError(f"{path} changed while it was read.")
    return np.frombuffer(content, np.uint8).reshape(shape)
