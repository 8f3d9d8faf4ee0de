"""What an evaluation left in its folder, checked value by value before anything is drawn."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from btrain.errors import UserError

STANDARD = ("clean", "pgd20", "pgd100x10", "pgd1000x5", "autoattack")
"""The usual attacks, in rising cost."""
SEVERITIES = 5


@dataclass(frozen=True)
class Attack:
    """One attack's outcome; accuracies and interval in percent, lengths in [0, 1] pixel units.

    Attributes:
        per_class: accuracy and number of images by class name.
        facts: how it was run (data, device, seed, versions …), for people to read.
        test_examples: how many test images were asked for; None is all of them.
    """

    name: str
    accuracy: float
    ci95: tuple[float, float] | None
    n: int
    per_class: dict[str, tuple[float, int]]
    epsilon: float | None
    step_size: float | None
    steps: int | None
    restarts: int | None
    seconds: float | None
    test_examples: int | None
    loss: str | None
    note: str | None
    facts: dict[str, str]


@dataclass(frozen=True)
class Corruptions:
    """Accuracies in percent; a row of the table holds severities 1 to 5."""

    accuracy: float
    mce: float | None
    n: int | None
    regenerated: bool
    note: str | None
    table: dict[str, list[float]]


@dataclass(frozen=True)
class Check:
    """One sanity check; `passed` is None where it was skipped."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Sanity:
    """Checks, and curves of (x, accuracy in percent) over "epsilon" and "steps"."""

    n: int | None
    checks: list[Check]
    curves: dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Samples:
    """Clean and adversarial images (k, C, H, W) in [0, 1], (k,) labels and predictions."""

    clean: NDArray[np.floating]
    adversarial: NDArray[np.floating]
    labels: NDArray[np.integer]
    clean_prediction: NDArray[np.integer]
    adversarial_prediction: NDArray[np.integer]
    class_names: list[str]


@dataclass(frozen=True)
class Evaluation:
    """All that a folder holds; attacks in rising cost, what was not measured is None or empty."""

    attacks: list[Attack]
    corruptions: Corruptions | None
    sanity: Sanity | None
    samples: Samples | None
    files: list[str]


def read(folder: Path) -> Evaluation:
    """Reads every `*.json` of an evaluation, and `samples.npz`.

    Raises:
        UserError: there is nothing to read, or a file is damaged.
    """
    paths = {path.name: path for path in sorted(folder.glob("*.json"))}
    samples = folder / "samples.npz"
    files = [*paths, samples.name] if samples.exists() else [*paths]
    if not files:
        raise UserError(f"{folder} holds no evaluation (neither a .json file nor samples.npz).")
    corruptions = paths.pop("corruptions.json", None)
    sanity = paths.pop("sanity.json", None)
    order = {name: position for position, name in enumerate(STANDARD)}
    attacks = [_attack(_Fields.of(path)) for path in paths.values()]
    attacks.sort(key=lambda attack: (order.get(attack.name, len(order)), attack.name))
    return Evaluation(
        attacks=attacks,
        corruptions=_corruptions(_Fields.of(corruptions)) if corruptions else None,
        sanity=_sanity(_Fields.of(sanity)) if sanity else None,
        samples=_samples(samples) if samples.exists() else None,
        files=files,
    )


class _Fields:
    """A JSON object with the file it came from, so that a wrong value can be named."""

    def __init__(self, path: Path, values: Any, prefix: str = "") -> None:
        if not isinstance(values, dict):
            raise UserError(f"{path} is damaged: {prefix.rstrip('.') or 'it'} is no JSON object.")
        self.path, self.values, self.prefix = path, values, prefix

    @classmethod
    def of(cls, path: Path) -> _Fields:
        try:
            return cls(path, json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}).") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged: it is not JSON.") from error

    def wrong(self, key: str, expected: str) -> UserError:
        """The sentence for a value that is missing or of another kind."""
        shown = repr(self.values[key])[:60] if key in self.values else "missing"
        return UserError(f"{self.path} is damaged: {self.prefix}{key} is {shown}, not {expected}.")

    def inside(self, key: str) -> dict[str, _Fields]:
        """An object of objects; empty where it is missing or null."""
        inner = _Fields(self.path, self.optional(key) or {}, f"{self.prefix}{key}.")
        return {
            name: _Fields(self.path, value, f"{inner.prefix}{name}.")
            for name, value in inner.values.items()
        }

    def optional(self, key: str) -> Any:
        return self.values.get(key)

    def number(self, key: str, *, low: float = 0, high: float = math.inf) -> float:
        value = self.optional(key)
        if not _is_number(value) or not low <= value <= high:
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
            or not all(_is_number(value) and 0 <= value <= 100 for value in values)
        ):
            raise self.wrong(key, f"a list of {length} percentages")
        return [float(value) for value in values]

    def optional_text(self, key: str) -> str | None:
        value = self.optional(key)
        return None if value is None else _plain(value)


