"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from btrain.durable import make_folder, write_file
from btrain.untrusted import read_text

_LARGEST = 16 << 20  # bytes of a JSON file


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces a JSON file in one move.

    Raises:
        UserError: the folder cannot be written.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    make_folder(path.parent)
    write_file(path, text.encode())


def write_arrays(path: Path, **arrays: Any) -> None:
    """Replaces an `.npz` file in one move.

    Raises:
        UserError: the folder cannot be written.
    """
    content = BytesIO()
    np.savez_compressed(content, **arrays)
    make_folder(path.parent)
    write_file(path, content.getbuffer())


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote; None where there is nothing, or nothing readable."""
    try:
        content = json.loads(read_text(path, _LARGEST))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
