"""Reading files that come from strangers: nothing in them runs, and no number in a header decides
how much memory is taken before it was held against the file's size.

The functions here raise `RefusedError`, or what the standard library and numpy raise on damaged
bytes; each reader turns all of it into a `UserError` that names the file.
"""

from __future__ import annotations

from pathlib import Path


class RefusedError(ValueError):
    """What is wrong with a file: a phrase that can stand after its name."""


def read_bytes(path: Path, most: int) -> bytes:
    """A file of at most so many bytes.

    Raises:
        RefusedError: it is larger.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise RefusedError(f"it is larger than {most:,} bytes")
    return content


def read_text(path: Path, most: int) -> str:
    """A UTF-8 file of at most so many bytes.

    Raises:
        RefusedError: it is larger.
        UnicodeDecodeError, OSError: it cannot be read.
    """
    return read_bytes(path, most).decode("utf-8")
