"""The decisions of Algorithm 2 as pure functions: which examples are near the boundary, and steps.

Equation and line numbers are those of Hua et al., "BulletTrain: Accelerating Robust Neural Network
Training via Boundary Example Mining". m is the batch size, K the number of classes. Nothing here
copies from the device to the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from btrain import precision
from btrain.errors import UserError

OUTLIER, ROBUST, BOUNDARY = 0, 1, 2


def signed_prediction_variance(logits: Tensor, labels: Tensor) -> Tensor:
    """Return SVar (eq. 4): the variance of the softmax, negative where the prediction is wrong.

    A wrong prediction whose variance is 0 (uniform logits) gives -0.0: the sign bit, not the
    comparison with zero, tells an outlier. (m, K), (m,) -> (m,), at least float32

    Raises:
        UserError: logits and labels are not of these shapes.
    """
    _check_logits("logits", logits, labels)
    variance = F.softmax(precision.full(logits), dim=1).var(dim=1, correction=0)
    return _signed(variance, variance, logits, labels)


def signed_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Rank examples by their cross-entropy: p_y where the prediction is right, else p_y − 1.

    (m, K), (m,) -> (m,); raises UserError as `signed_prediction_variance`.
    """
    _check_logits("logits", logits, labels)
    loss = F.cross_entropy(precision.full(logits), labels, reduction="none")
    return _signed((-loss).exp(), 1 - (-loss).exp(), logits, labels)


def signed_gradient_norm(logits: Tensor, labels: Tensor) -> Tensor:
    """Rank examples by the norm of the loss' gradient at the logits, which is at most √2.

    √2 − norm where the prediction is right, else −norm; the last layer's gradient norm of
    Katharopoulos and Fleuret. (m, K), (m,) -> (m,); raises UserError as
    `signed_prediction_variance`.
    """
    _check_logits("logits", logits, labels)
    probabilities = F.softmax(precision.full(logits), dim=1)
    gradient = probabilities - F.one_hot(labels, logits.shape[1])
    norm = gradient.norm(dim=1)
    return _signed((math.sqrt(2) - norm).clamp(min=0), norm, logits, labels)


def signed_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the label's probability minus the likeliest other class'.

    (m, K), (m,) -> (m,); raises UserError as `signed_prediction_variance`.
    """
    _check_logits("logits", logits, labels)
    probabilities = F.softmax(precision.full(logits), dim=1)
    index = labels[:, None]
    runner_up = probabilities.scatter(1, index, -1).max(dim=1).values
    margin = (probabilities.gather(1, index).squeeze(1) - runner_up).abs()
    return _signed(margin, margin, logits, labels)


def _signed(right: Tensor, wrong: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return `right` where the prediction is right, else minus `wrong`; both are at least 0."""
    return torch.where(logits.argmax(dim=1) == labels, right, -wrong)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "svar": signed_prediction_variance,
    "cross_entropy": signed_likelihood,
    "grad_norm": signed_gradient_norm,
    "margin": signed_margin,
}
"""The measures of distance from the decision boundary: negative for a wrong prediction, else
larger the further away, on either side."""


def classify(svar: Tensor, robust_fraction: Tensor | float) -> Tensor:
    """Apply the rule f (eq. 6): OUTLIER, ROBUST or BOUNDARY for each example.

    The percentile is taken over the whole batch, outliers included, with linear interpolation.
    (m,), () -> (m,) int64

    Raises:
        UserError: these are no scores (m,), or no fraction in [0, 1], which on a GPU only a number
            of Python's is seen to be.
    """
    return _split(svar, _threshold(svar, robust_fraction))


