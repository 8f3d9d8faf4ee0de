"""Runs on real digits: what they leave, repeat, resume, and refuse."""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from btrain.attacks.fast_paths import make_fast_paths
from btrain.build import find_device, make_model
from btrain.data import Batch, Data, Split
from btrain.data.splits import load_configured
from btrain.defenses import DEFENSES
from btrain.errors import UserError
from btrain.evaluation import evaluate
from btrain.methods.make import make_methods
from btrain.methods.statistics import EXAMPLES
from btrain.precision import to_channels_last
from btrain.runs import checkpoint
from btrain.runs.folder import RunFolder
from btrain.runs.provenance import git_commit
from btrain.settings import AllocatorName, Config, DefenseName, RivalName
from btrain.training import train
from btrain.training.epochs import train_epoch
from btrain.training.lines import epoch_line, headline
from btrain.training.schedule import cosine, cyclic, step_decay
from btrain.training.scores import part_of
from btrain.training.setup import make_optimizer, make_state
from btrain.training.state import TrainState
from btrain.training.update import train_batch
from composing import compose
from steps import epoch_of

CPU = torch.device("cpu")
TINY = [
    "dataset=digits",
    "model=small_cnn",
    "model.width=4",
    "dataset.train_examples=300",
    "dataset.test_examples=100",
    "train.batch_size=64",
    "attack.steps=3",
    "eval.steps=2",
    "device=cpu",
]


def tiny(folder: Path, *overrides: str) -> Config:
    return compose([*TINY, f"run.dir={folder}", *overrides])


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    times = ("train_seconds", "speedup_measured")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.load(folder / "checkpoints" / "last.pt")["state"]
    return dict(state["model"])


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_two_runs_with_one_seed_are_equal_and_with_two_are_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tiny(tmp_path / name, "train.epochs=2", f"seed={seed}"))
    a, b, c = (untimed(metrics(tmp_path / name)) for name in "abc")
    assert a == b
    assert a != c
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_equal_budgets_are_plain_trades_over_a_whole_run(tmp_path: Path) -> None:
    equal = ["bt.n_b=3", "bt.n_r=3", "bt.n_o=3", "train.epochs=2"]
    train(tiny(tmp_path / "equal", "bt=bullettrain", *equal))
    train(tiny(tmp_path / "plain", "bt=uniform", "train.epochs=2"))
    assert same(weights(tmp_path / "equal"), weights(tmp_path / "plain"))


def test_the_log_adds_up(tmp_path: Path) -> None:
    summary = train(tiny(tmp_path, "train.epochs=3", "bt.n_b=6", "bt.n_r=2"))
    lines = metrics(tmp_path)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["f_b"] + line["f_r"] + line["f_o"] == pytest.approx(1)
        assert line["attack_steps_mean"] == pytest.approx(6 * line["f_b"] + 2 * line["f_r"])
        # Eq. 7 with the plain defense's N = attack.steps.
        assert line["theoretical_speedup"] == pytest.approx(4 / (line["attack_steps_mean"] + 1))
        assert 0 <= line["robust_fraction"] <= 0.8
    assert summary["train_seconds"] == pytest.approx(sum(line["train_seconds"] for line in lines))
    # Multiply-adds of small_cnn at width 4: two 4×4 convolutions and two linear layers.
    macs = 4 * 16 * 4 * 4 + 8 * 4 * 16 * 2 * 2 + 32 * 100 + 100 * 10
    spent = [line["units_per_example"] * 300 * 2 * macs for line in lines]
    assert [line["flops"] for line in lines] == pytest.approx(spent)
    assert summary["flops"] == pytest.approx(sum(spent))
    assert summary["f_b"] == pytest.approx(sum(line["f_b"] for line in lines) / 3)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["parameters"] == sum(value.numel() for value in weights(tmp_path).values())


