"""Names and words of strangers on the terminal, in the log and in tables."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

import btrain
from btrain.cli import main
from btrain.errors import printable
from btrain.pages.pictures import drawn
from btrain.pages.tables import comma_separated, markdown, text
from btrain.runs.folder import RunFolder
from btrain.runs.json_fields import dumped
from fuzz.texts import unshowable

HOSTILE = [
    "\x1b[31m", "\x1b]0;title\x07", "\x9b1m", "\u202etxt", "\u2066a", "a\n| b | 99.99 |", "a\rb",
    "a\u2028b", "\ud800", "\x7f", "\b\b", "a\tb", "\u200b",
]  # fmt: skip
SUMMARY = dict.fromkeys(
    ("clean_acc", "robust_acc", "f_b", "f_r", "f_o", "theoretical_speedup", "train_seconds"), 1.0
) | {"device": "cpu"}


@pytest.mark.parametrize("words", HOSTILE)
def test_text_is_one_line_that_moves_nothing(words: str) -> None:
    assert printable(words).isprintable()
    assert printable("Straße 80 % ≥ γ – 中文 😀") == "Straße 80 % ≥ γ – 中文 😀"
    assert printable("a\n\x1b", kept="\n", instead="?") == "a\n?"


@pytest.mark.parametrize("words", HOSTILE)
def test_tables_have_the_rows_that_were_made(words: str) -> None:
    for made, lines in ((markdown, 3), (text, 2), (comma_separated, 2)):
        shown = made(["a", "b"], [[words, words]]).rstrip("\n")
        assert not unshowable(shown)
        assert len(shown.split("\n")) == lines
    assert json.loads(dumped({words: [words]}, indent=1)) == {words: [words]}
    assert not unshowable(dumped({words: [words]}, indent=1))


@pytest.mark.parametrize("words", HOSTILE)
def test_the_log_is_shown_line_by_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    with RunFolder(tmp_path).log_file():
        logging.getLogger("btrain").warning("%s: no image.", words)
    for said in ((tmp_path / "train.log").read_text(), capsys.readouterr().err):
        assert len(said.splitlines()) == 1
        assert not unshowable(said)


@pytest.mark.parametrize("words", [w for w in HOSTILE if w != "\ud800"])
def test_names_of_folders_forge_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    for name in ("sound", words):
        (tmp_path / "runs" / name).mkdir(parents=True)
        seed = {"seed": 0, "device": words}
        (tmp_path / "runs" / name / "summary.json").write_text(json.dumps(SUMMARY | seed))
    assert main(["report", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert not unshowable(out)
    assert len([line for line in out.splitlines() if line.startswith("|")]) == 4
    assert len(out.splitlines()) == 6  # and what both rows share
    for arguments in (["report", str(tmp_path / words)], [words], ["eval", f"checkpoint={words}"]):
        assert main(arguments) in (1, 2)
        err = capsys.readouterr().err
        assert not unshowable(err)
        assert len(err.splitlines()) == 1


def test_an_error_of_the_system_names_its_file_on_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: list[str]) -> None:
        raise OSError(5, "Input/output error", "a\x1b[31m\nb")

    monkeypatch.setitem(btrain.cli.COMMANDS, "report", fail)
    assert main(["report"]) == 1
    assert capsys.readouterr().err == "btrain: a\\x1b[31m\\nb: Input/output error.\n"


def test_a_drawing_moves_nothing() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.text(0, 0, "\u202ea")
    assert not unshowable(drawn(figure, "svg").decode())


def test_no_print_goes_around_it() -> None:
    """Only btrain.terminal prints or writes to the streams of the process."""
    going_around = re.compile(r"(?<![\w.])print\(|sys\.(__)?std(out|err)(__)?\.write|tqdm\.write")
    source = Path(btrain.__file__).parent
    found = [
        f"{path.relative_to(source)}: {line.strip()}"
        for path in source.rglob("*.py")
        for line in path.read_text().splitlines()
        if path.name != "terminal.py" and going_around.search(line)
    ]
    assert found == []
