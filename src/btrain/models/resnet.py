"""The ResNet of He et al. ("Deep Residual Learning …") for small images: no pooling at its stem."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions, activated after the addition; 1×1 shortcut where the shape changes."""

    inner_channels = (("conv1", "bn1", "conv2"),)

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Sequential()
        if not same:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(F.relu_(self.bn1(self.conv1(x)))))
        return F.relu_(out + self.shortcut(x))


class ResNet(nn.Module):
    """Four stages of blocks on images in [0, 1], (m, C, H, W) -> (m, K)."""

    def __init__(
        self,
        blocks: tuple[int, ...],
        width: int,
        channels: int,
        classes: int,
        normalise: nn.Module,
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.conv1 = nn.Conv2d(channels, width, 3, 1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages = []
        in_channels = width
        for stage, n in enumerate(blocks):
            out_channels = width * 2**stage
            for block in range(n):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(BasicBlock(in_channels, out_channels, stride))
                in_channels = out_channels
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(in_channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(F.relu_(self.bn1(self.conv1(self.normalise(x)))))
        logits: Tensor = self.fc(features.mean(dim=(2, 3)))
        return logits
