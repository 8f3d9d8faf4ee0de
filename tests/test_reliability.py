"""Stopping, resuming, locking, and what is reported instead of passing in silence."""

from __future__ import annotations

import copy
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from btrain.attacks.attack import Attack
from btrain.attacks.fast_paths import make_fast_paths
from btrain.cli import main
from btrain.data import Data
from btrain.errors import Interrupted, UserError
from btrain.evaluation import Accuracy
from btrain.methods.base import Reach
from btrain.methods.make import make_methods
from btrain.runs import checkpoint
from btrain.runs import lock as run_lock
from btrain.runs.folder import RunFolder
from btrain.runs.lock import locked
from btrain.runs.provenance import data_hash, processor
from btrain.runs.tracking import Tracker
from btrain.training import run as run_module
from btrain.training import train
from btrain.training.safety.determinism import deterministic
from btrain.training.safety.finite import Snapshot
from btrain.training.safety.inputs import InputGuard, epoch_warnings, is_above, overfitting
from btrain.training.safety.out_of_memory import explained_memory
from btrain.training.setup import make_optimizer, make_state
from btrain.training.state import TrainState
from test_training import CPU, metrics, same, tiny, untimed, weights

Capture = pytest.CaptureFixture[str]
FOUR = ["train.epochs=4", "dataset.val_examples=50", "recipe.crop_padding=1"]
BATCHES = 5  # 300 examples in batches of 64


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    train(tiny(folder, *FOUR))
    return folder


def assert_like(folder: Path, whole: Path) -> None:
    assert untimed(metrics(folder)) == untimed(metrics(whole))
    assert same(weights(folder), weights(whole))
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (folder, whole))
    assert untimed([ours]) == untimed([theirs])


def signal_after(patch: pytest.MonkeyPatch, batches: int, number: int) -> None:
    """This process gets a signal once so many batches are done."""
    add = TrainState.add

    def add_and_signal(state: TrainState, stats: Any) -> None:
        nonlocal batches
        add(state, stats)
        batches -= 1
        if batches == 0:
            os.kill(os.getpid(), number)

    patch.setattr(TrainState, "add", add_and_signal)


# Signals


@pytest.mark.parametrize(
    ("batches", "number", "every"),
    [(1, signal.SIGTERM, 3), (6, signal.SIGINT, 1), (7, signal.SIGINT, 3), (10, signal.SIGTERM, 1)],
)
def test_a_signal_ends_the_run_at_the_next_batch_and_nothing_is_lost(
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    batches: int,
    number: signal.Signals,
    every: int,
) -> None:
    config = tiny(tmp_path / "run", *FOUR, f"train.checkpoint_every={every}")
    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=number.name):
        signal_after(patch, batches, number)
        train(config)
    assert signal.getsignal(number) is before
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")["state"]
    assert state["epoch"] * BATCHES + state["batch"] == batches
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "run.lock").exists()
    assert number.name in (tmp_path / "run" / "train.log").read_text()
    train(config)
    assert_like(tmp_path / "run", whole)


@pytest.mark.parametrize("call", [1, 2, 3, 9])  # of 4 epochs with two evaluations each, and a last
def test_a_signal_during_evaluation_ends_it_at_once(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    from btrain.training import scores

    evaluate, calls = scores.evaluate, 0

    def interrupted(*args: Any, **kwargs: Any) -> Accuracy:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)  # cut short
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(scores, "evaluate", interrupted)
        train(tiny(tmp_path, *FOUR))
    train(tiny(tmp_path, *FOUR))
    assert_like(tmp_path, whole)


