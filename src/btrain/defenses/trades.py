"""TRADES (Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy")."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from btrain import precision


def kl_inner_loss(adv_logits: Tensor, clean_logits: Tensor, labels: Tensor) -> Tensor:
    """Return KL(p(x) ‖ p(x')), which the attack ascends; the labels play no part.

    `log_softmax` on both sides, at least in float32: with probabilities the gradient through the
    clean side is NaN once one of them underflows. (m, K), (m, K), (m,) -> (m,)
    """
    del labels
    log_p = F.log_softmax(precision.full(clean_logits), dim=1)
    log_q = F.log_softmax(precision.full(adv_logits), dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def trades_loss(clean_logits: Tensor, adv_logits: Tensor, labels: Tensor, *, beta: float) -> Tensor:
    """Return CE(f(x), y) + β · KL(p(x) ‖ p(x')), means over m, with the gradient of both sides.

    (m, K), (m, K), (m,) -> ()
    """
    cross_entropy = F.cross_entropy(precision.full(clean_logits), labels)
    return cross_entropy + beta * kl_inner_loss(adv_logits, clean_logits, labels).mean()
