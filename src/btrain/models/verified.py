"""The networks of verified training by name, as their papers' code has them.

Six of MixTrain (arXiv 1811.02625) and Wong et al., and the seven-layer network that certified
training uses since. Their weights have the names that they have in the papers' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from btrain.errors import UserError

Shape = tuple[int, int, int]


class Residual(nn.Module):
    """ReLU(main(x) + skip(x)): two convolutions, and one with weights beside them.

    The first of the two is 4×4 with stride 2 where the map gets smaller, else 3×3; that beside
    them is 2×2 with stride 2 or 1×1.
    """

    def __init__(self, channels: int, out: int, *, smaller: bool) -> None:
        super().__init__()
        kernel, stride = (4, 2) if smaller else (3, 1)
        self.main = nn.Sequential(
            nn.Conv2d(channels, out, kernel, stride, 1), nn.ReLU(), nn.Conv2d(out, out, 3, 1, 1)
        )
        self.skip = nn.Conv2d(channels, out, stride, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.main(x) + self.skip(x))
        return out


def build(name: str, *, shape: Shape, classes: int) -> nn.Sequential:
    """Return a freshly initialised network of `NETWORKS`, drawn from torch's global random state.

    Args:
        shape: of an image, (C, H, W).
        classes: K.

    Raises:
        UserError: there is no such network, or it is made for images of another size.
    """
    if name not in NETWORKS:
        raise UserError(f"model.network={name} is none of {', '.join(NETWORKS)}.")
    sizes, make = NETWORKS[name]
    if shape[1:] not in sizes:
        known = " or ".join(f"{h}×{w}" for h, w in sizes)
        raise UserError(f"{name} takes images of {known} pixels, not {shape[1]}×{shape[2]}.")
    return nn.Sequential(*make(shape, classes))


def _small(shape: Shape, classes: int) -> list[nn.Module]:
    """Return two 4×4 convolutions of stride 2, then 100 hidden units."""
    layers = [*_convolution(shape[0], 16, 4, 2), *_convolution(16, 32, 4, 2)]
    pixels = (shape[1] // 4) * (shape[2] // 4)
    return [*_fan_out(layers), nn.Flatten(), *_hidden(32 * pixels, 100), nn.Linear(100, classes)]


def _large(shape: Shape, classes: int) -> list[nn.Module]:
    """Return four convolutions, every second of stride 2, then twice 512 hidden units."""
    layers = [
        *_convolution(shape[0], 32, 3, 1), *_convolution(32, 32, 4, 2),
        *_convolution(32, 64, 3, 1), *_convolution(64, 64, 4, 2),
    ]  # fmt: skip
    pixels = (shape[1] // 4) * (shape[2] // 4)
    return [
        *_fan_out(layers), nn.Flatten(),
        *_hidden(64 * pixels, 512), *_hidden(512, 512), nn.Linear(512, classes),
    ]  # fmt: skip


def _wong_resnet(shape: Shape, classes: int) -> list[nn.Module]:
    """Return four residual blocks after a 3×3 convolution; the last two make the map smaller."""
    layers = [
        *_convolution(shape[0], 16, 3, 1),
        Residual(16, 16, smaller=False), Residual(16, 16, smaller=False),
        Residual(16, 32, smaller=True), Residual(32, 64, smaller=True),
    ]  # fmt: skip
    pixels = (shape[1] // 4) * (shape[2] // 4)
    return [*_fan_out(layers), nn.Flatten(), *_hidden(64 * pixels, 1000), nn.Linear(1000, classes)]


def _wang_resnet(shape: Shape, classes: int) -> list[nn.Module]:
    """Return four residual blocks, three of which halve the map, after a 7×7 convolution."""
    layers = [
        nn.Conv2d(shape[0], 16, 7, 2, 3), nn.ReLU(),
        Residual(16, 16, smaller=True), Residual(16, 16, smaller=False),
        Residual(16, 32, smaller=True), Residual(32, 64, smaller=True),
    ]  # fmt: skip
    pixels = (shape[1] // 16) * (shape[2] // 16)
    return [*_fan_out(layers), nn.Flatten(), *_hidden(64 * pixels, 512), nn.Linear(512, classes)]


def _cnn7(shape: Shape, classes: int) -> list[nn.Module]:
    """Return five 3×3 convolutions, the third of stride 2, and 512 hidden units, all normalised.

    Shi et al., *Fast Certified Robust Training with Short Warmup*.
    """
    layers: list[nn.Module] = []
    channels = shape[0]
    for out, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (128, 1)):
        layers += [nn.Conv2d(channels, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    pixels = math.ceil(shape[1] / 2) * math.ceil(shape[2] / 2)
    hidden = [nn.Linear(128 * pixels, 512), nn.BatchNorm1d(512), nn.ReLU()]
    return [*layers, nn.Flatten(), *hidden, nn.Linear(512, classes)]


def _convolution(channels: int, out: int, kernel: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, kernel, stride, 1), nn.ReLU()]


def _hidden(units: int, out: int) -> list[nn.Module]:
    return [nn.Linear(units, out), nn.ReLU()]


def _fan_out(layers: list[nn.Module]) -> list[nn.Module]:
    """Draw convolutions from N(0, 2/(k·k·out)), without bias, as both papers' code does."""
    for layer in layers:
        for part in layer.modules():
            if isinstance(part, nn.Conv2d):
                out = part.kernel_size[0] * part.kernel_size[1] * part.out_channels
                nn.init.normal_(part.weight, 0, math.sqrt(2 / out))
                assert part.bias is not None
                nn.init.zeros_(part.bias)
    return layers


NETWORKS: dict[str, tuple[tuple[tuple[int, int], ...], Callable[[Shape, int], list[nn.Module]]]] = {
    "mixtrain_mnist_small": (((28, 28),), _small),
    "mixtrain_mnist_large": (((28, 28),), _large),
    "mixtrain_cifar_small": (((32, 32),), _small),
    "mixtrain_cifar_large": (((32, 32),), _large),
    "wong_resnet": (((32, 32),), _wong_resnet),
    "wang_resnet": (((64, 64),), _wang_resnet),
    "cnn7": (((28, 28), (32, 32), (64, 64)), _cnn7),
}
"""The sizes of images that each takes, and what makes its layers."""
