"""The readers of CIFAR-10 and CIFAR-100 from the official python files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from btrain.data.source import Images, Source, in_memory
from btrain.errors import UserError
from btrain.untrusted import RefusedError, open_plain
from btrain.untrusted.arrays import ARRAY_NAMES, PickledArray
from btrain.untrusted.pickles import DATA_OPERATIONS, read_pickle


@dataclass(frozen=True)
class Layout:
    """The places where a CIFAR data set keeps what it holds."""

    folder: str
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    labels_key: str
    classes: int


CIFAR10 = Layout(
    "cifar-10-batches-py",
    tuple(f"data_batch_{i}" for i in range(1, 6)),
    ("test_batch",),
    "labels",
    10,
)
CIFAR100 = Layout("cifar-100-python", ("train",), ("test",), "fine_labels", 100)

_PIXELS = 3 * 32 * 32
_LARGEST = 256 << 20  # bytes of a file; CIFAR-100's training file has 148 MiB


def missing_file(layout: Layout, root: Path) -> Path | None:
    """Return the first file of the data set that is not there."""
    files = [root / layout.folder / name for name in layout.train_files + layout.test_files]
    return next((file for file in files if not file.is_file()), None)


def read(layout: Layout, root: Path) -> tuple[Source, Source]:
    """Return the training and the test part.

    Raises:
        UserError: a file cannot be read, or holds something else than CIFAR images and labels.
    """
    classes = tuple(str(label) for label in range(layout.classes))

    def part(names: tuple[str, ...]) -> Source:
        batches = [
            _read_batch(root / layout.folder / name, layout.labels_key, layout.classes)
            for name in names
        ]
        images = np.concatenate([images for images, _ in batches])
        labels = np.concatenate([labels for _, labels in batches])
        return in_memory(images, labels, classes, root / layout.folder)

    return part(layout.train_files), part(layout.test_files)


def _read_batch(path: Path, labels_key: str, classes: int) -> tuple[Images, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            raise RefusedError(f"it is larger than {_LARGEST:,} bytes")
        with open_plain(path) as file:
            content = read_pickle(file, ARRAY_NAMES, operations=DATA_OPERATIONS, encoding="bytes")
        pixels = _array(_entry(content, "data"))
        labels = _labels(_entry(content, labels_key))
        if pixels.dtype != np.uint8:
            raise ValueError(f"pixels of type {pixels.dtype}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(
                f"labels from {labels.min()} to {labels.max()}, not 0 to {classes - 1}"
            )
        if pixels.shape != (len(labels), _PIXELS):
            raise ValueError(f"pixels {pixels.shape} for {len(labels)} labels")
        return pixels.reshape(-1, 3, 32, 32), labels
    except Exception as error:  # a damaged pickle raises almost anything
        reason = error.strerror if isinstance(error, OSError) else None
        if isinstance(error, ValueError):
            reason = str(error)
        raise UserError(
            f"{path} is not a readable CIFAR batch: {reason or 'it is damaged'}. Right is the "
            f"published file, or a pickled dictionary of 'data', (n, {_PIXELS}) bytes, and "
            f"'{labels_key}', n whole numbers from 0 to {classes - 1}."
        ) from error


def _entry(content: Any, key: str) -> Any:
    """Return what a batch holds by a name, which Python 2 wrote as bytes and others as text."""
    if not isinstance(content, dict):
        raise RefusedError("it holds no dictionary")
    for name in (key.encode(), key):
        if name in content:
            return content[name]
    raise RefusedError(f"it has no '{key}'")


def _array(value: Any) -> npt.NDArray[Any]:
    if not isinstance(value, PickledArray) or value.array is None:
        raise RefusedError("no array of pixels")
    return value.array


def _labels(value: Any) -> npt.NDArray[np.int64]:
    """Return labels from a list or tuple of numbers, the former official, or an array. (n,)"""
    if isinstance(value, PickledArray):
        labels = _array(value)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise RefusedError("labels that are no whole numbers")
        return labels.astype(np.int64)
    if not isinstance(value, list | tuple) or not all(type(label) is int for label in value):
        raise RefusedError("labels that are no whole numbers")
    return np.array(value, dtype=np.int64)
