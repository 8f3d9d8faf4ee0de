"""The results of evaluations, their files, and how these are read again.

`btrain eval` writes them, the report reads them.
"""

from __future__ import annotations

import math
import platform
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from btrain import __version__
from btrain.corruptions import SEVERITIES
from btrain.durable import make_folder, write_file
from btrain.errors import UserError
from btrain.runs.folder import RunFolder
from btrain.runs.json_fields import Fields, dumped, is_number
from btrain.settings.evaluation import CHAIN, words_for
from btrain.terminal import counted
from btrain.untrusted import RefusedError, sha256
from btrain.untrusted.arrays import read_npz

STANDARD = ("clean", *CHAIN)
"""The usual attacks, in rising cost."""
CORRUPTIONS, SANITY, SAMPLES = "corruptions.json", "sanity.json", "samples.npz"
BROKEN = "verified_and_broken.json"
"""The file that tells which images are verified and broken, which none may be."""
PAGE = "index.html"
WEIGHTS = "checkpoint_sha256"
"""The fact of a result that tells whose it is: the hash of the checkpoint's file."""
SHARES = "shares"
"""The setting of a verified accuracy that holds points (ε, percent)."""
_LARGEST = 256 << 20  # bytes of the arrays
_ARRAYS = ("clean", "adversarial", "labels", "clean_prediction", "adversarial_prediction")
_OWN = ("attack", "accuracy", "ci95", "n", "per_class", "seconds")
_NUMBERS, _COUNTS = ("epsilon", "step_size", "mce"), ("steps", "restarts", "test_examples")

# The 97.5 % quantile of the normal distribution.
Z = 1.959963984540054


@dataclass(frozen=True)
class Summary:
    """The content of `<attack>.json`; accuracies and interval in percent.

    Attributes:
        ci95: None where the file does not tell it.
        n: test images; None where a file of corruptions does not tell it.
        per_class: `{class: {"accuracy": percent, "n": examples}}` of the classes that occur.
        seconds: the evaluation took; None where the file does not tell it.
        settings: everything else, as the file has it: how the attack was run, and of corruptions
            `table` and `extra_table`, the accuracies at severities 1 to 5 by corruption.
    """

    attack: str
    accuracy: float
    ci95: tuple[float, float] | None
    n: int | None
    per_class: Mapping[str, Mapping[str, float]]
    seconds: float | None
    settings: Mapping[str, Any]

    @property
    def norm(self) -> str:
        """Return the norm of the ball; older files do not tell, and are of L∞."""
        return str(self.settings.get("norm", "linf"))

    def to_dict(self) -> dict[str, Any]:
        """Return what the file holds."""
        return {
            "attack": self.attack,
            "accuracy": self.accuracy,
            "ci95": None if self.ci95 is None else list(self.ci95),
            "n": self.n,
            **self.settings,
            "seconds": None if self.seconds is None else round(self.seconds, 3),
            "per_class": self.per_class,
        }

    @staticmethod
    def read(path: Path) -> Summary:
        """Return what a file holds, each value checked that anything is computed from.

        Raises:
            UserError: the file cannot be read, or is damaged.
        """
        fields, corrupted = Fields.of(path), path.name == CORRUPTIONS
        attack = fields.values.get("attack", "corruptions" if corrupted else None)
        if not isinstance(attack, str):
            raise fields.wrong("attack", "an attack's name")
        n, interval = fields.optional_count("n"), None
        if not n and not corrupted:
            raise fields.wrong("n", "the number of images")
        if fields.optional("ci95") is not None:
            low, high = fields.percents("ci95", 2)
            if low > high:
                raise fields.wrong("ci95", "[low, high]")
            interval = (low, high)
        for key in _NUMBERS:
            fields.optional_number(key)
        for key in _COUNTS:
            fields.optional_count(key)
        if fields.optional(SHARES) is not None:
            _curve(fields, SHARES)
        for key in ("table", "extra_table"):
            table = Fields(path, fields.optional(key) or {}, f"{key}.")
            for name in table.values:
                table.percents(name, SEVERITIES)
        return Summary(
            attack=attack,
            accuracy=fields.percent("accuracy"),
            ci95=interval,
            n=n,
            per_class={
                label: {"accuracy": of.percent("accuracy"), "n": of.optional_count("n") or 0}
                for label, of in fields.inside("per_class").items()
            },
            seconds=fields.optional_number("seconds"),
            settings={key: value for key, value in fields.values.items() if key not in _OWN},
        )