def test_the_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    code = """
import signal, sys, time
from btrain.training.safety.signals import stop_on_signals
with stop_on_signals() as stop:
    signal.raise_signal(signal.SIGTERM)
    assert stop.made()
    print("noted", flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("unreachable")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "noted\n")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_whole_sweep_in_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    number: signal.Signals,
    status: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [a for a in _arguments(tmp_path, "train.epochs=2") if "run.dir" not in a]
    with monkeypatch.context() as patch:
        signal_after(patch, 3, number)
        assert main(["train", "--multirun", *arguments, "seed=0,1"]) == status
    err = capsys.readouterr().err
    assert f"btrain: stopped by {number.name}; the same command goes on from here." in err
    assert "Traceback" not in err
    assert len(list((tmp_path / "runs").glob("*/config.yaml"))) == 1
    assert main(["train", "--multirun", *arguments, "seed=0,1"]) == 0
    assert len(list((tmp_path / "runs").glob("*/summary.json"))) == 2
    capsys.readouterr()
    assert main(["train", "--multirun", *arguments, "seed=0,1"]) == 0
    assert capsys.readouterr().out.count("is finished already") == 2


def _arguments(folder: Path, *overrides: str) -> list[str]:
    from test_training import TINY

    return [*TINY, f"run.dir={folder}", *overrides]


# Checkpoints


def cut(folder: Path, patch: pytest.MonkeyPatch, batches: int, *overrides: str) -> None:
    with patch.context() as inner, pytest.raises(Interrupted):
        signal_after(inner, batches, signal.SIGTERM)
        train(tiny(folder, *FOUR, *overrides))


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "missing"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, damage: str
) -> None:
    cut(tmp_path, monkeypatch, 10)
    folder = RunFolder(tmp_path)
    content = bytearray(folder.last.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        folder.last.unlink()
    else:
        cuts = {"flip": content, "truncate": content[: len(content) // 2], "empty": b""}
        folder.last.write_bytes(cuts[damage])
    capsys.readouterr()
    train(tiny(tmp_path, *FOUR))
    assert_like(tmp_path, whole)
    for text in (capsys.readouterr().err, (tmp_path / "train.log").read_text()):
        assert f"The run goes on from {folder.previous}" in text
        assert str(folder.last) in text
    checkpoint.load(folder.last)
    checkpoint.load(folder.previous)
    assert folder.damaged.exists() == (damage != "missing")


def test_two_checkpoints_are_kept(whole: Path) -> None:
    folder = RunFolder(whole)
    epochs = [checkpoint.load(path)["state"]["epoch"] for path in (folder.previous, folder.last)]
    assert epochs == [3, 4]
    files = {path.name for path in folder.last.parent.iterdir()}
    assert files == {"last.pt", "previous.pt", "best.pt"}


def test_checkpoints_come_every_so_often_and_at_the_end(tmp_path: Path) -> None:
    train(tiny(tmp_path, "train.epochs=5", "train.checkpoint_every=3"))
    folder = RunFolder(tmp_path)
    epochs = [checkpoint.load(path)["state"]["epoch"] for path in (folder.previous, folder.last)]
    assert epochs == [3, 5]


@pytest.mark.parametrize("where", ["fresh", "unfinished", "finished"])
@pytest.mark.parametrize("resume", ["never", "auto", "must"])
def test_run_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str, where: str
) -> None:
    if where == "unfinished":
        cut(tmp_path / "run", monkeypatch, 2)
    if where == "finished":
        train(tiny(tmp_path / "run", *FOUR))
    refused = {"never": where != "fresh", "must": where == "fresh", "auto": False}[resume]
    config = tiny(tmp_path / "run", *FOUR, f"run.resume={resume}")
    if refused:
        with pytest.raises(UserError, match=f"run.resume={resume}"):
            train(config)
        assert (where == "fresh") == (not (tmp_path / "run").exists())
    else:
        assert train(config)["epochs"] == 4


def test_a_collapse_goes_back_to_the_epoch_before_wherever_the_run_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collapsing = [
        "train.epochs=14", "recipe.epochs=14", "recipe.milestones=[12]", "recipe.lr_factors=[100]",
        "attack.epsilon=0.05", "recipe.lr=0.1", "recipe.early_stop_on_collapse=true",
        "train.checkpoint_every=5",
    ]  # fmt: skip
    train(tiny(tmp_path / "whole", *collapsing))
    for batches in (12 * 5 + 1, 2):  # within the epoch that collapses, twice
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            signal_after(patch, batches, signal.SIGTERM)
            train(tiny(tmp_path / "cut", *collapsing))
    train(tiny(tmp_path / "cut", *collapsing))
    assert_like(tmp_path / "cut", tmp_path / "whole")
    assert len(metrics(tmp_path / "cut")) == 13


REPAIRED = [
    *("defense=pgd", "rival=fast", "bt.n_b=1", "bt.step_size_b=1e-4", "attack.start=clean"),
    *("attack.epsilon=0.3", "eval.steps=5", "eval.step_size=0.08"),
    *("recipe.repair_steps=2", "recipe.lr=0.1", "train.epochs=4"),
]
"""An attack that finds next to nothing, which training resists and PGD does not."""


def test_an_epoch_that_repairs_takes_more_steps_wherever_the_run_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny(tmp_path / "whole", *REPAIRED))
    lines = metrics(tmp_path / "whole")
    overfitted = [n["robust_acc_train"] > n["pgd_acc_train_batch"] + 20 for n in lines]
    steps = [line["attack_steps_mean"] for line in lines]
    assert steps == [1, *(3 if then else 1 for then in overfitted[:-1])]
    assert steps[1] == 1 and steps[-1] == 3
    told = ["the next epoch takes 3 steps" in " ".join(line["warnings"]) for line in lines]
    assert told == [*overfitted[:-1], False]
    for batches in (3 * BATCHES + 1, 2):  # within the epoch that repairs, twice
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            signal_after(patch, batches, signal.SIGTERM)
            train(tiny(tmp_path / "cut", *REPAIRED))
    train(tiny(tmp_path / "cut", *REPAIRED))
    assert_like(tmp_path / "cut", tmp_path / "whole")


def test_a_repaired_attack_goes_as_far_as_before(tmp_path: Path) -> None:
    config = tiny(tmp_path, "defense=pgd", "rival=fast", "bt.n_b=1", "recipe.repair_steps=4")
    once, often = (make_methods(config, CPU)(0, repairs).attack for repairs in (False, True))
    assert (once.n_b, often.n_b) == (1, 5)
    assert often.n_b * often.step_size_b == pytest.approx(once.step_size_b)


def test_overfitting_is_not_looked_for_while_epsilon_grows(tmp_path: Path) -> None:
    train(tiny(tmp_path, *REPAIRED, "attack.epsilon_warmup_epochs=4"))
    lines = metrics(tmp_path)
    assert lines[2]["robust_acc_train"] > lines[2]["pgd_acc_train_batch"] + 20
    assert {line["attack_steps_mean"] for line in lines} == {1}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["recipe.repair_steps=-1"], r"recipe\.repair_steps must be at least 0, not -1\."),
        (["recipe.repair_steps=1", "bt.n_b=0"], r"no attack to repair with bt\.n_b=0\."),
        (["recipe.repair_steps=1", "bt=bullettrain"], r"does not go with bt=bullettrain: .+\."),
        (["recipe.repair_steps=1", "rival=free"], r"does not go with rival=free: .+\."),
        (["recipe.repair_steps=1", "defense=ibp"], r"does not go with defense=ibp: .+\."),
        (["recipe.repair_steps=1", "defense=augmix"], r"does not go with defense=augmix: .+\."),
    ],
)
def test_a_repair_that_makes_no_sense_is_refused(
    tmp_path: Path, settings: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        tiny(tmp_path, "defense=pgd", "bt=uniform", *settings)


def test_a_checkpoint_that_watched_fewer_images_tells_of_no_collapse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path, "train.epochs=2", "train.batch_size=16", "dataset.train_examples=160",
                  "recipe.early_stop_on_collapse=true")  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        signal_after(patch, 11, signal.SIGTERM)
        train(config)
    file = RunFolder(tmp_path).last
    saved = checkpoint.load(file)
    assert saved["state"].pop("watched_images") == 128  # as older ones have none
    saved["state"]["watched_acc"] = 100.0
    checkpoint.save(file, saved)
    summary = train(config)
    assert summary["collapse"] is None and summary["epochs"] == 2


def test_going_back_keeps_what_was_spent(tmp_path: Path, digits: Data) -> None:
    state = make_state(tiny(tmp_path, "sparsity=flying_bird"), digits, torch.device("cpu"))
    assert state.sparsity is not None
    before = copy.deepcopy(state.state_dict())
    state.total_sums += 2
    state.epoch_sums += 3
    state.train_seconds = 4.0
    counts = [state.sparsity.memory[name] for name in ("counted_units", "extra_units")]
    for count in counts:
        count += 5
    with torch.no_grad():
        next(state.model.parameters()).add_(1)
    state.go_back(before)
    assert same(state.model.state_dict(), before["model"])
    assert bool((state.total_sums == 5).all()) and not bool(state.epoch_sums.any())
    assert state.train_seconds == 4 and all(float(count) == 5 for count in counts)


def test_nothing_draws_from_torchs_own_generators(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = TrainState.add

    def add_and_reseed(state: TrainState, stats: Any) -> None:
        add(state, stats)
        torch.manual_seed(state.batch)

    monkeypatch.setattr(TrainState, "add", add_and_reseed)
    train(tiny(tmp_path, *FOUR))
    assert_like(tmp_path, whole)


def test_the_best_epoch_s_number_and_weights_stay_together(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Cut between best.pt and the checkpoint of its epoch.
    def dies(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "append_metrics", dies)
        train(tiny(tmp_path, *FOUR))
    assert RunFolder(tmp_path).best.exists()
    assert not RunFolder(tmp_path).last.exists()
    train(tiny(tmp_path, *FOUR))
    assert_like(tmp_path, whole)


# The lock


def test_a_second_process_ends_with_a_sentence(tmp_path: Path, whole: Path) -> None:
    train(tiny(tmp_path / "run", *FOUR))
    (tmp_path / "run" / "summary.json").unlink()
    with (
        locked(tmp_path / "run" / "run.lock"),
        pytest.raises(UserError, match=rf"run is in use by process {os.getpid()} on \S+, which"),
    ):
        train(tiny(tmp_path / "run", *FOUR))
    train(tiny(tmp_path / "run", *FOUR))  # and goes on once the first is over
    assert_like(tmp_path / "run", whole)


HOLD = """
import sys, time
from pathlib import Path
from btrain.runs.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_holder_holds_nobody_up(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on "), locked(path):
            pass
        holder.kill()
        holder.wait()
    assert json.loads(path.read_text())["pid"] == holder.pid
    with locked(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


@pytest.mark.parametrize("content", ["", "[]", '{"host": 1}', "\x00\xff"])
def test_a_file_that_names_nobody_is_stale(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.lock").write_text(content)
    with locked(tmp_path / "run.lock") as lock:
        lock.check()


def test_the_number_of_another_living_process_is_stale(tmp_path: Path) -> None:
    import socket

    holder = {"host": socket.gethostname(), "pid": os.getppid(), "started": "yesterday"}
    (tmp_path / "run.lock").write_text(json.dumps(holder))
    with locked(tmp_path / "run.lock"):
        pass


@pytest.mark.parametrize("alive", [True, False])
def test_a_holder_on_another_host_is_known_by_its_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    import threading

    monkeypatch.setattr(run_lock, "_SIGN_OF_LIFE_SECONDS", 0.2)
    monkeypatch.setattr(run_lock, "_SILENCE_SECONDS", 1.0)
    path = tmp_path / "run.lock"
    path.write_text(json.dumps({"host": "far.example", "pid": 1, "started": "today"}))
    over = threading.Event()

    def touch() -> None:
        while not over.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=touch)
    if alive:
        thread.start()
    try:
        if alive:
            with pytest.raises(UserError, match=r"process 1 on far\.example"), locked(path):
                pass
        else:
            with locked(path):
                pass
    finally:
        over.set()
        if alive:
            thread.join()


def test_a_lock_that_was_taken_over_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with locked(path) as lock:
        lock.check()
        path.unlink()
        path.write_text("{}")
        with pytest.raises(UserError, match="taken over"):
            lock.check()
    assert path.exists()  # another's


@pytest.mark.parametrize("left", ["run.lock", ".0123456789abcdef.tmp"])
def test_a_run_killed_before_it_began_does_not_block_its_folder(tmp_path: Path, left: str) -> None:
    (tmp_path / left).write_text("")
    (tmp_path / "checkpoints").mkdir()
    assert train(tiny(tmp_path, "train.epochs=1"))["epochs"] == 1


# Loggers


def test_a_dying_logger_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from torch.utils import tensorboard

    class Dying(tensorboard.SummaryWriter):  # type: ignore[misc]
        calls = 0

        def add_scalar(self, *args: Any, **kwargs: Any) -> None:
            Dying.calls += 1
            raise ConnectionError("the server is gone")

    monkeypatch.setattr(tensorboard, "SummaryWriter", Dying)
    assert train(tiny(tmp_path, "train.epochs=3", "logger=tensorboard"))["epochs"] == 3
    assert Dying.calls == 1
    err = capsys.readouterr().err
    assert err.count("logger=tensorboard failed (the server is gone)") == 1
    assert "Traceback" not in err


def test_a_resumed_run_goes_on_without_a_logger_that_cannot_start(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "not a key")
    cut(tmp_path, monkeypatch, 6)
    train(tiny(tmp_path, *FOUR, "logger=wandb"))
    assert_like(tmp_path, whole)
    assert "logger=wandb could not start" in capsys.readouterr().err
    assert "logger=wandb could not start" in (tmp_path / "train.log").read_text()


def test_a_logger_that_fails_at_the_end_leaves_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import contextmanager

    @contextmanager
    def tracker(*args: Any, **kwargs: Any) -> Any:
        def fails(*args: Any) -> None:
            raise OSError("no route to host")

        yield Tracker(lambda metrics, epoch: None, fails)
        raise RuntimeError("nor to close")

    monkeypatch.setattr("btrain.runs.tracking._tensorboard", tracker)
    train(tiny(tmp_path, "train.epochs=1", "logger=tensorboard"))
    assert (tmp_path / "summary.json").exists()
    assert (tmp_path / "train.log").read_text().count("failed (no route to host)") == 1


# Numbers that are not finite

BLOW_UP = ["recipe.epochs=2", "train.epochs=2", "recipe.milestones=[1]"]


def test_the_offending_batch_is_saved_and_named(tmp_path: Path, digits: Data) -> None:
    grow = [*BLOW_UP, "recipe.lr_factors=[1e30]", "recipe.crop_padding=1"]
    with pytest.raises(UserError, match=r"in the logits in epoch 2, step 2\b.*recipe\.lr"):
        train(tiny(tmp_path, *grow, "dataset.train_examples=null"))
    saved = checkpoint.load(RunFolder(tmp_path).nonfinite)["state"]
    assert (saved["epoch"], saved["step"], saved["tensor"]) == (2, 2, "the logits")
    assert torch.equal(digits.train.labels[saved["indices"]], saved["labels"])
    assert saved["x"].shape == (64, 1, 8, 8)
    # The images as they were augmented: drawn again from the state that was saved with them.
    from btrain.data.augmentation import Moved, random_shifts, to_unit

    generator = torch.Generator()
    generator.set_state(saved["generator"])
    moved = Moved(1, random_shifts(64, 1, generator))
    images = moved.follow(digits.train.images[saved["indices"]])
    assert torch.equal(to_unit(images), saved["x"])


class Poison(nn.Module):
    """A network whose output or gradient is NaN in chosen train-mode passes."""

    def __init__(self, inner: nn.Module, passes: set[int], where: str) -> None:
        super().__init__()
        self.inner, self.passes, self.where, self.seen = inner, passes, where, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(x)
        if not self.training:
            return logits
        self.seen += 1
        if self.seen in self.passes:
            if self.where == "logits":
                return logits * torch.nan
            logits.register_hook(lambda gradient: gradient * torch.inf)
        return logits


def poisoned(patch: pytest.MonkeyPatch, passes: set[int], where: str) -> None:
    """Runs train a network of which some passes are bad; plain PGD makes one pass a step."""

    def make(*args: Any) -> TrainState:
        state = make_state(*args)
        state.model = Poison(state.model, passes, where)
        return state

    patch.setattr(run_module, "make_state", make)


@pytest.mark.parametrize(
    ("where", "name"), [("logits", "the logits"), ("gradient", r"the gradient of inner\.\S+")]
)
def test_the_tensor_and_the_step_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, name: str
) -> None:
    poisoned(monkeypatch, {7}, where)
    with pytest.raises(UserError, match=rf"not finite in {name} in epoch 2, step 2;"):
        train(tiny(tmp_path, "defense=pgd", "bt=uniform", "train.epochs=3"))


def test_skipped_steps_are_counted_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ["defense=pgd", "bt=uniform", "train.epochs=3", "train.on_nonfinite=skip"]
    with monkeypatch.context() as patch:
        poisoned(patch, {1, 7, 8}, "logits")
        train(tiny(tmp_path, *config))
    lines = metrics(tmp_path)
    assert [line["skipped_steps"] for line in lines] == [1, 2, 0]
    assert all(line["f_b"] + line["f_r"] + line["f_o"] == pytest.approx(1) for line in lines)
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


def test_an_epoch_of_skipped_steps_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, set(range(6, 11)), "logits")
    with pytest.raises(UserError, match="Every step of epoch 2 was skipped"):
        train(tiny(tmp_path, "defense=pgd", "bt=uniform", "train.on_nonfinite=skip"))


