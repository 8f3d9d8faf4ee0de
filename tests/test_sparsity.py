"""Sparsity in training: masks behind every update, their changes, cost, checkpoints, mistakes."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btrain import own
from btrain.attacks.fast_paths import make_fast_paths
from btrain.controllers.base import Controller, Gradients
from btrain.controllers.sparsity.controller import FlyingBird, FlyingBirdPlus
from btrain.controllers.sparsity.ticket import RobustBird
from btrain.data import Data
from btrain.data.augmentation import to_unit
from btrain.data.splits import load_configured
from btrain.errors import UserError
from btrain.exchange.from_run import load_run
from btrain.methods.base import Memory
from btrain.methods.make import make_methods
from btrain.methods.statistics import StepStats
from btrain.report.compare import compare
from btrain.runs import checkpoint
from btrain.settings import Config
from btrain.settings.compose import compose
from btrain.training import train
from btrain.training.epochs import train_epoch
from btrain.training.schedule import make_plan, updates_per_epoch
from btrain.training.setup import make_state
from btrain.training.state import TrainState
from btrain.training.update import descend

CPU = torch.device("cpu")
TINY = [
    "dataset=digits", "dataset.train_examples=200", "dataset.test_examples=100", "model=small_cnn",
    "model.width=4", "train.batch_size=50", "attack.steps=2", "attack.epsilon=0.03",
    "eval.steps=2", "recipe.optimizer=adam", "recipe.lr=0.01", "device=cpu",
]  # fmt: skip
PREACT = ["model=preact_resnet18", "model.width=2"]
OFTEN = ["sparsity.interval_unit=iterations", "sparsity.interval=2", "sparsity.late_interval=3"]
BIRD = ["sparsity=flying_bird", *OFTEN]
PLUS = [
    "sparsity=flying_bird_plus",
    "dataset.val_examples=60",
    "sparsity.probe_examples=50",
    *OFTEN,
]
FOUND = ["sparsity=robust_bird", "sparsity.window=2", "sparsity.threshold=1"]


@cache
def tiny(*overrides: str) -> Config:
    return compose([*TINY, "run.dir=unused", *overrides])


def tiny_in(folder: Path, *overrides: str) -> Config:
    config = tiny(*overrides)
    return replace(config, run=replace(config.run, dir=str(folder)))


@pytest.fixture(scope="module")
def few() -> Data:
    """The 200 digits of `tiny`, four batches, and 60 more."""
    return load_configured(tiny("dataset.val_examples=60").dataset, CPU)


class Watch:
    """Looks at weights and momenta behind each update, when all other controllers have acted."""

    def __init__(self, state: TrainState) -> None:
        assert state.sparsity is not None
        self.memory: Memory = {}
        self.sparsity, self.updates = state.sparsity, 0
        self.before = {name: mask.clone() for name, mask in state.sparsity.masks.items()}
        self.kept = state.sparsity.kept()

    def active(self, gradients: Gradients) -> Gradients:
        return gradients

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        self.updates += 1
        for name, weight in self.sparsity.thinned.weights.items():
            mask = self.sparsity.masks[name]
            momenta = [v for v in optimizer.state[weight].values() if v.shape == weight.shape]
            assert len(momenta) in (1, 2)  # SGD's or Adam's
            for tensor in (weight.detach(), *momenta):
                assert (tensor[mask == 0] == 0).all(), name
                assert (tensor[(mask > 0) & (self.before[name] == 0)] == 0).all(), name
            self.before[name] = mask.clone()

    def after_batch(self, done: int, stats: StepStats, skipped: Tensor | None) -> None:
        assert math.isfinite(float(stats.units))

    def columns(self) -> dict[str, Any]:
        return {}


def epoch(
    state: TrainState,
    data: Data,
    config: Config,
    *watching: Controller,
    stop_at: int = 1000,
) -> None:
    """Train an epoch, or as far as a batch."""
    paths = make_fast_paths(config.train, CPU)
    method = make_methods(config, CPU, paths=paths)(state.epoch)
    train_epoch(
        state, data.train, method, make_plan(config), see=paths.view, tick=lambda: None,
        show=lambda means: None, stopped=lambda: state.batch == stop_at,
        controllers=[*state.controllers, *watching],
    )  # fmt: skip
    if state.batch != stop_at:
        state.end_epoch()


WAYS = {
    "trades": [],
    "sgd": ["recipe.optimizer=sgd", "recipe.lr=0.05"],
    "mart": ["defense=mart", "bt=gaussian"],
    "pgd": ["defense=pgd", "bt=early_exit"],
    "pool": ["bt.pool=2"],
    "free": ["defense=pgd", "rival=free", "rival.replays=3", "train.epochs=2"],
    "mma": ["defense=pgd", "rival=mma", "attack.steps=2"],
    "gradalign": ["defense=pgd", "rival=gradalign"],
    "fast": ["rival=fast"],
    "augmix": ["defense=augmix", "recipe.optimizer=sgd"],
    "bf16": ["train.precision=bf16", *PREACT],
    "channels_last": ["train.channels_last=true", *PREACT, "model.width=8"],
    "ema": ["recipe.ema=0.9", *PREACT],
    "skip": ["train.on_nonfinite=skip"],
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_masked_is_zero_behind_every_update(way: str, few: Data) -> None:
    """Weights, momenta, and the average; layers keep their numbers, new weights begin at 0."""
    config = tiny("train.epochs=2", *BIRD, *WAYS[way])
    state = make_state(config, few, CPU)
    watch = Watch(state)
    bird = state.sparsity
    assert isinstance(bird, FlyingBird)
    first = {name: mask.clone() for name, mask in bird.masks.items()}
    epoch(state, few, config, watch)
    assert watch.updates == updates_per_epoch(config, len(few.train)) == bird.steps
    assert not all(torch.equal(first[name], bird.masks[name]) for name in first)
    assert bird.kept() == watch.kept
    if state.average is not None:
        for name, mask in bird.masks.items():
            weight = state.average.network.get_submodule(name).get_parameter("weight")
            assert (weight[mask == 0] == 0).all()
            assert weight.any()


@pytest.mark.parametrize("name", ["random", "igq", "magnitude", "snip", "grasp", "synflow"])
def test_static_masks_have_exactly_their_density_and_stay(name: str, few: Data) -> None:
    """The same of the same seed."""
    config = tiny(f"sparsity={name}", "sparsity.density=0.13", "defense=pgd")
    state, again = (make_state(config, few, CPU) for _ in range(2))
    assert state.sparsity is not None
    assert again.sparsity is not None
    assert sum(state.sparsity.kept().values()) == round(0.13 * state.sparsity.thinned.size)
    before = copy.deepcopy(state.sparsity.masks)
    assert all(torch.equal(before[n], mask) for n, mask in again.sparsity.masks.items())
    epoch(state, few, config, Watch(state))
    assert all(torch.equal(before[n], mask) for n, mask in state.sparsity.masks.items())


def test_clipping_counts_active_weights_alone_and_leaves_growth_its_gradients(few: Data) -> None:
    config = tiny(*BIRD, "recipe.optimizer=sgd", "recipe.lr=1", "recipe.momentum=0",
                  "recipe.nesterov=false", "recipe.weight_decay=0", "recipe.ema=0.9")  # fmt: skip
    state = make_state(config, few, CPU)
    assert state.sparsity is not None
    before = [weight.detach().clone() for weight in state.model.parameters()]
    loss = F.cross_entropy(state.model(to_unit(few.train.images)), few.train.labels)
    descend(state.optimizer, loss, 0.01, state.controllers)
    for name, weight in state.sparsity.thinned.weights.items():
        assert weight.grad is not None
        assert bool(weight.grad[state.sparsity.masks[name] == 0].any())
    for controller in state.controllers:
        controller.after_update(state.optimizer)
    after = [weight.detach() for weight in state.model.parameters()]
    moved = [(a - b).flatten() for a, b in zip(before, after, strict=True)]
    assert float(torch.cat(moved).norm()) == pytest.approx(0.01, rel=1e-4)


def test_excluded_layers_stay_dense_and_do_not_count(few: Data) -> None:
    config = tiny("sparsity=uniform", "sparsity.exclude=[conv1,fc*]")
    state = make_state(config, few, CPU)
    assert state.sparsity is not None
    weight = state.model.get_submodule("conv2").get_parameter("weight")
    assert state.sparsity.kept() == {"conv2": round(0.2 * weight.numel())}
    assert int((weight != 0).sum()) == round(0.2 * weight.numel())
    macs = {"conv1": 64 * 16, "conv2": 512 * 4, "fc1": 3200, "fc2": 1000}
    left = sum(macs.values()) - 0.8 * macs["conv2"]
    share = float(state.sparsity.memory["macs_share"])
    assert share == pytest.approx(left / sum(macs.values()), rel=1e-3)


@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_growth_finds_weights_that_were_never_active(growth: str, few: Data) -> None:
    config = tiny(*BIRD, f"sparsity.growth={growth}")
    state = make_state(config, few, CPU)
    assert state.sparsity is not None
    assert state.sparsity.columns()["fired_share"] == pytest.approx(0.2, abs=1e-4)
    epoch(state, few, config)
    columns = state.sparsity.columns()
    assert columns["mask_updates"] == 2
    assert 0.25 < columns["fired_share"] < 0.55
    assert columns["density"] == pytest.approx(0.2, abs=1e-4)


@pytest.mark.parametrize("prunes", [False, True])
def test_flying_bird_plus_is_flying_bird_until_its_switches(prunes: bool, few: Data) -> None:
    """Masks change behind updates 2, 4 and 7 of 8; only the last is in the second half."""
    fixed = ["sparsity.first_drop_rate=0.5", "sparsity.last_drop_rate=0.5", "train.epochs=2"]
    configs = [tiny(*BIRD, "dataset.val_examples=60", *fixed), tiny(*PLUS, *fixed)]
    plain, plus = (make_state(config, few, CPU) for config in configs)
    bird = plus.sparsity
    assert isinstance(bird, FlyingBirdPlus)
    for loss in (5, 4, 3, 2, 1):
        bird.heard(-loss if prunes else loss, loss)
    for stop_at in (1000, 3):
        for state, config in zip((plain, plus), configs, strict=True):
            epoch(state, few, config, stop_at=stop_at)
        pairs = zip(plain.model.parameters(), plus.model.parameters(), strict=True)
        same = all(torch.equal(one, other) for one, other in pairs)
        assert same == (stop_at == 1000 or not prunes)
    assert plain.sparsity is not None
    for name, kept in plain.sparsity.kept().items():
        left = kept - math.ceil(0.4 * 0.5 * kept) if prunes else kept
        assert bird.kept()[name] == left


def test_flying_bird_plus_hears_the_last_epochs_and_counts_what_that_costs(tmp_path: Path) -> None:
    settings = [*PLUS, "sparsity.switch_epochs=2", "eval.every_epochs=6"]
    summary = train(tiny_in(tmp_path, "train.epochs=6", *settings))
    lines = read(tmp_path)
    assert [line["epoch"] for line in lines if "robust_gap" in line] == [1, 2, 3, 4, 5, 6]
    for line in lines[:3]:
        assert (line["prune_more"], line["grow_more"]) == (False, False)
    saved = checkpoint.load(tmp_path / "checkpoints" / "last.pt")["state"]["sparsity"]["memory"]
    assert saved["gaps"].tolist() == [line["robust_gap"] for line in lines[-3:]]
    assert saved["losses"].tolist() == [line["val_loss"] for line in lines[-3:]]
    heard = (6 * 50 + 5 * 60) * (2 * 2 + 2)  # the last epoch's held-out part is scored anyway
    assert float(saved["extra_units"]) == heard
    unit = lines[0]["flops"] / (200 * lines[0]["units_per_example"])
    executed = sum(line["flops"] for line in lines) + heard * unit
    assert summary["flops_executed"] == pytest.approx(executed)
    shares = [line["macs_share"] for line in lines]
    low, high = (
        sum(line["flops_counted"] for line in lines) + bound * heard * unit
        for bound in (min(shares), max(shares))
    )
    assert low * 0.999 <= summary["flops_counted"] <= high * 1.001


def test_flying_bird_plus_reads_the_running_accuracy_where_all_get_the_whole_attack(
    tmp_path: Path,
) -> None:
    settings = [s for s in PLUS if "probe" not in s] + ["sparsity.switch_epochs=1", "defense=pgd"]
    train(tiny_in(tmp_path, "train.epochs=2", "bt=uniform", *settings))
    lines = read(tmp_path)
    for line in lines:
        gap = line["robust_acc_train"] - line["val_robust_acc"]
        assert line["robust_gap"] == pytest.approx(gap)
    saved = checkpoint.load(tmp_path / "checkpoints" / "last.pt")["state"]["sparsity"]["memory"]
    assert float(saved["extra_units"]) == 0


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_counted_work_is_units_times_the_share_of_multiply_adds(tmp_path: Path) -> None:
    summary = train(tiny_in(tmp_path, "sparsity=igq", "train.epochs=2", "dataset.val_examples=50"))
    lines = read(tmp_path)
    for line in (*lines, summary):
        assert line["density"] == pytest.approx(0.2, abs=1e-4)
        assert line["flops_counted"] == pytest.approx(line["flops"] * line["macs_share"])
        counted = line["speedup_flops"] / line["macs_share"]
        assert line["speedup_counted"] == pytest.approx(counted)
    assert summary["flops_executed"] == summary["flops"]
    config, network = load_run(tmp_path)
    zeros = sum(int((network.get_submodule(n).get_parameter("weight") == 0).sum())
                for n in ("conv1", "conv2", "fc1", "fc2"))  # fmt: skip
    size = 64 + 512 + 3200 + 1000
    assert zeros == size - round(0.2 * size)
    assert config.sparsity.name.name == "igq"


def test_the_report_has_counted_work_where_a_run_is_sparse(tmp_path: Path) -> None:
    more = ["train.epochs=1", "dataset.val_examples=50", "eval.train_examples=80"]
    dense = train(tiny_in(tmp_path / "dense", *more))
    assert "density" not in compare([tmp_path / "dense"])
    sparse = train(tiny_in(tmp_path / "sparse", "sparsity=igq", *more))
    table, notes = compare([tmp_path / "dense", tmp_path / "sparse"]).split("\n\n")
    head, _, *rows = table.splitlines()
    shared, *_, sentence = notes.splitlines()
    columns = [cell.strip() for cell in head.split("|")]
    cells = [dict(zip(columns, map(str.strip, row.split("|")), strict=True)) for row in rows]
    for summary, cell in zip((dense, sparse), cells, strict=True):
        gap = summary["train_robust_acc"] - summary["robust_acc"]
        assert float(cell["train − test"]) == pytest.approx(gap, abs=0.01)
        fall = summary["best_robust_acc"] - summary["robust_acc"]
        assert float(cell["best − final"]) == pytest.approx(fall, abs=0.01)
        assert float(cell["density"]) == pytest.approx(summary.get("density", 1), abs=1e-3)
        counted = summary.get("flops_counted", summary["flops"])
        assert float(cell["TFLOP counted"]) == pytest.approx(counted / 1e12, rel=0.01)
        work = f"{summary['flops'] / 1e12:.3g}"
        assert f"; TFLOP {work};" in shared
        assert f"; TFLOP executed {work}." in shared
    assert "do not speed up dense kernels" in sentence


class Tied(nn.Module):
    """One linear layer used twice, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.once, self.out = nn.Linear(64, 64), nn.Linear(64, 10)
        self.again = nn.Linear(64, 64)
        self.again.weight = self.once.weight
        self.fixed = nn.Linear(64, 64).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fixed(x.flatten(1)).relu()
        logits: Tensor = self.out(self.again(self.once(hidden).relu()).relu())
        return logits


