"""Reading and writing checkpoints: plain containers of tensors, written whole or not at all."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from btrain.durable import write_file
from btrain.errors import UserError

FORMAT = 2


def save(path: Path, content: dict[str, Any], *, previous: Path | None = None) -> None:
    """Writes a checkpoint; a crash leaves the one before it, at its place or at `previous`.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    # By way of memory, for torch hides the reason when it cannot write to a file.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    write_file(path, buffer.getbuffer(), previous=previous)


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU without executing anything in it.

    Raises:
        UserError: the file is not a checkpoint of btrain's, or a part of it is damaged.
    """
    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises many kinds
        raise UserError(f"{path} is not a readable checkpoint; delete it to start over.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of btrain.")
    return content


def _check_sums(path: Path) -> None:
    """torch reads tensors with flipped bits without a word; the archive has a sum of each."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")
