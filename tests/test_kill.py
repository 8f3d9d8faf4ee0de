"""Runs that are killed at random moments end like runs that are not; `make test-kill` does 100."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def killing(folder: Path, points: int, what: str, how: str) -> None:
    script = Path(__file__).with_name("killing.py")
    command = [sys.executable, str(script), str(folder), str(points), what, how]
    result = subprocess.run(command, capture_output=True, text=True, timeout=7200)
    assert result.returncode == 0, result.stderr[-4000:]
    figures = json.loads(result.stdout)
    print(f"{what}, SIG{how}: {figures}")
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
