"""Sizes, key names and shapes of the networks."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from btrain import models
from btrain.build import make_model
from btrain.data.download import import_torchvision
from btrain.errors import UserError
from btrain.models.wide_resnet import WideResNet
from composing import compose


@pytest.mark.parametrize(
    ("depth", "width", "parameters"), [(34, 10, 46_160_474), (40, 2, 2_243_546)]
)
def test_wide_resnets_have_their_published_size(depth: int, width: int, parameters: int) -> None:
    with torch.device("meta"):
        model = models.build("wide_resnet", width=width, depth=depth, classes=10, shape=(3, 32, 32))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_preact_resnet18_has_its_published_size() -> None:
    """With the BatchNorm after the last block, as in FAST's and GradAlign's code."""
    with torch.device("meta"):
        model = models.build("preact_resnet18", width=64, depth=None, classes=10, shape=(3, 32, 32))
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_172_170


def test_wide_resnet_has_robustbench_key_names() -> None:
    model = models.build("wide_resnet", width=2, depth=10, classes=10, shape=(3, 32, 32))
    layers = {key.rsplit(".", 1)[0] for key in model.state_dict()}
    block = {f"block{b}.layer.0.{name}" for b in (1, 2, 3)
             for name in ("bn1", "conv1", "bn2", "conv2", "convShortcut")}  # fmt: skip
    assert layers == {"conv1", "bn1", "fc"} | block


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (3, 30, 45)])
@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_networks_adapt_to_images_and_classes(
    architecture: str, shape: tuple[int, int, int]
) -> None:
    depth = 10 if architecture == "wide_resnet" else None
    model = models.build(architecture, width=2, depth=depth, classes=7, shape=shape)
    assert model(torch.rand(3, *shape)).shape == (3, 7)


def test_normalisation_is_inside_the_network_and_in_its_checkpoint() -> None:
    torch.manual_seed(0)
    plain = models.build("small_cnn", width=2, depth=None, classes=3, shape=(3, 8, 8))
    torch.manual_seed(0)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    inside = models.build(
        "small_cnn", width=2, depth=None, classes=3, shape=(3, 8, 8), mean=mean, std=std
    )
    x = torch.rand(2, 3, 8, 8)
    by_hand = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(inside(x), plain(by_hand))
    assert {"normalise.mean", "normalise.std"} == inside.state_dict().keys() - (
        plain.state_dict().keys()
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"architecture": "wide_resnet", "depth": 33}, "model.depth"),
        ({"architecture": "wide_resnet", "depth": None}, "model.depth"),
        ({"architecture": "small_cnn", "shape": (1, 3, 8)}, "4×4"),
        ({"architecture": "small_cnn", "mean": [0.5] * 2, "std": [0.5] * 2}, "model.mean"),
    ],
)
def test_impossible_networks_are_refused(settings: dict[str, object], named: str) -> None:
    defaults = {"width": 2, "depth": None, "classes": 10, "shape": (3, 32, 32)}
    with pytest.raises(UserError, match=named):
        models.build(**(defaults | settings))  # type: ignore[arg-type]


# Networks by name


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("wrn_28_10", 36_479_194),
        ("wrn_70_16", 266_796_506),
        ("wrn_28_10_silu", 36_479_194),
        ("wrn_34_10", 46_160_474),
        ("wrn_40_2", 2_243_546),
        ("preact_resnet18", 11_172_170),
        ("resnet18", 11_173_962),
    ],
)
def test_networks_by_name_have_their_published_size(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = make_model(compose([f"model={name}"]).model, 10, (3, 32, 32))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    silu = isinstance(model, WideResNet) and model.activation is F.silu
    assert silu == name.endswith("silu")


def test_silu_takes_the_place_of_every_relu() -> None:
    torch.manual_seed(0)
    settings = {"width": 1, "depth": 10, "classes": 3, "shape": (3, 8, 8)}
    model = models.build("wide_resnet", activation="silu", **settings).eval()  # type: ignore[arg-type]
    x, calls = torch.randn(2, 3, 8, 8), []

    class Called(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with Called():
        model(x)
    assert calls.count(F.silu) == 7
    assert not {F.relu, F.relu_, torch.relu, torch.relu_} & {*calls}


def test_resnet18_is_torchvisions_but_for_the_stem() -> None:
    torch.manual_seed(0)
    theirs = import_torchvision().models.resnet18(num_classes=7)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    ours = models.build("resnet18", width=64, depth=None, classes=7, shape=(3, 16, 16))
    names = zip(ours.state_dict(), theirs.state_dict().values(), strict=True)
    ours.load_state_dict(dict(names))
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


# Networks of libraries


def test_a_network_of_torchvision() -> None:
    torch.manual_seed(0)
    words = ["model=torchvision", "model.settings.name=mobilenet_v3_small",
             "model.settings.width_mult=0.5", "model.mean=[0.5]", "model.std=[0.5]"]  # fmt: skip
    network = make_model(compose(words).model, 5, (3, 32, 32)).eval()
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 5)
    assert "normalise.mean" in network.state_dict()


@pytest.mark.parametrize(
    ("library", "settings", "sentence"),
    [
        ("torchvision", {}, "needs the name of a network, as in model.settings.name=resnet18"),
        ("torchvision", {"name": "resnet19"}, "torchvision.models has none of that name"),
        ("torchvision", {"name": "fcn_resnet50"}, "has none of that name that classifies images"),
        ("torchvision", {"name": "resnet18", "weights": "DEFAULT"}, "model.weights=FILE"),
        ("torchvision", {"name": "resnet18", "widht": 3}, "widht"),
        ("timm", {"model_name": "hf-hub:somebody/something"}, "needs the name of a network"),
        ("timm", {"model_name": "resnet18", "checkpoint_path": "x"}, "model.weights=FILE"),
        ("timm", {"model_name": "resnet18", "pretrained": True}, "model.weights=FILE"),
    ],
)
def test_a_library_fetches_nothing_and_says_what_it_does_not_know(
    library: str, settings: dict[str, object], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        models.from_library(library, settings, 10, 3)


def test_a_library_that_is_missing_or_broken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"model=timm needs timm: pip install 'btrain\[timm\]'"):
        models.from_library("timm", {"model_name": "resnet18"}, 10, 3)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match="model=torchvision needs torchvision: pip install"):
        models.from_library("torchvision", {"name": "resnet18"}, 10, 3)


def test_a_library_for_another_torch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::roi_align does not exist')\n"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"does not go with torch .*roi_align does not exist"):
        models.from_library("torchvision", {"name": "resnet18"}, 10, 3)


@pytest.mark.skipif(find_spec("timm") is None, reason="the extra `timm` is not installed")
def test_a_network_of_timm() -> None:
    network = models.from_library("timm", {"model_name": "resnet18"}, 7, 1).eval()
    assert network(torch.rand(2, 1, 32, 32)).shape == (2, 7)


# What is checked of a network that is not btrain's


class Linear(nn.Module):
    """Right, and what others go wrong from."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        return self.layer(x.flatten(1))