def _is_number(value: Any) -> bool:
    try:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
    except OverflowError:  # an integer beyond every float
        return False


def _plain(value: Any) -> str:
    """Any JSON value as a phrase."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value)


def _attack(fields: _Fields) -> Attack:
    n = fields.optional_count("n")
    if not n:
        raise fields.wrong("n", "the number of images")
    name = fields.optional("attack")
    if not isinstance(name, str):
        raise fields.wrong("attack", "an attack's name")
    interval = None
    if fields.optional("ci95") is not None:
        low, high = fields.percents("ci95", 2)
        interval = (low, high)
    facts = ("dataset", "checkpoint", "device", "precision", "seed", "versions")
    return Attack(
        name=name,
        accuracy=fields.percent("accuracy"),
        ci95=interval,
        n=n,
        per_class={
            label: (of.percent("accuracy"), of.optional_count("n") or 0)
            for label, of in fields.inside("per_class").items()
        },
        epsilon=fields.optional_number("epsilon"),
        step_size=fields.optional_number("step_size"),
        steps=fields.optional_count("steps"),
        restarts=fields.optional_count("restarts"),
        seconds=fields.optional_number("seconds"),
        test_examples=fields.optional_count("test_examples"),
        loss=fields.optional_text("loss"),
        note=fields.optional_text("note"),
        facts={key: value for key in facts if (value := fields.optional_text(key)) is not None},
    )


def _corruptions(fields: _Fields) -> Corruptions:
    table = _Fields(fields.path, fields.optional("table"), "table.")
    return Corruptions(
        accuracy=fields.percent("accuracy"),
        mce=fields.optional_number("mce"),
        n=fields.optional_count("n"),
        regenerated=bool(fields.optional("regenerated")),
        note=fields.optional_text("note"),
        table={name: table.percents(name, SEVERITIES) for name in table.values},
    )


def _sanity(fields: _Fields) -> Sanity:
    entries = fields.optional("checks") or []
    if not isinstance(entries, list):
        raise fields.wrong("checks", "a list")
    curves = _Fields(fields.path, fields.optional("curves") or {}, "curves.")
    return Sanity(
        n=fields.optional_count("n"),
        checks=[
            _check(_Fields(fields.path, entry, f"checks[{i}].")) for i, entry in enumerate(entries)
        ],
        curves={key: _curve(curves, key) for key in ("epsilon", "steps") if curves.optional(key)},
    )


def _check(fields: _Fields) -> Check:
    passed = fields.optional("passed")
    if passed is not None and not isinstance(passed, bool):
        raise fields.wrong("passed", "true, false or null")
    name = fields.optional_text("name")
    if name is None:
        raise fields.wrong("name", "a check's name")
    return Check(name, passed, fields.optional_text("detail") or "")


def _curve(fields: _Fields, key: str) -> list[tuple[float, float]]:
    points = fields.optional(key)
    if not isinstance(points, list) or not all(
        isinstance(point, list)
        and len(point) == 2
        and all(_is_number(value) and value >= 0 for value in point)
        and point[1] <= 100
        for point in points
    ):
        raise fields.wrong(key, f"a list of [{key}, accuracy]")
    return [(float(x), float(y)) for x, y in points]


def _samples(path: Path) -> Samples:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in Samples.__annotations__}
        clean, labels = arrays["clean"], arrays["labels"]
        names = [str(name) for name in arrays["class_names"]]
        k = len(clean)
        of_images = all(
            arrays[key].shape == (k, *clean.shape[1:])
            and arrays[key].dtype.kind == "f"
            and bool(((arrays[key] >= 0) & (arrays[key] <= 1)).all())
            for key in ("clean", "adversarial")
        )
        of_classes = all(
            arrays[key].shape == (k,)
            and arrays[key].dtype.kind in "iu"
            and bool(((arrays[key] >= 0) & (arrays[key] < len(names))).all())
            for key in ("labels", "clean_prediction", "adversarial_prediction")
        )
    except Exception as error:  # a damaged archive raises many kinds
        raise UserError(f"{path} is damaged: it holds no readable sample images.") from error
    if clean.ndim != 4 or clean.shape[1] not in (1, 3) or not clean.size or not of_images:
        raise UserError(
            f"{path} is damaged: clean and adversarial must be images (k, 1 or 3, height, width) "
            "in [0, 1]."
        )
    if not of_classes:
        raise UserError(f"{path} is damaged: a label or prediction names no class.")
    return Samples(
        clean=clean,
        adversarial=arrays["adversarial"],
        labels=labels,
        clean_prediction=arrays["clean_prediction"],
        adversarial_prediction=arrays["adversarial_prediction"],
        class_names=names,
    )