def _threshold(svar: Tensor, robust_fraction: Tensor | float) -> Tensor:
    """Return the percentile of eq. 6, (), at least float32; raises UserError as `classify`."""
    if svar.dim() != 1 or not svar.is_floating_point() or not len(svar):
        raise UserError(
            "svar must be scores (m,), as signed_prediction_variance gives them, of one example or "
            f"more, not {svar.dtype} of shape {tuple(svar.shape)}."
        )
    svar = precision.full(svar)
    if not isinstance(robust_fraction, Tensor):
        _check_share("robust_fraction", robust_fraction)
        robust_fraction = svar.new_tensor(robust_fraction)
    elif robust_fraction.numel() != 1:
        shape = tuple(robust_fraction.shape)
        raise UserError(f"robust_fraction must be one number for all examples, not {shape}.")
    try:
        return torch.quantile(svar, (1 - robust_fraction).to(svar.dtype))
    except RuntimeError:
        _check_share("robust_fraction", float(robust_fraction))
        raise


def _split(svar: Tensor, threshold: Tensor) -> Tensor:
    """Return the classes on either side of the percentile, and the outliers. (m,), () -> (m,)"""
    classes = torch.where(svar < threshold, BOUNDARY, ROBUST)
    return torch.where(torch.signbit(svar), OUTLIER, classes)


def update_robust_fraction(
    robust_fraction: Tensor | float,
    adv_logits: Tensor,
    labels: Tensor,
    *,
    momentum: float,
    gamma: float,
    mean: Callable[[Tensor], Tensor] = Tensor.mean,
) -> Tensor:
    """Return the moving average F_R (eq. 5) after all m examples of the batch.

    `mean` is of m numbers, or of all processes' where the batch is dealt out to several.
    (), (m, K), (m,) -> ()

    Raises:
        UserError: logits and labels are not of these shapes, or momentum or gamma not in [0, 1].
    """
    _check_logits("adv_logits", adv_logits, labels)
    _check_share("momentum", momentum)
    _check_share("gamma", gamma)
    accuracy = mean((adv_logits.detach().argmax(dim=1) == labels).float())
    return momentum * robust_fraction + (1 - momentum) * gamma * accuracy


def theoretical_speedup(
    *,
    fractions: tuple[float, float, float],
    steps: tuple[float, float, float],
    baseline_steps: float,
) -> float:
    """Return eq. 7: (N + 1) / (F_B·N_B + F_R·N_R + F_O·N_O + 1), an update being one attack step.

    Args:
        fractions: F_B, F_R, F_O.
        steps: N_B, N_R, N_O.
        baseline_steps: N, the steps of the defense without BulletTrain.
    """
    mean_steps = sum(fraction * n for fraction, n in zip(fractions, steps, strict=True))
    return (baseline_steps + 1) / (mean_steps + 1)


def true_classes(clean_logits: Tensor, adv_logits: Tensor, labels: Tensor) -> Tensor:
    """Return the classes by what an attack really did (eqs. 1 to 3).

    (m, K), (m, K), (m,) -> (m,) int64

    Raises:
        UserError: logits and labels are not of these shapes.
    """
    _check_logits("clean_logits", clean_logits, labels)
    _check_logits("adv_logits", adv_logits, labels)
    stands = torch.where(adv_logits.argmax(dim=1) == labels, ROBUST, BOUNDARY)
    return torch.where(clean_logits.argmax(dim=1) == labels, stands, OUTLIER)


