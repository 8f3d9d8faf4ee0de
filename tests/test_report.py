"""The comparison of runs against hand-computed numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from btrain.errors import UserError
from btrain.report import compare


def finished(folder: Path, seconds: float, device: str = "cpu") -> Path:
    folder.mkdir()
    summary = {
        "clean_acc": 84.916,
        "robust_acc": 56.61,
        "f_b": 0.28,
        "f_r": 0.54,
        "f_o": 0.18,
        "theoretical_speedup": 2.254,
        "train_seconds": seconds,
        "device": device,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_the_first_run_is_the_baseline(tmp_path: Path) -> None:
    table = compare([finished(tmp_path / "plain", 90.0), finished(tmp_path / "ours", 40.0)])
    head, ruler, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    )
    assert head[0] == "run"
    assert set("".join(ruler)) == {"-"}
    assert rows == [
        ["plain", "84.92", "56.61", "0.28", "0.54", "0.18", "2.25×", "90.0", "1.00×"],
        ["ours", "84.92", "56.61", "0.28", "0.54", "0.18", "2.25×", "40.0", "2.25×"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_times_of_different_devices_are_not_divided(tmp_path: Path) -> None:
    table = compare([finished(tmp_path / "a", 90.0), finished(tmp_path / "b", 4.0, "NVIDIA H200")])
    assert "other device" in table.splitlines()[-1]
    assert "22.50" not in table


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_folder_without_a_finished_run_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        compare([tmp_path])
