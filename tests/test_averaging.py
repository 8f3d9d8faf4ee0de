"""recipe.ema: the average of the weights stands in for them and changes no training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from btrain.controllers.averaging import WeightAverage
from btrain.data import Data
from btrain.data.splits import load_configured
from btrain.errors import UserError
from btrain.evaluation import evaluate
from btrain.exchange.from_run import load_run
from btrain.runs import checkpoint
from btrain.runs.folder import RunFolder
from btrain.training import train
from btrain.training.setup import make_state
from btrain.training.state import TrainState
from composing import compose
from steps import epoch_of
from test_training import CPU, metrics, same, tiny, untimed

PREACT = ["model=preact_resnet18", "model.width=2"]


@pytest.fixture(scope="module")
def few() -> Data:
    """The 300 digits of `tiny`, five batches."""
    return load_configured(tiny(Path("unused")).dataset, CPU)


def expected(initial: Tensor, sequence: list[Tensor], decay: float) -> Tensor:
    """Each member's share written out: it enters with 1 − d, then shrinks by every later d."""
    decays = [min(decay, (1 + n) / (10 + n)) for n in range(len(sequence))]
    total = math.prod(decays) * initial.double()
    for n, member in enumerate(sequence):
        total += (1 - decays[n]) * math.prod(decays[n + 1 :]) * member.double()
    return total


def saved(folder: Path, name: str = "last.pt") -> dict[str, Any]:
    return dict(checkpoint.load(folder / "checkpoints" / name)["state"])


@pytest.mark.parametrize("decay", [0.3, 0.995])
def test_average_of_a_known_sequence(decay: float) -> None:
    """Weights and BatchNorm statistics alike; the number of batches seen is the model's own."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    average = WeightAverage(model, decay)
    seen: dict[str, list[Tensor]] = {name: [] for name in before}
    for n in range(40):
        for name, tensor in model.state_dict().items():
            tensor.copy_(tensor.new_full((), n) if tensor.dim() == 0 else torch.randn_like(tensor))
            seen[name].append(tensor.clone())
        average.update(n)
    for name, tensor in average.network.state_dict().items():
        want = expected(before[name], seen[name], decay)
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), want, rtol=1e-5, atol=1e-5)
        else:
            assert int(tensor) == 39


def test_a_skipped_step_leaves_the_average() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.9)
    before = average.network.state_dict()["weight"].clone()
    nn.init.ones_(model.weight)
    average.update(5, skipped=torch.tensor(True))
    assert torch.equal(average.network.state_dict()["weight"], before)
    average.update(5, skipped=torch.tensor(False))
    torch.testing.assert_close(average.network.state_dict()["weight"], before + 0.6 * (1 - before))


def test_training_averages_after_every_step(few: Data, tmp_path: Path) -> None:
    config = tiny(tmp_path, *PREACT, "recipe.ema=0.8")
    state = make_state(config, few, CPU)
    initial = {k: v.clone() for k, v in state.model.state_dict().items()}
    seen: dict[str, list[Tensor]] = {name: [] for name in initial}

    def record() -> None:
        for name, tensor in state.model.state_dict().items():
            seen[name].append(tensor.clone())

    epoch_of(config, state, few.train, tick=record)
    for name, tensor in state.evaluated.state_dict().items():
        if tensor.is_floating_point():
            want = expected(initial[name], seen[name], 0.8)
            torch.testing.assert_close(tensor.double(), want, rtol=1e-4, atol=1e-5)


def test_the_average_is_scored_and_kept_and_training_does_not_notice(tmp_path: Path) -> None:
    settings = ["train.epochs=3", "dataset.val_examples=100"]
    with_average = tiny(tmp_path / "ema", "recipe.ema=0.9", *settings)
    summary = train(with_average)
    train(tiny(tmp_path / "plain", *settings))
    ema, plain = saved(tmp_path / "ema"), saved(tmp_path / "plain")
    assert "trained_model" not in plain
    assert same(ema["trained_model"], plain["model"])
    assert not same(ema["model"], plain["model"])
    scores = ("val_clean_acc", "val_robust_acc")
    lines = [
        [{k: v for k, v in line.items() if k not in scores} for line in untimed(metrics(folder))]
        for folder in (tmp_path / "ema", tmp_path / "plain")
    ]
    assert lines[0] == lines[1]  # the watched batch, too, is attacked with the weights in training

    _, network = load_run(str(tmp_path / "ema"))  # what `btrain eval` and `btrain export` read
    assert same(dict(network.state_dict()), ema["model"])
    data = load_configured(with_average.dataset, CPU)
    again = evaluate(
        network, data.test, epsilon=with_average.eval.epsilon,
        step_size=with_average.eval.step_size, steps=2, batch_size=500, seed=0,
    )  # fmt: skip
    assert (again.clean, again.robust) == (summary["clean_acc"], summary["robust_acc"])
    if summary["best_epoch"] == 3:
        assert same(saved(tmp_path / "ema", "best.pt")["model"], ema["model"])


def test_a_collapse_takes_the_average_back_too(tmp_path: Path, few: Data) -> None:
    """What the state was at the epoch's start is what it is after loading that."""
    config = tiny(tmp_path, "recipe.ema=0.9")
    state = make_state(config, few, CPU)
    one_epoch(state, few, config)
    checkpoint.save(tmp_path / "start.pt", {"state": state.state_dict()})
    average = {k: v.clone() for k, v in state.evaluated.state_dict().items()}
    one_epoch(state, few, config)
    assert not same(dict(state.evaluated.state_dict()), average)
    state.load_state_dict(checkpoint.load(tmp_path / "start.pt")["state"])
    assert same(dict(state.evaluated.state_dict()), average)


