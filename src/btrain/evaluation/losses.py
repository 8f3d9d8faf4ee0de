"""What an attack can ascend, example by example.

Each takes adversarial logits (m, K), clean logits (m, K) and labels (m,) and returns (m,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from btrain import precision
from btrain.attacks.pgd import InnerLoss
from btrain.defenses import ce_inner_loss, kl_inner_loss


def cw_loss(adv_logits: Tensor, clean_logits: Tensor, labels: Tensor) -> Tensor:
    """The best wrong logit minus the right one: positive where the attack has won.

    Carlini & Wagner, *Towards Evaluating the Robustness of Neural Networks*, f₆ without its cut.
    """
    del clean_logits
    logits = precision.full(adv_logits)
    right = logits.gather(1, labels[:, None]).squeeze(1)
    return _best_wrong(logits, labels) - right


def dlr_loss(adv_logits: Tensor, clean_logits: Tensor, labels: Tensor) -> Tensor:
    """The same margin over the distance of the first from the third logit (K ≥ 3).

    Unchanged where all logits are scaled or shifted, so that a model cannot flatten it. Croce &
    Hein, *Reliable evaluation of adversarial robustness*, eq. 6.
    """
    first, _, third = precision.full(adv_logits).topk(3, dim=1).values.unbind(dim=1)
    return cw_loss(adv_logits, clean_logits, labels) / (first - third + 1e-12)


def _best_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """(m, K), (m,) -> (m,)"""
    right = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], True)
    return logits.masked_fill(right, float("-inf")).amax(dim=1)


LOSSES: dict[str, InnerLoss] = {
    "ce": ce_inner_loss,
    "kl": kl_inner_loss,
    "cw": cw_loss,
    "dlr": dlr_loss,
}