def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny(tmp_path / "whole", "train.epochs=4"))

    import btrain.training.run as run

    epochs = 0

    def dies_in_the_third(*args: Any, **kwargs: Any) -> Any:
        nonlocal epochs
        epochs += 1
        if epochs == 3:
            raise KeyboardInterrupt
        return train_epoch(*args, **kwargs)

    monkeypatch.setattr(run, "train_epoch", dies_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(tmp_path / "cut", "train.epochs=4"))
    monkeypatch.undo()
    assert [line["epoch"] for line in metrics(tmp_path / "cut")] == [1, 2]
    train(tiny(tmp_path / "cut", "train.epochs=4"))
    assert untimed(metrics(tmp_path / "cut")) == untimed(metrics(tmp_path / "whole"))
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_a_state_saved_within_an_epoch_continues_exactly(tmp_path: Path, digits: Data) -> None:
    config = tiny(tmp_path, "recipe.crop_padding=1")

    def stop_after(batches: int) -> Any:
        def tick() -> None:
            nonlocal batches
            batches -= 1
            if batches == 0:
                raise InterruptedError

        return tick

    whole, cut, resumed = (make_state(config, digits, CPU) for _ in range(3))
    expected = epoch_of(config, whole, digits.train)
    with pytest.raises(InterruptedError):
        epoch_of(config, cut, digits.train, tick=stop_after(7))
    checkpoint.save(tmp_path / "cut.pt", {"state": cut.state_dict()})
    resumed.load_state_dict(checkpoint.load(tmp_path / "cut.pt")["state"])
    assert resumed.batch == 7
    got = epoch_of(config, resumed, digits.train)
    assert expected is not None
    assert got is not None
    assert untimed([got]) == untimed([expected])
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    assert all(p.grad is None for p in whole.model.parameters())  # not held while others attack


def test_a_time_limit_ends_a_run_cleanly_and_more_time_continues_it(tmp_path: Path) -> None:
    summary = train(tiny(tmp_path, "train.epochs=200", "train.max_seconds=0.5"))
    assert 0.5 <= summary["train_seconds"] < 5
    assert summary["epochs"] < 200
    assert (tmp_path / "summary.json").is_file()
    saved = checkpoint.load(tmp_path / "checkpoints" / "last.pt")["state"]
    assert saved["epoch"] == summary["epochs"]
    longer = train(tiny(tmp_path, "train.epochs=200", "train.max_seconds=1"))
    assert longer["train_seconds"] >= 1
    epochs = [line["epoch"] for line in metrics(tmp_path)]
    assert epochs == list(range(1, len(epochs) + 1))


def test_time_that_is_up_before_the_first_batch_leaves_an_untrained_network(tmp_path: Path) -> None:
    summary = train(tiny(tmp_path, "train.epochs=1", "train.max_seconds=1e-9"))
    assert summary["epochs"] == 0
    assert summary["theoretical_speedup"] is summary["attack_steps_mean"] is None
    log = (tmp_path / "train.log").read_text()
    assert "boundary/robust/outlier –/–/–; 0.0 s" in log  # and no speedup
    assert train(tiny(tmp_path, "train.epochs=1"))["epochs"] == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path,
) -> None:
    # The decay of the second epoch is a "decay" by 10^30.
    blow_up = [
        "recipe.epochs=2",
        "recipe.milestones=[1]",
        "recipe.lr_factors=[1e30]",
        "train.epochs=2",
    ]
    with pytest.raises(UserError, match=r"epoch 2, step [12]\b.*recipe\.lr"):
        train(tiny(tmp_path, *blow_up))
    assert [line["epoch"] for line in metrics(tmp_path)] == [1]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["state"]["epoch"] == 1
    assert not (tmp_path / "summary.json").exists()


def test_a_log_line_tells_what_is_known_and_no_more() -> None:
    numbers = {"epoch": 1, "loss": 0.5, "clean_acc_train": None, "robust_acc_train": 97.0,
               "train_seconds": 2.0, "f_b": 0.25, "f_r": 0.5, "f_o": 0.25}  # fmt: skip
    chosen, alike = (compose([*TINY, f"bt={bt}"]) for bt in ("bullettrain", "uniform"))
    line = "epoch 1: loss 0.5000, training images 97.00 % under the training's attack; "
    assert epoch_line(alike, numbers) == line + "2.0 s"
    assert epoch_line(chosen, numbers) == line + "boundary/robust/outlier 0.25/0.50/0.25; 2.0 s"
    known = numbers | {"clean_acc_train": 99.0, "robust_acc_train": None}
    assert epoch_line(alike, known) == "epoch 1: loss 0.5000, training images 99.00 % clean; 2.0 s"
    summary = numbers | {"clean_acc": 90.0, "robust_acc": 80.0, "eval_steps": 20}
    assert headline(alike, summary) == "clean 90.00 %, PGD-20 80.00 %; 2.0 s of training"