def by_value(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Score weights by their value, whatever their sign."""
    assert len(images) == len(labels) == 100
    return {name: m.weight for name, m in network.named_modules() if isinstance(m, nn.Linear)}


def test_own_scores_of_an_own_network(few: Data) -> None:
    """A weight that two layers share counts once and costs twice; a frozen one is not masked."""
    settings = {"sparsity.factory": own.give(Scores(by_value)), "model.factory": own.give(Tied)}
    words = ["sparsity=own", "sparsity.examples=100", "model=own", "model.width=null"]
    config = compose([*(w for w in TINY if not w.startswith("model")), "run.dir=unused",
                      *words[:3], *(f"{k}={v}" for k, v in settings.items())])  # fmt: skip
    state = make_state(config, few, CPU)
    assert state.sparsity is not None
    size = 64 * 64 + 640
    assert sum(state.sparsity.kept().values()) == round(0.2 * size)
    assert set(state.sparsity.masks) == {"once", "out"}
    weights = state.sparsity.thinned.weights
    lowest = min(
        float(weights[n].detach()[mask > 0].min()) for n, mask in state.sparsity.masks.items()
    )
    assert lowest > 0
    kept = state.sparsity.kept()
    left = (2 * kept["once"] + kept["out"] + 64 * 64) / (3 * 64 * 64 + 640)
    assert float(state.sparsity.memory["macs_share"]) == pytest.approx(left)


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        (
            lambda network, images, labels: {},
            r"no scores of the shape \(4, 1, 4, 4\) for conv1",
        ),
        (lambda network, images, labels: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_own_scores_that_are_none_are_named(
    scores: Callable[..., Any], sentence: str, few: Data
) -> None:
    config = tiny("sparsity=own", f"sparsity.factory='{own.give(Scores(scores))}'")
    with pytest.raises(UserError, match=sentence):
        make_state(config, few, CPU)


class Scores:
    """Something that is called in place of a factory's result."""

    def __init__(self, scores: Callable[..., Any]) -> None:
        self._scores = scores

    def state_dict(self) -> None:
        """Make this a thing that is handed out as it is."""

    def __call__(self, *given: Any) -> Any:
        return self._scores(*given)


def test_without_sparsity_nothing_is_said_of_it(tmp_path: Path) -> None:
    summary = train(tiny_in(tmp_path, "train.epochs=1"))
    new = {"density", "macs_share", "flops_counted", "flops_executed", "speedup_counted"}
    assert not new & (summary.keys() | read(tmp_path)[0].keys())
    assert "sparsity" not in checkpoint.load(tmp_path / "checkpoints" / "last.pt")["state"]


# ---------------------------------------------------------------------------- skipped and resumed


def test_a_skipped_step_changes_no_mask(few: Data) -> None:
    """The second update of the weights is one behind which masks change, and goes wrong."""
    config = tiny(*BIRD, "train.on_nonfinite=skip", "sparsity.late_interval=2", "recipe.ema=0.5")
    state = make_state(config, few, CPU)
    bird = state.sparsity
    assert isinstance(bird, FlyingBird)
    epoch(state, few, config, stop_at=1)
    before = {name: tensor.clone() for name, tensor in bird.memory.items()}
    weight = state.model.get_submodule("fc2").get_parameter("weight")
    hook = weight.register_hook(lambda grad: grad * math.nan)
    epoch(state, few, config, stop_at=2)
    hook.remove()
    for name, tensor in bird.memory.items():
        assert torch.equal(tensor, before[name]), name
    assert torch.isfinite(weight).all()
    epoch(state, few, config, Watch(state))
    assert int(bird.memory["mask_updates"]) == 1
    assert float(bird.memory["counted_units"]) > float(before["counted_units"])


def reload(state: TrainState, config: Config, data: Data, path: Path) -> TrainState:
    checkpoint.save(path, {"state": state.state_dict()})
    fresh = make_state(config, data, CPU)
    fresh.load_state_dict(checkpoint.load(path)["state"])
    return fresh


@pytest.mark.parametrize("settings", [BIRD, [*BIRD, "sparsity.growth=random"], PLUS])
def test_resumes_bit_for_bit(settings: list[str], few: Data, tmp_path: Path) -> None:
    more = ["recipe.ema=0.95", "bt.pool=2"] if settings == BIRD else []
    config = tiny("train.epochs=3", *settings, *more)
    whole, cut = (make_state(config, few, CPU) for _ in range(2))
    epoch(whole, few, config)
    epoch(whole, few, config)
    epoch(cut, few, config)
    epoch(cut, few, config, stop_at=1)
    resumed = reload(cut, config, few, tmp_path / "cut.pt")
    epoch(resumed, few, config)
    ours, theirs = ({**s.model.state_dict(), **s.evaluated.state_dict()} for s in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert resumed.sparsity is not None
    assert whole.sparsity is not None
    for name, tensor in whole.sparsity.memory.items():
        assert torch.equal(resumed.sparsity.memory[name].nan_to_num(), tensor.nan_to_num()), name


Damage = Callable[[dict[str, Any]], None]


def longer(memory: dict[str, Any]) -> None:
    memory["mask.fc2"] = torch.ones(10, 101, dtype=torch.bool)


def halves(memory: dict[str, Any]) -> None:
    memory["mask.fc2"] = torch.full((10, 100), 0.5)


def twos(memory: dict[str, Any]) -> None:
    memory["mask.fc2"] = torch.full((10, 100), 2, dtype=torch.uint8).view(torch.bool)


def none(memory: dict[str, Any]) -> None:
    del memory["mask.fc2"]


@pytest.mark.parametrize("damage", [longer, halves, twos, none])
def test_masks_of_another_kind_are_refused(damage: Damage, few: Data) -> None:
    config = tiny(*BIRD)
    saved = make_state(config, few, CPU).state_dict()
    damage(saved["sparsity"]["memory"])
    with pytest.raises(UserError, match="state of a run like this"):
        make_state(config, few, CPU).load_state_dict(saved)


# ------------------------------------------------------------------------------------ Robust Bird


@pytest.mark.parametrize("search", ["plain", "fgsm", "pgd"])
def test_robust_bird_searches_prunes_and_trains(search: str, tmp_path: Path) -> None:
    config = tiny_in(tmp_path, *FOUND, f"sparsity.search={search}", "train.epochs=2", "defense=pgd")
    summary = train(config)
    assert summary["search_epochs"] == 2
    assert summary["epochs"] == 2
    size = 64 + 512 + 3200 + 1000
    assert summary["density"] == round(0.2 * size) / size
    unit = 2 * (64 * 16 + 512 * 4 + 3200 + 1000)
    spent = 2 * 200 * {"plain": 3, "fgsm": 2 + 3, "pgd": 2 * 2 + 3}[search] * unit
    assert summary["flops_executed"] == pytest.approx(summary["flops"] + spent)
    counted = summary["flops"] * summary["macs_share"] + spent
    assert summary["flops_counted"] == pytest.approx(counted)
    assert summary["train_seconds"] > sum(line["train_seconds"] for line in read(tmp_path))
    text = (tmp_path / "train.log").read_text()
    assert "search, epoch 2" in text
    assert "ticket is drawn after 2 epochs" in text


@pytest.mark.parametrize("rewind", ["none", "init", "epoch", "later"])
def test_robust_bird_keeps_the_largest_weights_and_rewinds(
    rewind: str, few: Data, caplog: pytest.LogCaptureFixture
) -> None:
    later = rewind == "later"  # than the ticket is drawn
    settings = [
        *FOUND,
        f"sparsity.rewind={'epoch' if later else rewind}",
        f"sparsity.rewind_epoch={3 if later else 1}",
        "sparsity.search_epochs=3",
    ]
    state = make_state(tiny(*settings), few, CPU)
    bird = state.sparsity
    assert isinstance(bird, RobustBird)
    seen = []
    for number in range(3):
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.copy_(torch.randn_like(parameter) if number else parameter)
        seen.append({k: v.clone() for k, v in state.model.state_dict().items()})
        if number:
            bird.look()
    assert not bird.searching
    largest = torch.cat([seen[2][f"{name}.weight"].abs().flatten() for name in bird.masks])
    limit = largest.topk(round(0.2 * len(largest))).values.min()
    began = seen[{"none": 2, "init": 0, "epoch": 1, "later": 2}[rewind]]
    assert ("there after 2 epochs, before epoch 3, whose weights" in caplog.text) == later
    for name, mask in bird.masks.items():
        assert torch.equal(mask > 0, seen[2][f"{name}.weight"].abs() >= limit)
        weight = state.model.get_submodule(name).get_parameter("weight")
        assert torch.equal(weight, began[f"{name}.weight"] * mask)


def test_the_ticket_needs_a_full_window_within_the_threshold(few: Data) -> None:
    state = make_state(tiny("sparsity=robust_bird", "sparsity.window=3"), few, CPU)
    bird = state.sparsity
    assert isinstance(bird, RobustBird)
    weight = state.model.get_submodule("conv2").get_parameter("weight")
    apart = []
    for _ in range(2):
        apart.append(bird.look())
    with torch.no_grad():
        weight.copy_(weight.flip(0))  # most of the largest are elsewhere now
    for _ in range(3):
        assert bird.searching
        apart.append(bird.look())
    assert apart[:2] == [None, None]
    assert apart[2] == apart[3]
    assert apart[3] is not None
    assert apart[3] > 0.08
    assert apart[4] == 0
    assert not bird.searching


def test_a_search_is_taken_up_again_and_ends_without_a_ticket(tmp_path: Path) -> None:
    settings = ["sparsity=robust_bird", "sparsity.search_epochs=3", "sparsity.threshold=0",
                "sparsity.rewind=epoch", "train.epochs=2", "defense=pgd", "bt=uniform"]  # fmt: skip
    whole = train(tiny_in(tmp_path / "whole", *settings))
    cut = tiny_in(tmp_path / "cut", *settings, "train.max_seconds=1e-6")
    train(cut)
    spent = 0.0
    for _ in range(2):
        state = checkpoint.load(tmp_path / "cut" / "checkpoints" / "last.pt")["state"]
        assert state["sparsity"]["search"]["searching"]
        assert state["epoch"] == 0
        spent = state["train_seconds"]
        train(tiny_in(tmp_path / "cut", *settings, f"train.max_seconds={spent + 1e-6}"))
    ended = train(tiny_in(tmp_path / "cut", *settings))
    times = ("train_seconds", "speedup_measured")
    assert {k: v for k, v in ended.items() if k not in times} == {
        k: v for k, v in whole.items() if k not in times
    }
    assert "without a ticket after 3 epochs" in (tmp_path / "whole" / "train.log").read_text()


# --------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["sparsity=igq", "sparsity.density=0"], r"sparsity\.density must be in \(0, 1\], not 0"),
        (["sparsity=igq", "sparsity.density=1.5"], r"sparsity\.density must be in \(0, 1\]"),
        (["sparsity=igq", "sparsity.density=nan"], r"sparsity\.density must be in \(0, 1\]"),
        (["sparsity=igq", "sparsity.density=0.0005"], "keeps 2 of 4776 weights, fewer than"),
        (["sparsity=snip", "sparsity.exclude=[fc9]"], r"fc9 is no convolution or linear layer"),
        (["sparsity=snip", "sparsity.exclude=['*']"], "no layer that a mask could thin out"),
        (["sparsity=flying_bird_plus"], r"needs held-out images; set dataset\.val_examples"),
        (
            [*BIRD, "sparsity.interval=999", "sparsity.late_interval=999"],
            r"sparsity\.interval=999 \(iterations\) is longer than the run",
        ),
        (["sparsity=flying_bird", "sparsity.interval=-1"], r"sparsity\.interval must be finite"),
        ([*PLUS, *WAYS["augmix"]], "sparsity=flying_bird_plus does not go with defense=augmix"),
        (
            [*FOUND, "sparsity.search=pgd", *WAYS["augmix"]],
            r"sparsity\.search=pgd does not go with defense=augmix",
        ),
        (
            [
                *FOUND,
                "sparsity.rewind=epoch",
                "sparsity.rewind_epoch=9",
                "sparsity.search_epochs=2",
            ],
            r"rewind_epoch=9 is behind the search, which takes at most sparsity\.search_epochs=2\.",
        ),
        (["sparsity=random", "sparsity.interval=5"], r"sparsity\.interval is no setting with"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(
    settings: list[str], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        train(tiny_in(tmp_path / "run", *settings))
    assert not (tmp_path / "run").exists()


def test_another_sparsity_is_another_run(tmp_path: Path) -> None:
    train(tiny_in(tmp_path, "train.epochs=1", "sparsity=igq"))
    with pytest.raises(UserError, match=r"belongs to a run with sparsity\.density=0\.2, not 0\.3"):
        train(tiny_in(tmp_path, "train.epochs=1", "sparsity=igq", "sparsity.density=0.3"))
    with pytest.raises(UserError, match=r"a run with sparsity=igq, not none"):
        train(tiny_in(tmp_path, "train.epochs=1"))


def test_weights_stay_where_they_lie(few: Data) -> None:
    """Recorded graphs and frozen copies rely on it."""
    state = make_state(tiny(*BIRD), few, CPU)
    places = [p.data_ptr() for p in state.model.parameters()]
    epoch(state, few, tiny(*BIRD))
    assert [p.data_ptr() for p in state.model.parameters()] == places
