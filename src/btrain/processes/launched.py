"""The number of processes started for one command, by torchrun or by what sets its variables."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from btrain.errors import UserError

GRACE_SECONDS = 3.0
"""The time that other processes keep quiet: torchrun ends them here if the first has failed."""


def processes() -> int:
    """Return the size of the world; 1 without torchrun."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdecimal() and {"RANK", "MASTER_ADDR"} <= os.environ.keys() else 1


def is_first() -> bool:
    """Return whether this is the process that speaks for all; without torchrun it is."""
    return processes() == 1 or os.environ["RANK"] == "0"


@contextmanager
def first_complains() -> Iterator[None]:
    """Let the first process say what is wrong with what all processes were given.

    Raises:
        UserError: a mistake; a moment later than in the first process, and with its number, in one
            that torchrun has not ended by then.
    """
    try:
        yield
    except UserError as error:
        if is_first():
            raise
        time.sleep(GRACE_SECONDS)
        where = f"process {os.environ['RANK']} of {processes()}"
        raise UserError(f"{where}: {error}") from error


def check_alone(what: str) -> None:
    """Make sure that what is not for several processes is done by one.

    Raises:
        UserError: there are several, and this is the first.
        SystemExit: there are several, and the first one says why.
    """
    if processes() == 1:
        return
    if not is_first():
        time.sleep(GRACE_SECONDS)
        raise SystemExit(1)
    raise UserError(
        f"{what} needs one process, and torchrun started {processes()}; they can share one "
        "training at a time, with btrain train."
    )
