"""A plan from a stranger: every value is checked, and nothing of it moves a cursor."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from btrain.errors import UserError
from btrain.paper.plan import KINDS, chosen, plans_in, read_plan
from btrain.paper.sheets.files import as_csv, as_json, markdown, sheet_files, sheet_page
from btrain.paper.sheets.sheet import make_sheet
from fuzz.texts import plan_content, unshowable

VALUES: tuple[Any, ...] = (
    None, True, -1, 1.5, 1e308, 10**400, float("nan"), "", "\0", "\x1b]0;a\x07", "a\n| b |",
    "\u202eb", "../up", "/", "x" * 3000, [], {}, [[]], {"a": {"b": []}},
)  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the places of all values, containers among them."""
    for key in [*node] if isinstance(node, dict) else range(len(node)):
        yield (*path, key)
        if isinstance(node[key], dict | list):
            yield from places(node[key], (*path, key))


def mutations() -> Iterator[Any]:
    """Yield the sound plan with one value of another kind, or one missing, or one too many."""
    for path in places(plan_content()):
        for value in (..., *VALUES):
            content = copy.deepcopy(plan_content())
            node = content
            for key in path[:-1]:
                node = node[key]
            if value is ...:
                del node[path[-1]]
            else:
                node[path[-1]] = value
                if isinstance(node, dict):
                    node["\x1b[31m"] = value
            yield content
            if isinstance(node, dict):
                node.pop("\x1b[31m", None)
                yield content


def test_a_plan_of_other_values_is_shown_or_refused_in_a_sentence(tmp_path: Path) -> None:
    path, read = tmp_path / "table9.json", 0
    for content in mutations():
        path.write_text(json.dumps(content))
        try:
            plan = read_plan(path)
        except UserError as error:
            assert str(error).startswith(f"{path} is no plan of a table or figure: ")
            assert str(error).isprintable()
            continue
        read += 1
        sheet = make_sheet(plan, tmp_path)
        for text in (markdown(sheet), as_csv(sheet), as_json(sheet), sheet_page(sheet, None, "")):
            assert not unshowable(text)
    assert read > 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes", [{}, {"title": "\x1b]0;a\x07\u202e", "note": "\x9b"}, {"rows": [], "claims": []}]
)
def test_every_kind_of_picture_shows_it(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    path = tmp_path / "table9.json"
    path.write_text(json.dumps(plan_content() | {"kind": kind} | changes))
    for name, content in sheet_files(make_sheet(read_plan(path), tmp_path)).items():
        if not name.endswith(".png"):
            assert not unshowable(content.decode()), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "pie"}, r"kind is 'pie', not one of table, heatmaps"),
        ({"rows": [{}]}, r"rows\[0\]\.swept is no JSON object"),
        ({"attacks": [1]}, r"attacks\.0 is 1, not a name"),
        ({"target": "\n"}, r"target is '.+', not a name"),
        ({"more": 1}, r"more is 1, not known"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = tmp_path / "table9.json"
    path.write_text(json.dumps(plan_content() | changes))
    with pytest.raises(UserError, match=rf"table9\.json is no plan of a table or figure: {words}"):
        read_plan(path)
    with pytest.raises(UserError, match="holds no plan"):
        chosen(plans_in(tmp_path), None, tmp_path)
