"""A bounded number of damaged and hostile files for every reader; `make test-fuzz` reads more."""

from __future__ import annotations

import pytest

from fuzz.__main__ import READERS, run

INPUTS = 300
MEMORY = 256 << 20
"""Bytes beyond what a process has that has read a few files already."""


@pytest.mark.skipif("sys.platform != 'linux'", reason="the limit of memory is Linux'")
def test_no_damaged_file_does_harm() -> None:
    results = run([*READERS], 0, INPUTS)
    assert [*results] == [*READERS]
    for name, result in results.items():
        assert not result["failures"], (name, result["failures"])
        assert result["accepted"] + result["refused"] == INPUTS
        assert min(result["accepted"], result["refused"]) > 0.01 * INPUTS, name
        assert result["memory"] < MEMORY, name
