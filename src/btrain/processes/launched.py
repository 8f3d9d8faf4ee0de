"""The number of processes started for one command, by torchrun or by what sets its variables."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from btrain.errors import UserError

GRACE_SECONDS = 3.0
"""The time that other processes keep quiet: torchrun ends them here if the first has failed."""

_LAST_PORT = 65535


def processes() -> int:
    """Return the size of the world; 1 without torchrun."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdecimal() and {"RANK", "MASTER_ADDR"} <= os.environ.keys() else 1


def by_torchrun() -> bool:
    """Return whether torchrun started this process, which then waits for it and ends with it."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def check_variables() -> None:
    """Make sure that the variables of several processes are what a launcher sets.

    Raises:
        UserError: one is missing, or has a value that none of so many processes can have.
    """
    size = os.environ.get("WORLD_SIZE", "")
    if not size:
        return
    hint = "torchrun sets it; to train alone, unset WORLD_SIZE"
    if not _within(size, 1):
        raise UserError(f"WORLD_SIZE={size} must be the number of processes; {hint}.")
    if int(size) == 1:
        return
    why = f"WORLD_SIZE={size} is for several processes that train together"
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(f"{name} is not set, and {why}; {hint}.")
    rank, port = os.environ["RANK"], os.environ["MASTER_PORT"]
    if not _within(rank, 0, int(size) - 1):
        last = int(size) - 1
        raise UserError(f"RANK={rank} must be one of 0 to {last}, the numbers of {size} processes.")
    if not _within(port, 1, _LAST_PORT):
        raise UserError(f"MASTER_PORT={port} must be a number from 1 to {_LAST_PORT}, a TCP port.")
    if not _within(local := os.environ.get("LOCAL_RANK", "0"), 0):
        raise UserError(f"LOCAL_RANK={local} must be the process' number on its machine, from 0.")


def _within(text: str, low: int, high: int = 10**6) -> bool:
    """Return whether a text is a whole number from `low` to `high`, as Python writes it."""
    if not (text.isascii() and text.isdecimal() and len(text) < 9):
        return False
    return str(int(text)) == text and low <= int(text) <= high


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