def _check_logits(name: str, logits: Tensor, labels: Tensor) -> None:
    """Raise UserError unless logits are (m, K) and labels (m,); nothing is read of the device."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not logits.is_floating_point():
        shapes = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        raise UserError(f"{name} must be floats (m, K) and labels (m,), not {shapes}.")


def _check_share(name: str, share: float) -> None:
    try:
        within = bool(0 <= share <= 1)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{name} must be a number in [0, 1], not {share}.") from None
    if not within:
        raise UserError(f"{name} must be in [0, 1], not {share:g}.")


class Allocation(NamedTuple):
    """The classes that a batch's examples are taken for, and the attack steps that each gets.

    Attributes:
        classes, steps: (m,) int64.
        overhead: steps an example that finding this out has taken.
        patience: steps that a boundary example takes after it is misclassified; None for all.
    """

    classes: Tensor
    steps: Tensor
    overhead: int = 0
    patience: int | None = None

    def ordered(self, order: Tensor | slice) -> Allocation:
        """Return the same in another order of the examples, or of some of them."""
        return self._replace(classes=self.classes[order], steps=self.steps[order])


def by_class(classes: Tensor, budget: Tensor) -> Allocation:
    """Return N_O, N_R or N_B steps; `budget` (3,) is indexed by OUTLIER, ROBUST, BOUNDARY."""
    return Allocation(classes, budget[classes])


def filled_up(
    allocation: Allocation, order: Tensor, active: Sequence[int], multiple: int
) -> tuple[Allocation, list[int]]:
    """Round up how many examples take each step; the next in the order take the longer budget.

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


def by_score(score: Tensor, robust_fraction: Tensor, budget: Tensor) -> Allocation:
    """Allocate by Algorithm 2, line 12: classes by the score (SVar) and the estimated F_R."""
    return by_class(classify(score, robust_fraction), budget)


def randomised(allocation: Allocation, generator: torch.Generator) -> Allocation:
    """Return the same budgets on randomly chosen examples: the control that the choice matters.

    With BulletTrain's rule F_R adapts to it, so the mean number of steps of a run is near
    BulletTrain's, not equal to it.
    """
    m, device = len(allocation.classes), allocation.classes.device
    return allocation.ordered(torch.randperm(m, generator=generator, device=device))


def thinned(
    allocation: Allocation, share: float | Tensor, generator: torch.Generator
) -> tuple[Allocation, Tensor]:
    """Take their steps away from robust examples, from each with probability 1 − share.

    Returns:
        The allocation, and inverse-probability weights, (m,), with which no sum over the examples
        is biased: of robust ones 1/share where they keep their steps and 0 where not; of others 1.
    """
    robust = allocation.classes == ROBUST
    drawn = torch.rand(len(robust), generator=generator, device=robust.device)
    spared = robust & (drawn >= share)
    weight = torch.where(robust, 1 / share, 1.0).masked_fill(spared, 0.0)
    return allocation._replace(steps=allocation.steps.masked_fill(spared, 0)), weight


@dataclass(frozen=True)
class Guard:
    """The change of an allocation while more than a share of the examples are outliers.

    All robust examples then keep their steps, whatever the run's share of them, and outliers take
    at least so many steps. Nothing changes otherwise.

    Attributes:
        share: the largest moving average of F_O with which nothing changes.
        steps: the least number of steps of an outlier above it.
    """

    share: float
    steps: int

    def __call__(
        self, allocation: Allocation, outlier_fraction: Tensor, robust_share: float
    ) -> tuple[Allocation, Tensor]:
        """Return the allocation, and the share of robust examples that keep their steps, ().

        Args:
            outlier_fraction: the moving average of F_O, ().
            robust_share: of the robust examples that keep their steps where nothing changes.
        """
        many = outlier_fraction > self.share
        longer = allocation.steps.clamp(min=self.steps)
        steps = torch.where(many & (allocation.classes == OUTLIER), longer, allocation.steps)
        share = torch.full_like(outlier_fraction, robust_share).masked_fill(many, 1.0)
        return allocation._replace(steps=steps), share


def at_fractions(fractions: tuple[float, float, float], score: Tensor) -> Tensor:
    """Give any examples classes in the shares F_B, F_R, F_O, rounded. (m,) -> (m,) int64"""
    m = len(score)
    boundary = round(fractions[0] * m)
    stay = round((fractions[0] + fractions[1]) * m)
    classes = torch.full((m,), OUTLIER, device=score.device)
    classes[:stay], classes[:boundary] = ROBUST, BOUNDARY
    return classes


