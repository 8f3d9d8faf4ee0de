"""The type that every reader returns: labels now, images when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from btrain.errors import UserError
from btrain.terminal import counted

Images = npt.NDArray[np.uint8]  # (n, C, H, W)
Labels = npt.NDArray[np.int64]  # (n,)


@dataclass(frozen=True)
class Source:
    """One part (training or test) of a data set.

    Attributes:
        labels: (n,).
        read: the images at some indices, (k,) -> (k, C, H, W); an image folder decodes them here.
        classes: their names, K of them.
    """

    labels: Labels
    read: Callable[[npt.NDArray[np.int64]], Images]
    classes: tuple[str, ...]


def in_memory(
    images: Images, labels: npt.NDArray[Any], classes: tuple[str, ...], origin: Path
) -> Source:
    """Return a source over an array.

    Raises:
        UserError: the counts differ, or a label is outside [0, K); it names `origin`.
    """
    if len(images) != len(labels) or len(images) == 0:
        raise UserError(
            f"{origin} holds {counted(len(images), 'image')} for {counted(len(labels), 'label')}."
        )
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(
            f"{origin} holds labels from {labels.min()} to {labels.max()}; "
            f"right would be 0 to {len(classes) - 1}."
        )
    return Source(labels.astype(np.int64), lambda indices: images[indices], classes)
