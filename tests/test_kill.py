"""Runs that are killed at random moments end like runs that are not; `make test-kill` does 100."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from killing import families, main
from test_training import TINY
from torchrun import in_a_fork


def killing(folder: Path, points: int, what: str, how: str) -> None:
    figures(f"{what}, SIG{how}", folder, points, main, what, signal.Signals[f"SIG{how}"])


def figures(name: str, folder: Path, points: int, work: Callable[..., None], *args: object) -> None:
    said = folder / "said"
    process = in_a_fork(work, folder, points, *args, said=said)
    process.join(7200)
    assert process.exitcode == 0, said.read_text()[-4000:]
    figures = json.loads(said.read_text().splitlines()[-1])
    print(f"{name}: {figures}")
    assert figures["equal to the uninterrupted run"] == points
    assert figures["killed before the end"] >= points / 2


CASES = [("run", "KILL", 10), ("run", "TERM", 2), ("sweep", "KILL", 2)]


@pytest.mark.parametrize(("what", "how", "points"), CASES)
def test_a_killed_run_ends_like_another(tmp_path: Path, what: str, how: str, points: int) -> None:
    killing(tmp_path, points, what, how)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "how"), [case[:2] for case in CASES])
def test_a_hundred_killed_runs_end_like_another(tmp_path: Path, what: str, how: str) -> None:
    killing(tmp_path, 100, what, how)


needs_linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux' /proc")


@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize("kind", ["parent", "worker", "torchrun"])
def test_nothing_outlives_a_hundred_killed_parents_and_workers(tmp_path: Path, kind: str) -> None:
    figures(kind, tmp_path, 100, families, kind)


KILL_LOGGER = """
import os, signal, sys
from pathlib import Path
from btrain import cli
from btrain.training.state import TrainState

end_epoch = TrainState.end_epoch

def end_epoch_and_kill(state):
    end_epoch(state)
    for entry in Path("/proc").glob("[0-9]*/stat") if state.epoch == 2 else ():
        _, name, rest = entry.read_text().replace(")", "(").split("(")
        if name.startswith("wandb") and rest.split()[1] == str(os.getpid()):
            os.kill(int(entry.parent.name), signal.SIGKILL)

TrainState.end_epoch = end_epoch_and_kill
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@needs_linux
def test_a_logger_s_killed_process_does_not_end_the_run(tmp_path: Path) -> None:
    arguments = [*TINY, "train.epochs=4", "logger=wandb", "logger.mode=offline", "run.dir=run"]
    result = subprocess.run(
        [sys.executable, "-c", KILL_LOGGER, "train", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0
    assert result.stderr.count("logger=wandb failed") == 1
    assert "Traceback" not in result.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 4
