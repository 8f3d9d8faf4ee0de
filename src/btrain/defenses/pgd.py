"""PGD adversarial training (Madry et al., "Towards Deep Learning Models Resistant …")."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from btrain import precision


def ce_inner_loss(adv_logits: Tensor, clean_logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of x', which MART, Madry et al. and the evaluation ascend.

    The clean logits play no part. (m, K), (m, K), (m,) -> (m,)
    """
    del clean_logits
    return F.cross_entropy(precision.full(adv_logits), labels, reduction="none")
