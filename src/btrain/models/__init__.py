"""The networks. Each takes images in [0, 1]; normalisation, where there is one, is inside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from btrain.errors import UserError
from btrain.models import verified
from btrain.models.check import check, gives_probabilities
from btrain.models.libraries import from_library
from btrain.models.preact_resnet import PreActResNet
from btrain.models.resnet import ResNet
from btrain.models.small_cnn import SmallCNN
from btrain.models.wide_resnet import ACTIVATIONS, WideResNet

__all__ = [
    "ARCHITECTURES",
    "Normalise",
    "Normalised",
    "build",
    "check",
    "from_library",
    "gives_probabilities",
    "normalisation",
    "verified",
]

ARCHITECTURES = ("wide_resnet", "preact_resnet18", "resnet18", "small_cnn")


class Normalise(nn.Module):
    """(x - mean) / std by channel: attacks stay in pixel units, checkpoints keep the constants."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Normalised(nn.Module):
    """A network that does not normalise by itself, behind a normalisation."""

    def __init__(self, normalise: Normalise, network: nn.Module) -> None:
        super().__init__()
        self.normalise = normalise
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalise(x))
        return logits


def normalisation(
    channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Normalise | None:
    """Return the normalisation of images with so many channels; None where none is asked for.

    Raises:
        UserError: there is not one value or one a channel.
    """
    if mean is None or std is None:
        return None
    if len(mean) != len(std) or len(mean) not in (1, channels):
        raise UserError(
            f"model.mean and model.std need one value each, or one for each of {channels} channels."
        )
    return Normalise(mean, std)


def build(
    architecture: str,
    *,
    width: int,
    depth: int | None,
    classes: int,
    shape: tuple[int, int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    activation: str = "relu",
    shortcut: str = "activated",
) -> nn.Module:
    """Return a freshly initialised network, drawn from torch's global random state.

    Args:
        architecture: one of `ARCHITECTURES`.
        width: widening factor of a WideResNet, else the channels of the first stage.
        depth: of a WideResNet, 6n + 4; ignored elsewhere.
        classes: K.
        shape: of an image, (C, H, W).
        mean, std: normalisation in [0, 1] pixel units, one value for each channel or one for all;
            None for none.
        activation: of a WideResNet, relu or silu.
        shortcut: of a PreActResNet's blocks, of the activated input or of the input.

    Raises:
        UserError: no such WideResNet, images too small, or not one mean and std a channel.
    """
    channels, height, wide = shape
    if min(height, wide) < 4:
        raise UserError(f"The networks need images of at least 4×4 pixels, not {height}×{wide}.")
    normalise = normalisation(channels, mean, std) or nn.Identity()
    if architecture == "wide_resnet":
        if depth is None or depth < 10 or (depth - 4) % 6:
            raise UserError(f"model.depth must be 6n + 4 (10, 16, …, 34, 40), not {depth}.")
        return WideResNet(depth, width, channels, classes, normalise, ACTIVATIONS[activation])
    if architecture == "preact_resnet18":
        of_input = shortcut == "input"
        return PreActResNet((2, 2, 2, 2), width, channels, classes, normalise, of_input=of_input)
    if architecture == "resnet18":
        return ResNet((2, 2, 2, 2), width, channels, classes, normalise)
    if architecture == "small_cnn":
        return SmallCNN(width, shape, classes, normalise)
    raise ValueError(f"architecture must be one of {ARCHITECTURES}, not {architecture}")
