"""One run on several processes: what it leaves, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from btrain.cli import main
from torchrun import (
    command,
    forked,
    in_a_fork,
    launched,
    torchrun,
    unasked_for,
    unasked_for_in_python,
)

RUN = (
    "train", "dataset=digits", "model=small_cnn", "model.width=4", "eval.steps=2",
    "train.batch_size=64", "recipe.lr=0.01", "device=cpu",
)  # fmt: skip
SAID = Path("said")


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
    settings = (*RUN, "train.epochs=3", *examples)
    assert status(in_a_fork(command, (*settings, "run.dir=one"), said=SAID)) == 0
    mixed = (*settings, "run.dir=mixed")
    assert status(forked(2, *mixed, "train.max_seconds=0.04", said=SAID)) == 0
    assert len(lines("mixed")) == 1
    assert 0 < saved("mixed")["batch"] < batches
    a_little = f"train.max_seconds={saved('mixed')['train_seconds'] + 1e-4}"  # a batch or so
    assert status(in_a_fork(command, (*mixed, a_little), said=SAID)) == 0
    before = saved("mixed")
    assert status(forked(2, *mixed, said=SAID)) == 0
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
    assert run.pid is not None
    os.kill(run.pid, signal.SIGTERM)  # torchrun hands it on
    assert status(run) != 0
    said = SAID.read_text()
    assert said.count("btrain: stopped by SIGTERM") == 1
    assert Path("run/train.log").read_text().count("stopped by SIGTERM") == 1
    assert saved("run")["epoch"] >= 1


def test_a_signal_to_one_process_ends_all_with_a_checkpoint(here: Path) -> None:
    run = started_run()
    first = json.loads(Path("run/run.lock").read_text())["pid"]
    (other,) = [process for process in children(run.pid) if process != first]
    os.kill(other, signal.SIGTERM)
    assert status(run) != 0
    said = SAID.read_text()
    assert said.count("btrain: stopped by SIGTERM") == 1
    lines_then = lines("run")
    assert lines_then[-1]["epoch"] <= saved("run")["epoch"] + 1


def test_a_killed_process_ends_the_others(here: Path) -> None:
    run = started_run()
    first = json.loads(Path("run/run.lock").read_text())["pid"]
    (other,) = [process for process in children(run.pid) if process != first]
    os.kill(other, signal.SIGKILL)
    assert status(run) != 0
    said = SAID.read_text()
    assert (
        said.count("btrain: ") == 1
    )  # that one is gone, or SIGTERM from torchrun while evaluating
    assert not Path(f"/proc/{first}").exists()
    assert saved("run")["epoch"] >= 1


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux'")
@pytest.mark.parametrize("work", [unasked_for, unasked_for_in_python])
def test_a_killed_torchrun_ends_its_processes_with_a_checkpoint(
    work: Callable[[tuple[str, ...]], None], here: Path
) -> None:
    settings = (*RUN, "run.dir=run", "train.epochs=2000")
    run = started(in_a_fork(launched, 2, work, settings, said=SAID))
    processes = children(run.pid)
    assert len(processes) == 2 and run.pid is not None
    os.kill(run.pid, signal.SIGKILL)
    until = time.monotonic() + 60
    for process in processes:
        while Path(f"/proc/{process}").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
    # The other one may have noticed first, and its signal is one to both.
    assert SAID.read_text().count(f"process {run.pid}, which started this one, is gone") <= 1
    assert Path("run/train.log").read_text().count("stopped by SIGTERM") == 1
    assert not Path("run/run.lock").exists()


def test_a_mistake_is_said_once_and_ends_all(here: Path) -> None:
    rival = ["rival=free", "defense=pgd", "bt=uniform"]
    assert status(forked(2, *RUN, "run.dir=run", *rival, said=SAID)) == 1
    said = SAID.read_text()
    assert said.count("btrain: rival=free needs one process") == 1
    assert not Path("run").exists()


@pytest.mark.parametrize("wrong", ["rival=free", "train.epochs=few"])
def test_a_mistake_in_the_settings_is_said_once(here: Path, wrong: str) -> None:
    assert status(forked(2, *RUN, wrong, said=SAID)) == 1
    said = SAID.read_text()
    assert said.count("btrain: ") == 1
    assert wrong.partition("=")[0] in said


TWO = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29577"}


@pytest.mark.parametrize(
    "wrong",
    [
        "WORLD_SIZE=two", "WORLD_SIZE=0", "WORLD_SIZE=-2", "RANK=x", "RANK=2", "RANK=-1", "RANK=",
        "MASTER_ADDR=", "MASTER_PORT=", "MASTER_PORT=x", "MASTER_PORT=0", "MASTER_PORT=65536",
        "MASTER_PORT=²", "RANK=00", "LOCAL_RANK=x",
    ],
)  # fmt: skip
def test_a_launcher_s_variable_that_is_none_is_named(
    wrong: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, _, value = wrong.partition("=")
    for variable, one in {**TWO, name: value}.items():
        monkeypatch.setenv(variable, one)
    assert main([*RUN, "run.dir=run"]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert f"btrain: {wrong} must be" in said or (not value and f"btrain: {name} is not" in said)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("rank", "number", "whom"),
    [(0, signal.SIGTERM, "the other processes"), (1, signal.SIGINT, "process 0")],
)
def test_a_process_says_for_whom_it_waits_and_ends_at_the_first_signal(
    rank: int, number: signal.Signals, whom: str, here: Path
) -> None:
    run = in_a_fork(command_with, {**TWO, "RANK": str(rank)}, (*RUN, "run.dir=run"), said=SAID)
    until = time.monotonic() + 60
    while not (SAID.exists() and SAID.read_text()):
        assert run.exitcode is None and time.monotonic() < until
        time.sleep(0.05)
    assert SAID.read_text().startswith(f"Process {rank} of 2 waits for {whom}, at MASTER_ADDR=loc")
    assert run.pid is not None
    os.kill(run.pid, number)
    run.join(5)
    assert run.exitcode == 128 + number
    assert "Traceback" not in SAID.read_text()


def command_with(variables: dict[str, str], arguments: tuple[str, ...]) -> None:
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command(arguments)


def test_processes_that_take_one_port_for_two_runs_say_so(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        for variable, one in {**TWO, "MASTER_PORT": str(taken.getsockname()[1])}.items():
            monkeypatch.setenv(variable, one)
        assert main([*RUN, "run.dir=run"]) == 1
    said = capsys.readouterr().err
    assert "btrain: process 0 of 2 could not meet the others, at MASTER_ADDR=localhost" in said
    assert "Traceback" not in said


NAMES_OF_THREADS = """
import atexit, os, sys
from pathlib import Path
def leave():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    Path(os.environ["RANK"] + ".threads").write_text("".join(names))
atexit.register(leave)
from btrain.__main__ import run
run()
"""


def test_a_failing_run_leaves_no_thread_to_the_end_of_its_interpreter(here: Path) -> None:
    """One of the group's would now and then abort a process that has just said why it ends."""
    run = torchrun(2, "-c", NAMES_OF_THREADS, *RUN, "run.dir=run", "run.resume=must")
    assert run.wait(90) != 0
    for path in here.glob("*.threads"):  # where the interpreter came to its end
        assert "gloo" not in path.read_text()


def started_run() -> ForkServerProcess:
    """A run on two processes that has left a checkpoint and goes on."""
    return started(forked(2, *RUN, "run.dir=run", "train.epochs=2000", said=SAID))


def started(run: ForkServerProcess) -> ForkServerProcess:
    until = time.monotonic() + 120
    while not Path("run/checkpoints/last.pt").exists():
        assert run.exitcode is None and time.monotonic() < until
        time.sleep(0.05)
    return run


def status(run: ForkServerProcess) -> int | None:
    """The exit status of a run, when it has ended."""
    run.join(120)
    return run.exitcode


def children(process: int | None) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(number) for number in path.read_text().split()]