def test_skipping_costs_the_result_nothing(tmp_path: Path, whole: Path) -> None:
    train(tiny(tmp_path, *FOUR, "train.on_nonfinite=skip"))
    assert same(weights(tmp_path), weights(whole))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_undone_step_leaves_everything_as_it_was(
    tmp_path: Path, digits: Data, preact: nn.Module, optimizer: str
) -> None:
    config = tiny(tmp_path, f"recipe.optimizer={optimizer}")
    states = [make_state(config, digits, CPU) for _ in range(2)]
    x, labels = digits.train.images[:32].float() / 255, digits.train.labels[:32]

    def step(state: TrainState, factor: float) -> None:
        state.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(state.model(x), labels)
        (factor * loss).backward()  # type: ignore[no-untyped-call]
        state.optimizer.step()

    for state in states:
        state.model = preact if state is states[0] else __import__("copy").deepcopy(preact)
        state.optimizer = make_optimizer(config.recipe, state.model)
        state.model.train()
    for factors in ([torch.nan, 1.0, torch.inf, 1.0], [1.0, 1.0]):
        state = states[len(factors) == 2]
        for factor in factors:
            bad = torch.tensor(factor != 1.0)
            before = Snapshot(state.model, state.optimizer, state.memory)
            step(state, factor)
            before.undo_where(bad)
    assert same(states[0].model.state_dict(), states[1].model.state_dict())
    ours, theirs = (state.optimizer.state_dict()["state"] for state in states)
    assert ours.keys() == theirs.keys()
    assert all(same(ours[key], theirs[key]) for key in ours)


