"""The base defenses: what the attack ascends and what the weights descend.

A loss takes logits, never a model. `adv_logits` always has a row for each example of the batch; for
an example that was not perturbed it is the clean row.

PGD: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks".
TRADES: Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy".
MART: Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples".
AugMix: Hendrycks et al., "AugMix: A Simple Data Processing Method to Improve Robustness and
Uncertainty".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from btrain import precision
from btrain.attacks.pgd import InnerLoss

OuterLoss = Callable[..., Tensor]
"""(clean logits (m, K), adversarial logits (m, K), labels (m,)) -> (), some with `weights=`"""

# MART's published margins: both keep a logarithm or a weight away from zero.
_MARGIN = 1.0001
_WEIGHT_MARGIN = 1.0000001
_TINY = 1e-12
_LEAST_MIXTURE = 1e-7


class Weights(NamedTuple):
    """Inverse-probability weights, by which examples count for those that were left out.

    Attributes:
        clean: in what the clean image is learnt from, (m,).
        adv: in what the adversarial one is, (m,).
    """

    clean: Tensor
    adv: Tensor


@dataclass(frozen=True)
class Defense:
    """The two losses of a robust training method, and which of them read the clean logits.

    A forward pass whose logits nobody reads is not made.

    Attributes:
        takes_weights: whether the outer loss takes `weights=`.
        weighs_by_adv: whether the weights of adversarial images alone count in it.
    """

    inner_loss: InnerLoss
    outer_loss: OuterLoss
    inner_reads_clean: bool
    outer_reads_clean: bool
    takes_weights: bool = False
    weighs_by_adv: bool = False


def ce_inner_loss(adv_logits: Tensor, clean_logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of x', which MART, Madry et al. and the evaluation ascend.

    The clean logits play no part. (m, K), (m, K), (m,) -> (m,)
    """
    del clean_logits
    return F.cross_entropy(precision.full(adv_logits), labels, reduction="none")


def kl_inner_loss(adv_logits: Tensor, clean_logits: Tensor, labels: Tensor) -> Tensor:
    """Return KL(p(x) ‖ p(x')), which the attack ascends; the labels play no part.

    `log_softmax` on both sides, at least in float32: with probabilities the gradient through the
    clean side is NaN once one of them underflows. (m, K), (m, K), (m,) -> (m,)
    """
    del labels
    log_p = F.log_softmax(precision.full(clean_logits), dim=1)
    log_q = F.log_softmax(precision.full(adv_logits), dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def cw_loss(adv_logits: Tensor, clean_logits: Tensor, labels: Tensor) -> Tensor:
    """Return the best wrong logit minus the right one: positive where the attack has won.

    Carlini & Wagner, *Towards Evaluating the Robustness of Neural Networks*, f₆ without its cut.
    The clean logits play no part. (m, K), (m, K), (m,) -> (m,)
    """
    del clean_logits
    logits = precision.full(adv_logits)
    right = logits.gather(1, labels[:, None]).squeeze(1)
    return logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1) - right


def pgd_loss(
    clean_logits: Tensor, adv_logits: Tensor, labels: Tensor, *, weights: Weights | None = None
) -> Tensor:
    """Return CE(f(x'), y), the mean over m. (m, K), (m, K), (m,) -> ()"""
    del clean_logits
    return _cross_entropy(adv_logits, labels, None if weights is None else weights.adv)


def trades_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    labels: Tensor,
    *,
    beta: float,
    weights: Weights | None = None,
) -> Tensor:
    """Return CE(f(x), y) + β · KL(p(x) ‖ p(x')), means over m, with the gradient of both sides.

    (m, K), (m, K), (m,) -> ()
    """
    clean, adv = (None, None) if weights is None else weights
    # First, for autograd adds up gradients in the order of the graph, and rounding shows it.
    cross_entropy = _cross_entropy(clean_logits, labels, clean)
    divergence = _weighted(kl_inner_loss(adv_logits, clean_logits, labels), adv)
    return cross_entropy + beta * divergence.mean()


def mart_loss(
    clean_logits: Tensor,
    adv_logits: Tensor,
    labels: Tensor,
    *,
    beta: float,
    weights: Weights | None = None,
) -> Tensor:
    """Return BCE(x', y) + β · mean of KL(p(x) ‖ p(x')) · (1 − p_y(x)), with its whole gradient.

    BCE adds to the cross-entropy of x' the margin to its likeliest wrong class. At least float32:
    in bf16 the margin 1.0001 is 1. (m, K), (m, K), (m,) -> ()
    """
    clean_logits, adv_logits = precision.full(clean_logits), precision.full(adv_logits)
    log_p, q = F.log_softmax(clean_logits, dim=1), F.softmax(adv_logits, dim=1)
    p = log_p.exp()
    index = labels[:, None]
    runner_up = q.scatter(1, index, -1).max(dim=1).values
    counts = None if weights is None else weights.adv
    margin = -_weighted((_MARGIN - runner_up + _TINY).log(), counts).mean()
    kl = (p * (log_p - (q + _TINY).log())).sum(dim=1)
    weight = _WEIGHT_MARGIN - p.gather(1, index).squeeze(1)
    cross_entropy = _cross_entropy(adv_logits, labels, counts)
    return cross_entropy + margin + beta * _weighted(kl * weight, counts).mean()


def _cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
    logits = precision.full(logits)
    if weight is None:
        return F.cross_entropy(logits, labels)
    return (weight * F.cross_entropy(logits, labels, reduction="none")).mean()


def _weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    return values if weight is None else weight * values


def augmix_loss(
    clean_logits: Tensor,
    view1_logits: Tensor,
    view2_logits: Tensor,
    labels: Tensor,
    *,
    jsd_weight: float,
) -> Tensor:
    """Return CE(f(x), y) + weight · JSD(p(x), p(x'), p(x'')), both means over all m examples.

    The Jensen-Shannon divergence is between probabilities, as in AugMix' code (BulletTrain's text
    writes logits), their mixture clamped at 1e-7. An example without views has its clean logits
    in their place: it adds nothing to the divergence and counts in its mean.
    (m, K), (m, K), (m, K), (m,) -> ()
    """
    logits = torch.stack([clean_logits, view1_logits, view2_logits])
    log_p = F.log_softmax(precision.full(logits), dim=2)
    p = log_p.exp()
    log_mixture = p.mean(dim=0).clamp(min=_LEAST_MIXTURE).log()
    divergence = (p * (log_p - log_mixture)).sum(dim=2).mean(dim=0)
    return F.nll_loss(log_p[0], labels) + jsd_weight * divergence.mean()


def _trades(beta: float) -> Defense:
    return Defense(
        kl_inner_loss,
        partial(trades_loss, beta=beta),
        inner_reads_clean=True,
        outer_reads_clean=True,
        takes_weights=True,
    )


def _mart(beta: float) -> Defense:
    return Defense(
        ce_inner_loss,
        partial(mart_loss, beta=beta),
        inner_reads_clean=False,
        outer_reads_clean=True,
        takes_weights=True,
        weighs_by_adv=True,
    )


def _pgd() -> Defense:
    return Defense(
        ce_inner_loss,
        pgd_loss,
        inner_reads_clean=False,
        outer_reads_clean=False,
        takes_weights=True,
        weighs_by_adv=True,
    )


DEFENSES: dict[str, Callable[..., Defense]] = {"trades": _trades, "mart": _mart, "pgd": _pgd}
"""The adversarial ones by name; each takes the settings of `defense=` that it has."""
