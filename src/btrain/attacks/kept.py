"""Starts that are kept: every example's last perturbation, from which its next attack goes on.

Weights change little between two visits of an example, so that one step from where its last attack
ended does what several do from noise (Zheng et al., "Efficient Adversarial Training with
Transferable Adversarial Examples", keep starts from epoch to epoch as well).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from btrain.attacks.balls import per_image
from btrain.data import Batch, Data

STORE, KNOWN = "kept", "kept_known"
"""The names in a method's memory: perturbations (n, C, H, W), and which examples have one (n,)."""
_LARGEST = 127  # of int8, which stands for ε


@dataclass(frozen=True)
class Kept:
    """A store of perturbations, as shares of an ε that may grow.

    Attributes:
        dtype: int8, which resolves a 127th of ε, or bfloat16.
    """

    dtype: torch.dtype

    def memory(self, data: Data, device: torch.device) -> dict[str, Tensor]:
        """Return an empty store for the training images."""
        n = len(data.train)
        return {
            STORE: torch.zeros((n, *data.shape), dtype=self.dtype, device=device),
            KNOWN: torch.zeros(n, dtype=torch.bool, device=device),
        }

    def nbytes(self, data: Data) -> int:
        """Return the bytes of such a store."""
        return len(data.train) * (prod(data.shape) * self.dtype.itemsize + 1)

    def starts(
        self, memory: dict[str, Tensor], batch: Batch, noise: Tensor, epsilon: float
    ) -> Tensor:
        """Return what is added to the images before the first step, like them.

        Args:
            noise: what takes its place where an example has not been attacked before.
        """
        shares = batch.moved.follow(memory[STORE][batch.indices]).to(noise.dtype)
        full = epsilon / _LARGEST if self.dtype is torch.int8 else epsilon
        return torch.where(per_image(memory[KNOWN][batch.indices], noise) > 0, shares * full, noise)

    def encoded(self, delta: Tensor, epsilon: float) -> Tensor:
        """Return perturbations as the store has them, like them."""
        shares = delta / epsilon
        if self.dtype is torch.int8:
            shares = (_LARGEST * shares).round_().clamp_(-_LARGEST, _LARGEST)
        return shares.to(self.dtype)

    def keep(
        self, memory: dict[str, Tensor], batch: Batch, rows: Tensor, new: Tensor, attacked: Tensor
    ) -> None:
        """Remember the encoded perturbations of some rows of a batch, in place.

        Pixels that a crop has cut off keep their old one.

        Args:
            rows: (k,) int64.
            new: like those rows of the images.
            attacked: which of them took a step, (k,) bool; the others keep what they have.
        """
        indices = batch.indices[rows]
        old = memory[STORE][indices]
        new = batch.moved.of(rows).undo(new, old)
        memory[STORE][indices] = torch.where(attacked.view(-1, 1, 1, 1), new, old)
        memory[KNOWN][indices] |= attacked
