"""The two ends of a command other than success: bad input, and a signal."""

from __future__ import annotations

import signal

_LONGEST = 2000  # characters


class UserError(Exception):
    """A fault of the input: one sentence that names the key or file and what would be right.

    The command line prints it without a traceback and exits with status 1. Names and values from
    files may be part of it, so it is cut when it is very long, and what would move the cursor or
    break the line is spelt out.
    """

    def __init__(self, message: str) -> None:
        cut = message if len(message) <= _LONGEST else message[:_LONGEST] + "…"
        super().__init__(printable(cut))


class Interrupted(KeyboardInterrupt):
    """A signal that asked the run to end, which it did at a place from which it can go on.

    A KeyboardInterrupt, so that it ends a whole sweep and not one job of it.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(
            f"stopped by {signal.Signals(number).name}; the same command goes on from here."
        )

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int]]:
        return Interrupted, (self.number,)  # from a sweep's process to that of the command


def printable(text: str, *, kept: str = "", instead: str | None = None) -> str:
    """Return text that a terminal shows as it is, on one line.

    What would move the cursor, turn the direction of writing or break the line is spelt out.

    Args:
        kept: characters that stay as they are.
        instead: what stands for each of the others; None for its escape.
    """
    if text.isprintable():
        return text
    shown = (c if c.isprintable() or c in kept else instead or _spelt_out(c) for c in text)
    return "".join(shown)


def _spelt_out(character: str) -> str:
    """Return the character's escape; a lone surrogate, half of what was no UTF-8, has one, too."""
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, without a full stop, for use in a sentence."""
    return str(error).strip().split("\n")[0].rstrip(".")


def first_reason(error: BaseException) -> str:
    """Return the first line of the earliest of the errors that led to this one.

    An error in the recording of a CUDA graph, for one, makes the end of the recording fail as well.
    One that was raised to explain another one speaks for itself.
    """
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    return first_line(error)
