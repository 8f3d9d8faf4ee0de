"""Equations 4 to 7 against hand-worked batches and the paper's printed numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from btrain.allocation import (
    BOUNDARY,
    METRICS,
    OUTLIER,
    ROBUST,
    Random,
    Scored,
    Uniform,
    by_score,
    classify,
    gaussian,
    randomised,
    signed_prediction_variance,
    step_sizes,
    theoretical_speedup,
    true_classes,
    update_robust_fraction,
)
from btrain.errors import UserError
from btrain.methods.pool import no_attack


def test_svar_is_the_softmax_variance_with_the_sign_of_the_prediction() -> None:
    p = [0.7, 0.2, 0.1]
    logits = torch.tensor([[math.log(v) for v in p]] * 2)
    variance = sum((v - 1 / 3) ** 2 for v in p) / 3
    svar = signed_prediction_variance(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(svar, torch.tensor([variance, -variance]))


def test_svar_is_float32_whatever_the_logits() -> None:
    logits = torch.randn(4, 10, dtype=torch.bfloat16)
    assert signed_prediction_variance(logits, torch.zeros(4, dtype=torch.int64)).dtype is (
        torch.float32
    )


def test_eq6_on_a_hand_worked_batch() -> None:
    # Sorted: -.2 -.1 0 .1 .2 .3 .4 .5 .6; with F_R = 1/4 the percentile 3/4 is the 7th of 9: 0.4.
    svar = torch.tensor([0.4, -0.2, 0.1, 0.6, 0.0, -0.1, 0.3, 0.5, 0.2])
    expected = [ROBUST, OUTLIER, BOUNDARY, ROBUST, BOUNDARY, OUTLIER, BOUNDARY, ROBUST, BOUNDARY]
    assert classify(svar, torch.tensor(0.25)).tolist() == expected


def test_eq6_interpolates_between_examples() -> None:
    # The percentile 0.5 of four values lies half-way between the middle ones.
    svar = torch.tensor([0.1, 0.2, 0.4, 0.5])
    assert classify(svar, torch.tensor(0.5)).tolist() == [BOUNDARY, BOUNDARY, ROBUST, ROBUST]


def test_at_f_r_zero_all_correct_examples_but_the_surest_are_boundary() -> None:
    svar = torch.tensor([0.3, -0.1, 0.2, 0.1])
    assert classify(svar, torch.tensor(0.0)).tolist() == [ROBUST, OUTLIER, BOUNDARY, BOUNDARY]


def test_more_outliers_than_one_minus_f_r_leave_no_boundary() -> None:
    svar = torch.tensor([-0.3, -0.1, -0.2, 0.1, 0.2])
    classes = classify(svar, torch.tensor(0.8)).tolist()
    assert classes == [OUTLIER, OUTLIER, OUTLIER, ROBUST, ROBUST]


def test_a_misclassified_uniform_output_is_an_outlier() -> None:
    logits = torch.zeros(3, 10)  # argmax 0, variance 0: the sign of zero tells
    svar = signed_prediction_variance(logits, torch.tensor([0, 1, 9]))
    assert classify(svar, torch.tensor(0.0))[1:].tolist() == [OUTLIER, OUTLIER]
    assert classify(svar, torch.tensor(0.0))[0] != OUTLIER


BUDGET = torch.tensor([0, 2, 10])


def scored(score: torch.Tensor, labels: torch.Tensor, robust_fraction: float = 0.5) -> Scored:
    """A batch of which an allocator sees the score and the labels alone."""
    generator, unread = torch.Generator().manual_seed(0), torch.empty(len(labels), 0)
    return Scored(score, unread, labels, torch.tensor(robust_fraction), generator, no_attack)


def some_batch(m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random logits, about 70 % of them right."""
    generator = torch.Generator().manual_seed(m)
    logits = 2 * torch.randn(m, 10, generator=generator)
    labels = torch.randint(10, (m,), generator=generator)
    right = torch.rand(m, generator=generator) < 0.7
    return logits, torch.where(right, logits.argmax(1), labels)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("m", [1, 2, 7, 128])
@pytest.mark.parametrize("robust_fraction", [0.0, 0.3, 0.8, 1.0])
def test_classes_are_ordered_by_every_metric(metric: str, m: int, robust_fraction: float) -> None:
    logits, labels = some_batch(m)
    svar = METRICS[metric](logits, labels)
    classes, steps, *_ = by_score(svar, torch.tensor(robust_fraction), BUDGET)
    assert torch.equal(steps, BUDGET[classes])
    assert torch.equal(classes == OUTLIER, logits.argmax(1) != labels)
    for lower, upper in ((OUTLIER, BOUNDARY), (OUTLIER, ROBUST), (BOUNDARY, ROBUST)):
        if (classes == lower).any() and (classes == upper).any():
            assert svar[classes == lower].max() <= svar[classes == upper].min()


