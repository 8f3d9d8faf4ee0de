"""GradAlign (Andriushchenko and Flammarion, "Understanding and Improving Fast …")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btrain import precision
from btrain.methods.bullettrain import Regulariser

UNITS = 8
"""The cost an example: two gradients of the images, one of them differentiated again."""


def regulariser(weight: float, epsilon: float) -> Regulariser:
    """Return λ times the misalignment of each image with a random point of its ε-ball."""

    def added(network: nn.Module, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        around = torch.empty_like(x).uniform_(-epsilon, epsilon, generator=generator)
        return weight * misalignment(network, x, labels, around)

    return added


def misalignment(model: nn.Module, x: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
    """Return 1 − cos(∇L(x), ∇L(x + noise)) of the cross-entropy, the mean over the examples.

    The model is used in the mode it is in. As published, the weights' gradient goes through
    ∇L(x + noise) only, and an example with a gradient that is zero everywhere does not count; of
    none left the mean is 0. (m, C, H, W), (m,), (m, C, H, W) -> ()
    """
    fixed = _input_gradient(model, x, labels, create_graph=False)
    moving = _input_gradient(model, x + noise, labels, create_graph=True)
    counts = (_largest(fixed) > 0) & (_largest(moving) > 0)
    # A row that does not count is replaced: the gradient of a zero norm would be NaN.
    a, b = (_unit(torch.where(counts[:, None], row, 1.0)) for row in (fixed, moving))
    return ((1 - (a * b).sum(dim=1)) * counts).sum() / counts.sum().clamp(min=1)


def _largest(rows: Tensor) -> Tensor:
    return rows.detach().abs().amax(dim=1)


def _unit(rows: Tensor) -> Tensor:
    """Bring each row to length 1, also where its squares would underflow (confident examples)."""
    return F.normalize(rows / _largest(rows)[:, None], dim=1)


def _input_gradient(model: nn.Module, x: Tensor, labels: Tensor, *, create_graph: bool) -> Tensor:
    """Return ∇L at each image as a row, (m, C·H·W)."""
    images = x.detach().clone().requires_grad_()
    loss = F.cross_entropy(precision.full(model(images)), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, [images], create_graph=create_graph)
    return gradient.flatten(1)
