"""The work of a training step, counted by torch's own formulae, beside the analytical units.

One unit is a forward pass of one example: an attack step takes two, a training pass three.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from btrain import models
from btrain.config import compose
from btrain.data import Data
from btrain.defenses import DEFENSES
from btrain.training.setup import make_step
from btrain.training.step import ALLOCATORS

STEPS = 4
ORACLE_STEPS = 3
M = 96


class Flops(TorchDispatchMode):
    """Adds up the floating-point operations of everything that is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def expected_units(defense: str, allocator: str, steps: int, n: int) -> int:
    """Of a step that takes `steps` attack steps in all and perturbs n of M examples."""
    scores = M if allocator != "uniform" or defense == "trades" else 0
    oracle = (2 * ORACLE_STEPS + 1) * M if allocator == "oracle" else 0
    if defense == "augmix":
        return 3 * M + 6 * n
    training = 3 * M if defense == "pgd" else 3 * M + 3 * n
    return scores + oracle + 2 * steps + training


@pytest.mark.parametrize(
    ("defense", "allocator"),
    [
        *itertools.product(DEFENSES, ALLOCATORS),
        *itertools.product(["augmix"], ["bullettrain", "uniform", "random"]),
    ],
)
def test_counted_flops_are_the_analytical_units(
    tmp_path: Path, digits: Data, defense: str, allocator: str
) -> None:
    budgets = [] if defense == "augmix" else ["bt.n_r=1", f"attack.steps={STEPS}"]
    config = compose(
        ["dataset=digits", "model=preact_resnet18", f"defense={defense}", f"bt={allocator}",
         f"bt.oracle_steps={ORACLE_STEPS}", "bt.mean_steps=1.5", *budgets]
    )  # fmt: skip
    torch.manual_seed(0)
    model = models.build("preact_resnet18", width=8, depth=None, classes=10, shape=(1, 8, 8))
    model.train(defense == "augmix")  # the mode in which the classes are decided
    x = digits.train.images[:M].float() / 255
    with torch.no_grad():
        predicted = model(x).argmax(dim=1)
    labels = torch.where(torch.arange(M) % 5 == 0, (predicted + 1) % 10, predicted)

    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    stats, flops = counted(config, model, x, labels)
    handle.remove()
    with Flops() as unit, torch.no_grad():
        model(x)
    attacked = int(stats.steps) - (ORACLE_STEPS * M if allocator == "oracle" else 0)
    if defense == "augmix":
        attacked, n = 0, attacked // 2
    else:
        n = sizes[-1]
    expected = expected_units(defense, allocator, attacked, n)
    assert flops / (unit.total / M) == pytest.approx(expected, rel=0.05)
    if allocator == "bullettrain":
        assert 0 < n < M or defense == "pgd"


def counted(config: Any, model: nn.Module, x: Tensor, labels: Tensor) -> tuple[Any, int]:
    """The statistics of one training step and its floating-point operations."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step = make_step(config, torch.device("cpu"))
    model.train()
    with Flops() as flops:
        generator = torch.Generator().manual_seed(0)
        _, stats = step(model, optimizer, x, labels, torch.tensor(0.4), generator)
    return stats, flops.total