# Guards


def test_a_batch_norm_that_is_not_finite_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(*args: Any) -> TrainState:
        state = make_state(*args)
        state.model.register_buffer("running_var", torch.tensor([1.0, torch.inf]))
        return state

    monkeypatch.setattr(run_module, "make_state", make)
    with pytest.raises(
        UserError,
        match="ruined after epoch 1, step 5: there is a number that is not finite in running_var;",
    ):
        train(tiny(tmp_path))
    assert not RunFolder(tmp_path).last.exists()


@pytest.mark.parametrize(
    ("shift", "words"), [(0.0, None), (0.3, "away from the clean"), (2.0, "leave the pixel box")]
)
def test_images_outside_the_ball_or_the_box_are_reported(
    digits: Data, small_cnn: nn.Module, shift: float, words: str | None
) -> None:
    x = digits.train.images[:20].float() / 255
    guard = InputGuard(Reach(0.1))
    small_cnn.train()
    with guard.over(small_cnn, x):
        moved = x.flip(0) + 0.1 * torch.rand_like(x)
        moved.clamp_(0, 1)
        moved[3] += shift
        small_cnn(moved if shift != 0.3 else moved.clamp(0, 1))
    small_cnn(x + 5)  # no longer watched
    found = guard.warnings()
    assert bool(found) == (words is not None)
    assert words is None or any(words in warning for warning in found)


