"""What one attack on one model came to, and its two files."""

from __future__ import annotations

import math
import platform
import shlex
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from btrain import __version__
from btrain.errors import UserError
from btrain.evaluation.files import read_json, write_arrays, write_json
from btrain.untrusted.arrays import read_npz

_LARGEST = 256 << 20  # bytes of the arrays

# The 97.5 % quantile of the normal distribution.
Z = 1.959963984540054


@dataclass(frozen=True)
class Result:
    """One attack, example by example.

    Attributes:
        attack: its name, which names the files.
        correct: whether each example is classified correctly under it, (n,) bool in the data set's
            order; under corruptions (corruptions, severities, n).
        labels: (n,) int64.
        classes: names of the K classes.
        seconds: the evaluation took.
        settings: everything else the JSON file tells.
    """

    attack: str
    correct: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def scores(self) -> npt.NDArray[np.float64]:
        """The share of an example's trials that it came through, (n,); 0 or 1 under one attack."""
        scores: npt.NDArray[np.float64] = self.correct.reshape(-1, len(self.labels)).mean(axis=0)
        return scores

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * float(self.scores.mean())

    @property
    def ci95(self) -> tuple[float, float]:
        """In percent: what another draw of test examples would make of the accuracy.

        Wilson's interval of a binomial proportion. Under corruptions, where an example is scored
        many times, a normal interval of the mean over examples.
        """
        n = len(self.labels)
        if self.correct.ndim == 1:
            low, high = wilson(int(self.correct.sum()), n)
        else:
            half = Z * float(self.scores.std()) / math.sqrt(n)
            low, high = max(0.0, self.scores.mean() - half), min(1.0, self.scores.mean() + half)
        return 100 * float(low), 100 * float(high)

    @property
    def per_class(self) -> dict[str, dict[str, float]]:
        """`{class: {"accuracy": percent, "n": examples}}` of the classes that occur."""
        return {
            name: {
                "accuracy": 100 * float(self.scores[self.labels == k].mean()),
                "n": int((self.labels == k).sum()),
            }
            for k, name in enumerate(self.classes)
            if (self.labels == k).any()
        }

    def to_dict(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {
            "attack": self.attack,
            "accuracy": self.accuracy,
            "ci95": list(self.ci95),
            "n": len(self.labels),
            **self.settings,
            "seconds": round(self.seconds, 3),
            "per_class": self.per_class,
        }

    def write(self, folder: Path) -> Path:
        """`<attack>.npz`, then `<attack>.json`, which is thus the mark of a finished attack.

        Raises:
            UserError: the folder cannot be written.
        """
        write_arrays(folder / f"{self.attack}.npz", correct=self.correct, labels=self.labels)
        path = folder / f"{self.attack}.json"
        write_json(path, self.to_dict())
        return path

    @staticmethod
    def read(folder: Path, attack: str) -> Result | None:
        """What `write` left; None where there is nothing, or something unreadable."""
        content = read_json(folder / f"{attack}.json")
        if content is None:
            return None
        try:
            arrays = read_npz(folder / f"{attack}.npz", ("correct", "labels"), most=_LARGEST)
            correct, labels = arrays["correct"], arrays["labels"]
            classes, seconds = tuple(content["classes"]), float(content["seconds"])
            name = str(content["attack"])
        except Exception:  # a damaged archive raises many kinds
            return None
        if not _fit(correct, labels, classes):
            return None
        own = ("attack", "accuracy", "ci95", "n", "per_class")
        settings = {key: content[key] for key in content if key not in (*own, "seconds")}
        return Result(name, correct, labels, classes, seconds, settings)


def _fit(correct: npt.NDArray[Any], labels: npt.NDArray[Any], classes: tuple[object, ...]) -> bool:
    """Whether the arrays of a file are of the shapes and kinds that `write` gives them."""
    return (
        correct.dtype == bool
        and correct.ndim in (1, 3)
        and labels.dtype == np.int64
        and labels.ndim == 1
        and correct.shape[-1] == len(labels) > 0
        and all(isinstance(name, str) for name in classes)
        and 0 <= labels.min() <= labels.max() < len(classes)
    )


def read_result(folder: Path, attack: str) -> Result:
    """An attack's result in a run folder or in the folder of an evaluation.

    Raises:
        UserError: there is none.
    """
    for place in (folder / "eval", folder):
        if (result := Result.read(place, attack)) is not None:
            return result
    files = [path for place in (folder / "eval", folder) for path in place.glob("*.json")]
    there = sorted({path.stem for path in files if path.with_suffix(".npz").is_file()})
    have = f" (there are: {', '.join(there)})" if there else ""
    elsewhere = (place for place in folder.glob("eval/*") if (place / f"{attack}.npz").is_file())
    if others := sorted(map(str, elsewhere)):
        how = f"please name one of other conditions: {', '.join(others)}"
    elif (folder / "config.yaml").is_file():
        how = f"run btrain eval {shlex.quote(f'checkpoint={folder}')} attack={attack}"
    else:
        how = "btrain eval makes one in a run folder"
    raise UserError(f"{folder} holds no finished evaluation {attack}{have}; {how}.")


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927), which stays inside [0, 1]."""
    p, z2 = right / n, Z**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def versions(*others: str) -> dict[str, str]:
    """Of btrain, Python, torch, numpy and whatever else computed."""
    found = {"btrain": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", *others):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
