"""The way of all words to the terminal and the log: names from files and folders are among them."""

from __future__ import annotations

import logging
import sys

from btrain.errors import printable


def say(message: str, *, flush: bool = False) -> None:
    """Print a message on one line, whatever names are part of it."""
    show(printable(message), flush=flush)


def show(text: str, *, end: str = "\n", flush: bool = False) -> None:
    """Print a text of lines."""
    print(printable(text, kept="\n"), end=end, flush=flush)


def complain(message: object) -> None:
    """Print what went wrong, on one line of the standard error."""
    print(f"btrain: {printable(str(message))}", file=sys.stderr)


def overwrite(message: str) -> None:
    """Write over the last line of the standard error."""
    print(f"\r\x1b[K{printable(message)}", end="", file=sys.stderr, flush=True)


def clear() -> None:
    """Empty the screen."""
    print("\x1b[H\x1b[J", end="")


class _Printable(logging.Filter):
    """A change of every record that is logged: its message is one printable line."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), ()
        return True


logging.getLogger("btrain").addFilter(_Printable())
