"""The reader and writer of checkpoints: plain containers of tensors, whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from btrain.data import Data
from btrain.durable import write_file
from btrain.errors import UserError
from btrain.runs.json_fields import is_count, is_number, is_percentage
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
            if is_resumable(state) and not _counts_are_numbers(state):
                raise UserError(f"{path} is damaged: it does not say how far its run came.")
            return dict(content)
    raise UserError(f"{path} is not a checkpoint of this version of btrain.")


def is_resumable(state: dict[str, Any]) -> bool:
    """Return whether a state is one of a run under way, and not of weights alone."""
    return "optimizer" in state


# The keys of a run's progress in its state; the last two kinds are None where nothing was measured.
_COUNTS, _SECONDS = ("epoch", "batch"), ("epoch_seconds", "train_seconds")
_EPOCHS, _PERCENTAGES = ("best_epoch",), ("best_val_acc", "watched_acc")


def _counts_are_numbers(state: dict[str, Any]) -> bool:
    return (
        all(is_count(state.get(key)) for key in _COUNTS)
        and all(is_number(state.get(key)) and 0 <= state[key] < 2**53 for key in _SECONDS)
        and type(state.get("collapsed")) is bool
        and all(state.get(key) is None or is_count(state[key]) for key in _EPOCHS)
        and all(state.get(key) is None or is_percentage(state[key]) for key in _PERCENTAGES)
    )
