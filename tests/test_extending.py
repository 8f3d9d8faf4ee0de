"""docs/extending.md: its files are written, its commands run, its code is short.

Its trainings are cut to an epoch but for those of its own data, which learn what the page says.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from btrain.cli import main

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
_BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LONGEST = 15  # lines


def test_the_page_of_own_parts_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    commands, scripts = [], []
    for kind, name, text in _BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        assert text.count("\n") <= _LONGEST, name
        if kind == "sh":
            commands += text.splitlines()
            continue
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        scripts += [file] if name == "use.py" else []
    assert len(commands) >= 6
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "btrain"
        if "run.dir=runs/data" not in words:
            words = [re.sub(r"^train\.epochs=\d+$", "train.epochs=1", word) for word in words]
        assert main(words) == 0, command
    summary = json.loads((tmp_path / "runs" / "data" / "summary.json").read_text())
    assert summary["clean_acc"] > 95
    assert summary["robust_acc"] > 95
    (script,) = scripts
    capsys.readouterr()
    runpy.run_path(str(script))
    assert float(capsys.readouterr().out.splitlines()[-1]) > 95
