"""The command `btrain`, which is `python -m btrain`: ready for Ctrl-C ahead of its first import."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn


def run() -> NoReturn:
    """Run the command of this process, and end the process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not in the background
        signal.signal(signal.SIGINT, _interrupt)
    from btrain.cli import run_command

    run_command()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; while a module is imported end the process instead.

    Libraries turn what is raised there into errors of their own, or go on without the module.
    """
    at = frame
    while at is not None:
        if at.f_code.co_filename.startswith("<frozen importlib"):
            if os.environ.get("RANK", "0") == "0":
                os.write(2, b"btrain: interrupted.\n")
            os._exit(128 + number)
        at = at.f_back
    signal.default_int_handler(number, frame)


if __name__ == "__main__":
    run()
