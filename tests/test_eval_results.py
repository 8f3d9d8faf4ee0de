"""Intervals, files, and the paired test of two models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from btrain.errors import UserError
from btrain.evaluation.compare import compare, compare_folders
from btrain.evaluation.result import Result, read_result, wilson

RNG = np.random.default_rng(0)


def result(correct: Any, **settings: Any) -> Result:
    correct = np.asarray(correct)
    labels = np.arange(correct.shape[-1]) % 3
    facts = {"classes": ["a", "b", "c"], "dataset": "digits", "epsilon": 0.1, **settings}
    return Result("pgd20", correct, labels, ("a", "b", "c"), 1.5, facts)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (3, 7), (81, 355), (5308, 10000)])
def test_the_interval_is_wilsons(right: int, n: int) -> None:
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == pytest.approx((expected.low, expected.high))


def test_accuracy_by_class_adds_up() -> None:
    correct = RNG.random(100) < 0.6
    found = result(correct)
    assert found.accuracy == pytest.approx(100 * correct.mean())
    assert sum(c["n"] for c in found.per_class.values()) == 100
    total = sum(c["n"] * c["accuracy"] for c in found.per_class.values())
    assert total / 100 == pytest.approx(found.accuracy)


def test_under_corruptions_an_example_is_scored_many_times() -> None:
    correct = RNG.random((15, 5, 200)) < np.linspace(0.2, 0.9, 200)
    found = result(correct)
    assert found.accuracy == pytest.approx(100 * correct.mean())
    share = correct.mean(axis=(0, 1))
    half = 1.96 * share.std() / math.sqrt(200)
    assert found.ci95 == pytest.approx(
        (100 * (share.mean() - half), 100 * (share.mean() + half)), rel=1e-4
    )


def test_files_return_what_was_written(tmp_path: Path) -> None:
    written = result(RNG.random(50) < 0.5, steps=20, started_from=None)
    written.write(tmp_path / "eval")
    found = read_result(tmp_path, "pgd20")
    assert (found.correct == written.correct).all()
    assert found.settings == written.settings
    assert found.to_dict() == written.to_dict()
    assert not list(tmp_path.rglob("*.tmp"))
    with np.load(tmp_path / "eval" / "pgd20.npz", allow_pickle=False) as arrays:
        assert arrays["correct"].dtype == bool


def test_mcnemar_by_hand() -> None:
    # 20 examples: both right 9, only A 1, only B 8, both wrong 2.
    a = np.array([1] * 9 + [1] + [0] * 8 + [0] * 2, dtype=bool)
    b = np.array([1] * 9 + [0] + [1] * 8 + [0] * 2, dtype=bool)
    found = compare(a, b)
    assert (found.only_a, found.only_b) == (1, 8)
    # Of 9 disagreements, 0 or 1 or 8 or 9 for A: 2·(1 + 9)/2⁹.
    assert found.p == pytest.approx(2 * (1 + 9) / 2**9)
    assert found.difference == pytest.approx(35)
    # Half an example in each cell: b = 1.5, c = 8.5, n = 22.
    centre = 7 / 22
    half = 1.959964 * math.sqrt(10 - 49 / 22) / 22
    assert found.ci95 == pytest.approx((100 * (centre - half), 100 * (centre + half)), rel=1e-6)
    assert "B is better" in found.sentence()
    mirrored = compare(b, a)
    assert mirrored.p == found.p
    assert mirrored.ci95 == pytest.approx((-found.ci95[1], -found.ci95[0]))


def test_two_equal_models_are_not_told_apart() -> None:
    a = RNG.random(100) < 0.5
    found = compare(a, a)
    assert found.p == 1
    assert found.ci95[0] < 0 < found.ci95[1]
    assert "do not tell them apart" in found.sentence()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (result(np.ones(12, dtype=bool)), "n is 9 and 12"),
        (result(np.ones(9, dtype=bool), epsilon=0.2), "epsilon is 0.1 and 0.2"),
        (result(np.ones(9, dtype=bool), dataset="mnist"), "dataset is digits and mnist"),
        (result(np.ones(9, dtype=bool), data_sha256="b"), "images differ"),
    ],
)
def test_different_evaluations_are_not_compared(tmp_path: Path, other: Result, words: str) -> None:
    result(np.ones(9, dtype=bool), data_sha256="a").write(tmp_path / "A" / "eval")
    settings = {"data_sha256": "a", **other.settings}
    Result("pgd20", other.correct, other.labels, other.classes, 1.0, settings).write(tmp_path / "B")
    with pytest.raises(UserError, match=words):
        compare_folders(tmp_path / "A", tmp_path / "B", "pgd20")


def test_different_labels_are_not_compared(tmp_path: Path) -> None:
    first = result(np.ones(9, dtype=bool))
    first.write(tmp_path / "A")
    labels = first.labels[::-1].copy()
    Result("pgd20", first.correct, labels, first.classes, 1.0, first.settings).write(tmp_path / "B")
    with pytest.raises(UserError, match="test labels differ"):
        compare_folders(tmp_path / "A", tmp_path / "B", "pgd20")


def test_a_missing_evaluation_is_named_with_what_there_is(tmp_path: Path) -> None:
    result(np.ones(9, dtype=bool)).write(tmp_path / "eval")
    with pytest.raises(UserError) as caught:
        read_result(tmp_path, "autoattack")
    assert "holds no finished evaluation autoattack (there are: pgd20)" in str(caught.value)


def test_a_run_is_not_compared_by_results_of_its_earlier_weights(tmp_path: Path) -> None:
    result(np.ones(9, dtype=bool), checkpoint_sha256="earlier").write(tmp_path / "eval")
    assert len(read_result(tmp_path, "pgd20").labels) == 9  # handed on without its checkpoints
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").write_bytes(b"later")
    with pytest.raises(UserError, match=r"pgd20\.json is of other weights than .*last\.pt holds"):
        read_result(tmp_path, "pgd20")
    assert len(read_result(tmp_path / "eval", "pgd20").labels) == 9  # a folder that is named


@pytest.mark.parametrize("damage", ["json", "npz"])
def test_a_damaged_evaluation_counts_as_none(tmp_path: Path, damage: str) -> None:
    result(np.ones(9, dtype=bool)).write(tmp_path)
    file = tmp_path / f"pgd20.{damage}"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match="holds no finished evaluation"):
        read_result(tmp_path, "pgd20")
    if damage == "json":
        file.write_text(json.dumps([1]))
        assert Result.read(tmp_path, "pgd20") is None
