"""The files of the sheets: complete, self-contained, small, the same each time; and the watch."""

from __future__ import annotations

import io
import json
import os
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from btrain.cli import main
from btrain.errors import UserError
from btrain.pages.pictures import NO_MATPLOTLIB
from btrain.paper.plan import Claim, Plan
from btrain.paper.sheets import files
from btrain.paper.sheets.files import write_sheets
from btrain.paper.sheets.watch import progress
from btrain.runs import read as runs
from btrain.runs.read import Runs, read_run
from disks import full_disk
from sheets import begun, evaluated, finished, plan, row

HOSTILE = "</title><script>alert(1)</script>|*_`$x^2$ <img src=//evil.example onerror=x>"


def a_table(folder: Path) -> Plan:
    """Two rows of two seeds, one of which failed."""
    for seed in range(2):
        finished(folder / f"a-seed{seed}", robust=50.0 + seed)
        evaluated(folder / f"a-seed{seed}", "pgd20", [1, 0, 1, 0])
    finished(folder / "b-seed0", robust=48.0, seconds=50)
    evaluated(folder / "b-seed0", "pgd20", [1, 1, 0, 0])
    begun(folder / "b-seed1", log="failed: The disk is full.", epochs=3)
    rows = [row("a", 2, paper={"robust_acc": 56.0}), row("b", 2, label="B")]
    claims = [Claim("b is above a", "robust_acc", "b", "a", at_least=0)]
    found = plan(rows, claims)
    found.write(folder)
    return found


def test_a_table_leaves_every_file_and_an_index(tmp_path: Path) -> None:
    a_table(tmp_path)
    written = write_sheets(tmp_path, tmp_path / "out")
    kinds = ("csv", "html", "json", "md", "png", "svg")
    names = {f"table9.{kind}" for kind in kinds} | {"index.html"}
    assert (
        {path.name for path in written} == names == {p.name for p in (tmp_path / "out").iterdir()}
    )
    shown = (tmp_path / "out" / "table9.md").read_text()
    assert "seed 1 failed: “The disk is full.”" in shown
    assert "![Table 9](table9.png)" in shown
    index = (tmp_path / "out" / "index.html").read_text()
    assert "1 of 2 rows done, 3 of 4 runs finished, 1 failed" in index
    assert 'href="table9.html"' in index


def test_no_text_of_a_plan_or_log_becomes_markup(tmp_path: Path) -> None:
    finished(tmp_path / "a-seed0")
    begun(tmp_path / "a-seed1", log=f"failed: {HOSTILE}")
    hostile = row("a", 2, label=HOSTILE, original={"dataset": HOSTILE})
    claims = [Claim(HOSTILE, HOSTILE, "a", at_least=0)]
    plan([hostile], claims, title=HOSTILE, note=HOSTILE, profile=HOSTILE).write(tmp_path)
    write_sheets(tmp_path, tmp_path / "out")
    for name in ("table9.html", "index.html"):
        content = (tmp_path / "out" / name).read_text()
        assert "<script" not in content
        assert re.findall(r'<img src="(?!data:)', content) == []
        assert (
            re.findall(r"(?:src|href)=.?(?:https?:)?//", content.replace("&lt;img src=//", ""))
            == []
        )
    shown = (tmp_path / "out" / "table9.md").read_text()
    assert r"\<script\>" in shown
    assert re.findall(r"(?<!\\)[<|]script", shown) == []