def test_the_ball_is_that_of_the_epoch(tmp_path: Path, digits: Data, small_cnn: nn.Module) -> None:
    config = tiny(tmp_path, "attack.epsilon=0.3", "attack.epsilon_warmup_epochs=2")
    x = digits.train.images[:20].float() / 255
    small_cnn.train()
    method_of = make_methods(config, CPU, paths=make_fast_paths(config.train, CPU))
    found = []
    for epoch in range(4):
        guard = InputGuard(method_of(epoch).reach)
        with guard.over(small_cnn, x):
            small_cnn(torch.where(x > 0.5, x - 0.15, x + 0.15))
        found.append(bool(guard.warnings()))
    assert found == [True, False, False, False]  # 0.1, 0.2, 0.3, 0.3


def test_a_broken_attack_is_reported_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    evenly = Attack.evenly
    monkeypatch.setattr(Attack, "evenly", lambda *a, **k: evenly(*a, **k) + 0.9)
    train(tiny(tmp_path, "train.epochs=1", "bt=uniform"))
    (line,) = metrics(tmp_path)
    assert any("leave the pixel box" in warning for warning in line["warnings"])
    assert "leave the pixel box" in capsys.readouterr().err


def test_a_healthy_run_has_no_warnings(whole: Path) -> None:
    assert all(line["warnings"] == [] for line in metrics(whole))


