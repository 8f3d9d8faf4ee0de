"""The reader of corrupted test sets in the official layout, official and regenerated ones alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from btrain.corruptions import SEVERITIES, check_name, check_severity
from btrain.errors import UserError, first_line
from btrain.untrusted.arrays import open_npy


def read(root: str | Path, name: str, severity: int) -> tuple[Tensor, Tensor]:
    """Return the images of one corruption and severity, and their labels.

    Only this severity's part of the file is read.

    Args:
        root: a folder of `<corruption>.npy`, (5n, H, W, C) uint8 with the severities one after the
            other, and `labels.npy`, (5n,).
        name: of the corruption.
        severity: 1 to 5.

    Returns:
        (n, C, H, W) uint8 and (n,) int64.

    Raises:
        UserError: a file is missing or holds something else.
    """
    check_name(name)
    check_severity(severity)
    root = Path(root)
    file = root / f"{name}.npy"
    images = _array(file)
    _check_images(file, images)
    n = len(images) // SEVERITIES
    part = images[(severity - 1) * n : severity * n].transpose(0, 3, 1, 2)
    labels = _labels(root / "labels.npy", file, n)
    return torch.from_numpy(np.array(part, order="C")), torch.from_numpy(labels)


def _array(file: Path) -> npt.NDArray[Any]:
    if not file.is_file():
        raise UserError(
            f"{file} is missing; a folder of corrupted images holds <corruption>.npy and "
            "labels.npy, as CIFAR-10-C does and as btrain data corrupt makes it."
        )
    try:
        return open_npy(file)
    except Exception as error:  # a damaged header raises many kinds
        reason = first_line(error)
        raise UserError(f"{file} is not a readable numpy array ({reason}).") from error


def _check_images(file: Path, images: npt.NDArray[Any]) -> None:
    shape = images.shape
    if images.dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3):
        raise UserError(
            f"{file} holds {images.dtype} {shape}; right would be uint8 (5n, H, W, 3), or 1 in "
            "place of 3 for grey images."
        )
    rows = shape[0]
    if rows == 0 or rows % SEVERITIES:
        raise UserError(
            f"{file} holds {rows} images; right would be as many for each of {SEVERITIES} "
            "severities."
        )


def _labels(file: Path, images: Path, n: int) -> npt.NDArray[np.int64]:
    """Return those of one severity, (n,): the same for all five."""
    labels = _array(file)
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (SEVERITIES * n,):
        raise UserError(
            f"{file} holds {labels.dtype} {labels.shape}; right would be whole numbers "
            f"({SEVERITIES * n},), one for each image of {images}."
        )
    blocks = labels.reshape(SEVERITIES, n)
    if (blocks != blocks[0]).any() or blocks.min() < 0 or blocks.max() >= 2**63:
        raise UserError(
            f"{file} does not repeat the same labels from 0 up for each of {SEVERITIES} severities."
        )
    return np.array(blocks[0], dtype=np.int64)
