"""One run on several processes: what it leaves, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from torchrun import ENVIRONMENT, torchrun

RUN = [
    "-m", "btrain", "train", "dataset=digits", "model=small_cnn", "model.width=4", "eval.steps=2",
    "train.batch_size=64", "recipe.lr=0.01", "device=cpu",
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(folder: str) -> list[dict[str, Any]]:
    text = Path(folder, "metrics.jsonl").read_text()
    timed = ("train_seconds",)
    return [
        {k: v for k, v in json.loads(line).items() if k not in timed} for line in text.splitlines()
    ]


def test_a_run_on_two_processes_is_resumed_by_one_and_again_by_two(here: Path) -> None:
    batches = 20
    examples = ["dataset.train_examples=1280", "dataset.val_examples=64"]
    settings = [*RUN, "train.epochs=3", *examples]
    subprocess.run([sys.executable, *settings, "run.dir=one"], env=ENVIRONMENT, check=True)
    mixed = [*settings, "run.dir=mixed"]
    assert torchrun(2, *mixed, "train.max_seconds=0.04").wait(120) == 0
    assert len(lines("mixed")) == 1
    assert 0 < saved("mixed")["batch"] < batches
    a_little = f"train.max_seconds={saved('mixed')['train_seconds'] + 1e-4}"  # a batch or so
    subprocess.run([sys.executable, *mixed, a_little], env=ENVIRONMENT, check=True)
    before = saved("mixed")
    assert torchrun(2, *mixed).wait(120) == 0
    assert (before["epoch"], before["batch"]) < (3, 0)
    for one, several in zip(lines("one"), lines("mixed"), strict=True):
        assert one.keys() == several.keys()
        for key in ("epoch", "f_b", "f_r", "f_o", "attack_steps_mean", "loss", "robust_fraction"):
            assert several[key] == pytest.approx(one[key], rel=0.02, abs=0.005), key
    sessions = json.loads(Path("mixed/provenance.json").read_text())["sessions"]
    assert [session["processes"] for session in sessions] == [2, 1, 2]
    assert not Path("mixed/run.lock").exists()


def saved(folder: str) -> dict[str, Any]:
    path = Path(folder, "checkpoints/last.pt")
    return dict(torch.load(path, weights_only=True)["state"])


def test_a_signal_to_all_ends_the_run_with_a_checkpoint_and_one_sentence(here: Path) -> None:
    run = started_run()
    os.kill(run.pid, signal.SIGTERM)  # torchrun hands it on
    _, said = run.communicate(timeout=90)
    assert run.returncode != 0
    assert said.count("btrain: stopped by SIGTERM") == 1
    assert Path("run/train.log").read_text().count("stopped by SIGTERM") == 1
    assert saved("run")["epoch"] >= 1


def test_a_signal_to_one_process_ends_all_with_a_checkpoint(here: Path) -> None:
    run = started_run()
    first = json.loads(Path("run/run.lock").read_text())["pid"]
    (other,) = [process for process in children(run.pid) if process != first]
    os.kill(other, signal.SIGTERM)
    _, said = run.communicate(timeout=90)
    assert run.returncode != 0
    assert said.count("btrain: stopped by SIGTERM") == 1
    lines_then = lines("run")
    assert lines_then[-1]["epoch"] <= saved("run")["epoch"] + 1


def test_a_killed_process_ends_the_others(here: Path) -> None:
    run = started_run()
    first = json.loads(Path("run/run.lock").read_text())["pid"]
    (other,) = [process for process in children(run.pid) if process != first]
    os.kill(other, signal.SIGKILL)
    _, said = run.communicate(timeout=90)
    assert run.returncode != 0
    assert (
        said.count("btrain: ") == 1
    )  # that one is gone, or SIGTERM from torchrun while evaluating
    assert not Path(f"/proc/{first}").exists()
    assert saved("run")["epoch"] >= 1


def test_a_mistake_is_said_once_and_ends_all(here: Path) -> None:
    rival = ["rival=free", "defense=pgd", "bt=uniform"]
    run = torchrun(2, *RUN, "run.dir=run", *rival, stderr=subprocess.PIPE)
    _, said = run.communicate(timeout=90)
    assert run.returncode == 1
    assert said.count("btrain: rival=free needs one process") == 1
    assert not Path("run").exists()


def started_run() -> subprocess.Popen[str]:
    """A run on two processes that has left a checkpoint and goes on."""
    run = torchrun(2, *RUN, "run.dir=run", "train.epochs=2000", stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not Path("run/checkpoints/last.pt").exists():
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    return run


def children(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(number) for number in path.read_text().split()]
