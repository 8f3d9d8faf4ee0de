"""Results of the weights that a run had before it went on: set aside, never mixed, never lost."""

from __future__ import annotations

import string
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from btrain.durable import make_folder
from btrain.errors import UserError
from btrain.evaluation.result import PAGE, SAMPLES, WEIGHTS, agree
from btrain.runs.json_fields import read_object
from btrain.runs.lock import locked
from btrain.terminal import say

_SETTINGS = "settings_sha256"
_IDENTITY = (
    (WEIGHTS, "other weights"),
    ("data_sha256", "other test images"),
    ("epsilon", "another ε"),
    ("norm", "another norm"),
)


def found(folder: Path, facts: Mapping[str, Any], *, own: bool) -> str | None:
    """Return a name for a run's earlier weights that a folder holds results of; None without such.

    Args:
        facts: of the results that are to come into the folder.
        own: whether the folder is the run's own, and not one that somebody named.

    Raises:
        UserError: it holds results of another run or network, another test set, norm or ε.
    """
    name = None
    for path in sorted(folder.glob("*.json")):
        there = read_object(path)
        for key, what in _IDENTITY:
            if agree(there, facts, [key]):
                continue
            epoch, run = there.get("epoch"), facts.get(_SETTINGS)
            went_on = own and run is not None and there.get(_SETTINGS) == run
            went_on = went_on and type(epoch) is int and 0 <= epoch <= (facts["epoch"] or 0)
            if key != WEIGHTS or not went_on:
                raise UserError(
                    f"{folder} holds results of {what} ({path.name}); "
                    "please give out=… or delete it."
                )
            sha256 = "".join(c for c in str(there[key]) if c in string.hexdigits)[:8]
            name = f"epoch_{epoch}-{sha256}"
    return name


def set_aside(folder: Path, facts: Mapping[str, Any], *, own: bool) -> None:
    """Move the results of a run's earlier weights to `earlier/<name>` in their folder, and say so.

    Raises:
        UserError: as `found`, another process evaluates into the folder, or files cannot be moved.
    """
    with ExitStack() as locks:
        if (name := found(folder, facts, own=own)) is None:
            return
        for lock in folder.glob("*.lock"):
            locks.enter_context(locked(lock))
        files = _results(folder)
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


def _results(folder: Path) -> list[Path]:
    """Return the files of evaluations in a folder, those that they keep meanwhile among them."""
    told = [path for path in folder.glob("*.json") if WEIGHTS in read_object(path)]
    beside = {f"{path.stem}.npz" for path in told} | {PAGE, SAMPLES}
    others = [p for p in folder.iterdir() if p.name in beside or p.name.endswith(".partial.npz")]
    return told + [path for path in others if path.is_file()]
