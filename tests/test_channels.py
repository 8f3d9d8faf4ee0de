"""Whole channels: a compact network is trained, and everything else sees an ordinary one."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from btrain.attacks.fast_paths import make_fast_paths
from btrain.cli import main
from btrain.controllers.sparsity.channels import Channels, FlyingChannels, Trained, same_outputs
from btrain.controllers.sparsity.controller import Sparsity
from btrain.controllers.sparsity.make import Length, make_sparsity
from btrain.data import Data
from btrain.data.splits import load_configured
from btrain.errors import UserError
from btrain.evaluation.pgd import evaluate
from btrain.exchange.from_run import load_run
from btrain.methods.cost import forward_flops
from btrain.methods.make import make_methods
from btrain.models import verified
from btrain.models.channels import Cut, Inner, inner_channels
from btrain.runs import checkpoint
from btrain.settings import Config
from btrain.settings.compose import compose
from btrain.training import train
from btrain.training.epochs import train_epoch
from btrain.training.schedule import make_plan
from btrain.training.setup import make_state
from btrain.training.state import TrainState

CPU = torch.device("cpu")
TINY = [
    "dataset=digits", "dataset.train_examples=200", "dataset.test_examples=100", "model=small_cnn",
    "model.width=4", "train.batch_size=50", "attack.steps=2", "attack.epsilon=0.03",
    "eval.steps=2", "recipe.optimizer=adam", "recipe.lr=0.01", "device=cpu",
]  # fmt: skip
PREACT = ["model=preact_resnet18", "recipe.optimizer=sgd", "recipe.lr=0.05", "recipe.ema=0.9"]
OFTEN = ["sparsity.interval_unit=iterations", "sparsity.interval=2", "sparsity.late_interval=3"]
BIRD = ["sparsity=channel_flying_bird", *OFTEN]


@cache
def tiny(*overrides: str) -> Config:
    return compose([*TINY, "run.dir=unused", *overrides])


@pytest.fixture(scope="module")
def few() -> Data:
    """The 200 digits of `tiny`, four batches."""
    return load_configured(tiny().dataset, CPU)


def epoch(state: TrainState, data: Data, config: Config, *, stop_at: int = 1000) -> None:
    """Train an epoch, or as far as a batch."""
    paths = make_fast_paths(config.train, CPU)
    method = make_methods(config, CPU, paths=paths)(state.epoch)
    train_epoch(
        state, data.train, method, make_plan(config), see=paths.view, tick=lambda: None,
        show=lambda means: None, stopped=lambda: state.batch == stop_at,
    )  # fmt: skip
    if state.batch != stop_at:
        state.end_epoch()


def channels_of(state: TrainState) -> Channels:
    assert isinstance(state.sparsity, Channels)
    return state.sparsity


def everything(state: TrainState) -> dict[str, Tensor]:
    """Weights, statistics, momenta and averages by name."""
    found = dict(state.model.state_dict())
    found |= {f"average.{k}": v for k, v in state.evaluated.state_dict().items()}
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            found[f"{key}.{name}"] = value
    return found


# ------------------------------------------------------------------- the compact and the masked


@pytest.mark.parametrize(
    "more",
    [
        [],
        [*PREACT, "model.width=8", "recipe.lr=0.002", "bt=uniform", "train.channels_last=true"],
    ],
    ids=["adam", "sgd"],
)
def test_the_compact_network_learns_what_the_masked_one_does(more: list[str], few: Data) -> None:
    """To rounding, of which signs of an attack and large steps make much: ε and rate are tiny."""
    few_channels = ["sparsity=channel_static", "sparsity.macs_share=0.4"]
    config = tiny(*few_channels, *more, "attack.epsilon=0.0001", "attack.start=uniform")
    compact, masked = make_state(config, few, CPU), make_state(config, few, CPU)
    channels = channels_of(compact)
    masked.sparsity = Sparsity(channels_of(masked).thinned, channels_of(masked).masks)
    for state in (compact, masked):
        epoch(state, few, config)
    ours, theirs = everything(compact), everything(masked)
    assert ours.keys() == theirs.keys()
    assert {"momentum_buffer.fc.weight", "exp_avg.fc2.weight"} & ours.keys()
    for name, tensor in ours.items():
        of = name.removeprefix("average.").removeprefix("momentum_buffer.")
        of = of.removeprefix("exp_avg_sq.").removeprefix("exp_avg.")
        parts = [channels.cut.part(of, t, channels.channels) for t in (tensor, theirs[name])]
        torch.testing.assert_close(*parts, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_kernels_are_smaller_and_lie_still(few: Data) -> None:
    """Recorded graphs and frozen copies rely on it, from one exchange and epoch to the next."""
    config = tiny(*BIRD, "sparsity.macs_share=0.3", "train.epochs=3")
    state = make_state(config, few, CPU)
    places, whole = [], state.model
    for _ in range(2):
        with state.at_work():
            small = state.model
            assert small is not whole
            assert small.get_parameter("conv2.weight").shape[0] < 8
            assert small.get_parameter("fc1.weight").shape[0] < 100
            places.append([tensor.data_ptr() for tensor in small.state_dict().values()])
        assert state.model is whole
        epoch(state, few, config)
    assert places[0] == places[1]
    counted = forward_flops(small, few.shape, CPU) / forward_flops(whole, few.shape, CPU)
    assert counted == pytest.approx(channels_of(state).columns()["macs_share"], abs=2e-3)
    assert counted <= 0.3


# ------------------------------------------------------------------------------------ exchanges


@pytest.mark.parametrize("more", [[], [*PREACT, "model.width=8"]], ids=["small_cnn", "preact"])
def test_an_exchange_changes_outputs_by_what_it_drops_alone(more: list[str], few: Data) -> None:
    config = tiny(*BIRD, *more, "train.epochs=4")
    state = make_state(config, few, CPU)
    epoch(state, few, config)
    bird = channels_of(state)
    assert isinstance(bird, FlyingChannels)
    assert int(bird.memory["mask_updates"]) == 2
    before, images = bird.channels, few.train.images[:20] / 255
    expected = copy.deepcopy(state.model).eval()
    bird.steps += 1  # for other random numbers
    bird.exchange(Trained(state.model, state.optimizer, state.average))
    after = bird.channels
    stayed = {m: c[torch.isin(c, after[m])] for m, c in before.items()}
    assert any(len(stayed[maker]) < len(before[maker]) for maker in before)
    assert {m: len(c) for m, c in before.items()} == {m: len(c) for m, c in after.items()}
    bird.cut.clear(expected, stayed)
    with torch.no_grad():
        torch.testing.assert_close(state.model.eval()(images), expected(images))
    for inner in bird.cut.inner:  # grown channels are made of something, and nobody reads them
        new = after[inner.maker][~torch.isin(after[inner.maker], before[inner.maker])]
        made = state.model.get_parameter(f"{inner.maker}.weight")
        read = state.model.get_parameter(f"{inner.reader}.weight").transpose(0, 1)
        assert (made[new].flatten(1).abs().sum(dim=1) > 0).all()
        assert (read.reshape(len(made), -1)[new] == 0).all()


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["recipe.ema=0.9", "bt.pool=2"],
        ["defense=pgd", "rival=free", "rival.replays=3"],
        [*PREACT, "train.precision=bf16"],
    ],
)
def test_what_is_missing_is_zero_between_epochs(more: list[str], few: Data) -> None:
    config = tiny(*BIRD, *more, "train.epochs=3")
    state = make_state(config, few, CPU)
    epoch(state, few, config)
    bird = channels_of(state)
    for name, tensor in everything(state).items():
        of = name.removeprefix("average.").removeprefix("momentum_buffer.")
        of = of.removeprefix("exp_avg_sq.").removeprefix("exp_avg.")
        missing = torch.ones_like(tensor)
        there = bird.cut.whole(of, bird.cut.part(of, missing, bird.channels), bird.channels)
        gone = tensor[there == 0]
        assert (gone == 0).all(), name
    assert state.average is None or not torch.equal(
        state.average.network.get_parameter("conv1.weight"),
        state.model.get_parameter("conv1.weight"),
    )


def test_a_skipped_step_exchanges_nothing(few: Data) -> None:
    config = tiny(*BIRD, "sparsity.interval=1", "train.on_nonfinite=skip", "train.epochs=2")
    state = make_state(config, few, CPU)
    bird = channels_of(state)
    epoch(state, few, config, stop_at=1)
    assert int(bird.memory["mask_updates"]) == 1
    before = {name: tensor.clone() for name, tensor in bird.memory.items()}
    bias = state.model.get_parameter("fc2.bias")
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(torch.nan)
    epoch(state, few, config, stop_at=2)
    for name, tensor in bird.memory.items():
        assert torch.equal(tensor, before[name]), name
    with torch.no_grad():
        bias.copy_(kept)
    epoch(state, few, config, stop_at=3)
    assert int(bird.memory["mask_updates"]) == 2


# ------------------------------------------------------------------------- resuming and exporting


@pytest.mark.parametrize(
    "settings",
    [[*BIRD, "recipe.ema=0.95", "bt.pool=2"], ["sparsity=channel_static", *PREACT]],
    ids=["flying", "static"],
)
def test_resumes_bit_for_bit(settings: list[str], few: Data, tmp_path: Path) -> None:
    config = tiny("train.epochs=3", *settings)
    whole, cut = (make_state(config, few, CPU) for _ in range(2))
    epoch(whole, few, config)
    epoch(whole, few, config)
    epoch(cut, few, config)
    epoch(cut, few, config, stop_at=1)
    path = tmp_path / "cut.pt"
    checkpoint.save(path, {"state": cut.state_dict()})
    resumed = make_state(config, few, CPU)
    resumed.load_state_dict(checkpoint.load(path)["state"])
    epoch(resumed, few, config)
    ours, theirs = everything(resumed), everything(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name, tensor in channels_of(whole).memory.items():
        assert torch.equal(channels_of(resumed).memory[name], tensor), name


def test_masks_that_are_no_channels_are_refused(few: Data) -> None:
    config = tiny(*BIRD)
    for row, column in ((0, 0), (slice(None), 0)):
        saved = make_state(config, few, CPU).state_dict()
        mask = saved["sparsity"]["memory"]["mask.conv2"]
        mask[row, column] = ~mask[row, column]
        with pytest.raises(UserError, match="state of a run like this"):
            make_state(config, few, CPU).load_state_dict(saved)


def test_a_run_its_files_and_its_compact_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(*BIRD, "train.epochs=2", "sparsity.macs_share=0.3", "dataset.val_examples=60")
    folder, small = tmp_path / "run", tmp_path / "small.pt"
    summary = train(replace(config, run=replace(config.run, dir=str(folder))))
    assert summary["macs_share"] <= 0.3
    assert summary["flops"] == summary["flops_executed"] == summary["flops_counted"]
    _, network = load_run(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["mask_updates"] for line in lines] == [2, 3]
    assert all(line["flops"] == line["flops_counted"] for line in lines)
    whole = network.get_parameter("fc1.weight")
    assert whole.shape == (100, 32)
    assert float((whole == 0).float().mean()) == pytest.approx(1 - summary["density"], abs=0.1)
    capsys.readouterr()
    words = [f"checkpoint={folder}", "format=compact", f"out={small}", "model_card=true"]
    assert main(["export", *words]) == 0
    config, compact = load_run(small)
    written, before = (sum(p.numel() for p in one.parameters()) for one in (compact, network))
    told = capsys.readouterr().out
    assert f"small_cnn with {written:,} of its {before:,} parameters as compact" in told
    assert "Nothing could be left out" not in told
    assert f", {written:,} parameters." in small.with_name("small.pt.md").read_text()
    again = tmp_path / "again.pt"
    assert main(["export", f"checkpoint={small}", "format=compact", f"out={again}"]) == 0
    told = capsys.readouterr().out
    assert f"small_cnn with {written:,} parameters" in told and "Nothing could be left out" in told
    assert compact.get_parameter("fc1.weight").numel() < 0.4 * whole.numel()
    data = load_configured(config.dataset, CPU)
    attack = {"epsilon": 0.03, "step_size": 0.01, "steps": 3, "batch_size": 100, "seed": 0}
    ours, theirs = (evaluate(model, data.test, **attack) for model in (network, compact))
    assert (ours.clean, ours.robust) == (theirs.clean, theirs.robust)
    assert main(["eval", f"checkpoint={small}", "attack=clean", f"out={tmp_path / 'eval'}"]) == 0
    assert json.loads((tmp_path / "eval" / "clean.json").read_text())["accuracy"] == ours.clean
    capsys.readouterr()


def test_a_compact_file_of_other_channels_is_refused(tmp_path: Path, few: Data) -> None:
    from btrain.exchange.write import write

    config, path = tiny(), tmp_path / "small.pt"
    model = make_state(tiny("sparsity=channel_static"), few, CPU).model
    for key, wrong in (
        ("fc1.weight", torch.zeros(200, 8)),
        ("conv2.weight", torch.zeros(2, 9, 4, 4)),
    ):
        write(
            model,
            path,
            format="compact",
            shape=few.shape,
            config=config,
            classes=10,
            overwrite=True,
        )
        content = torch.load(path, weights_only=True)
        content["state"]["model"][key] = wrong
        torch.save(content, path)
        with pytest.raises(UserError, match=r"no compact form|does not fit"):
            load_run(path)


# -------------------------------------------------------------------------------- other networks


class Tapped(nn.Module):
    """A network whose hidden units are read by more than the layer that it names."""

    def __init__(self, told: tuple[object, ...]) -> None:
        super().__init__()
        self.inner_channels = (told,)
        self.a, self.b, self.c = nn.Linear(64, 20), nn.Linear(20, 10), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.a(x.flatten(1)))
        logits: Tensor = self.b(hidden) + self.c(hidden)
        return logits


def test_networks_that_cannot_be_cut_are_named(few: Data) -> None:
    def made(model: nn.Module, *settings: str) -> None:
        config = tiny("sparsity=channel_static", *settings)
        make_sparsity(config.sparsity, model, few, beside=[], length=Length(1, 4), seed=0)

    row = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
    made(row)
    assert int((row[3].weight != 0).any(dim=0).sum()) == 10
    with pytest.raises(UserError, match="no channels in this network"):
        made(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with pytest.raises(UserError, match="no channels in this network"):
        made(row, "sparsity.exclude=['1']")
    with pytest.raises(UserError, match="7 is no convolution or linear layer"):
        made(row, "sparsity.exclude=['7']")
    with pytest.raises(UserError, match="computes something else than with zeros"):
        made(Tapped(("a", None, "b")))
    with pytest.raises(UserError, match="inner_channels are wrong"):
        made(Tapped(("a", "b")))
    with pytest.raises(UserError, match=r"macs_share=0\.001 is out of reach"):
        made(row, "sparsity.macs_share=0.001")


def test_channels_are_found_in_rows_of_layers() -> None:
    torch.manual_seed(0)
    for name, found in (("mixtrain_mnist_small", 3), ("wong_mnist_resnet", 4)):
        if name not in verified.NETWORKS:
            continue
        model = verified.build(name, shape=(1, 28, 28), classes=10).eval()
        cut = Cut.of(model, inner_channels(model))
        assert len(cut.inner) >= found - 1
        kept = {maker: torch.arange(0, size, 2) for maker, size in cut.sizes.items()}
        cut.clear(model, kept)
        assert same_outputs(model, cut, kept, torch.rand(3, 1, 28, 28))
        assert {m: len(c) for m, c in cut.read(model).items()} == {
            m: len(c) for m, c in kept.items()
        }


def test_patterns_exclude_makers(preact: nn.Module) -> None:
    assert len(inner_channels(preact)) == 8
    left = inner_channels(preact, ["blocks.0.*", "blocks.1.conv1"])
    assert Inner("blocks.2.conv1", "blocks.2.bn2", "blocks.2.conv2") == left[0]
    assert len(left) == 6
