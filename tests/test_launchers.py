"""Sweeps whose jobs run in processes of their own: joblib's launcher and submitit's."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from btrain.cli import main
from btrain.errors import Interrupted, UserError
from btrain.training.safety.finite import NotFiniteError
from torchrun import in_a_fork, with_forked_jobs

installed = pytest.mark.skipif(
    find_spec("hydra_plugins.hydra_joblib_launcher") is None
    or find_spec("hydra_plugins.hydra_submitit_launcher") is None,
    reason="the extra `sweep` is not installed",
)

SWEEP = [
    "train", "--multirun", "dataset=digits", "model=small_cnn",
    "model.width=4", "dataset.test_examples=50", "eval.steps=2", "device=cpu",
]  # fmt: skip
SAID = Path("said")
JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
SUBMITIT = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"]


@installed
@pytest.mark.parametrize(
    ("launcher", "jobs"), [(JOBLIB, 2), (SUBMITIT, None)], ids=["joblib", "submitit_local"]
)
def test_a_bad_job_says_so_once_and_leaves_the_good_one(
    launcher: list[str], jobs: int | None, here: Path
) -> None:
    option = here / "mine" / "model" / "thin.yaml"  # which a new interpreter has to find
    option.parent.mkdir(parents=True)
    option.write_text("defaults:\n  - small_cnn\n\nwidth: 4\n")
    words = [word for word in SWEEP if not word.startswith("model")]
    settings = ["model=thin", "--config-dir", "mine", "dataset.train_examples=100",
                "train.epochs=1", "run.dir=runs/${bt.gamma}"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "btrain", *words, *launcher, *settings, "bt.gamma=2,0.8"],
        capture_output=True, text=True,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert said.count("btrain: bt.gamma must be in (0, 1], not 2.0.") == 1
    assert "Traceback" not in said
    assert "\nbt.gamma=0.8 " in done.stdout and "1 of 2 runs did not finish:" in done.stdout
    assert json.loads(Path("runs/0.8/summary.json").read_text())["epochs"] == 1
    assert not Path("runs/2").exists()
    (session,) = json.loads(Path("runs/0.8/provenance.json").read_text())["sessions"]
    assert session["jobs"] == jobs
    assert {"bt.gamma=0.8", "run.dir=runs/${bt.gamma}"} < {*session["overrides"]}


IDLE = """
import os, signal
from joblib import Parallel, delayed
from btrain.processes.parent import watched_workers
with watched_workers(os.getpid()):
    workers = set(Parallel(n_jobs=2)(delayed(os.getpid)() for _ in range(8)))
    print(*workers, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@installed
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux' /proc")
def test_workers_without_a_job_end_with_the_sweep(here: Path) -> None:
    with Path("said").open("w+") as file:  # a pipe would stay open as long as the workers
        subprocess.run([sys.executable, "-c", IDLE], stdout=file, stderr=subprocess.DEVNULL)
        file.seek(0)
        workers, until = file.readline().split(), time.monotonic() + 30
    assert workers
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < until  # joblib itself waits for five minutes
        time.sleep(0.1)


@installed
@pytest.mark.parametrize(
    ("kill", "status", "sentence", "times"),
    [
        (lambda sweep, job: os.kill(job, signal.SIGKILL), 1, "a job of the sweep ended without", 1),
        (lambda sweep, job: os.kill(sweep, signal.SIGTERM), 143, "stopped by SIGTERM", 1),
        (lambda sweep, job: os.killpg(sweep, signal.SIGINT), 130, "the same command goes on", 1),
        (lambda sweep, job: os.kill(sweep, signal.SIGKILL), -9, "is gone; so this one ends", 2),
    ],
    ids=["job killed", "SIGTERM to the sweep", "Ctrl-C", "sweep killed"],
)
def test_the_end_of_a_sweep_ends_its_jobs_and_they_can_go_on(
    kill: Callable[[int, int], None], status: int, sentence: str, times: int, here: Path
) -> None:
    settings = ["train.epochs=2000", "seed=0,1", "run.dir=runs/s${seed}"]
    sweep = in_a_fork(with_forked_jobs, (*SWEEP, *JOBLIB, *settings), said=SAID)
    folders = [Path(f"runs/s{seed}") for seed in (0, 1)]
    until = time.monotonic() + 120
    while not all((folder / "checkpoints/last.pt").exists() for folder in folders):
        assert sweep.exitcode is None and time.monotonic() < until
        time.sleep(0.1)
    jobs = [json.loads((folder / "run.lock").read_text())["pid"] for folder in folders]
    assert sweep.pid is not None and sweep.pid not in jobs
    kill(sweep.pid, jobs[0])
    sweep.join(60)
    assert sweep.exitcode == status
    for job in jobs:
        with pytest.raises(ProcessLookupError):
            while time.monotonic() < until + 60:
                os.kill(job, 0)
                time.sleep(0.1)
    said = SAID.read_text()
    assert sum(sentence in line for line in said.splitlines() if "btrain: " in line) == times
    assert "Traceback" not in said


def test_a_launcher_that_is_not_installed_is_named_with_its_extra(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--multirun", "hydra/launcher=pigeon", "seed=0,1"]) == 1
    assert "hydra/launcher=pigeon is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [UserError("x"), Interrupted(15), NotFiniteError("x", {"x": torch.zeros(1)})]
)
def test_what_ends_a_job_travels_between_processes(error: BaseException) -> None:
    twin = pickle.loads(pickle.dumps(error))
    assert (type(twin), str(twin), vars(twin)) == (type(error), str(error), vars(error))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path
