"""CIFAR-10 and CIFAR-100 from the official python files."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from btrain.data.source import Images, Source, in_memory
from btrain.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Where a CIFAR data set keeps what."""

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


def missing_file(layout: Layout, root: Path) -> Path | None:
    """The first file of the data set that is not there."""
    files = [root / layout.folder / name for name in layout.train_files + layout.test_files]
    return next((file for file in files if not file.is_file()), None)


def read(layout: Layout, root: Path) -> tuple[Source, Source]:
    """The training and the test part.

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
        content = _DataUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels = np.asarray(content[b"data"])
        labels = np.asarray(content[labels_key.encode()], dtype=np.int64)
        if pixels.dtype != np.uint8:
            raise ValueError(f"pixels of type {pixels.dtype}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(
                f"labels from {labels.min()} to {labels.max()}, not 0 to {classes - 1}"
            )
        if len(pixels) != len(labels):
            raise ValueError(f"{len(pixels)} images for {len(labels)} labels")
        return pixels.reshape(-1, 3, 32, 32), labels
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(
            f"{path} is not a readable CIFAR batch ({error}); delete it to download it again."
        ) from error


class _DataUnpickler(pickle.Unpickler):
    """Admits numpy arrays and plain containers: a strange file cannot run code."""

    _ADMITTED = frozenset(
        {
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)
