"""The paired tests and the verdicts of the sheets against their definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from scipy import stats

from btrain.evaluation.compare import compare_folders
from btrain.paper.plan import Claim
from btrain.paper.sheets import arithmetic, files
from btrain.paper.sheets.sheet import make_sheet
from sheets import cells, evaluated, finished, line, plan, row


def test_with_one_seed_the_paired_test_is_mcnemars(tmp_path: Path) -> None:
    ours = [1, 1, 1, 1, 1, 0, 1, 0]
    theirs = [0, 0, 0, 0, 1, 1, 1, 0]
    evaluated(finished(tmp_path / "a-seed0"), "pgd20", theirs)
    evaluated(finished(tmp_path / "b-seed0"), "pgd20", ours)
    sheet = make_sheet(plan([row("a"), row("b")]), tmp_path)
    found = line(sheet, "b").test
    assert found is not None
    # Four examples only b gets right, one only a: (4 − 1) / √(4 + 1).
    assert found.z == pytest.approx(3 / math.sqrt(5))
    # The exact test: twice the chance of four heads or more of five tosses, (5 + 1) / 32.
    assert found.p == pytest.approx(2 * 6 / 32)
    folders = tmp_path / "a-seed0", tmp_path / "b-seed0"
    assert found.p == compare_folders(*folders, "pgd20").p  # and so says btrain eval compare
    assert found.difference == pytest.approx(100 * 3 / 8)
    assert cells(sheet, "b")["p"] == "0.375"
    assert "McNemar's exact test;" in files.markdown(sheet)
    assert cells(sheet, "a")["p"] == "baseline"


def test_seeds_are_averaged_before_the_test(tmp_path: Path) -> None:
    answers = {
        ("a", 0): [0, 0, 1, 1], ("a", 1): [0, 1, 1, 1],
        ("b", 0): [1, 0, 1, 1], ("b", 1): [1, 1, 0, 1], ("b", 2): [0, 0, 0, 0],
    }  # fmt: skip
    for (name, seed), correct in answers.items():
        evaluated(finished(tmp_path / f"{name}-seed{seed}"), "pgd20", correct)
    found = line(make_sheet(plan([row("a", 2), row("b", 3)]), tmp_path), "b").test
    assert found is not None
    # d = 1, 0, −1/2, 0; seed 2 is b's alone.
    assert found.seeds == 2
    assert found.z == pytest.approx(0.5 / math.sqrt(1.25))
    assert (found.differing, found.p) == (2, None)  # too few for the normal tail


@pytest.mark.parametrize(("differing", "shown"), [(24, "–"), (25, "< 0.001")])
def test_the_normal_tail_needs_25_differing_examples(
    tmp_path: Path, differing: int, shown: str
) -> None:
    for seed in range(2):
        evaluated(finished(tmp_path / f"a-seed{seed}"), "pgd20", [0] * 40)
        right = [1] * differing + [0] * (40 - differing)
        evaluated(finished(tmp_path / f"b-seed{seed}"), "pgd20", right)
    sheet = make_sheet(plan([row("a", 2), row("b", 2)]), tmp_path)
    found = line(sheet, "b").test
    assert found is not None and found.differing == differing
    assert found.z == pytest.approx(math.sqrt(differing))
    assert cells(sheet, "b")["p"] == shown
    assert "fewer than 25 examples differ" in files.markdown(sheet)
    assert json.loads(files.as_json(sheet))["rows"][1]["test"]["p"] == pytest.approx(found.p)


def test_other_test_examples_are_not_compared(tmp_path: Path) -> None:
    evaluated(finished(tmp_path / "a-seed0"), "pgd20", [1, 0, 1, 0])
    evaluated(finished(tmp_path / "b-seed0"), "pgd20", [1, 1, 1, 0], data_sha256="other")
    evaluated(finished(tmp_path / "c-seed0"), "pgd20", [1, 1, 1])
    evaluated(finished(tmp_path / "d-seed0"), "pgd20", [1, 0, 1, 0])
    sheet = make_sheet(plan([row(name) for name in "abcd"]), tmp_path)
    assert [line(sheet, name).test for name in "abc"] == [None] * 3
    same = line(sheet, "d").test
    assert same is not None and (same.z, same.p) == (0, 1)


def test_the_interval_is_students(tmp_path: Path) -> None:
    ends = arithmetic.interval({0: 1.0, 1: 2.0, 2: 6.0})
    # Mean 3, deviation √7; t of 2 degrees of freedom is 4.302653.
    assert ends == pytest.approx((3 - 4.302653 * math.sqrt(7 / 3), 3 + 4.302653 * math.sqrt(7 / 3)))
    assert ends == pytest.approx(stats.t.interval(0.95, 2, 3, math.sqrt(7 / 3)))
    assert arithmetic.interval({0: 1.0}) is None


LIMIT = "undecided (all differences are the limit)"


@pytest.mark.parametrize(
    ("values", "at_least", "at_most", "verdict"),
    [
        ([2.0, 2.0], 2.0, None, LIMIT),  # as much above as below
        ([2.0, 2.0], None, 2.0, LIMIT),
        ([0.0, 0.0, 0.0], 0, None, LIMIT),
        ([0.0, 0.0, 0.0], -1, None, "holds"),
        ([2.0, 2.0], 1.9, None, "holds"),
        ([2.0, 2.0], 2.1, None, "fails"),
        ([2.0, 2.0], None, 1.9, "fails"),
        ([2.0, 2.0], 1.0, 3.0, "holds"),
        ([1.0, 2.0, 6.0], 0.0, None, "undecided"),
        ([1.0, 2.0, 6.0], -3.6, None, "holds"),  # from −3.57 to 9.57
        ([1.0, 2.0, 6.0], -3.5, None, "undecided"),
        ([1.0, 2.0, 6.0], 9.6, None, "fails"),
        ([1.0, 2.0, 6.0], 9.5, None, "undecided"),
        ([5.0], 0.0, None, "undecided (one seed)"),
        ([], 0.0, None, "undecided"),
    ],
)
def test_verdicts_at_the_edges(
    values: list[float], at_least: float | None, at_most: float | None, verdict: str
) -> None:
    by_seed = dict(enumerate(values))
    assert arithmetic.verdict(by_seed, at_least=at_least, at_most=at_most) == verdict


def test_claims_are_of_paired_seeds(tmp_path: Path) -> None:
    for seed, (theirs, ours) in enumerate([(50.0, 51.0), (60.0, 62.0), (70.0, 73.0)]):
        finished(tmp_path / f"a-seed{seed}", robust=theirs, seconds=100)
        finished(tmp_path / f"b-seed{seed}", robust=ours, seconds=50)
        evaluated(tmp_path / f"b-seed{seed}", "autoattack", [1, 1, 0, 0, 0, 0, 0, 0])
    finished(tmp_path / "b-seed3", robust=0.0)
    claims = [
        Claim("b is above", "robust_acc", "b", "a", at_least=0),
        Claim("b is twice as fast", "speedup_measured", "b", None, at_least=1.9),
        Claim("b withstands", "autoattack", "b", None, at_least=20),
        Claim("no such row", "robust_acc", "c", "a", at_least=0),
    ]
    sheet = make_sheet(plan([row("a", 3), row("b", 4)], claims), tmp_path)
    above, fast, withstands, none = sheet.verdicts
    assert above.differences == {0: 1.0, 1: 2.0, 2: 3.0}
    assert above.verdict == "undecided"  # 2 ± 4.30 · 1/√3
    assert (fast.differences, fast.verdict) == ({0: 2.0, 1: 2.0, 2: 2.0}, "holds")
    assert withstands.differences == {0: 25.0, 1: 25.0, 2: 25.0}
    assert none.verdict == "undecided (no row c)"
    shown = files.markdown(sheet)
    assert (
        "**undecided** – b is above (PGD-20, at least 0: +2.00, 95 % interval −0.48 to +4.48"
        in (shown)
    )


def test_a_claim_without_numbers_tells_why(tmp_path: Path) -> None:
    for seed in range(2):
        finished(tmp_path / f"a-seed{seed}")
        finished(tmp_path / f"b-seed{seed}", machine="Processor 2")
        finished(tmp_path / f"c-seed{seed}", config={"dataset.train_examples": 3000})
    finished(tmp_path / "d-seed2")
    rows = [*(row(name, 2) for name in "abc"), row("d", 3), row("e", 2)]
    claims = [
        Claim("another machine", "speedup_measured", "b", at_least=1),
        Claim("other images", "speedup_measured", "c", at_least=1),
        Claim("other images' FLOPs", "speedup_flops", "c", at_least=1),
        Claim("no pair", "speedup_measured", "d", at_least=1),
        Claim("no pair to subtract", "clean_acc", "d", "a", at_least=0),
        Claim("no attack", "autoattack", "b", "a", at_least=0),
        Claim("not begun", "clean_acc", "a", "e", at_least=0),
        Claim("<b>", "<b>", "a", at_least=0),
    ]
    sheet = make_sheet(plan(rows, claims), tmp_path)
    assert [found.verdict for found in sheet.verdicts] == [
        f"undecided ({why})"
        for why in (
            "other machine", "other images", "other images",
            "no seed in common with the baseline", "no common seed", "autoattack not evaluated",
            "no finished run of e", "<b> not evaluated",
        )
    ]  # fmt: skip
    shown = files.markdown(sheet)
    assert "no run yet" not in shown
    assert "<b>" not in shown.replace(r"\<b\>", "")
    assert "not of other test images" in shown


@pytest.mark.parametrize(
    ("base", "ours", "verdict"),
    [
        (10.0, 10.0, "undecided (not trained: clean accuracy near chance)"),
        (19.9, 90.0, "undecided (not trained: clean accuracy near chance)"),
        (90.0, 10.0, "fails"),  # it collapsed, which is a result
        (20.0, 20.5, "holds"),
        (20.0, 20.0, LIMIT),
    ],
)
def test_networks_that_learnt_nothing_decide_nothing(
    tmp_path: Path, base: float, ours: float, verdict: str
) -> None:
    for seed in range(2):
        finished(tmp_path / f"a-seed{seed}", clean=base)
        finished(tmp_path / f"b-seed{seed}", clean=ours)
    claims = [Claim("b is not below a", "clean_acc", "b", "a", at_least=0)]
    sheet = make_sheet(plan([row("a", 2), row("b", 2)], claims), tmp_path)
    assert sheet.verdicts[0].verdict == verdict
