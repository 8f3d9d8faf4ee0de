"""Checkpoints as other projects save them: their wrappers, their names, and what lies beside."""

from __future__ import annotations

import argparse
import copy
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from btrain import models
from btrain.cli import main
from btrain.errors import UserError
from btrain.exchange.read import load_weights, read_plain, start_from
from btrain.models import Normalise, Normalised

GREY = (1, 8, 8)
State = dict[str, Tensor]


def small_cnn(seed: int = 0, **constants: Any) -> nn.Module:
    torch.manual_seed(seed)
    return models.build(
        "small_cnn", width=2, depth=None, classes=10, shape=GREY, **constants
    ).eval()


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def same_logits(one: nn.Module, other: nn.Module, shape: tuple[int, int, int] = GREY) -> bool:
    x = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.allclose(one(x), other(x), atol=1e-6)


def averaged_model(network: nn.Module) -> Any:
    averaged = torch.optim.swa_utils.AveragedModel(network)
    averaged.update_parameters(network)
    return averaged.state_dict()


RAW = small_cnn(seed=7).state_dict()
WRAPPINGS: dict[str, Callable[[nn.Module], Any]] = {
    "AveragedModel": averaged_model,
    "AveragedModel of DataParallel": lambda n: averaged_model(nn.DataParallel(n)),
    "ema beside raw": lambda n: {"state_dict": RAW, "ema_state_dict": n.state_dict()},
    "timm's ema": lambda n: {"state_dict": RAW, "state_dict_ema": n.state_dict(), "arch": "x"},
    "ema before raw": lambda n: {"ema": n.state_dict(), "model": RAW},
    "ema of DataParallel": lambda n: {
        "model_ema": {"state_dict": prefixed("module.", n.state_dict())}, "model": RAW,
    },
    "ema in the module": lambda n: {
        "state_dict": prefixed("net.", RAW) | prefixed("net_ema.module.", n.state_dict()),
    },
    "ema_pytorch": lambda n: {
        "initted": torch.tensor(True), "step": torch.tensor(9),
        **prefixed("online_model.", RAW), **prefixed("ema_model.", n.state_dict()),
    },
    "net_state_dict": lambda n: {"net_state_dict": n.state_dict(), "optimizer_state_dict": {}},
    "weights": lambda n: {"weights": n.state_dict()},
    "params": lambda n: {"params": n.state_dict(), "epoch": 3},
    "Lightning": lambda n: {
        "state_dict": prefixed("net.", n.state_dict()), "pytorch-lightning_version": "2.4.0",
        "hyper_parameters": {"lr": 0.1}, "loops": {}, "callbacks": {},
    },
    "compiled Lightning": lambda n: {"state_dict": prefixed("model._orig_mod.", n.state_dict())},
    "a name of their own": lambda n: {"classifier_last": n.state_dict(), "optimizer": {}},
    "Sequential of a layer without numbers": lambda n: nn.Sequential(nn.Identity(), n).state_dict(),
}  # fmt: skip


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_are_found_in_what_others_save(tmp_path: Path, wrapping: str) -> None:
    source, model = small_cnn(), small_cnn(seed=1)
    torch.save(WRAPPINGS[wrapping](source), tmp_path / "theirs.pt")
    load_weights(model, tmp_path / "theirs.pt")
    assert same_logits(source, model)
    assert start_from(small_cnn(seed=2), tmp_path / "theirs.pt").startswith("The network starts")


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_averaged_weights_are_said_where_there_are_raw_ones(
    tmp_path: Path, wrapping: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(WRAPPINGS[wrapping](small_cnn()), tmp_path / "theirs.pt")
    with caplog.at_level(logging.WARNING, "btrain"):
        load_weights(small_cnn(), tmp_path / "theirs.pt")
    both = "ema" in wrapping
    assert ["the averaged are taken" in message for message in caplog.messages] == [True] * both


def robustness(network: nn.Module, mean: Tensor, std: Tensor) -> Any:
    """The module that MadryLab's robustness saves: a normaliser, the network, and an attacker."""
    inside = {"new_mean": mean.view(-1, 1, 1), "new_std": std.view(-1, 1, 1)}
    state = {
        **prefixed("module.normalizer.", inside),
        **prefixed("module.model.", network.state_dict()),
        **prefixed("module.attacker.normalize.", inside),
        **prefixed("module.attacker.model.", network.state_dict()),
    }
    return {"model": state, "epoch": 7, "schedule": None}


def sequential(network: nn.Module, mean: Tensor, std: Tensor) -> Any:
    return nn.Sequential(Normalise(mean.tolist(), std.tolist()), network).state_dict()


def named(network: nn.Module, mean: Tensor, std: Tensor) -> Any:
    normalise = Normalise(mean.tolist(), std.tolist())
    layers = OrderedDict([("normalize", normalise), ("model", network)])
    return prefixed("module.", nn.Sequential(layers).state_dict())


@pytest.mark.parametrize("save", [robustness, sequential, named])
def test_a_normalisation_ahead_of_the_network_is_taken_along(
    tmp_path: Path, save: Callable[..., Any]
) -> None:
    source, mean, std = small_cnn(), torch.tensor([0.3]), torch.tensor([0.6])
    torch.save(save(source, mean, std), tmp_path / "theirs.pt")
    model = small_cnn(seed=1)
    load_weights(model, tmp_path / "theirs.pt")
    x = torch.rand(4, *GREY)
    torch.testing.assert_close(model(x), source((x - 0.3) / 0.6))
    with pytest.raises(UserError, match=r"normalises with 0\.3 where the model"):
        load_weights(small_cnn(mean=[0.5], std=[0.5]), tmp_path / "theirs.pt")


@pytest.mark.parametrize("prefix", ["", "module.", "1.", "model."])
def test_a_sequence_of_the_layers_of_small_cnn_is_one(tmp_path: Path, prefix: str) -> None:
    """As FastAT's MNIST network is."""
    torch.manual_seed(3)
    source = nn.Sequential(
        nn.Conv2d(1, 2, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(2, 4, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(4 * 2 * 2, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip
    torch.save(prefixed(prefix, source.state_dict()), tmp_path / "theirs.pt")
    model = small_cnn()
    load_weights(model, tmp_path / "theirs.pt")
    assert same_logits(source, model)
    torch.save(nn.Sequential(*source, nn.ReLU(), nn.Linear(10, 10)).state_dict(),
               tmp_path / "deeper.pt")  # fmt: skip
    with pytest.raises(UserError, match="of another architecture"):
        load_weights(model, tmp_path / "deeper.pt")


class Block(nn.Module):
    """A block as kuangliu/pytorch-cifar and its heirs name it, pre-activated or not."""

    def __init__(
        self, inside: int, outside: int, stride: int, *, preact: bool, of_input: bool = False
    ) -> None:
        super().__init__()
        self.preact, self.of_input = preact, of_input
        self.bn1 = nn.BatchNorm2d(inside if preact else outside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != outside:
            self.shortcut.append(nn.Conv2d(inside, outside, 1, stride, bias=False))
            if not preact:
                self.shortcut.append(nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        if self.preact:
            active = F.relu(self.bn1(x))
            out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
            return out + self.shortcut(active if len(self.shortcut) and not self.of_input else x)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class TheirResNet(nn.Module):
    """ResNet-18 as TRADES', PreActResNet-18 as AWP's and FastAT's repositories name its layers.

    FastAT's shortcuts take the input of a block, and not what its first activation makes of it.
    """

    def __init__(self, width: int, *, preact: bool, of_input: bool = False) -> None:
        super().__init__()
        self.preact = preact
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        inside = width
        for stage in range(4):
            outside, blocks = width * 2**stage, []
            for stride in (1 if stage == 0 else 2, 1):
                blocks.append(Block(inside, outside, stride, preact=preact, of_input=of_input))
                inside = outside
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.add_module("bn" if preact else "bn1", nn.BatchNorm2d(inside if preact else width))
        self.linear = nn.Linear(inside, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x) if self.preact else F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, 5):
            out = getattr(self, f"layer{stage}")(out)
        out = F.relu(self.bn(out)) if self.preact else out
        logits: Tensor = self.linear(F.avg_pool2d(out, out.shape[-1]).flatten(1))
        return logits


@pytest.mark.parametrize(
    ("architecture", "shortcut"),
    [("preact_resnet18", "activated"), ("preact_resnet18", "input"), ("resnet18", "activated")],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_residual_networks_of_others_give_their_logits_here(
    tmp_path: Path, architecture: str, shortcut: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    preact, of_input = architecture == "preact_resnet18", shortcut == "input"
    torch.manual_seed(0)
    source = TheirResNet(4, preact=preact, of_input=of_input)
    with torch.no_grad():
        for _ in range(3):
            source(torch.randn(8, 3, 16, 16))  # in train mode: other statistics than the fresh ones
    torch.save({"state_dict": prefixed(prefix, source.state_dict())}, tmp_path / "theirs.pt")
    model = models.build(
        architecture, width=4, depth=None, classes=10, shape=(3, 16, 16), shortcut=shortcut
    )
    load_weights(model, tmp_path / "theirs.pt")
    assert same_logits(source.eval(), model.eval(), (3, 16, 16))
    assert ("model.shortcut=input the input itself" in caplog.text) == (preact and not of_input)


def test_eval_predicts_like_fastat_s_preact_resnet_where_it_is_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = TheirResNet(4, preact=True, of_input=True)
    with torch.no_grad():
        source(torch.randn(64, 3, 8, 8))
    images, labels = torch.rand(60, 3, 8, 8), torch.arange(60) % 10
    root, to_byte = tmp_path / "data", (images * 255).round().to(torch.uint8)
    for part in ("train", "test"):
        for number, (image, label) in enumerate(zip(to_byte, labels.tolist(), strict=True)):
            (root / part / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(
                root / part / str(label) / f"{number:02}.png"
            )
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    words = ["dataset=imagefolder", f"dataset.root={root}", "model=preact_resnet18", "attack=clean",
             "model.width=4", "model.shortcut=input", "dataset.image_size=8", "device=cpu",
             "sanity=false"]  # fmt: skip
    assert main(["eval", f"checkpoint={tmp_path / 'weights.pt'}", f"out={tmp_path / 'out'}",
                 *words]) == 0  # fmt: skip
    order = labels.argsort(stable=True)  # class by class
    expected = source.eval()(to_byte[order] / 255).argmax(dim=1)
    with np.load(tmp_path / "out" / "clean.npz") as found:
        assert found["labels"].tolist() == labels[order].tolist()
        assert found["correct"].tolist() == (expected == labels[order]).tolist()
        assert 0 < found["correct"].sum() < 60


def test_layers_of_a_network_of_ones_own_keep_their_names(tmp_path: Path) -> None:
    source = TheirResNet(2, preact=True)
    torch.save({"state_dict": prefixed("module.", source.state_dict())}, tmp_path / "theirs.pt")
    model = TheirResNet(2, preact=True)
    normalised = Normalised(Normalise([0.5], [0.5]), TheirResNet(2, preact=True))
    for network, inside in ((model, model), (normalised, normalised.network)):
        load_weights(network, tmp_path / "theirs.pt")
        assert same_logits(source.eval(), inside.eval(), (3, 8, 8))


def test_what_lies_beside_the_weights_comes_as_plain_values(tmp_path: Path) -> None:
    source, model = small_cnn(), small_cnn(seed=1)
    counts: defaultdict[str, list[int]] = defaultdict(list)
    counts["a"].append(1)
    generator = np.random.RandomState(0)
    allowed = torch.serialization.get_safe_globals()
    beside = {
        "best_acc": np.float64(87.5), "epoch": np.int64(3), "done": np.bool_(True),
        "args": argparse.Namespace(lr=0.1, out=PurePosixPath("runs/a"), sizes=[1, 2]),
        "history": counts, "path": Path("runs") / "a", "generator": generator.get_state(),
    }  # fmt: skip
    for zipped in (True, False):
        torch.save({"state_dict": source.state_dict(), **beside}, tmp_path / "theirs.pt",
                   _use_new_zipfile_serialization=zipped)  # fmt: skip
        load_weights(model, tmp_path / "theirs.pt")
        assert same_logits(source, model)
        read = read_plain(tmp_path / "theirs.pt")
        for key, value in (("best_acc", 87.5), ("epoch", 3), ("done", True)):
            assert read[key] == value
            assert type(read[key]) is type(value)
        assert read["args"] == {"lr": 0.1, "out": "runs/a", "sizes": [1, 2]}
        assert read["history"] == {"a": [1]}
        assert type(read["history"]) is dict
        assert read["path"] == "runs/a"
    assert torch.serialization.get_safe_globals() == allowed


class Trainer:
    """A class of someone's own."""


UNREADABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "whole network": (small_cnn, "it asks for btrain.models.small_cnn.SmallCNN, and only tensors"),
    "own class": (
        lambda: {"state_dict": RAW, "trainer": Trainer()},
        f"it asks for {__name__}.Trainer, and only tensors",
    ),
    "two networks": (
        lambda: {"teacher_net": RAW, "student_net": RAW},
        "nor a single one under another name",
    ),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_says_what_to_save(tmp_path: Path, kind: str) -> None:
    make, words = UNREADABLE[kind]
    torch.save(make(), tmp_path / "theirs.pt")
    model = small_cnn()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError) as caught:
        load_weights(model, tmp_path / "theirs.pt")
    assert words in str(caught.value)
    assert str(caught.value).endswith('torch.save(model.state_dict(), "weights.pt").')
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_eval_reads_a_sequence_and_says_which_weights_it_took(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 2 * 2, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip
    raw = {key: torch.zeros_like(value) for key, value in source.state_dict().items()}
    torch.save({"state_dict": raw, "ema_state_dict": source.state_dict()}, tmp_path / "theirs.pt")
    words = [
        "dataset=digits",
        "model=small_cnn",
        "device=cpu",
        "attack=clean",
        "dataset.test_examples=20",
    ]
    assert main(["eval", f"checkpoint={tmp_path / 'theirs.pt'}", f"out={tmp_path / 'out'}",
                 *words]) == 0  # fmt: skip
    (said,) = caplog.messages
    assert "holds averaged weights under ema_state_dict and raw ones" in said
