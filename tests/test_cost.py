"""The work of a training step, counted by torch's own formulae, beside the analytical units.

One unit is a forward pass of one example: an attack step takes two, a training pass three.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from btrain import models
from btrain.data import Batch, Data
from btrain.defenses import DEFENSES
from btrain.methods.cost import Costs, speedups
from btrain.methods.statistics import StepStats
from btrain.settings import AllocatorName, DefenseName, RivalName
from composing import compose
from steps import memory_of, step_of

CPU = torch.device("cpu")
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


BUDGETS = {
    "bullettrain": ["bt.n_r=1"],
    "early_exit": ["bt.n_r=1"],
    "random": ["bt.n_r=1"],
    "oracle": ["bt.n_r=1", f"bt.oracle_steps={ORACLE_STEPS}"],
    "gaussian": ["bt.mean_steps=1.5"],
    "uniform": [],
}


def expected_units(defense: str, allocator: str, steps: int, n: int) -> int:
    """Of a step that takes `steps` attack steps in all and perturbs n of M examples."""
    scores = M if allocator != "uniform" or defense == "trades" else 0
    oracle = (2 * ORACLE_STEPS + 1) * M if allocator == "oracle" else 0
    if defense == "augmix":
        return 3 * M + 6 * n
    training = 3 * M if defense == "pgd" else 3 * M + 3 * n
    return scores + oracle + 2 * steps + training


@dataclass
class Counted:
    """One training step: its statistics, torch's count in units, and what each forward pass saw."""

    stats: StepStats
    units: float
    passes: list[int]


def one_step(digits: Data, *overrides: str) -> Counted:
    """A step on digits of which the network gets four in five right, with F_R = 0.4."""
    config = compose(
        ["dataset=digits", "model=preact_resnet18", f"train.batch_size={M}",
         *overrides]
    )  # fmt: skip
    torch.manual_seed(0)
    model = models.build("preact_resnet18", width=8, depth=None, classes=10, shape=(1, 8, 8))
    # The mode in which the classes are decided.
    model.train(config.defense.name is DefenseName.augmix or config.rival.name is RivalName.mma)
    x = digits.train.images[:M].float() / 255
    with torch.no_grad():
        predicted = model(x).argmax(dim=1)
    labels = torch.where(torch.arange(M) % 5 == 0, (predicted + 1) % 10, predicted)
    with Flops() as unit, torch.no_grad():
        model(x)

    passes: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step, memory = step_of(config, CPU), memory_of(config, digits, CPU)
    memory["robust_fraction"].fill_(0.4)
    batch, generator = Batch(x, labels, torch.arange(M)), torch.Generator().manual_seed(0)
    model.train()
    with Flops() as flops:
        stats = step(model, optimizer, batch, memory, generator)
    handle.remove()
    return Counted(stats, flops.total / (unit.total / M), passes)


@pytest.mark.parametrize(
    ("defense", "allocator"),
    [
        *itertools.product(DEFENSES, [name.name for name in AllocatorName if name.name != "own"]),
        *itertools.product(["augmix"], ["bullettrain", "uniform", "random"]),
    ],
)
def test_counted_flops_are_the_analytical_units(digits: Data, defense: str, allocator: str) -> None:
    budgets = [] if defense == "augmix" else [*BUDGETS[allocator], f"attack.steps={STEPS}"]
    counted = one_step(digits, f"defense={defense}", f"bt={allocator}", *budgets)
    assert counted.units == pytest.approx(float(counted.stats.units), rel=0.05)
    attacked = int(counted.stats.steps) - (ORACLE_STEPS * M if allocator == "oracle" else 0)
    n = attacked // 2 if defense == "augmix" else counted.passes[-1]
    if allocator == "early_exit":  # the attack's passes: one an image and step, stopped ones too
        attacked = sum(counted.passes[1 : -1 if defense == "pgd" else -2])
        assert attacked >= counted.stats.steps
    assert counted.stats.units == expected_units(defense, allocator, attacked, n)
    if allocator == "bullettrain":
        assert 0 < n < M or defense == "pgd"


