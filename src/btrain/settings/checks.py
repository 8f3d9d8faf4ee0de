"""The rules that values keep; each raises a UserError that names the key of one that does not."""

from __future__ import annotations

import math
import operator
from typing import Any, SupportsFloat

from btrain.errors import UserError

_FARTHEST = 1_000_000  # √(C·H·W) of colour images of 577,000² pixels

MISSING: Any = "???"  # OmegaConf's mark for a value that the user or a YAML file must give


def typed(value: object) -> str:
    """Return a setting's value as a user types it: `null`, `true`, `[1,2]`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(typed, value))}]"
    return str(value)


def require(condition: bool, key: str, rule: str, value: object) -> None:
    if not condition:
        raise UserError(f"{key} must be {rule}, not {typed(value)}.")


def finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def no_null(key: str, path: str | None) -> None:
    require("\0" not in (path or ""), key, "a path, without a null character", repr(path))


def positive(key: str, value: float) -> None:
    require(value > 0 and finite(value), key, "finite and greater than 0", value)


def gibibytes(count: float) -> int:
    """Return so many GiB in bytes."""
    return max(1, int(count * 2**30))


def at_least(least: float, key: str, value: float | None) -> None:
    if value is not None:
        require(value >= least and finite(value), key, f"at least {least}", value)


def whole(least: int, key: str, value: Any) -> None:
    """Raise UserError for what is no whole number, or is below the least; None passes."""
    if value is not None:
        at_least(least, key, _index(key, value))


def _index(key: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{key} must be a whole number, not {value!r}.") from None


def seed_in_range(key: str, value: int | None) -> None:
    """Raise UserError for what torch or NumPy does not take for a seed."""
    if value is not None:
        require(0 <= _index(key, value) < 2**63, key, "in [0, 2^63)", value)


def within_64_bits(value: Any, key: str = "") -> None:
    """Raise UserError for a whole number in settings that torch and NumPy do not take."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{key} must be below 2^63, not {value}.")
    if isinstance(value, dict):
        for name, item in value.items():
            within_64_bits(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            within_64_bits(item, key)


def number(key: str, value: object) -> float:
    """Return a number, which may be written as a fraction: 8/255.

    Raises:
        UserError: it is none.
    """
    try:
        if isinstance(value, str):
            above, over, below = value.partition("/")
            return float(above) / float(below) if over else float(above)
        if isinstance(value, SupportsFloat) and not isinstance(value, bool):
            return float(value)  # of NumPy's and torch's numbers, too
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError, OverflowError):
        pass
    raise UserError(f"{key} must be a number, like 0.031 or 8/255, not {value}.")


def pixels(key: str, value: object, norm: str, *, most: float = 1, least: bool = False) -> float:
    """Return a length in [0, 1] pixel units.

    Args:
        norm: in which it is one; an L∞ length is at most `most`, others are at most what the size
            of the images allows, which is not known here.
        least: whether 0 is a length, too.

    Raises:
        UserError: it is no number, or out of range.
    """
    length = number(key, value)
    enough = length >= 0 if least else length > 0
    if norm != "linf":
        rule = "at least 0" if least else "greater than 0"
        require(enough and finite(length), key, f"finite and {rule}", value)
        why = f"at most {_FARTHEST:,} (farther apart than any two images)"
        require(length <= _FARTHEST, key, why, value)
    elif not enough or not length <= most:
        rule = "at least" if least else "greater than"
        raise UserError(
            f"{key} must be {rule} 0 and at most {most} ([0, 1] pixel units, like 8/255), "
            f"not {value}."
        )
    return length


def no_farther(key: str, length: float | None, largest: float) -> None:
    """Raise UserError for an L2 length that is above √(C·H·W); None passes.

    Args:
        largest: √(C·H·W), how far apart two images can be.
    """
    if length is not None and length > largest:
        why = "√(C·H·W), how far apart two images can be"
        raise UserError(f"{key} must be at most {largest:.4g} ({why}), not {length:g}.")
