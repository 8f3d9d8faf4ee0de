"""Symbolic linear relaxation going forward: an oracle for `symbolic`, written another way.

A layer's values are a centre and one generator for each noise symbol; each unstable ReLU adds a
symbol of its own. Residual branches share the symbols that were there when they parted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Zonotope:
    """c + Σ_r s_r·g_r with s in [-1, 1] for one image: c (1, …) and generators (R, …)."""

    def __init__(self, centre: Tensor, generators: Tensor) -> None:
        self.centre = centre
        self.generators = generators

    @classmethod
    def box(cls, lower: Tensor, upper: Tensor) -> Zonotope:
        radius = (upper - lower) / 2
        size = radius.numel()
        generators = torch.diag(radius.flatten()).view(size, *radius.shape[1:])
        return cls((upper + lower) / 2, generators)

    def affine(self, f: Callable[[Tensor], Tensor]) -> Zonotope:
        """Under an affine map of batches."""
        nothing = f(torch.zeros_like(self.centre))
        return Zonotope(f(self.centre), f(self.generators) - nothing)

    def interval(self) -> tuple[Tensor, Tensor]:
        radius = self.generators.abs().sum(0, keepdim=True)
        return self.centre - radius, self.centre + radius

    def relu(self) -> Zonotope:
        lower, upper = self.interval()
        unstable = (lower < 0) & (upper > 0)
        slope = torch.where(unstable, upper / (upper - lower), (lower >= 0).to(lower.dtype))
        shift = torch.where(unstable, -slope * lower / 2, torch.zeros_like(lower))
        new = torch.diag(shift.flatten()).view(shift.numel(), *shift.shape[1:])
        return Zonotope(slope * self.centre + shift, torch.cat([slope * self.generators, new]))

    def plus(self, other: Zonotope) -> Zonotope:
        """The sum of two branches, one of which made no symbol after the other's last."""
        size = max(len(self.generators), len(other.generators))

        def padded(generators: Tensor) -> Tensor:
            missing = size - len(generators)
            return torch.cat([generators, generators.new_zeros(missing, *generators.shape[1:])])

        return Zonotope(
            self.centre + other.centre, padded(self.generators) + padded(other.generators)
        )


def margins(last: Zonotope, label: int) -> Tensor:
    """Upper bounds of all logits minus the labelled one, (K,)."""
    difference = last.affine(lambda z: z - z[:, label : label + 1])
    return difference.interval()[1].squeeze(0)


def through(layer: nn.Module, z: Zonotope) -> Zonotope:
    """Through a layer, or layers one after the other; residual blocks by their two branches."""
    if isinstance(layer, nn.Sequential):
        for part in layer:
            z = through(part, z)
        return z
    if isinstance(layer, nn.ReLU):
        return z.relu()
    if hasattr(layer, "main") and hasattr(layer, "skip"):
        return through(layer.main, z).plus(through(layer.skip, z)).relu()
    return z.affine(layer)
