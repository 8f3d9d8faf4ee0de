"""The protocol of a controller: what acts on the weights behind an update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from btrain.methods.base import Memory
from btrain.methods.statistics import StepStats

Gradients = Mapping[nn.Parameter, Tensor]
"""By their weights."""


class Controller(Protocol):
    """A part that acts on the weights behind an update.

    Attributes:
        memory: tensors that it changes in place, which a skipped step undoes.
    """

    memory: Memory

    def active(self, gradients: Gradients) -> Gradients:
        """Return the gradients with zeros where it undoes an update; those given stay dense."""
        ...

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Act on weights that the optimizer has just moved; their gradients are still there."""
        ...

    def after_batch(self, done: int, stats: StepStats, skipped: Tensor | None) -> None:
        """Act on the weights that a batch leaves.

        Args:
            done: batches of the run before this one, with those that `train.skip` left out.
            stats: sums over the batch, zeros where it was undone.
            skipped: whether it was undone, () bool; None where no batch ever is.
        """
        ...

    def columns(self) -> dict[str, Any]:
        """Return what an epoch's line and the summary say of it."""
        ...
