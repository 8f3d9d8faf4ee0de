"""Long runs in short: nothing grows. `make test-soak`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EPOCHS = 2000


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux' /proc")
def test_memory_and_open_files_stay_flat(tmp_path: Path) -> None:
    script = Path(__file__).with_name("soaking.py")
    command = [sys.executable, str(script), str(tmp_path), str(EPOCHS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=7200)
    assert result.returncode == 0, result.stderr[-4000:]
    print(result.stdout)
    tenths = [json.loads(line) for line in result.stdout.splitlines()]
    first, last = tenths[0], tenths[-1]
    assert last["open_files"] == first["open_files"]
    assert last["memory_mib"] - first["memory_mib"] < 10
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, EPOCHS + 1))
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2