@pytest.mark.parametrize(
    "settings",
    [
        ["bt=uniform", "attack.mode=train"],  # whose start beside the images is not projected
        ["bt=uniform", "attack.mode=train", "train.precision=bf16"],
        ["defense=pgd", "rival=gradalign"],  # whose penalty looks at noise
    ],
    ids=str,
)
def test_what_is_not_trained_on_may_leave_the_box(tmp_path: Path, settings: list[str]) -> None:
    train(tiny(tmp_path, "train.epochs=1", *settings))
    (line,) = metrics(tmp_path)
    assert line["warnings"] == []


MEANS = {"f_b": 0.5, "f_r": 0.3, "f_o": 0.2}


@pytest.mark.parametrize(
    ("means", "watched", "words"),
    [
        ({}, (80.0, 60.0), None),
        ({"f_b": 0.6}, (80.0, 60.0), "F_B + F_R + F_O is 1.1"),
        ({}, (50.0, 75.0), "above the clean"),
    ],
)
def test_what_is_odd_about_an_epoch(
    means: dict[str, float], watched: tuple[float, float], words: str | None
) -> None:
    found = epoch_warnings(MEANS | means, Accuracy(*watched), 128)
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


@pytest.mark.parametrize(
    ("under_attack", "before", "from_start", "words"),
    [
        (60.0, 40.0, False, "fell from 40.0 to 10.0 % while training sees 60.0 %"),
        (60.0, 12.0, True, "is 10.0 % while training sees 60.0 %"),
        (60.0, None, True, "is 10.0 % while training sees 60.0 %"),
        (29.0, 12.0, True, None),
        (12.0, 40.0, False, None),  # ruined, not overfitted
        (None, 40.0, False, None),  # training by bounds
        (60.0, 12.0, False, None),  # some robust examples are counted unattacked
    ],
)
def test_overfitting_to_the_training_attack_is_told(
    under_attack: float | None, before: float | None, from_start: bool, words: str | None
) -> None:
    found = overfitting(under_attack, 10.0, before, from_start=from_start)
    assert (found is None) == (words is None)
    assert words is None or f"PGD accuracy on a training batch {words}" in str(found)


