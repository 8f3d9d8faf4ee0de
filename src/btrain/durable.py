"""Files that are whole after a crash, a full disk or a power cut."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from btrain.errors import UserError

# What a file system says that cannot sync a folder; its renames are as durable as it makes them.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP}


def write_file(path: Path, content: bytes | memoryview, *, previous: Path | None = None) -> None:
    """Replaces a file in one move: a temporary file, fsync, rename, fsync of the folder.

    Args:
        previous: where the file that is replaced goes; a crash at the wrong moment leaves this
            one alone.

    Raises:
        UserError: the disk is full, or the folder cannot be written or is gone. Then the old file
            is there, at its own place or at `previous`.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def append_line(path: Path, line: str) -> None:
    """Adds one line and makes it durable; a crash may leave a part of it.

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


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} could not be written ({error.strerror or error}).")
