"""GradAlign (Andriushchenko and Flammarion, "Understanding and Improving Fast …")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def misalignment(model: nn.Module, x: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
    """1 − cos(∇L(x), ∇L(x + noise)) of the cross-entropy, the mean over the examples.

    The model is used in the mode it is in. As published, the weights' gradient goes through
    ∇L(x + noise) only, and an example with a gradient that is zero everywhere does not count; of
    none left the mean is 0. (m, C, H, W), (m,), (m, C, H, W) -> ()
    """
    fixed = _input_gradient(model, x, labels, create_graph=False)
    moving = _input_gradient(model, x + noise, labels, create_graph=True)
    counts = (fixed.abs().amax(dim=1) > 0) & (moving.detach().abs().amax(dim=1) > 0)
    # An example that does not count gets another gradient: that of a zero norm would be NaN.
    moving = torch.where(counts[:, None], moving, 1.0)
    cosine = F.cosine_similarity(fixed, moving, dim=1, eps=1e-20)
    return ((1 - cosine) * counts).sum() / counts.sum().clamp(min=1)


def _input_gradient(model: nn.Module, x: Tensor, labels: Tensor, *, create_graph: bool) -> Tensor:
    """∇L at each image as a row, (m, C·H·W)."""
    images = x.detach().clone().requires_grad_()
    loss = F.cross_entropy(model(images).float(), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, [images], create_graph=create_graph)
    return gradient.flatten(1)