def test_warm_up_epochs_give_every_example_the_full_budget(tmp_path: Path) -> None:
    train(tiny(tmp_path, "train.epochs=4", "bt.warmup_epochs=2"))
    assert [line["attack_steps_mean"] == 3 for line in metrics(tmp_path)] == [
        True,
        True,
        False,
        False,
    ]


def test_epsilon_warm_up_lengthens_the_attack_evenly(digits: Data, tmp_path: Path) -> None:
    config = tiny(tmp_path, "defense=pgd", "bt=uniform", "attack.epsilon_warmup_epochs=2")
    state = make_state(config, digits, CPU)
    x, labels = digits.train.images[:16] / 255, digits.train.labels[:16]
    seen: list[torch.Tensor] = []
    state.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    method_of = make_methods(config, CPU, paths=make_fast_paths(config.train, CPU))
    lengths = []
    for epoch in range(4):
        seen.clear()
        batch = Batch(x, labels, torch.arange(16))
        train_batch(
            state.model, state.optimizer, method_of(epoch), batch, state.memory, state.generator
        )
        lengths.append(max(float((inputs - x).abs().max()) for inputs in seen))
    epsilon = config.attack.epsilon
    assert lengths == pytest.approx([epsilon / 3, 2 * epsilon / 3, epsilon, epsilon], rel=1e-4)


def test_weights_ruined_by_the_last_update_are_not_saved(tmp_path: Path) -> None:
    # The learning rate jumps at the very last step, whose loss was taken before.
    config = tiny(
        tmp_path, "train.epochs=2", "recipe.epochs=10", "recipe.milestones=[9]",
        "recipe.lr_factors=[1e30]",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"ruined after epoch 2, step 5\b.*recipe\.lr"):
        train(config)
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["state"]["epoch"] == 1
    assert not (tmp_path / "summary.json").exists()
    assert "ruined" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize(
    ("stops", "more"),
    [(True, []), (False, []), (True, ["bt=uniform", "recipe.repair_steps=1"])],
    ids=["stops", "goes_on", "nothing_to_repair"],
)
def test_a_collapse_is_logged_and_ends_the_run_if_asked(
    tmp_path: Path, stops: bool, more: list[str]
) -> None:
    # A learning rate 100 times larger in the last epoch but one ruins what was learnt.
    config = tiny(
        tmp_path, "train.epochs=14", "recipe.epochs=14", "recipe.milestones=[12]",
        "recipe.lr_factors=[100]", "attack.epsilon=0.05", "recipe.lr=0.1",
        f"recipe.early_stop_on_collapse={stops}", *more,
    )  # fmt: skip
    summary = train(config)
    watched = [line["pgd_acc_train_batch"] for line in metrics(tmp_path)]
    assert watched[12] < watched[11] - 20 > 30
    assert summary["epochs"] == (12 if stops else 14)
    assert len(watched) == (13 if stops else 14)
    for key in ("train_seconds", "flops"):  # an epoch that is undone was paid for
        assert summary[key] == pytest.approx(sum(line[key] for line in metrics(tmp_path)))
    assert summary["collapse"] == ("epoch 13 of 14" if stops else None)
    last = (tmp_path / "train.log").read_text().splitlines()[-1]
    assert ("ended by a collapse in epoch 13 of 14; clean" in last) is stops
    if stops:
        saved = checkpoint.load(tmp_path / "checkpoints" / "last.pt")["state"]
        assert saved["total_sums"][EXAMPLES] == 13 * 300
        assert summary["clean_acc"] > 60  # the weights of the epoch before
        assert train(config) == summary  # over for good


