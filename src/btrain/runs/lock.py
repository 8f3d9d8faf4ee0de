"""The lock that keeps a run folder to one process at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from btrain.durable import open_in_place
from btrain.errors import UserError
from btrain.untrusted import read_text

log = logging.getLogger("btrain")

_SIGN_OF_LIFE_SECONDS = 10.0
_SILENCE_SECONDS = 25.0
_LARGEST = 4096  # bytes of the file
_NO_KERNEL_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}


class RunLock:
    """A lock file with the host, process and start time of whoever holds it.

    On one machine, and on network folders that pass locks on, the kernel's lock on the file
    counts: it ends with its process, so a file left by one that was killed holds nobody up, nor
    does another process that got the same number. A holder on another host, whose
    lock may not be seen here, keeps touching the file: one that stays untouched for a while is
    stale, too.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UserError: another process has it, or the folder cannot be written.
        """
        try:
            while not self._try():
                pass
        except OSError as error:
            raise UserError(f"{self._path} could not be written ({error.strerror}).") from error

    def _try(self) -> bool:
        """Try to take the lock; return False where the holder removed the file meanwhile."""
        file = open_in_place(self._path, os.O_RDWR)
        try:
            seen = _kernel_lock(file)
            if seen == "held" or _lives_elsewhere(self._path, seen):
                raise UserError(f"{self._path.parent} is in use {_holder(self._path)}.")
            if not self._is_at_path(file):
                os.close(file)
                return False
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            me = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
            os.ftruncate(file, 0)
            os.write(file, json.dumps(me).encode())
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(file)
            raise
        self._file = file
        return True

    def _is_at_path(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), self._path.stat())
        except OSError:
            return False

    def check(self) -> None:
        """Make sure that the lock is still held, before a write that matters.

        Raises:
            UserError: the file is gone or another's: the folder was deleted, or this process slept
                so long that another took over.
        """
        if not self._is_at_path(self._file):
            raise UserError(
                f"{self._path.parent} was deleted or taken over by another process; "
                "nothing more is written to it."
            )

    def touch(self) -> None:
        """Touch the file, a sign of life for other hosts."""
        with contextlib.suppress(OSError):
            os.utime(self._file)

    def release(self) -> None:
        if self._is_at_path(self._file):
            with contextlib.suppress(OSError):
                self._path.unlink()
        os.close(self._file)


@contextmanager
def locked(path: Path) -> Iterator[RunLock]:
    """Hold the lock file at `path`, and touch it now and then.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    lock, over = RunLock(path), threading.Event()
    lock.acquire()

    def keep_touching() -> None:
        while not over.wait(_SIGN_OF_LIFE_SECONDS):
            lock.touch()

    thread = threading.Thread(target=keep_touching, daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        over.set()
        thread.join()
        lock.release()


def _kernel_lock(file: int) -> str:
    """Return held (by another process), taken (by this one), or unknown where no locks exist."""
    try:
        import fcntl
    except ImportError:
        return "unknown"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError as error:
        if error.errno in _NO_KERNEL_LOCKS:
            return "unknown"
        raise
    return "taken"


def _lives_elsewhere(path: Path, seen: str) -> bool:
    """Return whether a holder lives whom the kernel's lock does not show: is its file touched?"""
    holder = _read(path)
    if not holder or (seen == "taken" and holder.get("host") == socket.gethostname()):
        return False
    log.warning("%s was in use %s; is it alive? …", path.parent, _holder(path))
    touched, until = _touched(path), time.monotonic() + _SILENCE_SECONDS
    while time.monotonic() < until:
        time.sleep(_SIGN_OF_LIFE_SECONDS / 10)
        if _touched(path) != touched:
            return True
    return False


def _touched(path: Path) -> int:
    """Return when the file was touched last.

    It is opened anew, for a network folder looks again only then.
    """
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _read(path: Path) -> dict[str, object]:
    try:
        holder = json.loads(read_text(path, _LARGEST))
    except (OSError, ValueError, RecursionError):
        return {}
    known = isinstance(holder, dict) and {"host", "pid", "started"} <= holder.keys()
    return holder if known else {}


def _holder(path: Path) -> str:
    holder = _read(path)
    if not holder:
        return "by another process"
    return f"by process {holder['pid']} on {holder['host']}, which began at {holder['started']}"
