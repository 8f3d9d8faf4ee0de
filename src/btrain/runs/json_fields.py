"""The values of a JSON file, each checked, so that a wrong one can be named with its file."""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any

from btrain.errors import UserError
from btrain.untrusted import RefusedError, read_text

_LARGEST = 16 << 20  # bytes


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

    def number(self, key: str, *, low: float = 0, high: float = math.inf) -> float:
        value = self.optional(key)
        if not is_number(value) or not low <= value <= high:
            limits = f"of {low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
            raise self.wrong(key, f"a number {limits}")
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
            or not all(is_number(value) and 0 <= value <= 100 for value in values)
        ):
            raise self.wrong(key, f"a list of {length} percentages")
        return [float(value) for value in values]

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


def is_number(value: Any) -> bool:
    try:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
    except OverflowError:  # an integer beyond every float
        return False


def phrase(value: Any) -> str:
    """Return any JSON value as words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_leaf(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_leaf, value))
    return str(value)


def _leaf(value: Any) -> str:
    return reprlib.repr(value) if isinstance(value, dict | list) else str(value)
