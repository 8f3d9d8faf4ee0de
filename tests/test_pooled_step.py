"""Batches attacked at once: the same attack as one by one, at the same cost."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from btrain.attacks.fast_paths import make_fast_paths
from btrain.data import Batch, Data, Split
from btrain.errors import UserError
from btrain.methods.bullettrain import BulletTrain, Examples, rows_to_forward
from btrain.methods.make import make_bullettrain, make_method
from btrain.methods.pool import Pool
from btrain.methods.statistics import EXAMPLES
from btrain.settings import Config
from btrain.training import train
from btrain.training.epochs import train_epoch
from btrain.training.schedule import make_plan
from btrain.training.setup import make_state
from btrain.training.state import TrainState
from btrain.training.timing.look import look
from composing import compose
from steps import take

CPU = torch.device("cpu")
TINY = [
    "dataset=digits",
    "model=small_cnn",
    "model.width=4",
    "dataset.train_examples=300",
    "dataset.test_examples=50",
    "train.batch_size=32",
    "train.epochs=2",
    "attack.steps=3",
    "eval.steps=2",
    "device=cpu",
]
BY_CLASS = "bt.n_r=1"
F_R = torch.tensor(0.4)


def tiny(*overrides: str) -> Config:
    return compose([*TINY, *overrides])


def method(*overrides: str) -> BulletTrain:
    return make_bullettrain(tiny(*overrides), CPU)


def images(digits: Data, model: nn.Module, n: int) -> tuple[Tensor, Tensor]:
    """n digits, of which the network gets about two thirds right. (n, 1, 8, 8), (n,)"""
    x, labels = digits.train.images[:n].float() / 255, digits.train.labels[:n]
    with torch.no_grad():
        right = model(x).argmax(dim=1)
    return x, torch.where(torch.arange(n) % 3 == 0, labels, right)


def examples(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    chosen: BulletTrain | Pool,
    generator: torch.Generator,
) -> list[Examples]:
    batch = Batch(x, labels, torch.arange(len(x)))
    return [*chosen.examples(model, batch, {"robust_fraction": F_R}, generator)]


def one_by_one(
    model: nn.Module, x: Tensor, labels: Tensor, chosen: BulletTrain, sizes: list[int]
) -> list[Examples]:
    """Each batch attacked by itself, its noise drawn from where the one before stopped."""
    generator = torch.Generator().manual_seed(0)
    batches = zip(x.split(sizes), labels.split(sizes), strict=True)
    return [one for each in batches for one in examples(model, *each, chosen, generator)]


@pytest.mark.parametrize(
    "settings",
    [
        ["defense=trades", BY_CLASS],
        ["defense=trades", "bt.n_r=0"],
        ["defense=trades", "bt=uniform"],
        ["defense=mart", "bt=gaussian"],
        ["defense=pgd", "bt=uniform"],
        ["defense=trades", "bt=early_exit", "bt.n_b=5", BY_CLASS],
    ],
)
@pytest.mark.parametrize("sizes", [[16, 16, 16], [16, 16, 7], [16, 17], [16]])
def test_with_constant_weights_a_pool_is_attacked_like_its_batches(
    digits: Data, small_cnn: nn.Module, settings: list[str], sizes: list[int]
) -> None:
    x, labels = images(digits, small_cnn, sum(sizes))
    chosen = method(*settings)
    small_cnn.double()  # in float32 a large pass rounds otherwise than a small one
    x, generator = x.double(), torch.Generator().manual_seed(0)
    pool = examples(small_cnn, x, labels, Pool(chosen, batch_size=16), generator)
    alone = one_by_one(small_cnn, x, labels, chosen, sizes)
    assert any(batch.perturbed > 0 for batch in pool)
    for ours, theirs in zip(pool, alone, strict=True):
        assert torch.equal(ours.x, theirs.x)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.allocation.classes, theirs.allocation.classes)
        assert torch.equal(ours.allocation.steps, theirs.allocation.steps)
        assert ours.perturbed == theirs.perturbed
        torch.testing.assert_close(ours.z, theirs.z)
        torch.testing.assert_close(ours.x_adv, theirs.x_adv)
        assert torch.equal(ours.x_adv[ours.perturbed :], ours.x[ours.perturbed :])
    assert sum(each.units for each in pool) == pytest.approx(sum(each.units for each in alone))


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


@pytest.mark.parametrize("defense", ["trades", "mart", "pgd"])
def test_a_pool_of_one_batch_is_the_plain_step(
    digits: Data, preact: nn.Module, defense: str
) -> None:
    preact.train()
    x, labels = images(digits, preact, 24)
    chosen, other = method(f"defense={defense}", BY_CLASS), copy.deepcopy(preact)
    plain = take(chosen, preact, sgd(preact, 0.1), x, labels, F_R, torch.Generator().manual_seed(0))
    pooled = take(
        Pool(chosen, batch_size=24), other, sgd(other, 0.1), x, labels, F_R,
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert torch.equal(plain[0], pooled[0])
    torch.testing.assert_close(plain[1], pooled[1], rtol=0, atol=0, equal_nan=True)
    theirs = other.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in preact.state_dict().items())


def test_every_batch_has_its_update_and_the_ledger_is_that_of_the_batches(
    digits: Data, preact: nn.Module
) -> None:
    preact.train()
    x, labels = images(digits, preact, 56)
    chosen, sizes = method(BY_CLASS), [24, 24, 8]
    still = copy.deepcopy(preact)
    alone = one_by_one(still, x, labels, chosen, sizes)
    adam = torch.optim.Adam(preact.parameters())
    generator = torch.Generator().manual_seed(0)
    pool = Pool(chosen, batch_size=24)
    robust_fraction, stats = take(pool, preact, adam, x, labels, F_R, generator)
    assert next(float(each["step"]) for each in adam.state.values()) == 3
    # Attack and clean forward, then three units for each image in a training pass.
    passes = [
        m + rows_to_forward(batch.perturbed, m) for m, batch in zip(sizes, alone, strict=True)
    ]
    assert float(stats.units) == sum(batch.units for batch in alone) + 3 * sum(passes)
    assert int(stats.examples) == 56
    assert int(stats.steps) == sum(int(batch.allocation.steps.sum()) for batch in alone)
    assert int(stats.boundary + stats.robust + stats.outlier) == 56
    assert 0.9**3 * F_R <= robust_fraction <= 0.9**3 * F_R + (1 - 0.9**3) * 0.8


def test_it_copies_the_step_counts_to_the_host_once(digits: Data, small_cnn: nn.Module) -> None:
    x, labels = images(digits, small_cnn, 48)
    seen = look(
        lambda: take(
            Pool(method(BY_CLASS), batch_size=16), small_cnn, sgd(small_cnn, 0.0), x, labels, F_R,
            torch.Generator(),
        ),
        CPU,
    )  # fmt: skip
    assert seen.host_copies == 1


POOLED = [BY_CLASS, "bt.pool=3", "model=preact_resnet18", "model.width=2"]


@pytest.mark.parametrize(
    "settings", [[], ["train.precision=bf16"], ["train.on_nonfinite=skip", "bt=random"]]
)
def test_a_run_cut_between_two_pools_goes_on_like_an_uncut_one(
    digits: Data, settings: list[str]
) -> None:
    config = tiny(*POOLED, *settings)
    split = Split(digits.train.images[:250], digits.train.labels[:250])  # 8 batches, 3 pools
    data = replace(digits, train=split)

    paths = make_fast_paths(config.train, CPU)

    def advance(state: TrainState, pools: float) -> None:
        train_epoch(
            state, split, make_method(config, CPU, paths=paths), make_plan(config),
            see=paths.view, tick=lambda: None, show=lambda means: None,
            stopped=lambda: state.batch >= pools,
        )  # fmt: skip

    whole, cut, resumed = (make_state(config, data, CPU) for _ in range(3))
    advance(whole, math.inf)
    assert whole.batch == 3
    advance(cut, 1)
    resumed.load_state_dict(copy.deepcopy(cut.state_dict()))
    advance(resumed, math.inf)
    theirs = resumed.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, theirs["model"][name])
    assert torch.equal(whole.generator.get_state(), theirs["generator"])
    torch.testing.assert_close(whole.epoch_sums, theirs["epoch_sums"], rtol=0, atol=0)
    assert int(whole.epoch_sums[EXAMPLES]) == 250


def test_a_whole_run(tmp_path: Path) -> None:
    collapse = "recipe.early_stop_on_collapse=true"
    summary = train(tiny(*POOLED, collapse, "bt.warmup_epochs=1", f"run.dir={tmp_path}"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert next(line["f_b"] for line in lines) == 1
    assert lines[1]["f_b"] < 1
    for line in lines:
        assert line["warnings"] == []
        assert line["attack_steps_mean"] == pytest.approx(3 * line["f_b"] + line["f_r"])
    assert summary["epochs"] == 2


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["defense=pgd", "rival=fast"], "rival=fast"),
        (["defense=augmix", "attack.steps=2", "bt.n_r=0"], "defense=augmix"),
        (["bt=oracle"], "bt=oracle"),
        (["bt=uniform", "attack.mode=train"], "attack.mode=train"),
        (["bt.score=shared"], "bt.score=shared"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: list[str], key: str) -> None:
    tiny(*settings)
    with pytest.raises(UserError, match=rf"^bt\.pool=2 does not go with {re.escape(key)}: .+\.$"):
        tiny(*settings, "bt.pool=2")


def test_a_pool_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"bt\.pool must be at least 1, not 0\."):
        tiny("bt.pool=0")
