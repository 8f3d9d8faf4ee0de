"""Loading the user's own code: what is imported, when, and what is said where it cannot be."""

from __future__ import annotations

import hashlib
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from btrain import own
from btrain.errors import UserError

MINE = """\
import beside

class Thing:
    def __init__(self, classes, width=8):
        self.made = (classes, width, beside.ONE)

def picky(width, *, depth):
    return width, depth

def open_to_all(**settings):
    return settings

def fails(width):
    return 1 / width

number = 3

class Network:
    def __call__(self, x): return x
    def state_dict(self): return {}

network = Network()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an own file and its neighbour."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "beside.py").write_text("ONE = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    monkeypatch.setattr(own, "_allowed", set())
    return tmp_path


def called(factory: str, settings: dict[str, Any] | None = None, **known: Any) -> Any:
    own.allow(factory)
    return own.call("model", factory, settings or {}, **known)


def test_a_factory_gets_its_settings_and_what_it_wants_to_know(here: Path) -> None:
    assert called("mine.py:Thing", {"width": 2}, classes=7, shape=(1, 2, 3)).made == (7, 2, 1)
    assert called("mine.py:open_to_all", {"a": 1}, classes=7) == {"a": 1}
    thing = called("mine.py:Thing", classes=1)
    assert pickle.loads(pickle.dumps(thing)).made == thing.made
    (here / "package").mkdir()
    (here / "package" / "__init__.py").write_text("")
    (here / "package" / "part.py").write_text("def make(classes): return classes\n")
    assert called("package.part:make", classes=4) == 4


def test_a_changed_file_is_executed_again_and_its_hash_is_that_of_what_ran(here: Path) -> None:
    before = called("mine.py:picky", {"width": 1, "depth": 2})
    first = own.facts("model", "mine.py:picky", {"width": 1})
    assert first["sha256"] == hashlib.sha256(MINE.encode()).hexdigest()
    assert first["path"] == str(here / "mine.py")
    assert own.load("model", "mine.py:picky") is own.load("model", "mine.py:picky")
    (here / "mine.py").write_text(MINE.replace("width, depth\n", "depth, width\n"))
    assert called("mine.py:picky", {"width": 1, "depth": 2}) == before[::-1]
    assert own.facts("model", "mine.py:picky", {})["sha256"] != first["sha256"]
    assert not list(here.glob("__pycache__/mine*"))


def test_what_nobody_named_is_not_imported(here: Path) -> None:
    (here / "secret.py").write_text("open('ran', 'w').close()\ndef make(): return 1\n")
    for factory in ("secret.py:make", "secret:make", "os:system", "object:Net"):
        with pytest.raises(UserError, match=f"{re.escape(factory)} is code that nobody"):
            own.load("model", factory)
    assert not (here / "ran").exists()
    assert called("secret.py:make") == 1
    assert (here / "ran").exists()


@pytest.mark.parametrize(
    ("factory", "settings", "said"),
    [
        ("mine.py", {}, "with a colon"),
        (":x", {}, "with a colon"),
        ("nowhere.py:Net", {}, r"nowhere.py cannot be read \(No such file"),
        ("mine.py:Nte", {}, "there is no Nte in mine.py"),
        ("mine.py:number", {}, "of type int and cannot be called; name what makes the network"),
        ("mine.py:network", {}, "mine.py:network is a network already; name what makes it"),
        ("no_such_module:Net", {}, "there is no module no_such_module; a file needs its .py"),
        ("absentx_nets:Net", {}, "importing absentx_nets fails: ModuleNotFoundError: .* 'absentx'"),
        ("absentx.nets:Net", {}, "there is no module absentx; a file needs its .py"),
        ("mine.py:Thing", {"widht": 3}, r"model.settings.widht is no setting of mine.py:Thing; it "
         "takes width"),
        ("mine.py:picky", {"width": 1}, r"needs depth; please give model.settings.depth=…"),
        ("mine.py:fails", {"width": 0}, r"fails in mine.py, line 14: ZeroDivisionError: division"),
        ("syntax.py:Net", {}, r"importing syntax.py fails in syntax.py, line 2: SyntaxError"),
        ("raises.py:Net", {}, r"importing raises.py fails in raises.py, line 3: KeyError: 'x'"),
        ("needs.py:Net", {}, r"line 1: ModuleNotFoundError: No module named 'not_there'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(
    here: Path, factory: str, settings: dict[str, Any], said: str
) -> None:
    (here / "syntax.py").write_text("x = 1\ndef Net(:\n")
    (here / "raises.py").write_text("x = 1\n\n{}['x']\n")
    (here / "needs.py").write_text("import not_there\n")
    (here / "absentx_nets.py").write_text("import absentx\n")
    with pytest.raises(UserError, match=said):
        called(factory, settings, classes=3)


def test_an_object_from_python_is_handed_out_and_a_factory_called() -> None:
    things = (1, 2)
    assert own.call("dataset", own.give(things), {}) is things
    with pytest.raises(UserError, match=r"dataset.settings.n cannot be set: object:tuple is an ob"):
        own.call("dataset", own.give(things), {"n": 3})
    assert own.call("model", own.give(lambda classes: classes), {}, classes=3, shape=1) == 3
    with pytest.raises(UserError, match=r"object:<lambda> needs width.*model.settings.width"):
        own.call("model", own.give(lambda width: width), {})
