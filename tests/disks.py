"""A disk that is really full, for whatever btrain writes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, after: int = 0) -> Iterator[None]:
    """Let files that are opened for writing, but for the first ones, be /dev/full, where the kernel
    refuses every byte.
    """
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    opened, count = io.FileIO, 0

    def open_full(path: Any, mode: str = "r", **named: Any) -> io.FileIO:
        nonlocal count
        count += mode != "r"
        return opened(path, mode, **named) if count <= after else opened("/dev/full", "wb")

    with monkeypatch.context() as patch:
        patch.setattr(io, "FileIO", open_full)
        yield