@pytest.mark.parametrize(("stops", "images"), [(True, 128), (False, 16)])
def test_a_collapse_is_looked_for_on_enough_images(
    tmp_path: Path, stops: bool, images: int
) -> None:
    wanted = ["train.epochs=1", "train.batch_size=16", "dataset.train_examples=160"]
    config = tiny(
        tmp_path, *wanted, f"recipe.early_stop_on_collapse={stops}", "attack.epsilon=0.03"
    )
    train(config)
    data = load_configured(config.dataset, CPU)
    network = make_model(config.model, len(data.classes), data.shape)
    network.load_state_dict(weights(tmp_path))
    found = evaluate(
        network, part_of(data.train, config.seed, images), epsilon=config.eval.epsilon,
        step_size=config.eval.step_size, steps=config.eval.steps, batch_size=500, seed=config.seed,
    )  # fmt: skip
    assert metrics(tmp_path)[0]["pgd_acc_train_batch"] == found.robust


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("checkpoints/last.pt", "state"),
        ("config.yaml", ""),
        ("config.yaml", "{"),
        ("summary.json", '{"clean_acc": 1}'),
        ("summary.json", "["),
    ],
)
def test_a_damaged_run_folder_is_named_and_left_alone(
    tmp_path: Path, file: str, content: str
) -> None:
    train(tiny(tmp_path, "train.epochs=1"))
    if content == "state":
        (tmp_path / "summary.json").unlink()
        progress = {"epoch": 0, "train_seconds": 0.0, "collapsed": False}
        torch.save({"format": 2, "state": progress}, tmp_path / file)
    else:
        (tmp_path / file).write_text(content)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError):
        train(tiny(tmp_path, "train.epochs=1"))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("line", ["[1]", "{}", '{"epoch": "x"}', '{"epoch": 2, "loss"'])
def test_what_follows_a_damaged_line_of_metrics_is_dropped(tmp_path: Path, line: str) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(f'{{"epoch": 1}}\n{line}\n{{"epoch": 3}}\n')
    folder.keep_metrics(5)
    assert metrics(tmp_path) == [{"epoch": 1}]


def test_a_run_does_not_go_on_with_the_random_numbers_of_another_device(
    tmp_path: Path, digits: Data
) -> None:
    state = make_state(tiny(tmp_path), digits, CPU)
    with pytest.raises(UserError, match=r"device=cuda.*device=cpu"):
        state.load_state_dict(state.state_dict() | {"device": "cuda"})


def test_a_logger_that_cannot_start_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "not a key")
    with pytest.raises(UserError, match=r"logger=wandb .*logger\.mode=offline"):
        train(tiny(tmp_path / "run", "logger=wandb"))
    assert not (tmp_path / "run").exists()


def test_held_out_examples_choose_the_best_epoch(tmp_path: Path) -> None:
    summary = train(
        tiny(tmp_path, "train.epochs=5", "dataset.val_examples=100", "eval.every_epochs=2")
    )
    lines = metrics(tmp_path)
    scored = {line["epoch"]: line["val_robust_acc"] for line in lines if "val_robust_acc" in line}
    assert list(scored) == [2, 4, 5]  # every second epoch, and the last
    assert summary["best_val_acc"] == max(scored.values())
    assert scored[summary["best_epoch"]] == max(scored.values())
    assert {"clean_acc", "robust_acc", "best_clean_acc", "best_robust_acc"} <= summary.keys()
    best = checkpoint.load(tmp_path / "checkpoints" / "best.pt")["state"]
    assert best["epoch"] == summary["best_epoch"]
    assert same(best["model"], weights(tmp_path)) == (summary["best_epoch"] == 5)


def test_held_out_evaluation_does_not_change_the_training(tmp_path: Path) -> None:
    held_out = ["train.epochs=2", "dataset.val_examples=100"]
    train(tiny(tmp_path / "often", *held_out, "eval.every_epochs=1"))
    train(tiny(tmp_path / "once", *held_out, "eval.every_epochs=3"))
    assert same(weights(tmp_path / "often"), weights(tmp_path / "once"))


def test_the_last_batch_may_hold_one_example(tmp_path: Path) -> None:
    config = ["model=preact_resnet18", "model.width=2", "dataset.train_examples=65"]
    assert train(tiny(tmp_path, *config, "train.epochs=1"))["epochs"] == 1


