"""The WideResNet of RobustBench, TRADES and AugMix, written down from its key names alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TheirBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.shortcut = shortcut
        if before != after:
            self.add_module(shortcut, nn.Conv2d(before, after, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        first = self.bn1(x).relu()
        skipped = getattr(self, self.shortcut)(first) if hasattr(self, self.shortcut) else x
        out: Tensor = skipped + self.conv2(self.bn2(self.conv1(first)).relu())
        return out


class TheirWideResNet(nn.Module):
    """RobustBench's keys; `sub_block1` as TRADES, `shortcut="conv_shortcut"` as AugMix has them."""

    def __init__(
        self,
        depth: int = 10,
        width: int = 2,
        classes: int = 10,
        *,
        sub_block1: bool = False,
        mu_sigma: bool = False,
        shortcut: str = "convShortcut",
    ) -> None:
        super().__init__()

        def stage(before: int, after: int, stride: int) -> nn.Module:
            blocks = [TheirBlock(before, after, stride, shortcut)]
            blocks += [TheirBlock(after, after, 1, shortcut) for _ in range((depth - 4) // 6 - 1)]
            out = nn.Module()
            out.layer = nn.Sequential(*blocks)
            return out

        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = stage(16, 16 * width, 1)
        if sub_block1:
            self.sub_block1 = stage(16, 16 * width, 1)
        self.block2 = stage(16 * width, 32 * width, 2)
        self.block3 = stage(32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, classes)
        if mu_sigma:
            self.register_buffer("mu", torch.full((1, 3, 1, 1), 0.5))
            self.register_buffer("sigma", torch.full((1, 3, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "mu"):
            x = (x - self.mu) / self.sigma
        x = self.conv1(x)
        for stage in (self.block1, self.block2, self.block3):
            x = stage.layer(x)
        out: Tensor = self.fc(F.avg_pool2d(self.bn1(x).relu(), 8).flatten(1))
        return out