class OneTooMany(Linear):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x.flatten(1)).repeat(1, 2)


class Several(Linear):
    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


class Probabilities(Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).softmax(1)


class FromZero(Linear):
    """A last layer that begins at zero, as those of vision transformers do."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.layer.weight)


class Whole(Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).argmax(1, keepdim=True).repeat(1, 4)


class Infinite(Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) / 0


class Blind(Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.detach())


class Rounding(Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.round())


class Random(Linear):
    def forward(self, x: Tensor) -> Any:
        return F.dropout(super().forward(x), 0.5)


class Batchwise(Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x - x.mean(0))


class Counting(Linear):
    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return super().forward(x)


class InPlace(Linear):
    def forward(self, x: Tensor) -> Any:
        x.data.mul_(2)
        return super().forward(x)


class Unused(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(1, 1)


class Weightless(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class Failing(Linear):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (OneTooMany, r"eval mode must give logits of shape \(6, 4\) for 6 images of 3×8×8, not of "
         r"shape \(6, 8\)"),
        (Several, "training mode must give .* not a thing of type tuple"),
        (Whole, "logits of a floating type, not torch.int64"),
        (Infinite, "logits that are not finite"),
        (Blind, "no gradient reach the images"),
        (Rounding, "no gradient reach the images"),
        (Random, "other logits each time"),
        (Batchwise, "other logits beside other images"),
        (Counting, "eval mode changes its own calls"),
        (InPlace, "changes the images"),
        (Unused, "gives other.weight no gradient; leave it out, or set its requires_grad"),
        (Weightless, "has no weights to train"),
        (Failing, "mine: trying it on one batch fails: RuntimeError: mat1"),
    ],
)  # fmt: skip
def test_a_network_is_tried_on_one_batch(network: type[Linear], sentence: str) -> None:
    torch.manual_seed(0)
    x, labels = torch.rand(6, 3, 8, 8), torch.arange(6) % 4
    with pytest.raises(UserError, match=sentence):
        models.check(network(), x, labels, 4, "mine")


@pytest.mark.parametrize("network", [Linear, Probabilities, FromZero])
def test_a_network_may_be_of_any_kind(network: type[Linear]) -> None:
    torch.manual_seed(0)
    models.check(network(), torch.rand(6, 3, 8, 8), torch.arange(6) % 4, 4, "mine")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_network_that_is_right_is_left_as_it_was(dropout: float) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Dropout(dropout),
                            nn.Flatten(), nn.Linear(72, 4))  # fmt: skip
    network[0].weight.requires_grad_(False)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    x, state = torch.rand(6, 3, 8, 8), torch.random.get_rng_state()
    models.check(network, x, torch.arange(6) % 4, 4, "mine")
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert network.training
    assert torch.equal(torch.random.get_rng_state(), state)
