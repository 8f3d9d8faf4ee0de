"""Ctrl-C while modules are imported, and terminals whose encoding lacks our signs."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from btrain import terminal

_READY = """
import signal, sys
from btrain import __main__ as entry
signal.signal(signal.SIGINT, entry._interrupt)
print("ready", flush=True)
entry.run()
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_while_libraries_are_imported_ends_with_130_and_no_traceback(tmp_path: Path) -> None:
    ends = []
    for press in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", _READY, "eval", "checkpoint=nowhere"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1 * press)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        ends.append((process.returncode, err))
    finished = (1, "btrain: checkpoint=nowhere does not exist.\n")
    told = ("btrain: interrupted.\n", "btrain: interrupted; the same command goes on from what is ")
    for status, err in ends:
        interrupted = status == 130 and err.startswith(told) and err.count("\n") == 1
        # Behind its work a process is left to the signal itself.
        assert interrupted or (status, err) == finished or status == -signal.SIGINT, (status, err)
    assert sum(status == 130 for status, _ in ends) >= 3


def test_what_an_encoding_lacks_is_spelt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    terminal.spell_out()
    terminal.show("10.00 ± 0.50 %, ε ≤ 8/255 …\n2.00× für 学")
    terminal.complain("“é”")
    texts = [stream.buffer.getvalue() for stream in streams if stream.flush() is None]
    out = b"10.00 +- 0.50 %, eps <= 8/255 ...\n2.00x f\\xfcr \\u5b66\n"
    assert texts == [out, b'btrain: "\\xe9"\n']


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["paper", "--help"]])
def test_help_in_a_locale_without_unicode(arguments: list[str]) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "btrain", *arguments],
        env={**os.environ, **plain},
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"..." in done.stdout
    assert done.stdout.isascii()


def test_a_size_is_told_in_the_unit_that_suits_it() -> None:
    sizes = (65, 19_500, 1_500_000, 153_600_000, 2.5e9)
    told = ["65 bytes", "20 kB", "1.5 MB", "153.6 MB", "2.5 GB"]
    assert [terminal.sized(size) for size in sizes] == told