def one_epoch(state: TrainState, few: Data, config: Any, stop_at: int = 1000) -> None:
    epoch_of(config, state, few.train, stopped=lambda: state.batch == stop_at)
    if state.batch != stop_at:
        state.end_epoch()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_resumes_bit_for_bit(few: Data, tmp_path: Path, precision: str) -> None:
    """Cut in the second epoch, through a file."""
    config = tiny(tmp_path, *PREACT, "recipe.ema=0.95", f"train.precision={precision}")
    whole, cut, resumed = (make_state(config, few, CPU) for _ in range(3))
    for state in (whole, cut):
        one_epoch(state, few, config)
    one_epoch(whole, few, config)
    one_epoch(cut, few, config, stop_at=2)
    checkpoint.save(tmp_path / "cut.pt", {"state": cut.state_dict()})
    resumed.load_state_dict(checkpoint.load(tmp_path / "cut.pt")["state"])
    one_epoch(resumed, few, config)
    assert same(dict(resumed.evaluated.state_dict()), dict(whole.evaluated.state_dict()))
    assert same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))


def test_the_timing_copy_has_no_average(few: Data, tmp_path: Path) -> None:
    """`speedup_measured` takes steps on a copy of the state; they are none of the run's."""
    config = tiny(tmp_path, "recipe.ema=0.9")
    state = make_state(config, few, CPU)
    average = {k: v.clone() for k, v in state.evaluated.state_dict().items()}
    one_epoch(state.throw_away_copy(), few, config)
    assert same(dict(state.evaluated.state_dict()), average)


def test_a_checkpoint_without_an_average_is_refused(few: Data, tmp_path: Path) -> None:
    plain = make_state(tiny(tmp_path), few, CPU)
    averaged = make_state(tiny(tmp_path, "recipe.ema=0.9"), few, CPU)
    with pytest.raises(UserError, match="state of a run like this"):
        averaged.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("value", ["1", "-0.1", "nan", "1.5"])
def test_a_decay_out_of_range_is_named(value: str) -> None:
    with pytest.raises(UserError, match=r"recipe\.ema must be in \[0, 1\), not"):
        compose([f"recipe.ema={value}"])


def test_a_folder_of_a_run_without_the_average_is_another_run(tmp_path: Path) -> None:
    train(tiny(tmp_path, "train.epochs=1"))
    with pytest.raises(UserError, match=r"recipe\.ema"):
        RunFolder(tmp_path).check_owner(tiny(tmp_path, "train.epochs=1", "recipe.ema=0.9"))