@pytest.mark.parametrize(
    ("overrides", "units"),
    [
        (["rival=fast"], 2 + 3 + 3),  # one clean pass is both the target and the loss'
        (["defense=mart", "rival=fast", "bt.n_b=3"], 6 + 3 + 3),
        (["defense=pgd", "rival=fast"], 2 + 3),
        (["rival=yopo"], 1 + 4 + 3 + 3),
        (["defense=mart", "rival=yopo"], 4 + 3 + 3),
        (["defense=pgd", "rival=yopo"], 4 + 3),
        (["defense=pgd", "rival=gradalign"], 2 + 3 + 8),
        (["defense=mart", "rival=gradalign"], 2 + 3 + 3 + 8),
        (["defense=pgd", "rival=free"], 8 * 3),
        # Of nobody is p_y > 1/2 at the start: two training passes alone.
        (["defense=pgd", "rival=mma"], 3 + 3),
        (["defense=augmix", "bt=uniform", "defense.jsd=false"], 3),
        (["defense=pgd", "bt=uniform", "attack.steps=10"], 20 + 3),
        (["bt=uniform"], 27),
        (["defense=mart", "bt=uniform"], 26),
        (["defense=augmix", "bt=uniform"], 9),
    ],
    ids=str,
)
def test_the_cost_of_a_plain_defense_and_of_a_rival(
    digits: Data, overrides: list[str], units: int
) -> None:
    counted = one_step(digits, *overrides)
    assert counted.stats.units == units * M
    assert counted.units == pytest.approx(units * M, rel=0.05)


def test_the_cost_of_mma_s_search(digits: Data, preact: nn.Module) -> None:
    """A correct example takes N attack steps, one pass at its radius and one a bisection."""
    x, labels = digits.train.images[:M].float() / 255, digits.train.labels[:M]
    optimizer = torch.optim.Adam(preact.parameters(), lr=0.01)
    preact.train()
    for _ in range(8):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(preact(x), labels).backward()
        optimizer.step()
    config = compose(["dataset=digits", "defense=pgd", "rival=mma", "attack.steps=3"])
    memory, batch = memory_of(config, digits, CPU), Batch(x, labels, torch.arange(M))
    with Flops() as unit, torch.no_grad():
        preact(x)
    with Flops() as flops:
        stats = step_of(config, CPU)(preact, optimizer, batch, memory, torch.Generator())
    correct = int(M - stats.outlier)
    assert 20 < correct < M
    assert stats.units == 6 * M + (2 * 3 + 1 + 10) * correct
    assert flops.total / (unit.total / M) == pytest.approx(float(stats.units), rel=0.05)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["bt.score=shared"],
        ["attack.mode=train"],
        ["attack.steps=3"],
        ["defense=mart"],
        ["defense=pgd"],
        ["defense=augmix"],
        ["defense=augmix", "defense.jsd=false"],
    ],
    ids=str,
)
def test_the_plain_defense_is_no_faster_than_itself(digits: Data, overrides: list[str]) -> None:
    counted = one_step(digits, "bt=uniform", *overrides)
    config = compose(["dataset=digits", "bt=uniform", *overrides])
    costs = Costs.of(config)
    assert costs.lean == float(counted.stats.units) / M
    means = {"attack_steps_mean": 1.0, "units_per_example": costs.lean}
    assert speedups(costs, means)["speedup_flops"] == 1


@pytest.mark.parametrize(
    ("overrides", "official"),
    [([], 39), (["attack.steps=5"], 24), (["defense=mart"], None), (["defense=pgd"], None)],
    ids=str,
)
def test_only_trades_has_a_published_structure_of_its_own(
    overrides: list[str], official: int | None
) -> None:
    costs = Costs.of(compose(overrides))
    assert costs.official == official
    means = {"attack_steps_mean": 3.88, "units_per_example": 13.0}
    expected = None if official is None else official / 13
    assert speedups(costs, means)["speedup_official"] == expected


@pytest.mark.parametrize("rival", ["free", "mma"])
def test_a_rival_of_another_kind_has_no_speedup(rival: str) -> None:
    costs = Costs.of(compose(["defense=pgd", f"rival={rival}"]))
    means = {"attack_steps_mean": 8.0, "units_per_example": 24.0}
    assert set(speedups(costs, means).values()) == {None}
