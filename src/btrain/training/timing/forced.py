"""The batches that the production rule divides into given fractions of the three classes.

Nothing in the rule is replaced: some labels are made wrong, and F_R is what its percentile needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from btrain.data import Batch
from btrain.errors import UserError
from btrain.methods.augmix import AugMix
from btrain.methods.base import Memory
from btrain.methods.bullettrain import BulletTrain

Timed = BulletTrain | AugMix
"""A method whose choice of examples the bench looks into."""


def class_counts(fractions: Sequence[float], m: int) -> tuple[int, int, int]:
    """Return how many of m examples are boundary, robust and outlier for given F_B, F_R, F_O.

    Raises:
        UserError: nothing is left for robust ones, which the percentile of eq. 6 always has.
    """
    boundary = round(fractions[0] * m)
    outlier = min(round(fractions[2] * m), m - boundary)
    robust = m - boundary - outlier
    if robust == 0:
        raise UserError(
            f"The fractions {list(fractions)} leave no robust example in a batch of {m}; eq. 6 "
            "always finds one."
        )
    return boundary, robust, outlier


def robust_fraction_for(robust: int, m: int) -> float:
    """Return the F_R whose percentile lies between the `robust` highest of m scores and others."""
    return min(1 - (m - robust - 0.5) / (m - 1), 1.0)


@torch.no_grad()
def deciding_logits(model: nn.Module, x: Tensor, method: Timed) -> Tensor:
    """Return the clean logits by which the step will decide the classes, (m, K)."""
    if isinstance(method, AugMix):
        logits: Tensor = model(x)
        return logits
    return method.forward_clean(model, x)[1]


def force(
    model: nn.Module,
    x: Tensor,
    method: Timed,
    fractions: Sequence[float],
    memory: Memory,
) -> Batch:
    """Return images and labels, and in `memory` set the F_R, that make the fractions come true.

    The first examples are the outliers; the prediction is the label of all others.
    """
    m = len(x)
    _, robust, outlier = class_counts(fractions, m)
    logits = deciding_logits(model, x, method)
    labels = logits.argmax(dim=1)
    labels[:outlier] = (labels[:outlier] + 1) % logits.shape[1]
    memory["robust_fraction"] = torch.tensor(robust_fraction_for(robust, m), device=x.device)
    return Batch(x, labels, torch.arange(m, device=x.device))
