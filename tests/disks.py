"""A disk that is really full, for whatever btrain writes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class FullFile(io.FileIO):
    """A file whose bytes go to /dev/full, where the kernel refuses every one."""

    def write(self, content: Any, /) -> int:
        with io.FileIO("/dev/full", "wb") as full:
            return int(full.write(content))


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, after: int = 0) -> Iterator[None]:
    """Let no byte into files that are opened for writing, but for the first ones."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    opened, count = io.FileIO, 0

    def open_full(path: Any, mode: str = "r", **named: Any) -> io.FileIO:
        nonlocal count
        writing = mode != "r" and path != "/dev/full"
        count += writing
        full = writing and count > after
        return FullFile(path, mode, **named) if full else opened(path, mode, **named)

    with monkeypatch.context() as patch:
        patch.setattr(io, "FileIO", open_full)
        yield
