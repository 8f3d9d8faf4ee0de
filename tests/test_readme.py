"""The code of the README and of docs/ runs, its commands compose, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from btrain.config import compose
from btrain.data import Data
from btrain.eval_config import parse, parse_compare

ROOT = Path(__file__).parents[1]
PAGES = {
    page: page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
LINES = [line for text in PAGES.values() for line in text.splitlines()]
COMMANDS = [
    (task, line.split("#")[0].removeprefix(command).strip())
    for task, command in (("train", "btrain train "), ("corrupt", "btrain data corrupt "))
    for line in LINES
    if line.startswith(command) and "--help" not in line
]
EVALUATIONS = [
    line.split("#")[0].split("btrain eval ", 1)[1].strip()
    for line in LINES
    if line.startswith("btrain eval ")
]


def python_of(page: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", PAGES[ROOT / page], re.DOTALL)
    return code


def test_the_library_example_trains(digits: Data) -> None:
    code = python_of("README.md")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    images, labels = digits.train.images.float() / 255, digits.train.labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    loader = [(images[part], labels[part]) for part in order.split(32)] * 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {"model": model, "loader": loader, "optimizer": optimizer}
    exec(code, names)
    accuracy = (model(images).argmax(dim=1) == labels).float().mean()
    assert accuracy > 0.7
    assert 0.3 < float(names["robust_fraction"]) <= 0.8  # type: ignore[arg-type]


def test_any_module_is_evaluated(digits: Data, capsys: pytest.CaptureFixture[str]) -> None:
    code = python_of("docs/evaluation.md")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    images = digits.test.images.float() / 255
    labels = model(images).argmax(dim=1)  # untrained, it guesses the digits' own
    exec(code, {"model": model, "images": images, "labels": labels})
    assert "a black-box attack is no stronger than PGD" in capsys.readouterr().out


@pytest.mark.parametrize("command", EVALUATIONS)
def test_evaluations_parse(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "compare":
        parse_compare(words[1:])
    else:
        parse(words)


@pytest.mark.parametrize(("task", "command"), COMMANDS)
def test_commands_compose(task: str, command: str) -> None:
    overrides = [word for word in shlex.split(command) if word != "--multirun"]
    compose([re.sub(r"=([^,\[]+),.*", r"=\1", override) for override in overrides], task)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 5
    assert len(EVALUATIONS) >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGES[page]):
        assert (page.parent / target).exists(), target
