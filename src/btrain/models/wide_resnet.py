"""WideResNet (Zagoruyko and Komodakis), as TRADES uses it; key names as in RobustBench."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]
"""Applied to a tensor that nothing else needs, so it may work in place."""

ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu_,
    "silu": F.silu,
}


class WideBlock(nn.Module):
    """Two pre-activated 3×3 convolutions; a 1×1 shortcut where the number of channels changes."""

    inner_channels = (("conv1", "bn2", "conv2"),)

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, activation: Activation = F.relu_
    ) -> None:
        super().__init__()
        self.activation = activation
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, padding=1, bias=False)
        self.convShortcut = (
            None
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        out: Tensor = self.conv2(self.activation(self.bn2(self.conv1(activated))))
        return out.add_(shortcut)


class Stage(nn.Module):
    """A row of blocks; the first changes stride and width."""

    def __init__(
        self, blocks: int, in_channels: int, out_channels: int, stride: int, activation: Activation
    ) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            WideBlock(in_channels, out_channels, stride, activation),
            *(WideBlock(out_channels, out_channels, 1, activation) for _ in range(blocks - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WRN-depth-widen_factor on images in [0, 1], (m, C, H, W) -> (m, K).

    `depth` is 6n + 4. Convolutions are initialised from N(0, 2/(k·k·out)), as TRADES does.
    """

    def __init__(
        self,
        depth: int,
        widen_factor: int,
        channels: int,
        classes: int,
        normalise: nn.Module,
        activation: Activation = F.relu_,
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.activation = activation
        blocks = (depth - 4) // 6
        widths = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, padding=1, bias=False)
        self.block1 = Stage(blocks, widths[0], widths[1], 1, activation)
        self.block2 = Stage(blocks, widths[1], widths[2], 2, activation)
        self.block3 = Stage(blocks, widths[2], widths[3], 2, activation)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
                nn.init.normal_(layer.weight, 0, math.sqrt(2 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        features = self.block3(self.block2(self.block1(self.conv1(self.normalise(x)))))
        pooled = self.activation(self.bn1(features)).mean(dim=(2, 3))
        logits: Tensor = self.fc(pooled)
        return logits
