"""Checks on one batch of what training and attacks assume of a network."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btrain import own
from btrain.errors import UserError

_ROUNDING = 1e-3  # of the largest logit


def check(network: nn.Module, x: Tensor, labels: Tensor, classes: int, what: str) -> None:
    """Try a network in both modes, on a copy of it; torch's random state stays as it was.

    Args:
        x: images (m, C, H, W) in [0, 1], of two examples at least; the copy goes to their device.
        labels: (m,) int64.
        classes: K.
        what: names the network in the sentence of an error.

    Raises:
        UserError: its logits are not (m, K) finite floats, in eval mode they are random, differ
            with the other images of the batch or change the network, no gradient reaches the images
            or some weight, or it fails.
    """
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices), own.explained(f"{what}: trying it on one batch"):
        network = copy.deepcopy(network).to(x.device)
        _check_eval_mode(network.eval(), x, classes, what)
        _check_train_mode(network.train(), x, labels, classes, what)


@torch.no_grad()
def gives_probabilities(network: nn.Module, x: Tensor) -> bool:
    """Return whether all outputs are at least 0 and those of each image add up to 1, in eval mode.

    The network is left as it was. (m, C, H, W)
    """
    outputs = copy.deepcopy(network).eval().to(x.device)(x)
    sums = outputs.sum(dim=1)
    return bool((outputs >= 0).all()) and bool(((sums - 1).abs() < _ROUNDING).all())


def _check_eval_mode(network: nn.Module, x: Tensor, classes: int, what: str) -> None:
    mode = f"{what} in eval mode"
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images = x.clone().requires_grad_()
    logits = network(images)
    _check_logits(logits, x, classes, mode)
    if not torch.equal(images, x):
        raise UserError(f"{mode} changes the images that it is given.")
    if not logits.requires_grad:
        raise UserError(f"{mode} gives logits without a gradient; attacks need that of the images.")
    gradient = _gradient(logits, images)
    if gradient is not None and not torch.isfinite(gradient).all():
        raise UserError(f"{mode} gives the images a gradient that is not finite.")
    if gradient is None or not (gradient.any() or _has_gradient_elsewhere(network, images)):
        raise UserError(f"{mode} lets no gradient reach the images; attacks need it.")
    with torch.no_grad():
        slack = _ROUNDING * (1 + float(logits.abs().max()))
        if float((network(x) - logits).abs().max()) > slack:
            raise UserError(f"{mode} gives other logits each time; nothing may be random there.")
        if float((network(x[:1]) - logits[:1]).abs().max()) > slack:
            raise UserError(
                f"{mode} gives an image other logits beside other images; each must stand alone."
            )
    after = network.state_dict()
    for key, value in before.items():
        if not torch.equal(value, after[key]):
            raise UserError(f"{mode} changes its own {key}; only training may.")


def _gradient(logits: Tensor, images: Tensor) -> Tensor | None:
    """Return the gradient of a sum that weighs classes differently, for that of all is constant."""
    weights = torch.arange(1, logits.shape[1] + 1, device=logits.device)
    (found,) = torch.autograd.grad((logits * weights).sum(), images, allow_unused=True)
    return found


def _has_gradient_elsewhere(network: nn.Module, images: Tensor) -> bool:
    """Return whether weights near the initial ones give one: a last layer may begin at zero."""
    network = copy.deepcopy(network)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    gradient = _gradient(network(images), images)
    return gradient is not None and bool(gradient.any())


def _check_train_mode(
    network: nn.Module, x: Tensor, labels: Tensor, classes: int, what: str
) -> None:
    mode = f"{what} in training mode"
    weights = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not weights:
        raise UserError(f"{what} has no weights to train.")
    logits = network(x.clone())
    _check_logits(logits, x, classes, mode)
    loss = F.cross_entropy(logits, labels)
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    for name, gradient in zip(weights, gradients, strict=True):
        if gradient is None:
            raise UserError(
                f"{mode} gives {name} no gradient; leave it out, or set its requires_grad to False."
            )
        if not torch.isfinite(gradient).all():
            raise UserError(f"{mode} gives {name} a gradient that is not finite.")


def _check_logits(logits: object, x: Tensor, classes: int, mode: str) -> None:
    size = "×".join(map(str, x.shape[1:]))
    wanted = f"logits of shape ({len(x)}, {classes}) for {len(x)} images of {size}"
    if not isinstance(logits, Tensor):
        raise UserError(f"{mode} must give {wanted}, not a thing of type {type(logits).__name__}.")
    if logits.shape != (len(x), classes):
        raise UserError(f"{mode} must give {wanted}, not of shape {tuple(logits.shape)}.")
    if not logits.is_floating_point():
        raise UserError(f"{mode} must give logits of a floating type, not {logits.dtype}.")
    if not torch.isfinite(logits).all():
        raise UserError(f"{mode} gives logits that are not finite.")
