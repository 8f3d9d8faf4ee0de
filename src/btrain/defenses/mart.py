"""MART (Wang et al., "Improving Adversarial Robustness Requires Revisiting …")."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from btrain import precision

# The published margins: both keep a logarithm or a weight away from zero.
_MARGIN = 1.0001
_WEIGHT_MARGIN = 1.0000001
_TINY = 1e-12


def mart_loss(clean_logits: Tensor, adv_logits: Tensor, labels: Tensor, *, beta: float) -> Tensor:
    """Return BCE(x', y) + β · mean of KL(p(x) ‖ p(x')) · (1 − p_y(x)), with its whole gradient.

    BCE adds to the cross-entropy of x' the margin to its likeliest wrong class. At least float32:
    in bf16 the margin 1.0001 is 1. (m, K), (m, K), (m,) -> ()
    """
    clean_logits, adv_logits = precision.full(clean_logits), precision.full(adv_logits)
    log_p, q = F.log_softmax(clean_logits, dim=1), F.softmax(adv_logits, dim=1)
    p = log_p.exp()
    index = labels[:, None]
    runner_up = q.scatter(1, index, -1).max(dim=1).values
    margin = -(_MARGIN - runner_up + _TINY).log().mean()
    kl = (p * (log_p - (q + _TINY).log())).sum(dim=1)
    weight = _WEIGHT_MARGIN - p.gather(1, index).squeeze(1)
    return F.cross_entropy(adv_logits, labels) + margin + beta * (kl * weight).mean()
