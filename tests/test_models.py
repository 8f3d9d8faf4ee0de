"""Sizes, key names and shapes of the networks."""

from __future__ import annotations

import pytest
import torch

from btrain import models
from btrain.errors import UserError


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