def test_metrics_agree_with_their_definitions() -> None:
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]]).log()
    labels = torch.tensor([0, 2])  # right, wrong
    for metric, right, wrong in (
        ("cross_entropy", 0.7, -0.7),
        ("margin", 0.5, -0.3),
        (
            "grad_norm",
            math.sqrt(2) - math.sqrt(0.3**2 + 0.2**2 + 0.1**2),
            -math.sqrt(0.1**2 + 0.6**2 + 0.7**2),
        ),
    ):
        torch.testing.assert_close(METRICS[metric](logits, labels), torch.tensor([right, wrong]))


def test_uniform_makes_everything_boundary() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1])
    classes, steps, *_ = Uniform(10)(scored(torch.full((5,), math.nan), labels))
    assert classes.tolist() == [BOUNDARY] * 5
    assert steps.tolist() == [10] * 5


def test_true_classes_follow_eqs_1_to_3() -> None:
    right, wrong = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    clean = torch.stack([right, right, wrong, wrong])
    adv = torch.stack([right, wrong, right, wrong])
    classes = true_classes(clean, adv, torch.zeros(4, dtype=torch.int64))
    assert classes.tolist() == [ROBUST, BOUNDARY, OUTLIER, OUTLIER]


def test_random_deals_out_the_shares_it_is_given() -> None:
    batch = scored(torch.linspace(-1, 1, 200), torch.zeros(200, dtype=torch.int64))
    chosen = Random(BUDGET, (10, 2, 0), fractions=(0.3, 0.5, 0.2))(batch)
    counts = torch.bincount(chosen.classes, minlength=3).tolist()
    assert (counts[OUTLIER], counts[ROBUST], counts[BOUNDARY]) == (40, 100, 60)
    assert torch.equal(chosen.steps, BUDGET[chosen.classes])
    assert not torch.equal(chosen.classes, chosen.classes.sort().values)


def test_random_keeps_the_budgets_and_moves_them() -> None:
    svar = signed_prediction_variance(*some_batch(128))
    chosen = by_score(svar, torch.tensor(0.5), BUDGET)
    moved = randomised(chosen, torch.Generator().manual_seed(0))
    assert torch.equal(moved.steps, BUDGET[moved.classes])
    assert torch.equal(moved.steps.sort().values, chosen.steps.sort().values)
    assert not torch.equal(moved.steps, chosen.steps)


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_grow_with_certainty_on_both_sides(metric: str) -> None:
    gaps = torch.tensor([6.0, 3.0, 1.0, 0.1])
    logits = torch.stack([gaps, torch.zeros(4)], dim=1)
    right = METRICS[metric](logits, torch.zeros(4, dtype=torch.int64))
    wrong = METRICS[metric](logits, torch.ones(4, dtype=torch.int64))
    assert torch.equal(right, right.sort(descending=True).values)
    assert torch.equal(wrong, wrong.sort().values)
    assert (right > 0).all()
    assert (wrong < 0).all()


@pytest.mark.parametrize("scale", [1e-4, 1e-2])
def test_gaussian_keeps_its_budget_with_tiny_scores(scale: float) -> None:
    logits, labels = some_batch(128)
    svar = signed_prediction_variance(scale * logits, labels)
    steps = gaussian(svar, torch.tensor(0.0), n_b=10, mean_steps=4.0).steps.double()
    assert 2.5 <= steps.mean() <= 4


@pytest.mark.parametrize("mean_steps", [0.0, 1.0, 4.0, 10.0])
@pytest.mark.parametrize("m", [1, 128])
def test_gaussian_falls_off_from_the_boundary_within_its_budget(m: int, mean_steps: float) -> None:
    svar = signed_prediction_variance(*some_batch(m))
    fraction = torch.tensor(0.5)
    steps = gaussian(svar, fraction, n_b=10, mean_steps=mean_steps).steps
    assert steps.min() >= 0
    assert steps.max() <= 10
    centre = torch.quantile(svar, 0.5).clamp(min=0) / 2
    by_distance = steps[(svar - centre).abs().argsort()]
    assert torch.equal(by_distance, by_distance.sort(descending=True).values)
    if m > 1 and mean_steps:
        assert 0.7 * mean_steps <= steps.double().mean() <= mean_steps


def test_eq5_counts_all_examples() -> None:
    logits = torch.eye(4)  # predicts 0, 1, 2, 3
    labels = torch.tensor([0, 1, 2, 0])
    updated = update_robust_fraction(torch.tensor(0.5), logits, labels, momentum=0.9, gamma=0.8)
    torch.testing.assert_close(updated, torch.tensor(0.9 * 0.5 + 0.1 * 0.8 * 3 / 4))
    assert updated.shape == ()


def test_eq5_converges_to_gamma_times_the_accuracy_and_keeps_no_graph() -> None:
    logits = torch.eye(4, requires_grad=True)
    fraction = torch.tensor(0.0)
    for _ in range(200):
        fraction = update_robust_fraction(
            fraction, logits, torch.arange(4), momentum=0.9, gamma=0.65
        )
    assert fraction.item() == pytest.approx(0.65, abs=1e-5)
    assert not fraction.requires_grad


