"""The base defenses: what the attack ascends and what the weights descend.

A loss takes logits, never a model. `adv_logits` always has a row for each example of the batch; for
an example that was not perturbed it is the clean row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from btrain import precision
from btrain.attacks.pgd import InnerLoss
from btrain.defenses.augmix import augmix_loss
from btrain.defenses.mart import mart_loss
from btrain.defenses.pgd import ce_inner_loss
from btrain.defenses.trades import kl_inner_loss, trades_loss

OuterLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(clean logits (m, K), adversarial logits (m, K), labels (m,)) -> ()"""


@dataclass(frozen=True)
class Defense:
    """The two losses of a robust training method, and which of them read the clean logits.

    A forward pass whose logits nobody reads is not made.
    """

    inner_loss: InnerLoss
    outer_loss: OuterLoss
    inner_reads_clean: bool
    outer_reads_clean: bool


def _trades(beta: float) -> Defense:
    outer_loss = partial(trades_loss, beta=beta)
    return Defense(kl_inner_loss, outer_loss, inner_reads_clean=True, outer_reads_clean=True)


def _mart(beta: float) -> Defense:
    outer_loss = partial(mart_loss, beta=beta)
    return Defense(ce_inner_loss, outer_loss, inner_reads_clean=False, outer_reads_clean=True)


def _pgd() -> Defense:
    def outer_loss(clean_logits: Tensor, adv_logits: Tensor, labels: Tensor) -> Tensor:
        del clean_logits
        return F.cross_entropy(precision.full(adv_logits), labels)

    return Defense(ce_inner_loss, outer_loss, inner_reads_clean=False, outer_reads_clean=False)


DEFENSES: dict[str, Callable[..., Defense]] = {"trades": _trades, "mart": _mart, "pgd": _pgd}
"""The adversarial ones by name; each takes the settings of `defense=` that it has."""

__all__ = [
    "DEFENSES",
    "Defense",
    "OuterLoss",
    "augmix_loss",
    "ce_inner_loss",
    "kl_inner_loss",
    "mart_loss",
    "trades_loss",
]