def gaussian(score: Tensor, robust_fraction: Tensor, *, n_b: int, mean_steps: float) -> Allocation:
    """Return section 3.2's quantised Gaussian: steps fall off with distance from boundary examples.

    Its centre is the middle of eq. 6's boundary interval, its height N_B, and its width the largest
    of a grid (of shares of the largest distance) with which the batch takes at most `mean_steps`
    steps an example. The classes are eq. 6's, for the log. (m,), () -> (m,)
    """
    threshold, score = _threshold(score, robust_fraction), precision.full(score)
    distance = (score - threshold.clamp(min=0) / 2).abs()
    distance = distance / distance.max().clamp(min=torch.finfo(score.dtype).tiny)
    widths = torch.logspace(-4, 2, 128, device=score.device, dtype=score.dtype)
    candidates = (n_b * torch.exp(-((distance / widths[:, None]) ** 2) / 2)).round()  # (128, m)
    candidates = torch.cat([torch.zeros_like(candidates[:1]), candidates])
    affordable = candidates.mean(dim=1) <= mean_steps  # the means rise with the width
    steps = candidates.index_select(0, affordable.sum().view(1) - 1).squeeze(0)
    return Allocation(_split(score, threshold), steps.long())


FAR = 1.7
"""The length of all steps of a short attack together, in ε (Section 4)."""


def step_sizes(
    steps: Tensor, *, n_b: int, epsilon: float, step_size_b: float, way: float = FAR
) -> Tensor:
    """Return the step sizes of Section 4: 1.7·ε/N for an example with N < N_B steps.

    With N_B steps it takes them like the plain defense, so that equal budgets are the plain defense
    exactly. (m,) -> (m,) float32
    """
    return torch.where(steps == n_b, step_size_b, way * epsilon / steps.clamp(min=1))


class Scored(NamedTuple):
    """A batch as an allocator sees it.

    Attributes:
        score: signed distance from the boundary by the run's metric, (m,); NaN where no clean
            logits were computed.
        z: clean logits, (m, K), or (m, 0) where none were computed.
        labels: (m,).
        robust_fraction: F_R of now, ().
        generator: of all random choices, on the device.
        attacked: (steps, step size) -> the logits (m, K) of all examples after an attack so long;
            name its steps as the allocation's overhead.
    """

    score: Tensor
    z: Tensor
    labels: Tensor
    robust_fraction: Tensor
    generator: torch.Generator
    attacked: Callable[[int, float], Tensor]


class Expected(NamedTuple):
    """The attack of an average batch.

    Attributes:
        steps: of an example, on average.
        attacked: the share of the examples that take at least one.
        overhead: steps of every example that the choice itself takes.
    """

    steps: float
    attacked: float
    overhead: int = 0


class Allocator(Protocol):
    """The choice of how many attack steps each example of a batch gets (Algorithm 2, line 12).

    Attributes:
        needs_scores: whether it reads `score` or `z`, which cost a forward pass.
        by_distance: whether a group that is rounded up takes the examples nearest to the boundary.
    """

    needs_scores: ClassVar[bool]
    by_distance: ClassVar[bool]

    def __call__(self, batch: Scored) -> Allocation:
        """Return classes and steps of the batch."""
        ...

    @property
    def fractions(self) -> tuple[float, float, float] | None:
        """Return the F_B, F_R, F_O that every batch has; None where the scores tell."""
        ...

    def expected(self, fractions: tuple[float, float, float]) -> Expected | None:
        """Return what F_B, F_R, F_O come to; None where they do not tell."""
        ...


@dataclass(frozen=True)
class Uniform:
    """The plain defense: every example gets N_B steps."""

    n_b: int
    needs_scores: ClassVar[bool] = False
    by_distance: ClassVar[bool] = True
    fractions: ClassVar[tuple[float, float, float]] = (1.0, 0.0, 0.0)

    def __call__(self, batch: Scored) -> Allocation:
        classes = torch.full_like(batch.labels, BOUNDARY)
        return Allocation(classes, torch.full_like(classes, self.n_b))

    def expected(self, fractions: tuple[float, float, float]) -> Expected:
        del fractions
        return Expected(self.n_b, min(self.n_b, 1))


