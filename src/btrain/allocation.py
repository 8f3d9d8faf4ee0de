"""Algorithm 2's decisions as pure functions: which examples are near the boundary, and their steps.

Equation and line numbers are those of Hua et al., "BulletTrain: Accelerating Robust Neural Network
Training via Boundary Example Mining". m is the batch size, K the number of classes. Nothing here
copies from the device to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from btrain import precision

OUTLIER, ROBUST, BOUNDARY = 0, 1, 2

Allocator = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(clean logits (m, K), labels (m,), F_R ()) -> classes (m,)"""


def signed_prediction_variance(logits: Tensor, labels: Tensor) -> Tensor:
    """SVar (eq. 4): the variance of the softmax, negative where the prediction is wrong.

    A wrong prediction whose variance is 0 (uniform logits) gives -0.0: the sign bit, not the
    comparison with zero, tells an outlier. (m, K), (m,) -> (m,), at least float32
    """
    variance = F.softmax(precision.full(logits), dim=1).var(dim=1, correction=0)
    return torch.where(logits.argmax(dim=1) == labels, variance, -variance)


def classify(svar: Tensor, robust_fraction: Tensor) -> Tensor:
    """The rule f (eq. 6): OUTLIER, ROBUST or BOUNDARY for each example.

    The percentile is taken over the whole batch, outliers included, with linear interpolation.
    (m,), () -> (m,) int64
    """
    threshold = torch.quantile(svar, (1 - robust_fraction).to(svar.dtype))
    classes = torch.where(svar < threshold, BOUNDARY, ROBUST)
    return torch.where(torch.signbit(svar), OUTLIER, classes)


def update_robust_fraction(
    robust_fraction: Tensor, adv_logits: Tensor, labels: Tensor, *, momentum: float, gamma: float
) -> Tensor:
    """The moving average F_R (eq. 5) over all m examples of the batch.

    (), (m, K), (m,) -> ()
    """
    accuracy = (adv_logits.detach().argmax(dim=1) == labels).float().mean()
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


class Budget(NamedTuple):
    """Attack steps and step sizes by class, each (3,) and indexed by OUTLIER, ROBUST, BOUNDARY."""

    steps: Tensor
    step_size: Tensor


def make_budget(
    *, n_b: int, n_r: int, n_o: int, epsilon: float, step_size_b: float, device: torch.device
) -> Budget:
    """The budgets of Section 4: a class with fewer than N_B steps takes steps of 1.7·ε/N.

    A class with N_B steps takes them like the plain defense, so that equal budgets are the plain
    defense exactly.
    """
    steps = [n_o, n_r, n_b]
    sizes = [step_size_b if n == n_b else 1.7 * epsilon / max(n, 1) for n in steps]
    return Budget(
        torch.tensor(steps, device=device), torch.tensor(sizes, device=device, dtype=torch.float32)
    )


def bullettrain(logits: Tensor, labels: Tensor, robust_fraction: Tensor) -> Tensor:
    """Algorithm 2, line 12: classes by SVar and the estimated robust fraction."""
    return classify(signed_prediction_variance(logits, labels), robust_fraction)


def uniform(logits: Tensor, labels: Tensor, robust_fraction: Tensor) -> Tensor:
    """The plain defense: every example gets the full number of steps."""
    del logits, robust_fraction
    return torch.full_like(labels, BOUNDARY)


ALLOCATORS: dict[str, Allocator] = {"bullettrain": bullettrain, "uniform": uniform}
