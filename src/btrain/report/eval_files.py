"""What an evaluation left in its folder, checked value by value before anything is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from btrain.errors import UserError
from btrain.runs.json_fields import Fields, is_number
from btrain.untrusted.arrays import read_npz

STANDARD = ("clean", "pgd20", "pgd100x10", "pgd1000x5", "autoattack")
"""The usual attacks, in rising cost."""
SEVERITIES = 5
_LARGEST_SAMPLES = 256 << 20  # bytes, decompressed


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
    """Accuracies in percent; a row of a table holds severities 1 to 5.

    Attributes:
        extra: the corruptions that are no part of the means.
    """

    accuracy: float
    mce: float | None
    n: int | None
    regenerated: bool
    note: str | None
    table: dict[str, list[float]]
    extra: dict[str, list[float]]


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
    attacks = [_attack(Fields.of(path)) for path in paths.values()]
    attacks.sort(key=lambda attack: (order.get(attack.name, len(order)), attack.name))
    return Evaluation(
        attacks=attacks,
        corruptions=_corruptions(Fields.of(corruptions)) if corruptions else None,
        sanity=_sanity(Fields.of(sanity)) if sanity else None,
        samples=_samples(samples) if samples.exists() else None,
        files=files,
    )


def _attack(fields: Fields) -> Attack:
    n = fields.optional_count("n")
    if not n:
        raise fields.wrong("n", "the number of images")
    name = fields.optional("attack")
    if not isinstance(name, str):
        raise fields.wrong("attack", "an attack's name")
    interval = None
    if fields.optional("ci95") is not None:
        low, high = fields.percents("ci95", 2)
        if low > high:
            raise fields.wrong("ci95", "[low, high]")
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


def _corruptions(fields: Fields) -> Corruptions:
    table = Fields(fields.path, fields.optional("table"), "table.")
    extra = Fields(fields.path, fields.optional("extra_table") or {}, "extra_table.")
    return Corruptions(
        accuracy=fields.percent("accuracy"),
        mce=fields.optional_number("mce"),
        n=fields.optional_count("n"),
        regenerated=bool(fields.optional("regenerated")),
        note=fields.optional_text("note"),
        table={name: table.percents(name, SEVERITIES) for name in table.values},
        extra={name: extra.percents(name, SEVERITIES) for name in extra.values},
    )


def _sanity(fields: Fields) -> Sanity:
    entries = fields.optional("checks") or []
    if not isinstance(entries, list):
        raise fields.wrong("checks", "a list")
    curves = Fields(fields.path, fields.optional("curves") or {}, "curves.")
    return Sanity(
        n=fields.optional_count("n"),
        checks=[
            _check(Fields(fields.path, entry, f"checks[{i}].")) for i, entry in enumerate(entries)
        ],
        curves={key: _curve(curves, key) for key in ("epsilon", "steps") if curves.optional(key)},
    )


def _check(fields: Fields) -> Check:
    passed = fields.optional("passed")
    if passed is not None and not isinstance(passed, bool):
        raise fields.wrong("passed", "true, false or null")
    name = fields.optional_text("name")
    if name is None:
        raise fields.wrong("name", "a check's name")
    return Check(name, passed, fields.optional_text("detail") or "")


def _curve(fields: Fields, key: str) -> list[tuple[float, float]]:
    points = fields.optional(key)
    if not isinstance(points, list) or not all(
        isinstance(point, list)
        and len(point) == 2
        and all(is_number(value) and value >= 0 for value in point)
        and point[1] <= 100
        for point in points
    ):
        raise fields.wrong(key, f"a list of [{key}, accuracy]")
    return [(float(x), float(y)) for x, y in points]


def _samples(path: Path) -> Samples:
    try:
        arrays = read_npz(path, Samples.__annotations__.keys(), most=_LARGEST_SAMPLES)
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