@pytest.mark.parametrize(
    ("fractions", "steps", "baseline", "printed"),
    [
        # Table 1: two augmented views are two units beside the clean one.
        ((0.35, 0.65, 0.0), (2, 0, 0), 2, 1.8),
        ((0.36, 0.64, 0.0), (2, 0, 0), 2, 1.8),
        # Table 2
        ((1, 0, 0), (10, 10, 10), 10, 1.0),
        ((1, 0, 0), (1, 1, 1), 10, 5.5),
        ((0.26, 0.55, 0.18), (10, 0, 0), 10, 3.0),
        ((0.28, 0.54, 0.18), (10, 2, 0), 10, 2.3),
        # Table 3
        ((0.29, 0.44, 0.27), (10, 1, 0), 10, 2.5),
        ((0.30, 0.43, 0.26), (10, 2, 0), 10, 2.2),
        # Table 4, multi-step FAST
        ((1, 0, 0), (2, 2, 2), 10, 3.7),
        ((1, 0, 0), (3, 3, 3), 10, 2.8),
        ((1, 0, 0), (4, 4, 4), 10, 2.2),
        ((1, 0, 0), (5, 5, 5), 10, 1.8),
    ],
)
def test_eq7_gives_the_printed_speedups(
    fractions: tuple[float, float, float],
    steps: tuple[float, float, float],
    baseline: float,
    printed: float,
) -> None:
    speedup = theoretical_speedup(fractions=fractions, steps=steps, baseline_steps=baseline)
    # The fractions are printed with two digits, the speedups with one.
    assert speedup == pytest.approx(printed, abs=0.07)


def test_step_sizes_follow_section_4() -> None:
    sizes = step_sizes(torch.tensor([10, 2, 1, 0]), n_b=10, epsilon=0.031, step_size_b=0.007)
    expected = torch.tensor([0.007, 1.7 * 0.031 / 2, 1.7 * 0.031])
    torch.testing.assert_close(sizes[:3], expected)
    assert torch.isfinite(sizes).all()


def test_a_number_of_python_s_is_a_fraction() -> None:
    svar = torch.linspace(-0.01, 0.05, 30)
    assert torch.equal(classify(svar, 0.3), classify(svar, torch.tensor(0.3)))
    logits, labels = torch.eye(4), torch.arange(4)
    found = update_robust_fraction(0.5, logits, labels, momentum=0.9, gamma=0.8)
    assert float(found) == pytest.approx(0.9 * 0.5 + 0.1 * 0.8)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda z, y: classify(torch.zeros(3), 1.7), r"robust_fraction must be in \[0, 1\]"),
        (lambda z, y: classify(torch.zeros(3), torch.tensor(1.7)), r"in \[0, 1\], not 1.7"),
        (lambda z, y: classify(torch.zeros(3), torch.ones(3)), "one number for all examples"),
        (lambda z, y: classify(z, torch.tensor(0.5)), r"scores \(m,\), as signed_prediction"),
        (lambda z, y: classify(torch.zeros(0), 0.5), r"one example or more.* of shape \(0,\)"),
        (lambda z, y: classify(torch.zeros(3), None), r"a number in \[0, 1\], not None"),
        (lambda z, y: signed_prediction_variance(z[:, 0], y), r"logits must be floats \(m, K\)"),
        (lambda z, y: true_classes(z, z[:2], y), r"adv_logits must be .* not \(2, 4\) and \(3,\)"),
        (lambda z, y: update_robust_fraction(0.5, z, y, momentum=0.9, gamma=8),
         r"gamma must be in \[0, 1\], not 8"),
        (lambda z, y: update_robust_fraction(0.5, z[0], y, momentum=0.9, gamma=0.8),
         "adv_logits must be floats"),
    ],
)  # fmt: skip
def test_what_is_no_batch_is_one_sentence(
    call: Callable[[Tensor, Tensor], Tensor], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        call(torch.randn(3, 4), torch.arange(3))


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_wants_a_label_for_each_row(metric: str) -> None:
    z = torch.randn(3, 4)
    for labels in (torch.zeros(1, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64)):
        with pytest.raises(UserError, match=r"logits must be floats \(m, K\) and labels \(m,\)"):
            METRICS[metric](z, labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_scores_are_classified_as_the_same_numbers_in_float32(dtype: torch.dtype) -> None:
    score = torch.linspace(-0.2, 0.3, 21).to(dtype)
    f_r, whole = torch.tensor(0.4), score.float()
    assert torch.equal(classify(score, f_r), classify(whole, f_r))
    ours, theirs = (gaussian(part, f_r, n_b=5, mean_steps=2.0) for part in (score, whole))
    assert torch.equal(ours.steps, theirs.steps) and torch.equal(ours.classes, theirs.classes)
    assert torch.equal(ours.classes, classify(whole, f_r))
