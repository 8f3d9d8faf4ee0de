"""Base defenses: what the attack ascends and what the weights descend.

A loss takes logits, never a model. `adv_logits` always has a row for each example of the batch; for
an example that was not perturbed it is the clean row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from btrain.attacks import InnerLoss
from btrain.defenses.trades import kl_inner_loss, trades_loss

OuterLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(clean logits (m, K), adversarial logits (m, K), labels (m,)) -> ()"""


@dataclass(frozen=True)
class Defense:
    """The two losses of a robust training method."""

    inner_loss: InnerLoss
    outer_loss: OuterLoss


def _trades(*, beta: float) -> Defense:
    def outer_loss(clean_logits: Tensor, adv_logits: Tensor, labels: Tensor) -> Tensor:
        return trades_loss(clean_logits, adv_logits, labels, beta=beta)

    return Defense(kl_inner_loss, outer_loss)


DEFENSES: dict[str, Callable[..., Defense]] = {"trades": _trades}

__all__ = ["DEFENSES", "Defense", "OuterLoss", "kl_inner_loss", "trades_loss"]
