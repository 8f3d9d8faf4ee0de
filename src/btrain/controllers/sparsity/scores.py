"""Scores of how much a network would miss each of its weights, for masks ahead of training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btrain.controllers.sparsity.masks import Layers, Masks, layers, top_of_all

Batches = Sequence[tuple[Tensor, Tensor]]
"""Clean images in [0, 1] with their labels."""

_TEMPERATURE = 200  # of GraSP's logits


def magnitude(weights: Layers) -> dict[str, Tensor]:
    """Return |w|."""
    return {name: weight.detach().abs() for name, weight in weights.items()}


def snip(model: nn.Module, exclude: Sequence[str], batches: Batches) -> dict[str, Tensor]:
    """Return |w · ∂L/∂w| of the cross-entropy, over all weights 1 (Lee et al. 2019)."""
    weights, gradients = _gradients(model, exclude, batches, temperature=1)
    scores = {name: (weights[name] * gradients[name]).detach().abs() for name in weights}
    total = torch.stack([score.sum() for score in scores.values()]).sum()
    return {name: score / total for name, score in scores.items()}


def grasp(model: nn.Module, exclude: Sequence[str], batches: Batches) -> dict[str, Tensor]:
    """Return w · Hg, the highest of which are kept (Wang et al. 2020).

    By sign and normalisation it is the score of the Synaptic-Flow code: g is the gradient of the
    cross-entropy of logits divided by 200, H its Hessian.
    """
    weights, gradients = _gradients(model, exclude, batches, temperature=_TEMPERATURE)
    fixed = [gradient.detach() for gradient in gradients.values()]
    again = copy.deepcopy(model).train()
    found = layers(again, exclude)
    curvature = [torch.zeros_like(gradient) for gradient in fixed]
    for images, labels in batches:
        loss = F.cross_entropy(again(images) / _TEMPERATURE, labels)
        moving = torch.autograd.grad(loss, [*found.values()], create_graph=True)
        product = torch.stack([(a * b).sum() for a, b in zip(fixed, moving, strict=True)]).sum()
        parts = torch.autograd.grad(product, [*found.values()])
        curvature = [a + b for a, b in zip(curvature, parts, strict=True)]
    scores = {
        name: weight.detach() * part
        for (name, weight), part in zip(weights.items(), curvature, strict=True)
    }
    total = torch.stack([score.sum() for score in scores.values()]).sum().abs() + 1e-10
    return {name: score / total for name, score in scores.items()}


def _gradients(
    model: nn.Module, exclude: Sequence[str], batches: Batches, *, temperature: float
) -> tuple[Layers, dict[str, Tensor]]:
    """Return the weights of a copy in train mode, and the batches' summed gradients of them."""
    network = copy.deepcopy(model).train()
    weights = layers(network, exclude)
    sums = [torch.zeros_like(weight) for weight in weights.values()]
    for images, labels in batches:
        loss = F.cross_entropy(network(images) / temperature, labels)
        parts = torch.autograd.grad(loss, [*weights.values()])
        sums = [a + b for a, b in zip(sums, parts, strict=True)]
    return weights, dict(zip(weights, sums, strict=True))


def synflow(
    model: nn.Module,
    exclude: Sequence[str],
    shape: tuple[int, int, int],
    masks: Layers | None = None,
) -> dict[str, Tensor]:
    """Return |w · ∂R/∂w|, R the sum of the outputs of |w| for an image of ones (Tanaka et al.).

    Args:
        shape: of an image, (C, H, W).
        masks: of the weights that take part; None for all.
    """
    network = copy.deepcopy(model).eval().double()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.copy_(tensor.abs())
        weights = layers(network, exclude)
        for name, mask in (masks or {}).items():
            weights[name].mul_(mask)
    device = next(iter(weights.values())).device
    flow = network(torch.ones(1, *shape, dtype=torch.float64, device=device)).sum()
    gradients = torch.autograd.grad(flow, [*weights.values()])
    return {
        name: (weight * gradient).detach().abs()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }


def in_rounds(
    score: Callable[[Layers | None], dict[str, Tensor]], kept: int, size: int, rounds: int
) -> tuple[Masks, list[str]]:
    """Return the masks that are left when the density falls in equal ratios to what is wanted.

    Args:
        score: of the weights under the masks so far.
        kept: how many weights are left in the end, of `size`.
    """
    masks: Masks | None = None
    emptied: list[str] = []
    for count in _counts(kept, size, rounds):
        scores = score(masks)
        if masks is not None:
            scores = {name: torch.where(masks[name] > 0, s, -1.0) for name, s in scores.items()}
        masks, emptied = top_of_all(scores, count)
    assert masks is not None
    return masks, emptied


def _counts(kept: int, size: int, rounds: int) -> Iterator[int]:
    for number in range(1, rounds):
        yield max(kept, round(size * (kept / size) ** (number / rounds)))
    yield kept