def test_a_robust_accuracy_within_noise_is_not_odd() -> None:
    assert not is_above(Accuracy(50.0, 51.0), 100)
    assert is_above(Accuracy(50.0, 51.0), 1_000_000)
    assert not is_above(Accuracy(100.0, 100.0), 10)


# Memory, provenance, determinism


MEMORY = [
    (MemoryError(), True),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU"), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
     True),
    (RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
]  # fmt: skip


@pytest.mark.parametrize(("error", "is_memory"), MEMORY)
def test_memory_that_ran_out_is_one_sentence(error: Exception, is_memory: bool) -> None:
    expected: tuple[type[Exception], str] = (
        (UserError, r"^Memory on cpu ran out with train\.batch_size=7 \(peak \d.*GiB.*smaller")
        if is_memory
        else (RuntimeError, "shapes")
    )
    with (
        pytest.raises(expected[0], match=expected[1]),
        explained_memory(CPU, "train.batch_size=7", "a smaller one may fit"),
    ):
        raise error


def test_how_much_was_asked_for_is_told() -> None:
    with (
        pytest.raises(UserError, match=r"2\.00 GiB more were asked for"),
        explained_memory(CPU, "train.batch_size=7", "a smaller one may fit"),
    ):
        raise MEMORY[1][0]


