"""Files that are whole after a crash, a full disk or a power cut."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from btrain.errors import UserError

PARTIAL = ".tmp"
"""Behind the name of a file that is being written."""

# What a file system says that cannot sync a folder; its renames are as durable as it makes them.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP}


def make_folder(path: Path, setting: str | None = None) -> None:
    """Make a folder and those that it lies in, where they are missing.

    Args:
        setting: the name of the setting that names the folder, for the sentence below.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(f"{setting}={path}" if setting else path, error) from error


def write_file(path: Path, content: bytes | memoryview, *, previous: Path | None = None) -> None:
    """Replace a file in one move, as `replacing`.

    Raises:
        UserError: the disk is full, or the folder cannot be written or is gone. Then the old file
            is there, at its own place or at `previous`.
    """
    try:
        with replacing(path, previous=previous) as file:
            file.write(content)
    except OSError as error:
        raise _cannot_write(path, error) from error


@contextmanager
def replacing(path: Path, *, previous: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a file that takes its name when it is whole, and leaves nothing behind otherwise.

    A temporary file (`path` with `PARTIAL` behind it), fsync, rename, fsync of the folder.

    Args:
        previous: where the file that is replaced goes; a crash at the wrong moment leaves this
            one alone.

    Raises:
        OSError: as the system says it, or there is something of that name that is no file.
    """
    if path.exists() and not path.is_file():  # a rename would put a file in a device's place
        raise OSError(errno.EEXIST, "it is no ordinary file")
    temporary = path.with_name(path.name + PARTIAL)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Add one line and make it durable; a crash may leave a part of it.

    Raises:
        UserError: as `write_file`.
    """
    try:
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "its folder is gone")
        with path.open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _cannot_write(path, error) from error


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def _cannot_write(path: Path | str, error: OSError) -> UserError:
    return UserError(f"{path} could not be written ({error.strerror or error}).")
