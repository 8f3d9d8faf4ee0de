"""Small real data and small networks for the tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from btrain import models
from btrain.data import Data, load
from evaluation_page import write_evaluation


@pytest.fixture(scope="session")
def digits() -> Data:
    """scikit-learn's handwritten digits on the CPU."""
    return load("digits", Path("unused"), device=torch.device("cpu"))


def _small_cnn() -> nn.Module:
    torch.manual_seed(0)
    return models.build("small_cnn", width=4, depth=None, classes=10, shape=(1, 8, 8))


@pytest.fixture
def small_cnn() -> nn.Module:
    """A seeded four-layer network for digits."""
    return _small_cnn()


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
def tiles(digits: Data) -> torch.Tensor:
    """24 real digits, each laid out four by four as a colour image, (24, 3, 32, 32) in [0, 1]."""
    return digits.test.images[:24].float().div(255).repeat(1, 3, 4, 4)


@pytest.fixture(scope="session")
def _evaluated(tmp_path_factory: pytest.TempPathFactory, digits: Data) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    write_evaluation(folder, digits, _small_cnn())
    return folder


@pytest.fixture
def evaluation(_evaluated: Path, tmp_path: Path) -> Path:
    """A folder with every file of an evaluation, to draw or to damage."""
    return shutil.copytree(_evaluated, tmp_path / "eval")
