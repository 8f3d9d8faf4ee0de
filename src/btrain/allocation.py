"""Algorithm 2's decisions as pure functions: which examples are near the boundary, and their steps.

Equation and line numbers are those of Hua et al., "BulletTrain: Accelerating Robust Neural Network
Training via Boundary Example Mining". m is the batch size, K the number of classes. Nothing here
copies from the device to the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from btrain import precision

OUTLIER, ROBUST, BOUNDARY = 0, 1, 2


def signed_prediction_variance(logits: Tensor, labels: Tensor) -> Tensor:
    """SVar (eq. 4): the variance of the softmax, negative where the prediction is wrong.

    A wrong prediction whose variance is 0 (uniform logits) gives -0.0: the sign bit, not the
    comparison with zero, tells an outlier. (m, K), (m,) -> (m,), at least float32
    """
    variance = F.softmax(precision.full(logits), dim=1).var(dim=1, correction=0)
    return _signed(variance, variance, logits, labels)


def signed_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Ranks examples by their cross-entropy: p_y where the prediction is right, else p_y − 1.

    (m, K), (m,) -> (m,)
    """
    loss = F.cross_entropy(precision.full(logits), labels, reduction="none")
    return _signed((-loss).exp(), 1 - (-loss).exp(), logits, labels)


def signed_gradient_norm(logits: Tensor, labels: Tensor) -> Tensor:
    """Ranks examples by the norm of the loss' gradient at the logits, which is at most √2.

    √2 − norm where the prediction is right, else −norm; the last layer's gradient norm of
    Katharopoulos and Fleuret. (m, K), (m,) -> (m,)
    """
    probabilities = F.softmax(precision.full(logits), dim=1)
    gradient = probabilities - F.one_hot(labels, logits.shape[1])
    norm = gradient.norm(dim=1)
    return _signed((math.sqrt(2) - norm).clamp(min=0), norm, logits, labels)


