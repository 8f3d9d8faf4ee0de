"""The four-layer network of the MNIST experiments: two convolutions, two linear layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = 100


class SmallCNN(nn.Module):
    """Two 4×4 convolutions of stride 2 (width and 2·width channels), then 100 hidden units.

    (m, C, H, W) -> (m, K), for any H, W ≥ 4.
    """

    inner_channels = (("conv1", None, "conv2"), ("conv2", None, "fc1"), ("fc1", None, "fc2"))

    def __init__(
        self, width: int, shape: tuple[int, int, int], classes: int, normalise: nn.Module
    ) -> None:
        super().__init__()
        self.normalise = normalise
        channels, height, wide = shape
        self.conv1 = nn.Conv2d(channels, width, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.fc1 = nn.Linear(2 * width * (height // 4) * (wide // 4), HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.conv2(F.relu(self.conv1(self.normalise(x)))))
        logits: Tensor = self.fc2(F.relu(self.fc1(features.flatten(1))))
        return logits
