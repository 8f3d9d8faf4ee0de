"""Kills real runs at random moments, takes them up again, and checks what comes of it.

`main` is for a process of its own, for it forks: each run is a child of a parent that has imported
torch and computed nothing. It prints a JSON object; an AssertionError names the point that failed.
So does `families`, for runs of several processes, of which one is killed; those are forks, too.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from btrain import cli
from btrain.errors import Interrupted
from btrain.runs import checkpoint
from btrain.training import train
from btrain.training.state import TrainState
from composing import compose
from torchrun import launched, unasked_for

EPOCHS, BATCHES, EVERY = 6, 5, 2
SETTINGS = [
    "dataset=digits", "model=small_cnn", "model.width=4", "dataset.train_examples=300",
    "dataset.val_examples=50", "dataset.test_examples=100", "train.batch_size=64",
    f"train.epochs={EPOCHS}", f"train.checkpoint_every={EVERY}", "recipe.crop_padding=1",
    "train.score_every=2",
    "attack.steps=3", "eval.steps=2", "eval.every_epochs=2", "device=cpu",
]  # fmt: skip
SEEDS = (0, 1)  # of a sweep

counter = mmap.mmap(-1, 8)  # shared with the children


def batches_done() -> int:
    return int(struct.unpack("q", counter[:8])[0])


def count_batches() -> None:
    add = TrainState.add

    def add_and_count(state: TrainState, stats: Any) -> None:
        add(state, stats)
        counter[:8] = struct.pack("q", batches_done() + 1)

    TrainState.add = add_and_count  # type: ignore[method-assign]


def start(work: Callable[[], int], log: Path) -> int:
    """Forks a child that does the work with its output in a file; returns its process id."""
    counter[:8] = struct.pack("q", 0)
    child = os.fork()
    if child:
        return child
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = 1
    try:
        status = work()
    except Interrupted as stop:
        status = 128 + stop.number
    finally:
        sys.stdout.flush()
        os._exit(status)


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(batches: int) -> None:
    """Until the child has done so many batches."""
    while batches_done() < batches:
        time.sleep(0.001)


def one_run(folder: Path) -> Callable[[], int]:
    config = compose([*SETTINGS, f"run.dir={folder / 'run'}"])

    def work() -> int:
        train(config)
        return 0

    return work


def one_sweep(folder: Path) -> Callable[[], int]:
    compose()  # imports all of Hydra

    def work() -> int:
        os.chdir(folder)
        return cli.main(["train", "--multirun", *SETTINGS, f"seed={','.join(map(str, SEEDS))}"])

    return work


def outcomes(folder: Path) -> dict[str, tuple[Any, Any, Any]]:
    """Weights, untimed metrics and untimed summary of every run below a folder, by name."""
    found = {}
    for path in sorted(folder.rglob("summary.json")):
        run = path.parent
        lines = [untimed(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        weights = checkpoint.load(run / "checkpoints" / "last.pt")["state"]["model"]
        found[str(run.relative_to(folder))] = (weights, lines, untimed(path.read_text()))
    return found


def untimed(text: str) -> dict[str, Any]:
    times = ("train_seconds", "speedup_measured")
    return {key: value for key, value in json.loads(text).items() if key not in times}


def assert_same(ours: dict[str, Any], whole: dict[str, Any]) -> None:
    assert ours.keys() == whole.keys()
    for name, (weights, lines, summary) in whole.items():
        assert all(torch.equal(weights[key], ours[name][0][key]) for key in weights), name
        assert ours[name][1:] == (lines, summary), name


def saved_batches(folder: Path) -> int:
    """Batches that the newest readable checkpoints hold."""
    total = 0
    for run in {path.parent for path in folder.rglob("checkpoints")}:
        for name in ("last.pt", "previous.pt"):
            path = run / "checkpoints" / name
            if path.is_file():
                state = checkpoint.load(path)["state"]
                total += state["epoch"] * BATCHES + state["batch"]
                break
    return total


def main(folder: Path, points: int, kind: str, how: signal.Signals) -> None:
    torch.set_num_threads(1)
    make, runs = (one_sweep, len(SEEDS)) if kind == "sweep" else (one_run, 1)
    count_batches()
    everything = runs * EPOCHS * BATCHES
    for name in ("warm", "whole"):  # the first run of all is slower
        (folder / name).mkdir()
        began = time.perf_counter()
        assert end(start(make(folder / name), folder / f"{name}.log")) == 0
        seconds = time.perf_counter() - began
    assert batches_done() == everything
    whole = outcomes(folder / "whole")
    assert len(whole) == runs
    draw, lost, killed = random.Random(0), [], 0
    for point in range(points):
        here, log = folder / str(point), folder / f"{point}.log"
        here.mkdir()
        child = start(make(here), log)
        # Every other one by work done, for much of the time goes into starting.
        moment = draw.uniform(0, 1.05 * seconds)
        if point % 2:
            wait_for(draw.randint(1, everything))
            moment = draw.uniform(0, seconds / everything)
        time.sleep(moment)
        os.kill(child, how)
        status = end(child)
        killed += status != 0
        assert status in (0, -how, 128 + how), (point, status)
        before, saved = batches_done(), saved_batches(here)
        finished = {path: path.stat().st_mtime_ns for path in here.rglob("summary.json")}
        assert end(start(make(here), log)) == 0, (point, moment, log.read_text())
        assert_same(outcomes(here), whole)
        assert all(path.stat().st_mtime_ns == time for path, time in finished.items()), point
        lost.append(before + batches_done() - everything)
        assert lost[-1] == before - saved, point
        limit = 0 if status == 128 + how else EVERY * BATCHES
        assert 0 <= lost[-1] <= limit, (point, lost[-1])
        shutil.rmtree(here)
        log.unlink()
    figures = {
        "points": points,
        "killed before the end": killed,
        "equal to the uninterrupted run": points,
        "batches lost, most": max(lost),
        "batches lost, mean": sum(lost) / points,
        "batches between checkpoints": EVERY * BATCHES,
        "seconds of an uninterrupted run": round(seconds, 2),
    }
    print(json.dumps(figures))


WORKERS = 2
_ENDS_WITHIN = 30.0  # seconds, of what was started, after the kill


def joblib_sweep(folder: Path) -> Callable[[], int]:
    """A sweep on two workers of joblib's, which are forks rather than new interpreters."""
    compose()

    def work() -> int:
        from joblib.externals.loky.backend.context import set_start_method

        set_start_method("fork", force=True)
        os.setsid()
        os.chdir(folder)
        jobs = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={WORKERS}"]
        seeds = f"seed={','.join(map(str, SEEDS))}"
        return cli.main(["train", "--multirun", *SETTINGS, *jobs, seeds])

    return work


