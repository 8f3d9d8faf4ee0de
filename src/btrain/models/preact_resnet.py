"""The pre-activation ResNet of He et al. ("Identity Mappings …") for small images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PreActBlock(nn.Module):
    """Two pre-activated 3×3 convolutions; a 1×1 shortcut where the shape changes.

    It takes the activated input, as He et al.'s and AWP's; of FastAT's network the input itself.
    """

    inner_channels = (("conv1", "bn2", "conv2"),)

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, of_input: bool = False
    ) -> None:
        super().__init__()
        self.of_input = of_input
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, padding=1, bias=False)
        self.shortcut = (
            None
            if stride == 1 and in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu_(self.bn1(x))
        taken = x if self.of_input else activated
        shortcut = x if self.shortcut is None else self.shortcut(taken)
        out: Tensor = self.conv2(F.relu_(self.bn2(self.conv1(activated))))
        return out.add_(shortcut)


class PreActResNet(nn.Module):
    """Four stages of blocks on images in [0, 1], (m, C, H, W) -> (m, K)."""

    def __init__(
        self,
        blocks: tuple[int, ...],
        width: int,
        channels: int,
        classes: int,
        normalise: nn.Module,
        *,
        of_input: bool = False,
    ) -> None:
        """Make the network; `of_input` is of the shortcuts, see `PreActBlock`."""
        super().__init__()
        self.of_input = of_input
        self.normalise = normalise
        self.conv1 = nn.Conv2d(channels, width, 3, 1, padding=1, bias=False)
        stages = []
        in_channels = width
        for stage, n in enumerate(blocks):
            out_channels = width * 2**stage
            for block in range(n):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(PreActBlock(in_channels, out_channels, stride, of_input=of_input))
                in_channels = out_channels
        self.blocks = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(in_channels)
        self.fc = nn.Linear(in_channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu_(self.bn(self.blocks(self.conv1(self.normalise(x)))))
        logits: Tensor = self.fc(features.mean(dim=(2, 3)))
        return logits