def signed_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The probability of the label minus that of the likeliest other class. (m, K), (m,) -> (m,)"""
    probabilities = F.softmax(precision.full(logits), dim=1)
    index = labels[:, None]
    runner_up = probabilities.scatter(1, index, -1).max(dim=1).values
    margin = (probabilities.gather(1, index).squeeze(1) - runner_up).abs()
    return _signed(margin, margin, logits, labels)


def _signed(right: Tensor, wrong: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """`right` where the prediction is right, else minus `wrong`; both are at least 0."""
    return torch.where(logits.argmax(dim=1) == labels, right, -wrong)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "svar": signed_prediction_variance,
    "cross_entropy": signed_likelihood,
    "grad_norm": signed_gradient_norm,
    "margin": signed_margin,
}
"""What stands for the distance from the decision boundary: negative for a wrong prediction, else
larger the further away, on either side."""


def classify(svar: Tensor, robust_fraction: Tensor) -> Tensor:
    """The rule f (eq. 6): OUTLIER, ROBUST or BOUNDARY for each example.

    The percentile is taken over the whole batch, outliers included, with linear interpolation.
    (m,), () -> (m,) int64
    """
    threshold = torch.quantile(svar, (1 - robust_fraction).to(svar.dtype))
    classes = torch.where(svar < threshold, BOUNDARY, ROBUST)
    return torch.where(torch.signbit(svar), OUTLIER, classes)


def update_robust_fraction(
    robust_fraction: Tensor,
    adv_logits: Tensor,
    labels: Tensor,
    *,
    momentum: float,
    gamma: float,
    mean: Callable[[Tensor], Tensor] = Tensor.mean,
) -> Tensor:
    """The moving average F_R (eq. 5) over all m examples of the batch.

    `mean` is of m numbers, or of all processes' where the batch is dealt out to several.
    (), (m, K), (m,) -> ()
    """
    accuracy = mean((adv_logits.detach().argmax(dim=1) == labels).float())
    return momentum * robust_fraction + (1 - momentum) * gamma * accuracy


def theoretical_speedup(
    *,
    fractions: tuple[float, float, float],
    steps: tuple[float, float, float],
    baseline_steps: float,
) -> float:
    """Eq. 7: (N + 1) / (F_B·N_B + F_R·N_R + F_O·N_O + 1), an update counted as one attack step.

    Args:
        fractions: F_B, F_R, F_O.
        steps: N_B, N_R, N_O.
        baseline_steps: N, the steps of the defense without BulletTrain.
    """
    mean_steps = sum(fraction * n for fraction, n in zip(fractions, steps, strict=True))
    return (baseline_steps + 1) / (mean_steps + 1)


def true_classes(clean_logits: Tensor, adv_logits: Tensor, labels: Tensor) -> Tensor:
    """Eqs. 1 to 3, by what an attack really did. (m, K), (m, K), (m,) -> (m,) int64"""
    stands = torch.where(adv_logits.argmax(dim=1) == labels, ROBUST, BOUNDARY)
    return torch.where(clean_logits.argmax(dim=1) == labels, stands, OUTLIER)


class Allocation(NamedTuple):
    """What a batch's examples are taken for, and how many attack steps each gets.

    Attributes:
        classes, steps: (m,) int64.
        overhead: steps an example that finding this out has taken.
    """

    classes: Tensor
    steps: Tensor
    overhead: int = 0

    def ordered(self, order: Tensor | slice) -> Allocation:
        """The same in another order of the examples, or of some of them."""
        return self._replace(classes=self.classes[order], steps=self.steps[order])


def by_class(classes: Tensor, budget: Tensor) -> Allocation:
    """N_O, N_R or N_B steps; `budget` (3,) is indexed by OUTLIER, ROBUST, BOUNDARY."""
    return Allocation(classes, budget[classes])


def filled_up(
    allocation: Allocation, order: Tensor, active: Sequence[int], multiple: int
) -> tuple[Allocation, list[int]]:
    """Rounds up how many examples take each step; the next in the order take the longer budget.

    No group grows by as many as `multiple`, nor beyond the batch, and an empty one stays empty. The
    classes remain those of the rule.

    Args:
        order: of descending step counts, (m,).
        active: how many examples take the first step, the second, …

    Returns:
        The allocation with the steps that follow, in the batch's order, and the counts.
    """
    m = len(order)
    active = [min(-(-n // multiple) * multiple, m) for n in active]
    steps = torch.zeros_like(allocation.steps)
    for n in set(active):
        steps[:n] += active.count(n)
    steps = torch.empty_like(steps).index_copy_(0, order, steps)
    return allocation._replace(steps=steps), active


def uniform(labels: Tensor, budget: Tensor) -> Allocation:
    """The plain defense: every example gets the full number of steps."""
    return by_class(torch.full_like(labels, BOUNDARY), budget)


def bullettrain(score: Tensor, robust_fraction: Tensor, budget: Tensor) -> Allocation:
    """Algorithm 2, line 12: classes by SVar (or another metric) and the estimated F_R."""
    return by_class(classify(score, robust_fraction), budget)


def randomised(allocation: Allocation, generator: torch.Generator) -> Allocation:
    """The same budgets on randomly chosen examples: the control that the choice matters.

    With BulletTrain's rule F_R adapts to it, so the mean number of steps of a run is near
    BulletTrain's, not equal to it.
    """
    m, device = len(allocation.classes), allocation.classes.device
    return allocation.ordered(torch.randperm(m, generator=generator, device=device))


def at_fractions(fractions: tuple[float, float, float], score: Tensor) -> Tensor:
    """Classes in the given shares F_B, F_R, F_O, rounded, of any examples. (m,) -> (m,) int64"""
    m = len(score)
    boundary = round(fractions[0] * m)
    stay = round((fractions[0] + fractions[1]) * m)
    classes = torch.full((m,), OUTLIER, device=score.device)
    classes[:stay], classes[:boundary] = ROBUST, BOUNDARY
    return classes


def predicted(
    allocator: str,
    score: Tensor,
    robust_fraction: Tensor,
    budget: Tensor,
    generator: torch.Generator,
    fractions: tuple[float, float, float] | None = None,
) -> Allocation:
    """Classes from a score: BulletTrain's, which `random` deals out anew.

    With `fractions` (F_B, F_R, F_O) `random` deals out those, whatever the score.
    """
    if allocator != "random":
        return bullettrain(score, robust_fraction, budget)
    classes = (
        classify(score, robust_fraction) if fractions is None else at_fractions(fractions, score)
    )
    return randomised(by_class(classes, budget), generator)


def gaussian(score: Tensor, robust_fraction: Tensor, *, n_b: int, mean_steps: float) -> Allocation:
    """Section 3.2's quantised Gaussian: steps fall off with distance from the boundary examples.

    Its centre is the middle of eq. 6's boundary interval, its height N_B, and its width the largest
    of a grid (of shares of the largest distance) with which the batch takes at most `mean_steps`
    steps an example. The classes are eq. 6's, for the log. (m,), () -> (m,)
    """
    threshold = torch.quantile(score, (1 - robust_fraction).to(score.dtype))
    distance = (score - threshold.clamp(min=0) / 2).abs()
    distance = distance / distance.max().clamp(min=torch.finfo(score.dtype).tiny)
    widths = torch.logspace(-4, 2, 128, device=score.device, dtype=score.dtype)
    candidates = (n_b * torch.exp(-((distance / widths[:, None]) ** 2) / 2)).round()  # (128, m)
    candidates = torch.cat([torch.zeros_like(candidates[:1]), candidates])
    affordable = candidates.mean(dim=1) <= mean_steps  # the means rise with the width
    steps = candidates.index_select(0, affordable.sum().view(1) - 1).squeeze(0)
    return Allocation(classify(score, robust_fraction), steps.long())


def step_sizes(steps: Tensor, *, n_b: int, epsilon: float, step_size_b: float) -> Tensor:
    """The step sizes of Section 4: 1.7·ε/N for an example with N < N_B steps.

    With N_B steps it takes them like the plain defense, so that equal budgets are the plain defense
    exactly. (m,) -> (m,) float32
    """
    return torch.where(steps == n_b, step_size_b, 1.7 * epsilon / steps.clamp(min=1))
