"""Names of a package that are imported when they are first asked for: torch takes a second."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def attributes(
    package: str, modules: Sequence[str], places: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's `__getattr__` and `__dir__` (PEP 562).

    Args:
        package: its `__name__`.
        modules: of it, imported when they are first asked for.
        places: its other names, by the module that each comes from.
    """
    known = places or {}

    def get(name: str) -> Any:
        if name in modules:
            return import_module(f"{package}.{name}")
        if name in known:
            return getattr(import_module(f"{package}.{known[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules, *known})

    return get, names
