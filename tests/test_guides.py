"""The commands of docs/guides run, in their order, on few images and small networks."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from btrain.cli import main

GUIDES = Path(__file__).parents[1] / "docs" / "guides"
TOLD = set(re.findall(r"`(\w+)`", (GUIDES.parent / "files.md").read_text(encoding="utf-8")))
"""The keys that the page of files explains."""
_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FOLDER = ("dataset=imagefolder", "dataset.root=my_images", "dataset.test_examples=4")
_SMALL = {
    "train": ("train.epochs=1", "dataset.train_examples=40", "dataset.test_examples=4",
              "bt.probe_every=0", "eval.steps=2"),
    "plan": ("train.epochs=1", "train.batch_size=10", "dataset.train_examples=40"),
    "eval": ("sanity=false", "device=cpu"),
}  # fmt: skip
"""Words that make a command quick, where it does not have words of its own for them."""
_ELSEWHERE = "format=onnx"  # six seconds, and in tests/test_export.py
_SMALLER = {
    "dataset=mnist_sample": ("dataset=digits",),
    "dataset=cifar10": _FOLDER,
    "model=preact_resnet18": ("model=preact_resnet18", "model.width=8"),
    "model=wrn_28_10": ("model=wrn_28_10", "model.depth=10", "model.width=1"),
    "dataset.train_examples=1000": (),
    "dataset.val_examples=500": ("dataset.val_examples=8",),
    "device=cuda": ("device=cpu",),
}
"""The words that stand for one of a guide: another data set, a smaller network, this machine."""


def quick(command: str) -> list[str]:
    """Return a guide's command as it is run here, on few images."""
    program, task, *words = shlex.split(command)
    assert program == "btrain"
    words = [short for word in words for short in _SMALLER.get(word, (word,))]
    if task in ("train", "plan") and not any(word.startswith("dataset=") for word in words):
        words += _FOLDER
    if words[:1] == ["compare"]:
        return [task, *words]
    given = {word.split("=")[0] for word in words}
    return [task, *words, *(word for word in _SMALL.get(task, ())
                            if word.split("=")[0] not in given)]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a working folder with the images that the guides speak of."""
    generator = np.random.default_rng(0)
    for part, first in (("train", 1), ("test", 101)):
        for bright, name in enumerate(("cat", "dog")):
            place = tmp_path / "my_images" / part / name
            place.mkdir(parents=True)
            for number in range(first, first + 30):
                pixels = generator.integers(128, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels + 100 * np.uint8(bright)).save(place / f"{number:03}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", sorted(GUIDES.glob("*.md")), ids=lambda page: page.stem)
def test_the_commands_of_a_guide_run(page: Path, folder: Path) -> None:
    """Those marked `sh` and `python` run; what needs a cluster or more packages is not marked."""
    if page.stem in ("evaluate", "export"):  # they begin with a trained network
        # At this ε no image stands under PGD, so that the stronger attacks have nothing to do.
        network = ("dataset=digits", "model=small_cnn", "attack.epsilon=0.8")
        assert main(["train", *network, "run.dir=runs/mine", *_SMALL["train"]]) == 0
    blocks = _BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks
    for kind, text in blocks:
        if kind == "python":
            exec(text, {})
            continue
        for command in text.splitlines():
            if _ELSEWHERE not in command:
                assert main(quick(command)) == 0, command
    for run in (folder / "runs").glob("*/summary.json"):
        assert json.loads(run.read_text()).keys() <= TOLD
        for line in (run.parent / "metrics.jsonl").read_text().splitlines():
            assert json.loads(line).keys() <= TOLD
