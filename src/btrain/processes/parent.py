"""The end of a process whose parent is gone: of a sweep's worker, or of one of torchrun's."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from btrain.processes.launched import is_first
from btrain.terminal import complain

_LOOK_SECONDS = 0.5
_GRACE_SECONDS = 30.0  # as torchrun's between SIGTERM and SIGKILL

_at_work = threading.RLock()


@cache
def watch(parent: int) -> None:
    """End this process soon after its parent is gone, however that ended.

    SIGTERM, at which a training leaves a checkpoint; then, when what stands in `not_outliving` is
    over, or half a minute later, by force. A thread looks, for only Linux can tell a process.
    """
    if os.name == "nt":  # where the parent's number stays
        return
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


@contextmanager
def not_outliving(parent: int) -> Iterator[None]:
    """Do work that ends in order, with a checkpoint, when this process' parent is gone."""
    with _at_work:
        watch(parent)
        yield


@contextmanager
def watched_workers(sweep: int) -> Iterator[None]:
    """Let joblib's workers end with the sweep's process before they have a job, too.

    Else one that has none yet would wait for it for joblib's five minutes.
    """
    from joblib import register_parallel_backend
    from joblib._parallel_backends import LokyBackend

    class Watching(LokyBackend):  # type: ignore[misc]
        def configure(self, *args: Any, **kwargs: Any) -> int:
            """Return the number of workers, which are made."""
            kwargs |= {"initializer": watch, "initargs": (sweep,)}
            return int(super().configure(*args, **kwargs))

    register_parallel_backend("loky", Watching)
    try:
        yield
    finally:
        register_parallel_backend("loky", LokyBackend)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    if is_first():
        with suppress(OSError, ValueError):  # the terminal may be gone, too
            complain(f"process {parent}, which started this one, is gone; so this one ends.")
    os.kill(os.getpid(), signal.SIGTERM)
    _at_work.acquire(timeout=_GRACE_SECONDS)
    os._exit(128 + signal.SIGTERM)
