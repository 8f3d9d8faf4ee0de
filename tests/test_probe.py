"""The plain defense timed beside a run: it leaves no trace but its own number."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from btrain.data import Data, Split
from btrain.errors import UserError
from btrain.methods.cost import Costs
from btrain.methods.make import NOTHING, plain_defense
from btrain.methods.statistics import StepStats
from btrain.runs import checkpoint
from btrain.settings import AllocatorName, Config, RivalName
from btrain.training import epochs, train
from btrain.training.setup import make_state
from btrain.training.state import TrainState
from btrain.training.timing import probe
from btrain.training.timing.probe import Probe
from btrain.training.update import train_batch
from composing import compose
from steps import epoch_of

CPU = torch.device("cpu")
TINY = [
    "dataset=digits",
    "model=small_cnn",
    "model.width=4",
    "dataset.train_examples=200",
    "dataset.test_examples=50",
    "train.batch_size=64",
    "train.epochs=2",
    "eval.steps=2",
    "device=cpu",
]
RESNET = ["model=preact_resnet18", "model.width=8", "dataset.train_examples=130", "attack.steps=3"]


def tiny(*overrides: str) -> Config:
    return compose([*TINY, *overrides])


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(content: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in content.items() if k not in ("train_seconds", "speedup_measured")}


@pytest.fixture
def generous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs of four batches leave no room within 1 %."""
    monkeypatch.setattr(probe, "_SHARE", 100.0)


@pytest.mark.parametrize(
    "settings",
    [
        ["attack.steps=3", "bt.n_r=1"],
        [*RESNET, "train.precision=bf16", "train.channels_last=true"],
        ["defense=augmix", "dataset.train_examples=130"],
        ["defense=pgd", "rival=mma"],
        ["train.on_nonfinite=skip", "recipe.optimizer=adam", "recipe.lr=0.001"],
        ["defense=mart", "bt=early_exit", "bt.warmup_epochs=1"],
    ],
)
@pytest.mark.usefixtures("generous")
def test_a_run_with_the_probe_is_the_run_without(tmp_path: Path, settings: list[str]) -> None:
    runs = {}
    for every in (0, 1):
        folder = tmp_path / str(every)
        summary = train(tiny(*settings, f"bt.probe_every={every}", f"run.dir={folder}"))
        state = checkpoint.load(folder / "checkpoints" / "last.pt")["state"]
        runs[every] = (summary, lines(folder), state)
    (bare, bare_lines, bare_state), (probed, probed_lines, probed_state) = runs[0], runs[1]
    assert [line["speedup_measured"] for line in bare_lines] == [None, None]
    assert all(line["speedup_measured"] > 0 for line in probed_lines)
    assert list(map(untimed, bare_lines)) == list(map(untimed, probed_lines))
    assert untimed(bare) == untimed(probed)
    times = ("epoch_seconds", "train_seconds")
    assert not different(
        {key: value for key, value in bare_state.items() if key not in times},
        {key: value for key, value in probed_state.items() if key not in times},
    )