def test_nothing_is_written_where_one_file_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_table(tmp_path)
    out = tmp_path / "out"
    write_sheets(tmp_path, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    finished(tmp_path / "a-seed9")
    (tmp_path / "a-seed0" / "summary.json").unlink()
    with full_disk(monkeypatch, after=3), pytest.raises(UserError, match="No space left"):
        write_sheets(tmp_path, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_without_matplotlib_the_numbers_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a_table(tmp_path)
    write_sheets(tmp_path, tmp_path / "report")
    monkeypatch.setattr(files, "is_available", lambda: False)
    assert main(["report", str(tmp_path)]) == 0
    assert NO_MATPLOTLIB in capsys.readouterr().out
    kinds = {path.suffix for path in (tmp_path / "report").iterdir()}
    assert kinds == {".csv", ".html", ".json", ".md"}  # and no picture of an earlier report
    assert "need matplotlib" in (tmp_path / "report" / "table9.html").read_text()


def test_the_command_writes_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_table(tmp_path)
    replace(plan([row("z")]), target="table10").write(tmp_path)
    (tmp_path / "other.json").write_text("[]")
    assert main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "# Table 9" in shown and "| B " in shown
    assert (tmp_path / "report" / "table10.md").is_file()
    assert main(["report", str(tmp_path), "target=table9", f"out={tmp_path / 'x'}"]) == 0
    assert {path.stem for path in (tmp_path / "x").iterdir()} == {"table9", "index"}
    assert main(["report", str(tmp_path), "target=table7"]) == 1
    assert "there are: table10, table9" in capsys.readouterr().err


def test_a_damaged_plan_is_named_and_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table2.json").write_text('{"target": "table2", ')
    for arguments in ([], ["target=table2"], ["--watch"]):
        assert main(["report", str(tmp_path), *arguments]) == 1
        assert "table2.json is no plan" in capsys.readouterr().err
    a_table(tmp_path)
    assert main(["report", str(tmp_path)]) == 1  # and is not left out without a word
    assert not (tmp_path / "report").exists()
    assert main(["report", str(tmp_path), "target=table9"]) == 0
    assert (tmp_path / "report" / "table9.md").is_file()


def test_a_report_does_not_replace_the_plans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_table(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*") if path.is_file()}
    assert main(["report", str(tmp_path), f"out={tmp_path / 'a' / '..'}"]) == 1
    assert "holds the plans" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--watch", "."], "holds no plan"),
        ([".", "target=table2"], "holds no plan"),
        ([".", "target="], "target needs a value"),
        ([".", "report.watch=maybe"], "report.watch is true or false"),
        (["--wach", "."], "report has no option --wach"),
        (["--watch", "a", "b"], "one folder of plans at a time"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 1
    assert said in capsys.readouterr().err


def test_a_run_that_sheets_share_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(folder: Path) -> runs.Run:
        read.append(folder.name)
        return read_run(folder)

    monkeypatch.setattr(runs, "read_run", counted)
    for name in "abc":
        finished(tmp_path / f"{name}-seed0")
    plan([row("a"), row("b")]).write(tmp_path)
    replace(plan([row("b"), row("c")]), target="table8").write(tmp_path)
    known = Runs()
    for target in ("table8", "table9"):
        write_sheets(tmp_path, tmp_path / "out", [target], known.read)
    assert sorted(read) == ["a-seed0", "b-seed0", "c-seed0"]
    evaluated(tmp_path / "b-seed0", "pgd20", [1, 0])
    write_sheets(tmp_path, tmp_path / "out", read=known.read)
    assert sorted(read) == ["a-seed0", "b-seed0", "b-seed0", "c-seed0"]


def test_the_watch_counts_and_tells_the_time_left(tmp_path: Path) -> None:
    for seed, seconds in enumerate((100.0, 140.0)):
        evaluated(finished(tmp_path / f"a-seed{seed}", seconds=seconds), "pgd20", [1, 0])
    finished(tmp_path / "b-seed0", seconds=1.0)  # trained, not evaluated yet
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": "now"}
    (begun(tmp_path / "b-seed1", epochs=5) / "run.lock").write_text(json.dumps(holder))
    begun(tmp_path / "c-seed0", log="failed: The disk is full.")
    rows = [row(name, 2, attacks=["pgd20"]) for name in "abc"]
    found = progress(plan(rows, attacks=["pgd20"]), tmp_path, Runs())
    assert (found.rows_done, found.rows, found.done, found.runs) == (1, 3, 2, 6)
    assert (found.trained, found.running, found.failed, found.left) == (1, 1, 1, 3)
    # A run takes 120 s to train and 5 s to evaluate; left are b-seed0's evaluation, half of b-seed1
    # and all of c-seed1, one after the other.
    assert found.seconds_left == pytest.approx(5 + (60 + 5) + (120 + 5))


def test_the_watch_reads_a_finished_run_again_only_when_it_changed(tmp_path: Path) -> None:
    folder = finished(tmp_path / "a-seed0", seconds=100.0)
    begun(tmp_path / "b-seed0", epochs=5)
    runs = Runs()
    first, running = runs.read(folder), runs.read(tmp_path / "b-seed0")
    assert runs.read(folder) is first
    assert runs.read(tmp_path / "b-seed0") is not running
    table = plan([row("a", attacks=["pgd20"])], attacks=["pgd20"])
    assert progress(table, tmp_path, runs).done == 0
    evaluated(folder, "pgd20", [1, 0])
    assert progress(table, tmp_path, runs).done == 1
    evaluated(folder, "pgd100x10", [1, 0], inside="eval/dataset.test_examples_2")
    assert runs.read(folder).evaluated("pgd100x10") == 50
    (folder / "summary.json").unlink()  # it is trained for longer
    assert runs.read(folder).state == "unfinished"
    assert progress(table, tmp_path, runs).done == 0


@pytest.mark.parametrize("option", ["--watch", "report.watch=true"])
def test_the_watch_shows_one_state_where_nobody_looks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    a_table(tmp_path)
    assert main(["report", option, str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.split(r"\s{2,}", line) for line in lines] == [
        ["target", "rows done", "runs done", "to evaluate", "running", "failed", "missing", "left"],
        ["table9", "1 of 2", "3 of 4", "0", "0", "1", "0", "0 s"],
    ]


def test_a_live_watch_ends_when_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    a_table(tmp_path)
    waiting = tmp_path / "b-seed1"
    (waiting / "train.log").unlink()
    terminal, naps = Terminal(), []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        (waiting / "train.log").write_text("2026-01-01 10:00:00,000 failed: The disk is full.\n")

    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("time.sleep", nap)
    assert main(["report", "--watch", str(tmp_path)]) == 0
    assert len(naps) == 1
    assert terminal.getvalue().count("table9") == 2
