"""The reading of strangers' files: nothing in them runs, and no number in a header decides
how much memory is taken before it was held against the file's size.

The functions here raise `RefusedError`, or what the standard library and numpy raise on damaged
bytes; each reader turns all of it into a `UserError` that names the file.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import IO


class RefusedError(ValueError):
    """The fault of a file: a phrase that can stand after its name."""


def open_plain(path: Path) -> IO[bytes]:
    """Open a file, but no pipe and no device, on which a reader could wait for ever.

    Raises:
        RefusedError: it is something else.
        OSError: it cannot be opened.
    """
    if path.exists() and not path.is_file():
        raise RefusedError("it is no plain file")
    return path.open("rb")


def check_hash(path: Path) -> None:
    """Make sure that a file is the one whose SHA-256 stands beside it, in `<name>.sha256`, if any.

    Raises:
        RefusedError: it is another, or what stands there is no hash.
        OSError: one of the two cannot be read.
    """
    beside = path.with_name(f"{path.name}.sha256")
    if not beside.exists():
        return
    said = re.match(r"[0-9a-f]{64}\b", read_text(beside, _LONGEST_HASH_FILE))
    if said is None:
        raise RefusedError(f"{beside.name} beside it holds no SHA-256")
    if sha256(path) != said[0]:
        raise RefusedError(f"it is not the file whose SHA-256 stands in {beside.name}")


def sha256(path: Path) -> str:
    """Return the hash of a file's bytes; raise as `open_plain`."""
    digest = hashlib.sha256()
    with open_plain(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


_LONGEST_HASH_FILE, _BLOCK = 1 << 12, 1 << 20


def read_text(path: Path, most: int) -> str:
    """Read a UTF-8 file of at most so many bytes; raise as `read_bytes`, and UnicodeError."""
    return read_bytes(path, most).decode("utf-8")


def read_bytes(path: Path, most: int) -> bytes:
    """Read a file of at most so many bytes.

    Raises:
        RefusedError: it is larger, or no plain file.
        OSError: it cannot be read.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(min(size, most) + 1)  # which makes room before it looks
    if len(content) > most:
        raise RefusedError(f"it is larger than {most:,} bytes")
    return content
