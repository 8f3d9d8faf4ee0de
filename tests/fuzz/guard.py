"""What a reader must not do, watched from inside its process."""

from __future__ import annotations

import collections
import dataclasses
import os
import resource
import signal
import sys
import sysconfig
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

SECONDS = 30
"""Of CPU time, for one input; ten times as many by the clock, which runs while others compute."""
MEMORY = 1 << 30
"""Bytes beyond what the process has when it begins."""

_HARMFUL = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.kill",
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "os.putenv", "os.unsetenv", "subprocess.Popen", "pty.spawn", "shutil.",
    "socket.", "urllib.", "http.", "ftplib.", "smtplib.", "webbrowser.", "ctypes.", "pickle.",
    "code.", "function.__new__", "object.__setattr__", "sys.settrace", "sys.setprofile",
)  # fmt: skip
_INSIDE = {
    "os.mkdir": 1, "os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.truncate": 1,
    "shutil.rmtree": 1, "socket.gethostname": 0,
}  # fmt: skip
"""What may be done in a folder that may be written to: how many of its arguments are paths."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_TRUSTED = tuple(
    str(Path(path).resolve())
    for path in (
        *(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        Path(__file__).parents[2] / "src",
    )
)

# They evaluate annotations and make classes from strings, none of them a file's.
_MAKING_CLASSES = (typing.__file__, collections.__file__, dataclasses.__file__)


class Violation(BaseException):
    """Something harmful; no reader's `except Exception` swallows it."""


_watching = False
_writable = ""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or event == "sys._getframe":
        return
    if event == "open":
        path, _, flags = arguments
        followed = isinstance(flags, int) and not flags & os.O_NOFOLLOW
        allowed = (_may_write if followed else _may_replace)(path)
        if isinstance(flags, int) and flags & _WRITING and not allowed:
            raise Violation(f"{path} is opened for writing")
    elif event in ("exec", "object.__setattr__") and (
        sys._getframe(1).f_code.co_filename in _MAKING_CLASSES
    ):
        return
    elif event == "exec":
        code: CodeType = arguments[0]
        file = code.co_filename
        if not file.startswith((*_TRUSTED, "<frozen ")):
            raise Violation(f"{file} is executed")
    elif _writable and event in _INSIDE and all(map(_may_replace, arguments[: _INSIDE[event]])):
        pass
    elif event.startswith(_HARMFUL):
        raise Violation(f"{event} {arguments!r:.200}")


def _may_write(path: object) -> bool:
    if isinstance(path, int):  # whose opening was seen
        return bool(_writable)
    return bool(_writable) and os.path.realpath(str(path)).startswith(_writable)


def _may_replace(path: object) -> bool:
    """Whether the name, not what a link of that name leads to, is in the folder."""
    if isinstance(path, int):
        return bool(_writable)
    folder, name = os.path.split(str(path))
    return bool(_writable) and f"{os.path.realpath(folder)}/{name}".startswith(_writable)


def install() -> None:
    """Sets the hook, which no process can take off again, and the limit of memory."""
    sys.addaudithook(_hook)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGPROF, _too_long)
    signal.signal(signal.SIGALRM, _too_long)


def _too_long(number: int, frame: FrameType | None) -> None:
    raise Violation(f"more than {SECONDS} seconds")


@contextmanager
def watched(writable: Path | None) -> Iterator[None]:
    """Raises Violation where what is inside runs code, takes too long, or writes a file elsewhere
    than in a folder.
    """
    global _watching, _writable
    _writable = f"{writable.resolve()}/" if writable else ""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
    _watching = True
    try:
        yield
    finally:
        _watching = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def wanted_too_much(error: BaseException | None) -> bool:
    """Whether an error goes back to memory that could not be had."""
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError) or "not enough memory" in text:
            return True
        hidden = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or hidden
    return False