@dataclass(frozen=True)
class Result:
    """An attack's outcome, example by example.

    Attributes:
        attack: its name, which names the files.
        correct: the examples that are classified correctly under it, (n,) bool in the data set's
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
        """Return the share of an example's trials that it came through, (n,); 0 or 1 under one
        attack.
        """
        scores: npt.NDArray[np.float64] = self.correct.reshape(-1, len(self.labels)).mean(axis=0)
        return scores

    @property
    def accuracy(self) -> float:
        """Return the mean of the scores, percent."""
        return 100 * float(self.scores.mean())

    @property
    def ci95(self) -> tuple[float, float]:
        """Return the 95 % interval of the accuracy over other draws of test examples, percent.

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
        """Return the accuracy and number of examples of each class that occurs, as `Summary` has
        it.
        """
        return {
            name: {
                "accuracy": 100 * float(self.scores[self.labels == k].mean()),
                "n": int((self.labels == k).sum()),
            }
            for k, name in enumerate(self.classes)
            if (self.labels == k).any()
        }

    @property
    def summary(self) -> Summary:
        """Return the result without the answers to single examples."""
        return Summary(
            attack=self.attack,
            accuracy=self.accuracy,
            ci95=self.ci95,
            n=len(self.labels),
            per_class=self.per_class,
            seconds=self.seconds,
            settings=self.settings,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what the JSON file holds."""
        return self.summary.to_dict()

    def write(self, folder: Path) -> Path:
        """Write `<attack>.npz`, then `<attack>.json`, which thus marks a finished attack.

        Raises:
            UserError: the folder cannot be written.
        """
        write_arrays(folder / f"{self.attack}.npz", correct=self.correct, labels=self.labels)
        path = folder / f"{self.attack}.json"
        write_json(path, self.to_dict())
        return path

    @staticmethod
    def read(folder: Path, attack: str) -> Result | None:
        """Return what `write` left; None where there is nothing, or something damaged."""
        try:
            found = Summary.read(folder / f"{attack}.json")
            arrays = read_npz(folder / f"{attack}.npz", ("correct", "labels"), most=_LARGEST)
            correct, labels = arrays["correct"], arrays["labels"]
            classes = tuple(found.settings["classes"])
        except Exception:  # a damaged archive raises many kinds
            return None
        if found.seconds is None or not _fit(correct, labels, classes):
            return None
        return Result(found.attack, correct, labels, classes, found.seconds, {**found.settings})


def _fit(correct: npt.NDArray[Any], labels: npt.NDArray[Any], classes: tuple[object, ...]) -> bool:
    """Return whether the arrays of a file are of the shapes and kinds that `write` gives them."""
    return (
        correct.dtype == bool
        and correct.ndim in (1, 3)
        and labels.dtype == np.int64
        and labels.ndim == 1
        and correct.shape[-1] == len(labels) > 0
        and all(isinstance(name, str) for name in classes)
        and 0 <= labels.min() <= labels.max() < len(classes)
    )


@dataclass(frozen=True)
class Check:
    """A sign that gradients are masked, looked for.

    Attributes:
        passed: False is suspicious, None skipped.
        numbers: what the verdict rests on.
    """

    name: str
    passed: bool | None
    detail: str
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Return the outcome in a word."""
        return {True: "passed", False: "suspicious", None: "skipped"}[self.passed]


@dataclass(frozen=True)
class Sanity:
    """The content of `sanity.json`.

    Attributes:
        n: images that were attacked; None where the file does not tell.
        curves: points (x, accuracy in percent) over "epsilon" and over "steps".
        norm: of the ball; older files do not tell, and are of L∞.
        warning: why the verdicts mean nothing, if they do not.
        broken: the images that are misclassified within ε, by their places among those checked; in
            a file by those in the test set.
    """

    n: int | None
    epsilon: float | None
    checks: tuple[Check, ...]
    curves: Mapping[str, list[tuple[float, float]]]
    norm: str = "linf"
    warning: str | None = None
    broken: Sequence[int] = field(default=(), repr=False)

    def to_dict(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the file holds; the facts tell whose checks these are."""
        return {
            **facts,
            "n": self.n,
            "norm": self.norm,
            "epsilon": self.epsilon,
            "warning": self.warning,
            "checks": [
                {
                    "name": check.name,
                    "passed": check.passed,
                    "verdict": check.verdict,
                    "detail": check.detail,
                    "numbers": check.numbers,
                }
                for check in self.checks
            ],
            "curves": {key: [list(point) for point in curve] for key, curve in self.curves.items()},
            "broken": list(self.broken),
        }

    def write(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Replace `<folder>/sanity.json`.

        Raises:
            UserError: the folder cannot be written.
        """
        write_json(folder / SANITY, self.to_dict(facts))

    @staticmethod
    def read(path: Path) -> Sanity:
        """Return what a file holds, each value checked.

        Raises:
            UserError: the file cannot be read, or is damaged.
        """
        fields = Fields.of(path)
        entries = fields.optional("checks") or []
        if not isinstance(entries, list):
            raise fields.wrong("checks", "a list")
        curves = Fields(path, fields.optional("curves") or {}, "curves.")
        return Sanity(
            n=fields.optional_count("n"),
            epsilon=fields.optional_number("epsilon"),
            checks=tuple(
                _check(Fields(path, entry, f"checks[{i}].")) for i, entry in enumerate(entries)
            ),
            curves={
                key: _curve(curves, key) for key in ("epsilon", "steps") if curves.optional(key)
            },
            norm=fields.optional_text("norm") or "linf",
            warning=fields.optional_text("warning"),
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
        raise fields.wrong(key, f"a list of [{'ε' if key == SHARES else key}, accuracy]")
    return [(float(x), float(y)) for x, y in points]


@dataclass(frozen=True)
class Samples:
    """The content of `samples.npz`: a few images for people to look at.

    Attributes:
        clean, adversarial: (k, C, H, W), floats in [0, 1].
        labels, clean_prediction, adversarial_prediction: (k,) integers, indices of `class_names`.
    """

    clean: npt.NDArray[np.floating]
    adversarial: npt.NDArray[np.floating]
    labels: npt.NDArray[np.integer]
    clean_prediction: npt.NDArray[np.integer]
    adversarial_prediction: npt.NDArray[np.integer]
    class_names: list[str]

    def write(self, folder: Path) -> None:
        """Replace `<folder>/samples.npz`.

        Raises:
            UserError: the folder cannot be written.
        """
        write_arrays(folder / SAMPLES, **vars(self))

    @staticmethod
    def read(path: Path) -> Samples:
        """Return what a file holds, each array checked.

        Raises:
            UserError: the file is damaged.
        """
        try:
            keys = (*_ARRAYS, "class_names")
            arrays: dict[str, Any] = {**read_npz(path, keys, most=_LARGEST)}
            clean, names = arrays["clean"], [str(name) for name in arrays["class_names"]]
            of_images = all(
                arrays[key].shape == (len(clean), *clean.shape[1:])
                and arrays[key].dtype.kind == "f"
                and bool(((arrays[key] >= 0) & (arrays[key] <= 1)).all())
                for key in _ARRAYS[:2]
            )
            of_classes = all(
                arrays[key].shape == (len(clean),)
                and arrays[key].dtype.kind in "iu"
                and bool(((arrays[key] >= 0) & (arrays[key] < len(names))).all())
                for key in _ARRAYS[2:]
            )
        except Exception as error:  # a damaged archive raises many kinds
            raise UserError(f"{path} is damaged: it holds no readable sample images.") from error
        if clean.ndim != 4 or clean.shape[1] not in (1, 3) or not clean.size or not of_images:
            raise UserError(
                f"{path} is damaged: clean and adversarial must be images (k, 1 or 3, height, "
                "width) in [0, 1]."
            )
        if not of_classes:
            raise UserError(f"{path} is damaged: a label or prediction names no class.")
        return Samples(**{**arrays, "class_names": names})


@dataclass(frozen=True)
class Evaluation:
    """The results of a command, or of a folder; what was not measured is None or empty.

    Attributes:
        attacks: of a folder in rising cost.
        files: those that it was read from.
    """

    folder: Path
    attacks: list[Summary]
    corruptions: Summary | None = None
    sanity: Sanity | None = None
    samples: Samples | None = None
    files: list[str] = field(default_factory=list)

    def summaries(self) -> Iterator[Summary]:
        """Yield the attacks, then the corruptions."""
        yield from self.attacks
        if self.corruptions is not None:
            yield self.corruptions

    @staticmethod
    def read(folder: Path) -> Evaluation:
        """Return what every `*.json` of a folder and its `samples.npz` hold.

        Raises:
            UserError: there is nothing to read, or a file is damaged.
        """
        paths = {path.name: path for path in sorted(folder.glob("*.json")) if path.name != BROKEN}
        samples = folder / SAMPLES
        files = [*paths, *([SAMPLES] if samples.exists() else [])]
        if not files:
            raise UserError(f"{folder} holds no evaluation (neither a .json file nor {SAMPLES}).")
        corruptions, sanity = paths.pop(CORRUPTIONS, None), paths.pop(SANITY, None)
        order = {name: position for position, name in enumerate(STANDARD)}
        return Evaluation(
            folder,
            attacks=sorted(
                map(Summary.read, paths.values()),
                key=lambda found: (order.get(found.attack, len(order)), found.attack),
            ),
            corruptions=_with_table(corruptions) if corruptions else None,
            sanity=Sanity.read(sanity) if sanity else None,
            samples=Samples.read(samples) if samples.exists() else None,
            files=files,
        )


def _with_table(path: Path) -> Summary:
    found = Summary.read(path)
    if not found.settings.get("table"):
        raise UserError(f"{path} is damaged: it holds no table of accuracies by corruption.")
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file in one move.

    Raises:
        UserError: the folder cannot be written.
    """
    text = dumped(content, indent=2) + "\n"
    make_folder(path.parent)
    write_file(path, text.encode())


def write_arrays(path: Path, **arrays: Any) -> None:
    """Replace an `.npz` file in one move.

    Raises:
        UserError: the folder cannot be written.
    """
    content = BytesIO()
    np.savez_compressed(content, **arrays)
    make_folder(path.parent)
    write_file(path, content.getbuffer())


def read_result(folder: Path, attack: str) -> Result:
    """Return an attack's result in a run folder or in the folder of an evaluation.

    Raises:
        UserError: there is none, or that of a run is of other weights than its last.
    """
    last = RunFolder(folder).last
    anew = f"run btrain eval {shlex.quote(f'checkpoint={folder}')} {words_for(attack)}"
    for place in (folder / "eval", folder):
        if (result := Result.read(place, attack)) is None:
            continue
        if not agree(result.settings, weights_in(last), [WEIGHTS]):
            file = place / f"{attack}.json"
            raise UserError(f"{file} is of other weights than {last} holds now; {anew}.")
        return result
    files = [path for place in (folder / "eval", folder) for path in place.glob("*.json")]
    there = sorted({path.stem for path in files if path.with_suffix(".npz").is_file()})
    have = f" (there are: {', '.join(there)})" if there else ""
    elsewhere = (place for place in folder.glob("eval/*") if (place / f"{attack}.npz").is_file())
    if others := sorted(map(str, elsewhere)):
        how = f"please name one of other conditions: {', '.join(others)}"
    elif (folder / "config.yaml").is_file():
        how = anew
    else:
        how = "btrain eval makes one in a run folder"
    raise UserError(f"{folder} holds no finished evaluation {attack}{have}; {how}.")


def of_a_part(n: int) -> str:
    """Return the sentence of a note that only n of the test images were attacked."""
    return f"{counted(n, 'test image')}, class-balanced, not the whole test set."


def with_norm(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return an attack's settings with its norm, which older files do not tell: L∞."""
    return ({"norm": "linf"} if "epsilon" in settings else {}) | dict(settings)


def agree(one: Mapping[str, Any], other: Mapping[str, Any], keys: Iterable[str]) -> bool:
    """Return whether the facts of two results are the same by some keys, as far as both tell."""
    ours, theirs = with_norm(one), with_norm(other)
    return all(ours[key] == theirs[key] for key in keys if key in ours and key in theirs)


def weights_in(checkpoint: Path) -> dict[str, str]:
    """Return what a result of a checkpoint tells of its weights; nothing where none can be read."""
    try:
        return {WEIGHTS: sha256(checkpoint)}
    except (OSError, RefusedError):
        return {}


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion (Wilson 1927), which stays in [0, 1]."""
    p, z2 = right / n, Z**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def student(mean: float, deviation: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a mean by Student's t with n − 1 degrees of freedom; n ≥ 2.

    Args:
        deviation: of the sample.
    """
    from scipy.special import stdtrit

    half = float(stdtrit(n - 1, 0.975)) * deviation / math.sqrt(n)
    return mean - half, mean + half


def hardly_above_chance(accuracy: float, classes: int) -> bool:
    """Return whether an accuracy, in percent, is hardly above that of guessing."""
    return hardly_above(accuracy, 100 / classes)


def hardly_above(accuracy: float, guessing: float) -> bool:
    """Return whether an accuracy gains at most a tenth of what guessing leaves, both in percent."""
    return accuracy <= guessing + (100 - guessing) / 10


def versions(*others: str) -> dict[str, str]:
    """Return the versions of btrain, Python, torch, numpy and whatever else computed."""
    found = {"btrain": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", *others):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