@dataclass(frozen=True)
class BulletTrain:
    """The rule of BulletTrain: classes by the score and the estimated F_R, and steps by class.

    Attributes:
        budget: N_O, N_R, N_B, (3,) int64 on the device.
        steps: N_B, N_R, N_O, the same on the host.
    """

    budget: Tensor
    steps: tuple[int, int, int]
    needs_scores: ClassVar[bool] = True
    by_distance: ClassVar[bool] = True

    def __call__(self, batch: Scored) -> Allocation:
        return by_score(batch.score, batch.robust_fraction, self.budget)

    @property
    def fractions(self) -> tuple[float, float, float] | None:
        """Return None: the scores tell."""
        return None

    def expected(self, fractions: tuple[float, float, float]) -> Expected | None:
        return _by_budget(fractions, self.steps)


def _by_budget(fractions: tuple[float, float, float], steps: tuple[int, int, int]) -> Expected:
    """Return what F_B, F_R, F_O come to where every example takes all steps of its class."""
    shares = list(zip(fractions, steps, strict=True))
    return Expected(sum(share * n for share, n in shares), sum(share for share, n in shares if n))


@dataclass(frozen=True)
class EarlyExit(BulletTrain):
    """The rule of BulletTrain, but boundary examples stop some steps after they fell."""

    patience: int = 1

    def __call__(self, batch: Scored) -> Allocation:
        return super().__call__(batch)._replace(patience=self.patience)

    def expected(self, fractions: tuple[float, float, float]) -> None:
        """Return None: how early examples stop depends on the network."""
        del fractions


@dataclass(frozen=True)
class Random(BulletTrain):
    """The control that the choice matters: the budgets on randomly chosen examples.

    Scores are computed though fixed fractions do not need them, to cost what a real choice costs.

    Attributes:
        fractions: F_B, F_R, F_O of every batch; None for those of BulletTrain's rule.
    """

    fractions: tuple[float, float, float] | None = None
    by_distance: ClassVar[bool] = False

    def __call__(self, batch: Scored) -> Allocation:
        if self.fractions is None:
            return randomised(super().__call__(batch), batch.generator)
        classes = at_fractions(self.fractions, batch.score)
        return randomised(by_class(classes, self.budget), batch.generator)


@dataclass(frozen=True)
class Gaussian:
    """The quantised Gaussian of `gaussian`, as an allocator."""

    n_b: int
    mean_steps: float
    needs_scores: ClassVar[bool] = True
    by_distance: ClassVar[bool] = True
    fractions: ClassVar[None] = None

    def __call__(self, batch: Scored) -> Allocation:
        return gaussian(
            batch.score, batch.robust_fraction, n_b=self.n_b, mean_steps=self.mean_steps
        )

    def expected(self, fractions: tuple[float, float, float]) -> None:
        """Return None: how many examples take a step depends on how the scores are spread."""
        del fractions


@dataclass(frozen=True)
class Oracle(BulletTrain):
    """The true classes of eqs. 1 to 3, by an attack of its own on every example (Section 3.1)."""

    oracle_steps: int = 10
    oracle_step_size: float = 0.0

    def __call__(self, batch: Scored) -> Allocation:
        adv_logits = batch.attacked(self.oracle_steps, self.oracle_step_size)
        classes = true_classes(batch.z, adv_logits, batch.labels)
        return by_class(classes, self.budget)._replace(overhead=self.oracle_steps)

    def expected(self, fractions: tuple[float, float, float]) -> Expected:
        return _by_budget(fractions, self.steps)._replace(overhead=self.oracle_steps)
