"""Rooms import from the rooms below them alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import btrain

ROOT = Path(btrain.__file__).parent

LAYERS = [
    ["errors", "lazy"],
    ["durable", "own", "pages", "terminal", "untrusted"],
    ["settings"],
    ["precision", "allocation", "data", "models", "corruptions", "processes"],
    ["attacks", "defenses", "verify"],
    ["controllers", "methods", "build"],
    ["runs", "exchange", "evaluation"],
    ["training"],
    ["bench", "paper", "report"],
    ["cli", "completion", "__main__", "__init__"],
]
"""From the lowest to the highest; rooms of one layer may import from each other."""

HEIGHT = {room: height for height, layer in enumerate(LAYERS) for room in layer}
APART = {"bench", "paper", "report"}
"""They import from the rooms below and not from each other; the command line alone uses them."""


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("btrain.")}
    return found & HEIGHT.keys()


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_from_below(path: Path) -> None:
    own = room(path)
    for other in imported(path) - {own}:
        assert HEIGHT[other] <= HEIGHT[own], f"{own} imports from {other}, which lies above it"
        assert not {own, other} <= APART, f"{own} imports from {other}"