def test_memory_that_really_ran_out(tmp_path: Path) -> None:
    """The network needs 1.2 GB where the kernel hands out 0.4 more."""
    config = tiny(tmp_path / "run", "model.width=3000")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + 400_000_000
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^Memory on cpu ran out with the data and the net"):
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert not (tmp_path / "run").exists()


def test_the_folder_tells_where_the_result_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Data
) -> None:
    cut(tmp_path, monkeypatch, 6)
    summary = train(tiny(tmp_path, *FOUR))
    content = json.loads((tmp_path / "provenance.json").read_text())
    assert content["data_sha256"] == summary["data_sha256"] != data_hash(digits)
    first, second = content["sessions"]
    assert (first["from_epoch"], second["from_epoch"]) == (1, 2)
    assert first["versions"]["torch"] == torch.__version__
    assert first["overrides"] is None  # of Python
    assert first["git_dirty"] in (True, False, None)
    capability = torch.backends.cpu.get_cpu_capability()
    assert first["hardware"]["processor"].endswith(f"{capability})")
    assert first["hardware"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (["processor : 0", "cpu family : 25", "model : 17", "model name : AMD EPYC"] * 2,
         "AMD EPYC (family 25, model 17, "),
        (["processor : 0", "CPU architecture: 8"], f"{platform.machine()} ("),
    ],
)  # fmt: skip
def test_a_processor_s_name_tells_its_family_and_instructions(
    monkeypatch: pytest.MonkeyPatch, lines: list[str], name: str
) -> None:
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: "\n".join(lines))
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert processor() == f"{name}{torch.backends.cpu.get_cpu_capability()})"


def test_a_run_does_not_go_on_with_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(tmp_path, monkeypatch, 6)
    path = tmp_path / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_sha256": 64 * "0"}))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="begun with other data"):
        train(tiny(tmp_path, *FOUR))
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_the_hash_depends_on_every_image_and_label(digits: Data) -> None:
    from dataclasses import replace

    def changed(change: Callable[[torch.Tensor, torch.Tensor], object]) -> Data:
        images, labels = digits.train.images.clone(), digits.train.labels.clone()
        change(images, labels)
        return replace(digits, train=type(digits.train)(images, labels))

    same_data = changed(lambda images, labels: None)
    pixel = changed(lambda images, labels: images[-1, 0, 7, 7].add_(1))
    label = changed(lambda images, labels: labels[0].add_(1))
    assert data_hash(same_data) == data_hash(digits)
    assert len({data_hash(data) for data in (digits, pixel, label)}) == 3


def test_deterministic_algorithms_change_nothing_on_a_cpu_and_are_switched_off_again(
    tmp_path: Path, whole: Path
) -> None:
    train(tiny(tmp_path, *FOUR, "train.deterministic=true"))
    assert same(weights(tmp_path), weights(whole))
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_that_cannot_be_deterministic_is_named() -> None:
    where, what = torch.zeros(2, dtype=torch.long), torch.arange(2.0)
    with (
        pytest.raises(UserError, match=r"^train\.deterministic=true cannot be kept here: put_"),
        deterministic(True),
    ):
        torch.zeros(3).put_(where, what)  # twice the same place: the last one wins, whichever it is
    torch.zeros(3).put_(where, what)
