"""Results of the weights that a run had before it went on: set aside, never mixed, never lost."""

from __future__ import annotations

import string
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from btrain.durable import make_folder
from btrain.errors import UserError
from btrain.evaluation.result import PAGE
from btrain.runs.json_fields import is_count, read_object
from btrain.runs.lock import locked
from btrain.terminal import say

_WEIGHTS, _SETTINGS = "checkpoint_sha256", "settings_sha256"
_IDENTITY = (
    (_WEIGHTS, "other weights"),
    ("data_sha256", "other test images"),
    ("epsilon", "another ε"),
    ("norm", "another norm"),
)


def found(folder: Path, facts: Mapping[str, Any]) -> str | None:
    """Return a name for a run's earlier weights that a folder holds results of; None without such.

    Args:
        facts: of the results that are to come into the folder.

    Raises:
        UserError: it holds results of another run or network, another test set, norm or ε.
    """
    name = None
    for path in sorted(folder.glob("*.json")):
        there = read_object(path)
        if "epsilon" in there:
            there = {"norm": "linf"} | there  # older files do not tell their norm
        for key, what in _IDENTITY:
            if there.get(key, facts[key]) == facts[key]:
                continue
            run = facts.get(_SETTINGS)
            if key != _WEIGHTS or run is None or there.get(_SETTINGS) != run:
                raise UserError(
                    f"{folder} holds results of {what} ({path.name}); "
                    "please give out=… or delete it."
                )
            epoch = there.get("epoch")
            sha256 = "".join(c for c in str(there[key]) if c in string.hexdigits)[:8]
            name = f"epoch_{epoch}-{sha256}" if is_count(epoch) else sha256
    return name


def set_aside(folder: Path, facts: Mapping[str, Any]) -> None:
    """Move the results of a run's earlier weights to `earlier/<name>` in their folder, and say so.

    Raises:
        UserError: as `found`, another process evaluates into the folder, or files cannot be moved.
    """
    with ExitStack() as locks:
        if (name := found(folder, facts)) is None:
            return
        for lock in folder.glob("*.lock"):
            locks.enter_context(locked(lock))
        files = [path for path in folder.iterdir() if _is_of_results(path)]
        # Those that tell their weights go last: until then, what is left is known to be older.
        files.sort(key=lambda path: (path.suffix == ".json", path.name))
        place, number = folder / "earlier" / name, 1
        while any((place / path.name).exists() for path in files):
            number += 1
            place = place.with_name(f"{name}-{number}")
        make_folder(place, within=folder)
        try:
            for path in files:
                path.replace(place / path.name)
        except OSError as error:
            raise UserError(f"{place} could not be written ({error.strerror}).") from error
    say(f"The run went on since it was evaluated; the results of before are in {place}.")


def _is_of_results(path: Path) -> bool:
    return path.is_file() and (path.suffix in (".json", ".npz") or path.name == PAGE)
