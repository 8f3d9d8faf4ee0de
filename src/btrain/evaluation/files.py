"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from btrain.errors import UserError
from btrain.untrusted import read_text

_LARGEST = 16 << 20  # bytes of a JSON file


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces a JSON file in one move.

    Raises:
        UserError: the folder cannot be written.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    _replace(path, lambda file: file.write(text.encode()))


def write_arrays(path: Path, **arrays: Any) -> None:
    """Replaces an `.npz` file in one move.

    Raises:
        UserError: the folder cannot be written.
    """
    _replace(path, lambda file: np.savez_compressed(file, **arrays))


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


def _replace(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}).") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