def torchrun_run(folder: Path) -> Callable[[], int]:
    """A run on two processes under torchrun's agent."""
    compose()

    def work() -> int:
        os.setsid()
        os.chdir(folder)
        launched(WORKERS, unasked_for, ("train", *SETTINGS, "run.dir=run"))
        return 0

    return work


def families(folder: Path, points: int, kind: str) -> None:
    """Kills the parent of joblib's workers, one of these, or torchrun's agent, with SIGKILL.

    Then all that was started must end by itself, and the same command end like an unkilled one.
    """
    make = torchrun_run if kind == "torchrun" else joblib_sweep
    torch.set_num_threads(1)
    count_batches()
    for name in ("warm", "whole"):
        (folder / name).mkdir()
        began = time.perf_counter()
        log = folder / f"{name}.log"
        assert end(start(make(folder / name), log)) == 0, log.read_text()
        seconds = time.perf_counter() - began
    whole, everything = outcomes(folder / "whole"), batches_done()
    draw, killed, slowest = random.Random(0), 0, 0.0
    for point in range(points):
        here, log = folder / str(point), folder / f"{point}.log"
        here.mkdir()
        child = start(make(here), log)
        moment = draw.uniform(0, seconds)
        if point % 2:
            until = time.monotonic() + 60
            batches = draw.randint(1, everything * 3 // 4)
            while batches_done() < batches and time.monotonic() < until:
                time.sleep(0.001)
            moment = draw.uniform(0, seconds / everything)
        time.sleep(moment)
        victims = forks_of(child) if kind == "worker" else [child]
        if victims:
            with suppress(ProcessLookupError):
                os.kill(draw.choice(victims), signal.SIGKILL)
        began = time.monotonic()
        status = end(child)
        killed += status != 0
        assert status in ((0, 1) if kind == "worker" else (0, -signal.SIGKILL)), (point, status)
        while left := session_of(child):
            assert time.monotonic() - began < _ENDS_WITHIN, (point, left, log.read_text())
            time.sleep(0.02)
        slowest = max(slowest, time.monotonic() - began)
        assert end(start(make(here), log)) == 0, (point, log.read_text())
        assert_same(outcomes(here), whole)
        shutil.rmtree(here)
        log.unlink()
    figures = {
        "points": points,
        "killed before the end": killed,
        "equal to the uninterrupted run": points,
        "seconds until nothing was left, most": round(slowest, 1),
        "seconds of an uninterrupted run": round(seconds, 2),
    }
    print(json.dumps(figures))


def forks_of(parent: int) -> list[int]:
    """The children of a process that run the same program."""
    found = []
    with suppress(OSError):
        program = Path(f"/proc/{parent}/cmdline").read_bytes()
        for number in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            if Path(f"/proc/{number}/cmdline").read_bytes() == program:
                found.append(int(number))
    return found


def session_of(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(int(path.parent.name))
    return found
