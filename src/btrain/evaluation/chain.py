"""The chain clean ≥ attacked ≥ verified, image by image, over all results of a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from btrain.errors import UserError
from btrain.evaluation.result import BROKEN, SANITY, WEIGHTS, Result, agree, write_json
from btrain.runs.json_fields import read_object
from btrain.settings.evaluation import VERIFIED
from btrain.terminal import counted

_SAME = (WEIGHTS, "data_sha256", "epsilon", "norm", "precision")
"""The facts in which a verdict and an attack must agree to be compared, where both tell them."""


@dataclass(frozen=True)
class _Attack:
    """The images that an attack has broken, and the facts that it was run with."""

    name: str
    broken: npt.NDArray[np.integer]
    labels: npt.NDArray[np.int64] | None
    """None where a file does not hold them."""
    facts: Mapping[str, Any]


def check(
    folder: Path | None, results: Sequence[Result] = (), *, keep: Mapping[str, Any] | None = None
) -> None:
    """Make sure that no image is verified and broken, by results at hand and those of a folder.

    Each verdict is compared with each attack, clean images and the sanity checks among them, that
    belongs to the same network, images, norm, ε and precision.

    Args:
        keep: facts; with them a file of the folder keeps which images are both, and that of an
            earlier evaluation is removed where there are none.

    Raises:
        UserError: an image is both: the bounds are wrong, or a file was changed.
    """
    found = contradictions(folder, results)
    if folder is not None and keep is not None:
        if found:
            write_json(folder / BROKEN, {"broken": found} | dict(keep))
        else:
            (folder / BROKEN).unlink(missing_ok=True)
    if found:
        which = max(found, key=lambda pair: len(found[pair]))
        indices = set().union(*found.values())
        place = "" if folder is None else f"{folder}: "
        tells = "" if folder is None or keep is None else f" {BROKEN} tells which."
        raise UserError(
            f"{place}{counted(len(indices), 'image is', 'images are')} verified and broken by an "
            f"attack ({which}): the bounds are wrong, or a result's file was changed.{tells}"
        )


def contradictions(folder: Path | None, results: Sequence[Result] = ()) -> dict[str, list[int]]:
    """Return the images that are verified and broken, by the names of verdict and attack."""
    there = {result.attack: result for result in [*_kept(folder), *results]}
    verdicts = [result for name, result in there.items() if name.startswith(VERIFIED)]
    attacks = [
        _Attack(name, (~result.correct).nonzero()[0], result.labels, result.settings)
        for name, result in there.items()
        if not name.startswith(VERIFIED) and result.correct.ndim == 1
    ]
    attacks += _sanity(folder)
    found = {}
    for verdict, attack in product(verdicts, attacks):
        both = attack.broken[attack.broken < len(verdict.correct)]
        both = both[verdict.correct[both]]
        if len(both) and _alike(verdict, attack):
            found[f"{verdict.attack} and {attack.name}"] = both.tolist()
    return found


def _kept(folder: Path | None) -> list[Result]:
    paths = [] if folder is None else sorted(folder.glob("*.npz"))
    found = [Result.read(path.parent, path.stem) for path in paths]
    return [result for result in found if result is not None]


def _sanity(folder: Path | None) -> list[_Attack]:
    """Return what the sanity checks of a folder have broken; nothing of a damaged file."""
    there = {} if folder is None else read_object(folder / SANITY)
    broken = there.get("broken")
    if not isinstance(broken, list) or not all(type(i) is int and i >= 0 for i in broken):
        return []
    return [_Attack("the sanity checks", np.array(broken, dtype=np.int64), None, there)]


def _alike(verdict: Result, attack: _Attack) -> bool:
    """Return whether a verdict and an attack are of the same network and facts."""
    same = agree(verdict.settings, attack.facts, _SAME)
    return same and (attack.labels is None or np.array_equal(verdict.labels, attack.labels))
