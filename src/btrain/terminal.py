"""The way of all words to the terminal and the log: names from files and folders are among them."""

from __future__ import annotations

import codecs
import io
import logging
import sys

from btrain.errors import printable

_PLAIN = {
    "…": "...", "–": "-", "−": "-", "“": '"', "”": '"', "’": "'", "→": "->", "×": "x", "±": "+-",
    "·": "*", "≤": "<=", "≥": ">=", "≠": "!=", "√": "sqrt", "∞": "inf", "²": "^2", "°": " deg",
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "eps", "κ": "kappa",
    "λ": "lambda", "σ": "sigma", "τ": "tau",
}  # fmt: skip
"""The signs of our sentences and tables in ASCII."""


def spell_out() -> None:
    """Let this process spell out, in what it prints, the characters that its terminal lacks.

    Under LC_ALL=C a ± is +- and an ö its escape, and nothing ends in a UnicodeEncodeError.
    """
    codecs.register_error("btrain", _spelt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="btrain")


def _spelt(error: UnicodeError) -> tuple[str, int]:
    """Return what stands for the characters that an encoding lacks, and where they end."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    shown = (_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in characters)
    return "".join(shown), error.end


def plural(count: object, one: str, many: str | None = None) -> str:
    """Return the word for so many: `image` of 1, else `images`, or what is given as `many`."""
    if count == 1:
        return one
    return many or f"{one}{'es' if one.endswith('s') else 's'}"


def counted(count: object, one: str, many: str | None = None) -> str:
    """Return a number of things in words: `1 image`, `2 images`."""
    return f"{count} {plural(count, one, many)}"


def sized(count: float) -> str:
    """Return a size in memory or on a disk: `1.5 GB`, `20 kB`."""
    for unit, length in (("GB", 1e9), ("MB", 1e6)):
        if count >= length:
            return f"{count / length:.1f} {unit}"
    return f"{count / 1e3:.0f} kB" if count >= 1e3 else f"{count:.0f} bytes"


def lasting(seconds: float) -> str:
    """Return a duration: `0.42 s`, `12 s`, `3 min 05 s`, `12 min`, `2 h 10 min`, `3.5 days`."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.1f} days"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def say(message: str, *, flush: bool = False) -> None:
    """Print a message on one line, whatever names are part of it."""
    show(printable(message), flush=flush)


def show(text: str, *, end: str = "\n", flush: bool = False) -> None:
    """Print a text of lines."""
    print(printable(text, kept="\n"), end=end, flush=flush)


def complain(message: object) -> None:
    """Print what went wrong, on one line of the standard error."""
    print(f"btrain: {printable(str(message))}", file=sys.stderr)


def tell(message: str) -> None:
    """Print how far a command has come, on one line of the standard error."""
    print(printable(message), file=sys.stderr, flush=True)


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