def different(a: Any, b: Any) -> bool:
    """Whether two trees of plain containers differ anywhere."""
    if isinstance(a, dict):
        return a.keys() != b.keys() or any(different(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) != len(b) or any(map(different, a, b))
    if isinstance(a, torch.Tensor):
        return a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    return bool(a != b)


def trained_epoch(config: Config, data: Data) -> TrainState:
    state = make_state(config, data, CPU)
    epoch_of(config, state, data.train)
    return state


def probe_of(config: Config, split: Split) -> Probe:
    return Probe(config, split, Costs.of(config), NOTHING)


@pytest.mark.usefixtures("generous")
def test_it_restores_every_state_even_where_it_fails(
    digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("dataset.train_examples=null")
    state = trained_epoch(config, digits)
    began, drawn = checkpointed(state), torch.get_rng_state()
    assert probe_of(config, digits.train).speedup(state) is not None
    assert not different(began, checkpointed(state))
    assert torch.equal(drawn, torch.get_rng_state())

    def no_memory(*args: object, **kwargs: object) -> None:
        torch.rand(3)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1")

    monkeypatch.setattr(probe, "train_epoch", no_memory)
    assert probe_of(config, digits.train).speedup(state) is None
    assert not different(began, checkpointed(state))
    assert torch.equal(drawn, torch.get_rng_state())


def checkpointed(state: TrainState) -> dict[str, Any]:
    """A copy of all that a checkpoint would hold."""
    model, optimizer, memory = state.model, state.optimizer, state.memory
    return {
        "model": {key: value.clone() for key, value in model.state_dict().items()},
        "momenta": [{k: v.clone() for k, v in m.items()} for m in optimizer.state.values()],
        "lr": [group["lr"] for group in optimizer.param_groups],
        "memory": {key: value.clone() for key, value in memory.items()},
        "generator": state.generator.get_state(),
        "progress": (state.epoch, state.batch, state.epoch_seconds, state.train_seconds),
        "sums": [state.epoch_sums.clone(), state.total_sums.clone()],
    }


def test_short_epochs_leave_no_room(tmp_path: Path) -> None:
    summary = train(tiny(f"run.dir={tmp_path}"))
    assert [line["speedup_measured"] for line in lines(tmp_path)] == [None, None]
    assert summary["speedup_measured"] is None


@pytest.mark.parametrize(
    ("examples", "own", "compiles"),
    [(1442, 1.0, 0.0), (64 * 3, 1.0, 0.0), (64 * 3, 0.5, 0.0), (1442, 1.0, 3.0)],
)
def test_it_costs_at_most_one_percent(
    digits: Data, monkeypatch: pytest.MonkeyPatch, examples: int, own: float, compiles: float
) -> None:
    """By a clock that goes on by a second a plain step, where one of the epoch's takes `own`.

    Their units are equal, so that with 0.5 the first probe expects half of what it will cost. The
    first step of each takes some seconds more where it compiles.
    """
    now = began = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(time, "process_time", lambda: now)

    def slow(*args: Any) -> StepStats:
        nonlocal now
        now += 1.0 + (compiles if now == began else 0.0)
        return train_batch(*args)

    split = Split(digits.train.images[:examples], digits.train.labels[:examples])
    config = tiny("bt=uniform", "attack.steps=1", "bt.n_b=1")
    state = trained_epoch(config, replace(digits, train=split))
    state.epoch_seconds = state.epoch_work = own * examples / 64
    monkeypatch.setattr(epochs, "train_batch", slow)
    watch, trained, speedups = probe_of(config, split), 0.0, []
    for _ in range(60 * 1442 // examples):
        trained += state.epoch_seconds
        began = now
        speedups.append(watch.speedup(state))
        assert now == began or began == 0 or now <= 0.01 * trained
        assert now <= 0.01 * trained + (2 if own < 1 else compiles)
    assert 0.005 * trained < now <= 0.01 * trained
    assert {value for value in speedups if value} == {1 / own}


@pytest.mark.usefixtures("generous")
def test_it_looks_every_so_many_epochs_and_the_summary_has_the_mean(tmp_path: Path) -> None:
    summary = train(tiny("train.epochs=4", "bt.probe_every=2", f"run.dir={tmp_path}"))
    values = [line["speedup_measured"] for line in lines(tmp_path)]
    assert values[0] is None
    assert values[2] is None
    assert summary["speedup_measured"] == pytest.approx((values[1] + values[3]) / 2)
    log = (tmp_path / "train.log").read_text()
    assert f"{values[1]:.2f} measured" in log
    assert f"{summary['speedup_measured']:.2f} measured" in log


@pytest.mark.usefixtures("generous")
def test_other_probing_is_the_same_run(tmp_path: Path) -> None:
    summary = train(tiny(f"run.dir={tmp_path}"))
    assert summary["speedup_measured"] is not None
    assert train(tiny("bt.probe_every=2", f"run.dir={tmp_path}")) == summary


@pytest.mark.usefixtures("generous")
def test_free_has_no_speedup_a_batch(tmp_path: Path) -> None:
    free = ["defense=pgd", "rival=free", "rival.replays=2", "train.epochs=1"]
    train(tiny(*free, f"run.dir={tmp_path}"))
    assert lines(tmp_path)[0]["speedup_measured"] is None


def test_the_plain_defense_takes_the_attacks_own_steps() -> None:
    plain = plain_defense(tiny("rival=fast", "attack.steps=7"))
    assert plain.rival.name is RivalName.none
    assert plain.bt.name is AllocatorName.uniform
    assert (plain.bt.n_b, plain.bt.step_size_b) == (7, plain.attack.step_size)
    shares = ["bt=random", "bt.fractions=[.3,.5,.2]", "bt.n_b=5", "bt.step_size_b=0.5"]
    assert plain_defense(tiny(*shares)).bt == plain_defense(tiny("bt=random")).bt
    assert plain_defense(tiny("defense=augmix")).bt.n_b == 1


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(UserError, match=r"bt\.probe_every must be at least 0, not -1\."):
        tiny("bt.probe_every=-1")
