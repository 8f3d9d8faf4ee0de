"""Small real data and small networks for the tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from btrain import models
from btrain.data import Data, load
from eval_nets import trained_on


@pytest.fixture(scope="session")
def digits() -> Data:
    """scikit-learn's handwritten digits on the CPU."""
    return load("digits", Path("unused"), device=torch.device("cpu"))


@pytest.fixture
def small_cnn() -> nn.Module:
    """A seeded four-layer network for digits."""
    torch.manual_seed(0)
    return models.build("small_cnn", width=4, depth=None, classes=10, shape=(1, 8, 8))


@pytest.fixture
def preact() -> nn.Module:
    """A seeded network with BatchNorm for digits."""
    torch.manual_seed(0)
    return models.build("preact_resnet18", width=4, depth=None, classes=10, shape=(1, 8, 8))


@pytest.fixture
def batch(digits: Data) -> tuple[torch.Tensor, torch.Tensor]:
    """24 real digits, x (24, 1, 8, 8) in [0, 1] and labels (24,)."""
    return digits.train.images[:24].float() / 255, digits.train.labels[:24]


@pytest.fixture(scope="session")
def robust_net(digits: Data) -> nn.Module:
    """A four-layer network, adversarially trained on digits for a while."""
    torch.manual_seed(0)
    network = models.build("small_cnn", width=8, depth=None, classes=10, shape=(1, 8, 8))
    trained_on(digits, network, epsilon=0.1)
    return network


@pytest.fixture(scope="session")
def plain_net(digits: Data) -> nn.Module:
    """The same, trained on clean digits."""
    torch.manual_seed(0)
    network = models.build("small_cnn", width=8, depth=None, classes=10, shape=(1, 8, 8))
    trained_on(digits, network)
    return network
