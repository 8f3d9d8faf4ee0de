"""The values of a JSON file, each checked, so that a wrong one can be named with its file."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from btrain.errors import UserError, printable
from btrain.untrusted import RefusedError, read_text

_LARGEST = 16 << 20  # bytes
_LONGEST_NAME = 1000  # characters
_LARGEST_NUMBER = 10**30
"""No number of ours is near it, be it of FLOPs."""


class Fields:
    """A JSON object with the file it came from, so that a wrong value can be named."""

    def __init__(self, path: Path, values: Any, prefix: str = "") -> None:
        if not isinstance(values, dict):
            raise UserError(f"{path} is damaged: {prefix.rstrip('.') or 'it'} is no JSON object.")
        self.path, self.values, self.prefix = path, values, prefix

    @classmethod
    def of(cls, path: Path) -> Fields:
        try:
            return cls(path, json.loads(read_text(path, _LARGEST)))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}).") from error
        except RefusedError as error:
            raise UserError(f"{path} is damaged: {error}.") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged: it is not JSON.") from error

    def wrong(self, key: str, expected: str) -> UserError:
        """Return the sentence for a value that is missing or of another kind."""
        shown = reprlib.repr(self.values[key]) if key in self.values else "missing"
        return UserError(f"{self.path} is damaged: {self.prefix}{key} is {shown}, not {expected}.")

    def inside(self, key: str) -> dict[str, Fields]:
        """Return an object of objects; empty where it is missing or null."""
        inner = Fields(self.path, self.optional(key) or {}, f"{self.prefix}{key}.")
        return {
            name: Fields(self.path, value, f"{inner.prefix}{name}.")
            for name, value in inner.values.items()
        }

    def optional(self, key: str) -> Any:
        return self.values.get(key)

    def number(self, key: str, *, low: float = 0, high: float = _LARGEST_NUMBER) -> float:
        value = self.optional(key)
        if not is_number(value) or not low <= value <= high:
            raise self.wrong(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.optional(key) is None else self.number(key)

    def optional_count(self, key: str) -> int | None:
        number = self.optional_number(key)
        if number is not None and number != int(number):
            raise self.wrong(key, "a whole number")
        return None if number is None else int(number)

    def percent(self, key: str) -> float:
        return self.number(key, high=100)

    def percents(self, key: str, length: int) -> list[float]:
        values = self.optional(key)
        if (
            not isinstance(values, list)
            or len(values) != length
            or not all(map(is_percentage, values))
        ):
            raise self.wrong(key, f"a list of {length} percentages")
        return [float(value) for value in values]

    def any_number(self, key: str) -> float:
        """Return a number of either sign."""
        return self.number(key, low=-_LARGEST_NUMBER)

    def name(self, key: str) -> str:
        """Return a text that stands for something and can be shown as it is."""
        value = self.optional(key)
        if not isinstance(value, str) or not value.isprintable() or len(value) > _LONGEST_NAME:
            raise self.wrong(key, "a name")
        return value

    def names(self, key: str) -> list[str]:
        """Return a list of names."""
        values = self.optional(key)
        if not isinstance(values, list):
            raise self.wrong(key, "a list")
        each = Fields(
            self.path, {str(n): value for n, value in enumerate(values)}, f"{self.prefix}{key}."
        )
        return [each.name(number) for number in each.values]

    def text(self, key: str) -> str:
        """Return words for people, as a terminal shows them."""
        value = self.optional(key)
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return printable(value)

    def objects(self, key: str) -> list[Fields]:
        """Return a list of objects."""
        values = self.optional(key)
        if not isinstance(values, list):
            raise self.wrong(key, "a list")
        return [
            Fields(self.path, value, f"{self.prefix}{key}[{number}].")
            for number, value in enumerate(values)
        ]

    def object(self, key: str) -> Fields:
        """Return an object."""
        return Fields(self.path, self.optional(key), f"{self.prefix}{key}.")

    def only(self, *known: str) -> None:
        """Make sure that there is no other key."""
        if unknown := [key for key in self.values if key not in known]:
            raise self.wrong(unknown[0], "known")

    def optional_text(self, key: str) -> str | None:
        value = self.optional(key)
        return None if value is None else phrase(value)


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty where there is none or it cannot be read."""
    try:
        content = json.loads(read_text(path, _LARGEST))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def dumped(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON for people, what no terminal shows as it is escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    shown = (c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
    return "".join(shown)


def is_number(value: Any) -> bool:
    """Return whether a value is a number of a size that sums and squares can be made of."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -_LARGEST_NUMBER <= value <= _LARGEST_NUMBER
    )


def is_count(value: Any) -> bool:
    """Return whether a value is a whole number from 0 on."""
    return type(value) is int and 0 <= value < 2**53


def is_percentage(value: Any) -> bool:
    """Return whether a value is a number from 0 to 100."""
    return is_number(value) and 0 <= value <= 100


def phrase(value: Any) -> str:
    """Return any JSON value as words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_leaf(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_leaf, value))
    return str(value)


def _leaf(value: Any) -> str:
    return reprlib.repr(value) if isinstance(value, dict | list) else str(value)
