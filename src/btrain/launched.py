"""How many processes were started for one command, by torchrun or by what sets its variables."""

from __future__ import annotations

import os
import time

from btrain.errors import UserError

GRACE_SECONDS = 3.0
"""So long the other processes keep quiet: torchrun ends them here if the first one has failed."""


def processes() -> int:
    """The size of the world; 1 without torchrun."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdecimal() and {"RANK", "MASTER_ADDR"} <= os.environ.keys() else 1


def check_alone(what: str) -> None:
    """Makes sure that what is not for several processes is done by one.

    Raises:
        UserError: there are several, and this is the first.
        SystemExit: there are several, and the first one says why.
    """
    if processes() == 1:
        return
    if os.environ.get("RANK", "0") != "0":
        time.sleep(GRACE_SECONDS)
        raise SystemExit(1)
    raise UserError(
        f"{what} needs one process, and torchrun started {processes()}; they can share one "
        "training at a time, with btrain train."
    )
