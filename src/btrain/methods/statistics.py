"""The sums that a batch adds to its epoch, kept on the device, and the averages for the log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from btrain.allocation import BOUNDARY, OUTLIER, ROBUST, Allocation
from btrain.defenses import Weights


class StepStats(NamedTuple):
    """The sums over the examples of a batch, 0-d tensors on the device.

    An outcome is known where the example was attacked and its clean prediction was right: it fell
    or it stood. The predicted outliers stand for the wrong if no clean logits were computed.
    The scores (SVar, or another metric) are summed by what really happened. A unit of cost is one
    forward pass of one example: an attack step takes two, a training pass three. `bad_logits`
    counts the examples whose logits are not finite.
    """

    examples: Tensor
    loss: Tensor
    boundary: Tensor
    robust: Tensor
    outlier: Tensor
    steps: Tensor
    units: Tensor
    clean_correct: Tensor
    robust_correct: Tensor
    boundary_fell: Tensor
    boundary_stood: Tensor
    robust_fell: Tensor
    robust_stood: Tensor
    wrong: Tensor
    score_wrong: Tensor
    score_fell: Tensor
    score_stood: Tensor
    bad_logits: Tensor


_OF_ATTACKS = {
    "robust_correct",
    *("boundary_fell", "boundary_stood", "robust_fell", "robust_stood"),
    *("score_fell", "score_stood"),
}
"""The sums that an attack decides, in which the attacked count for those who were spared."""

EXAMPLES = StepStats._fields.index("examples")
UNITS = StepStats._fields.index("units")


@torch.no_grad()
def step_stats(
    allocation: Allocation,
    loss: Tensor,
    z: Tensor,
    score: Tensor | None,
    clean_logits: Tensor,
    adv_logits: Tensor,
    labels: Tensor,
    *,
    units: float,
    weights: Weights | None = None,
) -> StepStats:
    """Return the statistics of one batch, all tensors in one order.

    Args:
        allocation: of the batch.
        loss: mean over the batch, ().
        z: the logits that tell who is misclassified, (m, K), or (m, 0) where none were computed.
        score: of z, (m,); NaN, or None for all, where it is not known.
        clean_logits: (m, K), or (m, 0) where none were computed.
        adv_logits: (m, K), or (m, 0) where they tell nothing of the outcome.
        labels: (m,).
        units: what the batch has cost.
        weights: inverse-probability weights; None for ones. All sums are weighted but those of
            steps and cost, which the examples of the batch alone have taken.
    """
    classes, steps, overhead, _ = allocation
    boundary, robust, outlier = classes == BOUNDARY, classes == ROBUST, classes == OUTLIER
    has_clean, has_adv = clean_logits.shape[1] > 0, adv_logits.shape[1] > 0
    wrong = z.argmax(dim=1) != labels if z.shape[1] else outlier
    stands = adv_logits.argmax(dim=1) == labels if has_adv else torch.zeros_like(wrong)
    known = (steps > 0) & ~wrong if has_adv else torch.zeros_like(wrong)
    fell, stood = known & ~stands, known & stands
    groups = {
        "boundary": boundary,
        "robust": robust,
        "outlier": outlier,
        "boundary_fell": boundary & fell,
        "boundary_stood": boundary & stood,
        "robust_fell": robust & fell,
        "robust_stood": robust & stood,
        "wrong": wrong,
        "bad_logits": ~torch.isfinite(torch.cat([clean_logits, adv_logits], dim=1)).all(dim=1),
    }
    groups |= {"clean_correct": clean_logits.argmax(dim=1) == labels} if has_clean else {}
    groups |= {"robust_correct": stands} if has_adv else {}
    examples = torch.full_like(loss, len(labels))
    sums = {
        "examples": examples if weights is None else weights.clean.sum().to(loss.dtype),
        "loss": loss * examples,
        "steps": steps.sum() + overhead * examples,
        "units": torch.full_like(loss, units),
        **_summed(groups, loss.dtype, weights),
    }
    if score is not None:
        scores = {"score_wrong": wrong, "score_fell": fell, "score_stood": stood}
        of_groups = {name: score * group for name, group in scores.items()}
        sums |= _summed(of_groups, score.dtype, weights)
    unknown = dict.fromkeys(StepStats._fields, torch.full_like(loss, math.nan))
    return StepStats(**(unknown | sums))


def _summed(
    rows: dict[str, Tensor], dtype: torch.dtype, weights: Weights | None
) -> dict[str, Tensor]:
    """Return the sum of each, in one go: a GPU launches few kernels. (m,) -> ()

    Counts are floating point from here on, exact below 2^24: a GPU would convert each by itself.
    """
    values = torch.stack([*rows.values()])
    if weights is not None:
        of = [weights.adv if name in _OF_ATTACKS else weights.clean for name in rows]
        values = values * torch.stack(of)
    return dict(zip(rows, values.sum(dim=1, dtype=dtype).unbind(), strict=True))


def summed(several: Sequence[StepStats]) -> StepStats:
    """Return the sums of several batches' statistics."""
    return StepStats._make(torch.stack(values).sum(0) for values in zip(*several, strict=True))


