"""Files that are whole after a crash, a full disk or a power cut, and that are only written where
their names say: folders come from strangers, and what lies in them may be a link, a pipe or a
device.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from btrain.errors import UserError

# The errors of a file system that cannot sync a folder; renames are as durable as it makes them.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP}

# A link is not followed, and nobody waits for the other end of a pipe.
_CAREFUL = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

_ROOTS: dict[Path, Path] = {}
"""The folders that must not be reached through a link, by the one below which links count."""

_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")
_YOUNG_SECONDS = 60.0


def is_left_over(name: str) -> bool:
    """Return whether a file of this name is a writer's, which has not ended or was killed."""
    return _TEMPORARY.fullmatch(name) is not None


def real(path: str | Path) -> Path:
    """Return the absolute path that links lead to; those of a loop stay as they are."""
    return Path(os.path.realpath(path))


def make_folder(path: Path, setting: str | None = None, *, within: Path | None = None) -> None:
    """Make a folder and those that it lies in, where they are missing.

    Args:
        setting: the name of the setting that names the folder, for the sentence below.
        within: a folder from which on `path` must not lead through a link.

    Raises:
        UserError: it cannot be made, or is reached through a link.
    """
    if within is not None:
        check_within(path, within)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(f"{setting}={path}" if setting else path, error) from error


@contextmanager
def folder_made(path: Path, *, within: Path | None = None) -> Iterator[None]:
    """Make a folder, as `make_folder`, and take away at the end what is empty of what was made."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    make_folder(path, within=within)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it holds something
            for place in missing:
                place.rmdir()


def check_within(folder: Path, root: Path) -> None:
    """Make sure that a folder lies where its name says, in another one that may be anywhere.

    From now on every file that `replacing` writes below it is looked at again.

    Raises:
        UserError: something on the way from `root` is a link.
    """
    for place in (folder, *folder.parents):
        if place == root:
            _ROOTS[folder] = root
            return
        if place.is_symlink():
            raise UserError(f"{place} is a link; nothing is written through it.")


def check_places(paths: Iterable[Path]) -> None:
    """Make sure, ahead of the work, that files can take their names.

    Raises:
        UserError: there is a folder, a pipe or a device of such a name.
    """
    for path in paths:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} could not be written (it is no ordinary file).")


def write_file(path: Path, content: bytes | memoryview, *, previous: Path | None = None) -> None:
    """Replace a file in one move, as `replacing`.

    Raises:
        UserError: the disk is full, or the folder cannot be written or is gone. Then the old file
            is there, at its own place or at `previous`.
    """
    with written(path, previous=previous) as file:
        file.write(content)


@contextmanager
def written(path: Path, *, previous: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a file as `replacing` does, for what is written part by part.

    Raises:
        UserError: as `write_file`.
    """
    try:
        with replacing(path, previous=previous) as file:
            yield file
    except OSError as error:
        raise _cannot_write(path, error) from error


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Replace files, of which none takes its name before all are on the disk.

    Raises:
        UserError: one cannot be written; then those of before are still there.
    """
    try:
        with ExitStack() as stack:
            for path, content in contents.items():
                file = stack.enter_context(replacing(path))
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise _cannot_write(next(iter(contents)).parent, error) from error


@contextmanager
def replacing(path: Path, *, previous: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a file that takes its name when it is whole, and leaves nothing behind otherwise.

    A new file of a name that nobody can foresee, fsync, rename, fsync of the folder. A link of the
    name is replaced, not followed.

    Args:
        previous: where the file that is replaced goes. A crash between the two renames leaves a
            file of this name only.

    Raises:
        OSError: as the system says it, or there is something of that name that is no file.
    """
    if path.exists() and not path.is_file():  # a rename would put a file in a device's place
        raise OSError(errno.EEXIST, "it is no ordinary file")
    _remove_left_over(path.parent)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    made = False
    try:
        with io.BufferedWriter(io.FileIO(temporary, "xb", opener=_new)) as file:
            made = True
            _claim(file.fileno())
            _check_place(file.fileno(), temporary)
            yield file
            file.flush()
            os.fsync(file.fileno())
            _check_place(file.fileno(), temporary)
        if previous is not None and path.exists():
            path.replace(previous)
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        if made:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _check_place(file: int, path: Path) -> None:
    """Make sure that an open file lies where its name says, though folders be swapped for links.

    The folders are opened one in the other, and stay the same ones from there on.

    Raises:
        OSError: it does not.
    """
    root = next((_ROOTS[place] for place in path.parents if place in _ROOTS), None)
    if root is None or os.open not in os.supports_dir_fd:
        return
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in path.relative_to(root).parts[:-1]:
            if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                raise OSError(errno.ELOOP, "its folder is a link")
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        there = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
        if not os.path.samestat(os.fstat(file), there):
            raise OSError(errno.ELOOP, "its folder is a link")
    finally:
        os.close(folder)


def _new(path: str, flags: int) -> int:
    return os.open(path, flags | _CAREFUL, 0o666)


def _remove_left_over(folder: Path) -> None:
    """Remove what writers left that were killed: no living one holds the file's lock."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        names = [entry.name for entry in entries if is_left_over(entry.name)]
        for path in (folder / name for name in names):
            file = os.open(path, os.O_RDONLY | _CAREFUL)
            try:
                # A young one may be between its opening and its lock.
                old = time.time() - os.fstat(file).st_mtime > _YOUNG_SECONDS
                if old and _claim(file):
                    path.unlink(missing_ok=True)
            finally:
                os.close(file)


def _claim(file: int) -> bool:
    """Take the kernel's lock on a file; return False where another holds it or there are none."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def append_line(path: Path, line: str) -> None:
    """Add one line and make it durable; a crash may leave a part of it.

    Raises:
        UserError: as `write_file`, or the name is a link's.
    """
    try:
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "its folder is gone")
        with io.BufferedWriter(io.FileIO(path, "ab", opener=open_in_place)) as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _cannot_write(path, error) from error


def open_in_place(path: str | Path, flags: int) -> int:
    """Open a file that is written where it lies, new or not; return its descriptor.

    Raises:
        OSError: it is a link, a pipe, a device or a folder, has another name elsewhere, or cannot
            be opened.
    """
    try:
        file = os.open(path, flags | os.O_CREAT | _CAREFUL, 0o666)
    except OSError as error:
        if Path(path).is_symlink():
            raise OSError(errno.ELOOP, "it is a link") from error
        if error.errno in (errno.ENXIO, errno.EISDIR):  # a pipe or a folder
            raise OSError(error.errno, "it is no ordinary file") from error
        raise
    found = os.fstat(file)
    wrong = None
    if not stat.S_ISREG(found.st_mode):
        wrong = "it is no ordinary file"
    elif found.st_nlink > 1:
        wrong = "it has another name elsewhere"
    if wrong is not None:
        os.close(file)
        raise OSError(errno.EEXIST, wrong)
    return file


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
