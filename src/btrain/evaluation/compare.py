"""A paired test of two models on the same examples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from btrain.errors import UserError
from btrain.evaluation.result import Result, Z, read_result, with_norm
from btrain.terminal import counted


@dataclass(frozen=True)
class Comparison:
    """The comparison of two models under one attack; differences are B − A in points.

    Attributes:
        only_a, only_b: how many examples only A, or only B, classifies correctly.
        p: of an exact McNemar test.
    """

    attack: str
    accuracy_a: float
    accuracy_b: float
    difference: float
    ci95: tuple[float, float]
    only_a: int
    only_b: int
    p: float

    def sentence(self) -> str:
        """Return the result in words."""
        verdict = "B is better" if self.difference > 0 else "A is better"
        if self.p >= 0.05:
            verdict = "the data do not tell them apart"
        return (
            f"{self.attack}: A {self.accuracy_a:.2f} %, B {self.accuracy_b:.2f} %, difference "
            f"{self.difference:+.2f} points (95 % interval {self.ci95[0]:+.2f} to "
            f"{self.ci95[1]:+.2f}); {counted(self.only_a, 'example')} only A gets "
            f"right, {self.only_b} only B; exact McNemar test p = {self.p:.3g}: {verdict}."
        )


def compare_folders(a: Path, b: Path, attack: str) -> Comparison:
    """Compare two evaluations of one attack, example by example.

    Args:
        a, b: run folders, or the folders of evaluations.

    Raises:
        UserError: an evaluation is missing, or they are not of the same attack on the same
            examples.
    """
    first, second = read_result(a, attack), read_result(b, attack)
    for key, left, right in _facts(first, second):
        if left != right:
            raise UserError(f"{a} and {b} cannot be compared: {key} is {left} and {right}.")
    if first.correct.ndim != 1:
        raise UserError(f"{attack} is no single answer for an example; please compare an attack.")
    for what, left, right in (
        ("labels", first.labels.tolist(), second.labels.tolist()),
        ("images", first.settings.get("data_sha256"), second.settings.get("data_sha256")),
    ):
        if left != right:
            raise UserError(f"{a} and {b} cannot be compared: their test {what} differ.")
    return compare(first.correct, second.correct, attack)


def _facts(first: Result, second: Result) -> list[tuple[str, object, object]]:
    """Return what must be the same, in the order in which it is worth telling."""
    keys = (
        *("dataset", "norm", "epsilon", "steps", "restarts", "step_size", "loss", "counts"),
        *("precision", "started_from"),
    )
    one, other = with_norm(first.settings), with_norm(second.settings)
    pairs = [(key, one.get(key), other.get(key)) for key in keys]
    return [("n", len(first.labels), len(second.labels)), *pairs]


def compare(
    a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_], attack: str = "clean"
) -> Comparison:
    """Test by McNemar's exact test whether, given that one of two errs, it is as often A as B.

    The interval is Agresti and Min's (2005): Wald's for paired proportions with half an example
    added to each of the four outcomes. (n,), (n,) bool
    """
    from scipy.stats import binomtest

    n, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    decided = only_a + only_b
    p = float(binomtest(only_a, decided).pvalue) if decided else 1.0
    centre = (only_b - only_a) / (n + 2)
    variance = (decided + 1 - (only_b - only_a) ** 2 / (n + 2)) / (n + 2) ** 2
    half = Z * math.sqrt(variance)
    return Comparison(
        attack=attack,
        accuracy_a=100 * float(a.mean()),
        accuracy_b=100 * float(b.mean()),
        difference=100 * (only_b - only_a) / n,
        ci95=(100 * max(-1.0, centre - half), 100 * min(1.0, centre + half)),
        only_a=only_a,
        only_b=only_b,
        p=p,
    )