def stacked(stats: StepStats) -> Tensor:
    """Return the statistics in one tensor of float64, in the order of the fields."""
    return torch.stack(stats).double()


def averages(sums: Tensor) -> dict[str, float | None]:
    """Return what the log shows of `StepStats` sums: means, percent, None if unknown.

    `boundary_precision` is the share of the attacked examples predicted boundary that fell,
    `boundary_recall` the share of the fallen that had been predicted boundary; `robust_…` likewise
    for those that stood. Each example is judged by the attack that it got, so with N_R = 0 nothing
    is known of the robust ones, and no recall.
    """
    total = StepStats._make(sums.tolist())
    n = total.examples
    both = (  # outcomes of both predictions are known
        total.boundary_fell + total.boundary_stood > 0
        and total.robust_fell + total.robust_stood > 0
    )
    fell = total.boundary_fell + total.robust_fell
    stood = total.boundary_stood + total.robust_stood
    return {
        "loss": _ratio(total.loss, n),
        "f_b": _ratio(total.boundary, n),
        "f_r": _ratio(total.robust, n),
        "f_o": _ratio(total.outlier, n),
        "attack_steps_mean": _ratio(total.steps, n),
        "units_per_example": _ratio(total.units, n),
        "clean_acc_train": _ratio(100 * total.clean_correct, n),
        "robust_acc_train": _ratio(100 * total.robust_correct, n),
        "boundary_precision": _ratio(
            total.boundary_fell, total.boundary_fell + total.boundary_stood
        ),
        "boundary_recall": _ratio(total.boundary_fell, fell) if both else None,
        "robust_precision": _ratio(total.robust_stood, total.robust_fell + total.robust_stood),
        "robust_recall": _ratio(total.robust_stood, stood) if both else None,
        "score_boundary": _ratio(total.score_fell, fell),
        "score_robust": _ratio(total.score_stood, stood),
        "score_outlier": _ratio(total.score_wrong, total.wrong),
    }


def scores_by_batch(sums: Mapping[int, Tensor], before: int) -> list[list[float | None]]:
    """Return mean scores of single batches: [iteration, boundary, robust, outlier] each.

    One copy from the device. The classes are those of `averages`; None where a batch has none.

    Args:
        sums: `StepStats` by the number of the batch in its epoch, from 1.
        before: batches of the epochs before.
    """
    if not sums:
        return []
    means = [averages(row) for row in torch.stack([*sums.values()]).cpu()]
    keys = ("score_boundary", "score_robust", "score_outlier")
    return [
        [before + number, *(_rounded(of[key]) for key in keys)]
        for number, of in zip(sums, means, strict=True)
    ]


def _rounded(value: float | None) -> float | None:
    """Round to four digits: more than a batch's mean tells, and logs stay small."""
    return None if value is None else float(f"{value:.4g}")


def _ratio(part: Any, whole: Any) -> float | None:
    """Return part / whole, None where the whole is empty or the part unknown."""
    return None if whole == 0 or math.isnan(part) else float(part) / float(whole)
