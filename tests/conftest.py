"""Small real data and small networks for the tests."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

import composing
from btrain import models
from btrain.cli import main
from btrain.data import Data, load
from eval_nets import trained_on
from evaluation_page import write_evaluation

# The networks are tiny: more threads only wait for each other. Child processes inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

composing.remember()

DEAREST = (
    "test_paper.py", "test_training.py", "test_fuzz.py", "test_bench.py", "test_own_parts.py",
    "test_config.py", "test_eval_autoattack.py", "test_bounds.py", "test_launchers.py",
    "test_reliability.py", "test_parallel.py", "test_torchrun.py", "test_parallel_runs.py",
    "test_kill.py", "test_eval_command.py", "test_eval_sanity.py", "test_estimate.py",
    "test_cost.py", "test_cli.py", "test_eval_order.py", "test_extending.py",
)  # fmt: skip
"""The files that take longest, in that order."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the dearest files first: with `--dist=loadfile` all cores then end about together."""
    place = {name: number for number, name in enumerate(DEAREST)}
    items.sort(key=lambda item: place.get(item.path.name, len(DEAREST)))


def pytest_collection_finish() -> None:
    """Spare the garbage collector what is there for good: libraries and the tests themselves."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """A shell starts what runs in its background with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_handlers_of_other_tests() -> None:
    """Hydra gives the root logger handlers for a sweep, on streams that end with their test."""
    root = logging.getLogger()
    root.handlers[:] = [h for h in root.handlers if type(h).__module__ == "_pytest.logging"]
    root.setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def digits() -> Data:
    """The 1,797 handwritten digits on the CPU."""
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


_TRAIN = [
    "train", "dataset=digits", "model=small_cnn", "model.width=4", "train.epochs=3",
    "recipe.lr=0.1", "bt=uniform", "device=cpu", "eval.steps=20",
]  # fmt: skip


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, A and B."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("A", 0), ("B", 1)):
        assert main([*_TRAIN, f"seed={seed}", f"run.dir={folder / name}"]) == 0
    return folder


@pytest.fixture
def runs_here(trained_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with copies of the runs."""
    shutil.copytree(trained_runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
