"""The networks in results/weights are as good as their cards say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from btrain.cli import main

WEIGHTS = Path(__file__).parents[1] / "results" / "weights"
VERIFIED = {"mnist_crown_ibp": ["verify=crown_ibp"]}


@pytest.mark.parametrize("name", ["mnist_bullettrain", "mnist_crown_ibp"])
def test_the_card_tells_what_an_evaluation_finds(name: str, tmp_path: Path) -> None:
    file = WEIGHTS / f"{name}.pt"
    assert file.stat().st_size < 300_000
    words = [f"checkpoint={file}", f"out={tmp_path}", "attack=clean,pgd20", "sanity=false"]
    assert main(["eval", *words, *VERIFIED.get(name, [])]) == 0
    card = (WEIGHTS / f"{name}.pt.md").read_text()
    told = dict(re.findall(r"^\| (\S+) \(btrain eval\) +\| ([\d.]+) ", card, re.MULTILINE))
    found = {
        path.stem: json.loads(path.read_text())["accuracy"] for path in tmp_path.glob("*.json")
    }
    assert {"clean", "pgd20"} <= found.keys() <= told.keys() | {"verified_and_broken"}
    for attack, accuracy in found.items():
        # Another processor rounds otherwise: an image or two of the 2,000.
        assert accuracy == pytest.approx(float(told[attack]), abs=0.1)
