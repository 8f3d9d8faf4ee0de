"""The reader and writer of checkpoints: plain containers of tensors, whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from btrain.data import Data
from btrain.durable import write_file
from btrain.errors import UserError
from btrain.untrusted import tensors

FORMAT = 2


def of_images(data: Data) -> dict[str, Any]:
    """Return what a checkpoint says of the network's images: their classes and shape."""
    return {"classes": len(data.classes), "shape": list(data.shape)}


def save(path: Path, content: dict[str, Any], *, previous: Path | None = None) -> None:
    """Write a checkpoint; a crash leaves the one before it, at its place or at `previous`.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    # By way of memory, for torch hides the reason when it cannot write to a file.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    write_file(path, buffer.getbuffer(), previous=previous)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without executing anything in it.

    Raises:
        UserError: the file is not a checkpoint of btrain's, or it is damaged.
    """
    try:
        content = tensors.load(path)
    except Exception as error:  # a damaged archive raises many kinds
        raise UserError(f"{path} is not a readable checkpoint; delete it to start over.") from error
    match content:
        case {"format": int() as version, "state": dict() as state} if version == FORMAT:
            if "optimizer" in state and not _counts_are_numbers(state):
                raise UserError(f"{path} is damaged: it does not say how far its run came.")
            return dict(content)
    raise UserError(f"{path} is not a checkpoint of this version of btrain.")


# How far a run came, in its state; the second kind is None where nothing was measured.
_COUNTS = ("epoch", "batch", "epoch_seconds", "train_seconds", "collapsed")
_MEASURED = ("best_epoch", "best_val_acc", "watched_acc")


def _counts_are_numbers(state: dict[str, Any]) -> bool:
    def is_number(value: object) -> bool:
        return isinstance(value, int | float) and 0 <= value < 2**53

    measured = [state[key] for key in _MEASURED if state.get(key) is not None]
    return all(map(is_number, measured)) and all(is_number(state.get(key)) for key in _COUNTS)
