"""Bounds: sound, exact where they can be, and the same as symbolic intervals going forward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zonotopes import Zonotope, margins, through

from btrain.models import Normalise
from btrain.models.verified import Residual
from btrain.verify import bounds
from btrain.verify.graph import Graph, trace

SHAPE = (2, 8, 8)
CLASSES = 4


class Shifted(nn.Module):
    """A residual block whose branches have different windows, without weights beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(6)
        self.main = nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1))
        self.skip = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        return F.relu(self.main(x) + x)


def convolutional() -> nn.Module:
    return nn.Sequential(
        Normalise([0.4, 0.5], [0.2, 0.3]),
        nn.Conv2d(2, 5, 3, 2, 1), nn.ReLU(), nn.Conv2d(5, 6, 3, 1, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(96, 12), nn.ReLU(), nn.Linear(12, CLASSES),
    )  # fmt: skip


def residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, 1, 1), nn.ReLU(),
        Residual(4, 4, smaller=False), Residual(4, 6, smaller=True),
        nn.Flatten(), nn.Linear(96, CLASSES),
    )  # fmt: skip


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6),
        nn.AvgPool2d(2), nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(24, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES),
    )  # fmt: skip


def unusual() -> nn.Module:
    """Groups, dilation, windows that are not square, padding that is not even, pooling at last."""
    return nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), (2, 1), (1, 0), groups=2), nn.ReLU(),
        nn.Conv2d(4, 4, 3, 1, 2, dilation=2), nn.ReLU(),
        nn.Conv2d(4, 6, 3, 2, 0), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, CLASSES),
    )  # fmt: skip


NETWORKS = {f.__name__: f for f in (convolutional, residual, normalised, unusual)}


def made(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Graph]:
    """A network with biases and statistics that matter, in evaluation mode, and its graph."""
    torch.manual_seed(seed)
    network = NETWORKS[name]().to(dtype)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for values in (module.running_var, module.weight):
                nn.init.uniform_(values, 0.5, 1.5)
            for values in (module.running_mean, module.bias):
                nn.init.normal_(values, 0, 0.3)
    network.eval()
    return network, trace(network, SHAPE)


def images(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Some of their pixels are near 0 or 1, where boxes are cut."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, *SHAPE, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.arange(count) % CLASSES


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", NETWORKS)
def test_symbolic_is_the_zonotope_going_forward(
    name: str, dtype: torch.dtype, close: float
) -> None:
    network, graph = made(name, dtype)
    x, labels = images(3, dtype)
    ours = bounds.margins(graph, bounds.box(x, 0.1), labels, engine="symbolic")
    theirs = torch.stack([
        margins(through(network, Zonotope.box((one - 0.1).clamp(0, 1), (one + 0.1).clamp(0, 1))),
                int(label))
        for one, label in zip(x[:, None], labels, strict=True)
    ])  # fmt: skip
    assert (ours - theirs).abs().max() <= close * (1 + theirs.abs().max())