ALLOCATORS = [f"bt={name.name}" for name in AllocatorName if name is not AllocatorName.own]
RIVALS = ["rival=fast", "rival=nfgsm", "rival=yopo"]  # of every adversarial defense
CONTRACT = [
    *itertools.product(DEFENSES, ALLOCATORS + RIVALS),
    *itertools.product(["pgd", "mart"], ["rival=gradalign"]),
    *itertools.product(["pgd"], ["rival=free", "rival=mma"]),
    *itertools.product(["augmix"], ["bt=bullettrain", "bt=uniform", "bt=random"]),
]
FEWER_STEPS = {
    "bt=bullettrain": ["bt.n_r=1"],
    "bt=random": ["bt.n_r=1"],
    "bt=early_exit": ["bt.n_r=1"],
    "bt=oracle": ["bt.n_r=1", "bt.oracle_steps=2"],
}


def test_the_wide_resnets_are_one_network_but_for_their_size(tmp_path: Path) -> None:
    of_a_size = ["model.width=2", "model.depth=10"]
    ours, theirs = (
        tiny(tmp_path, f"model={name}", *of_a_size).model for name in ("wrn_34_10", "wrn_40_2")
    )
    assert replace(ours, name=theirs.name) == theirs


@pytest.mark.parametrize("name", ["wrn_34_10", "preact_resnet18", "small_cnn"])
@pytest.mark.parametrize(("defense", "choice"), CONTRACT)
def test_every_combination_keeps_the_contract(
    tmp_path: Path, name: str, defense: str, choice: str, digits: Data
) -> None:
    """Two steps, one of a short batch: finite, in the ball and the box, and resumed exactly."""
    size = ["model.depth=10"] if name.startswith("wrn") else []
    fewer = ["attack.steps=2", *FEWER_STEPS.get("" if defense == "augmix" else choice, [])]
    config = tiny(tmp_path, f"defense={defense}", *fewer, "train.batch_size=20", choice)
    config.model = tiny(tmp_path, f"model={name}", "model.width=2", *size).model
    few = Split(digits.train.images[:33], digits.train.labels[:33])

    def epoch(state: TrainState, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
        means = epoch_of(config, state, few, tick=tick)
        assert means is not None
        return untimed([means])[0]

    whole, cut, resumed = (make_state(config, digits, CPU) for _ in range(3))
    seen: list[torch.Tensor] = []
    handle = whole.model.register_forward_pre_hook(
        lambda model, args: seen.append(args[0].detach().clone()) if model.training else None
    )
    means = epoch(whole)
    handle.remove()
    assert means["f_b"] + means["f_r"] + means["f_o"] == pytest.approx(1)
    assert all(torch.isfinite(value).all() for value in whole.model.state_dict().values())
    check_images(seen, few, config)

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        epoch(cut, stop)
    checkpoint.save(tmp_path / "cut.pt", {"state": cut.state_dict()})
    resumed.load_state_dict(checkpoint.load(tmp_path / "cut.pt")["state"])
    assert resumed.batch == 1
    assert epoch(resumed) == means
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    assert same(resumed.memory, whole.memory)


def check_images(seen: list[torch.Tensor], split: Split, config: Config) -> None:
    """What the network was trained on lies in the box, and but for AugMix in the ε-ball."""
    images = split.images.float() / 255
    radius = config.attack.epsilon * (1.5 * 1.05 if config.rival.name is RivalName.mma else 1)
    if config.rival.name is RivalName.nfgsm:  # noise of 2·ε and a step of ε, by design
        radius *= 3
    for x in seen:
        # GradAlign's noise and what Free brings from the batch before leave the box.
        leaves = config.rival.name in (RivalName.gradalign, RivalName.free)
        slack = config.attack.epsilon if leaves else 0.0
        assert x.min() >= -slack - 1e-6
        assert x.max() <= 1 + slack + 1e-6
        if config.defense.name is not DefenseName.augmix:
            nearest = torch.cdist(x.flatten(1), images.flatten(1), p=float("inf")).amin(dim=1)
            assert nearest.max() <= radius + 1e-5


def test_bullettrain_takes_fewer_steps_at_equal_robustness(tmp_path: Path) -> None:
    """The demo's comparison in short: 1,442 real digits, two runs."""
    common = ["dataset=digits", "model=small_cnn", "train.epochs=8", "recipe.lr=0.1",
              "attack.epsilon=0.1", "device=cpu"]  # fmt: skip
    plain, ours = (
        train(compose([*common, f"bt={bt}", f"run.dir={tmp_path / bt}"]))
        for bt in ("uniform", "bullettrain")
    )
    assert ours["theoretical_speedup"] > 1.8
    assert ours["robust_acc"] > 60
    # 355 test images: one standard deviation of a difference is about 3 points.
    assert ours["robust_acc"] > plain["robust_acc"] - 6
    assert ours["clean_acc"] > plain["clean_acc"] - 6


@pytest.mark.parametrize(("epoch", "factor"), [(1, 1.0), (74, 1.0), (75, 0.1), (76, 0.1)])
def test_trades_learning_rate_falls_after_74_of_76_epochs(epoch: int, factor: float) -> None:
    steps = 391
    for step in ((epoch - 1) * steps, epoch * steps - 1):
        assert step_decay([74 / 76], [0.1])(step / (76 * steps)) == pytest.approx(factor)


def test_each_milestone_has_its_factor() -> None:
    schedule = step_decay([0.4, 0.6, 0.8], [0.3, 0.1, 0.03])
    assert [schedule(progress) for progress in (0, 0.4, 0.7, 0.8, 1)] == [1, 0.3, 0.1, 0.03, 0.03]


def test_cyclic_and_cosine_schedules() -> None:
    triangle = [cyclic(0.4)(progress) for progress in (0, 0.2, 0.4, 0.7, 1)]
    assert triangle == pytest.approx([0, 0.5, 1, 0.5, 0])
    wave = [cosine()(progress) for progress in (0, 1 / 3, 0.5, 1)]
    assert wave == pytest.approx([1, 0.75, 0.5, 0], abs=2e-5)


@pytest.mark.parametrize("device", ["cuda:99", "meta", "tpu", ""])
def test_a_device_that_does_not_exist_is_named(device: str) -> None:
    with pytest.raises(UserError, match=f"device={device}"):
        find_device(device)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("settings", "plain"),
    [
        (["recipe.optimizer=adam"], partial(torch.optim.Adam, weight_decay=0.01)),
        (["recipe.nesterov=false"], partial(torch.optim.SGD, momentum=0.9, weight_decay=0.01)),
        (
            ["recipe.nesterov=true"],
            partial(torch.optim.SGD, momentum=0.9, weight_decay=0.01, nesterov=True),
        ),
    ],
)
def test_the_optimizer_makes_torch_s_plain_updates(
    preact: nn.Module, settings: list[str], plain: Callable[..., Any], turned: bool
) -> None:
    recipe = compose(
        ["recipe.lr=0.05", "recipe.momentum=0.9", "recipe.weight_decay=0.01", *settings]
    ).recipe
    ours = to_channels_last(preact.double()) if turned else preact.double()
    theirs = copy.deepcopy(ours)
    optimizers = make_optimizer(recipe, ours), plain(theirs.parameters(), lr=0.05, foreach=False)
    for seed in range(3):
        for network, optimizer in zip((ours, theirs), optimizers, strict=True):
            images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).double()
            optimizer.zero_grad()
            network(images).square().sum().backward()
            optimizer.step()
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("logger", ["tensorboard", "wandb", "[wandb,tensorboard]"])
def test_other_loggers_write_beside_the_jsonl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: str
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    offline = ["logger.mode=offline"] if "wandb" in logger else []
    groups = ["logger.group=row-of-a-table", "logger.tags=[of-a-target]"]
    train(tiny(tmp_path, "train.epochs=1", f"logger={logger}", *offline, *groups))
    assert len(metrics(tmp_path)) == 1
    pattern = {"tensorboard": "tensorboard/events.*", "wandb": "wandb/offline-run-*/*.wandb"}
    for name in logger.strip("[]").split(","):
        (file,) = tmp_path.glob(pattern[name])
        ends = time.monotonic() + 20  # wandb writes in a process of its own
        while b"robust_acc" not in (content := file.read_bytes()) and time.monotonic() < ends:
            time.sleep(0.05)
        assert b"robust_acc" in content
        if name == "wandb":
            assert b"row-of-a-table" in content
            assert b"of-a-target" in content


def test_the_commit_is_this_repository_s_or_unknown() -> None:
    commit = git_commit()
    assert commit is None or len(commit) == 40


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "last.pt"
    if content is None:
        torch.save({"format": 0}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)):
        checkpoint.load(path)
