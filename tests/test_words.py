"""`key=value` as the commands read it."""

from __future__ import annotations

import pytest

from btrain.errors import UserError
from btrain.settings.words import names, parse


@pytest.mark.parametrize(
    ("argument", "found"),
    [
        ("a.b=8/255", ("a.b", "8/255")),
        ("attack=pgd20,clean", ("attack", "pgd20,clean")),
        ("attack=[pgd20,clean]", ("attack", "[pgd20,clean]")),
        ("a='x, y=1'", ("a", "x, y=1")),
        ("hydra/launcher=joblib", ("hydra/launcher", "joblib")),
        ("+a=1", ("+a", "1")),
        ("out=a, (b)=c", ("out", "a, (b)=c")),
        ("out='a, b'", ("out", "a, b")),
    ],
)
def test_a_value_is_what_was_typed(argument: str, found: tuple[str, str]) -> None:
    assert parse([argument], paths=["out"]) == [found]


@pytest.mark.parametrize("argument", ["a", "--a", "=1", "a=(b", "a='b", "a=b,", "out='a"])
def test_what_is_no_pair_is_told(argument: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(["seed=1", argument], paths=["out"])
    assert str(caught.value) == f"{argument} is not of the form key=value."


@pytest.mark.parametrize("argument", ["a=", "out=", "a=''"])
def test_an_empty_value_is_told(argument: str) -> None:
    with pytest.raises(UserError) as caught:
        parse([argument], paths=["out"])
    assert str(caught.value) == f"{argument.partition('=')[0]} needs a value."


@pytest.mark.parametrize("value", ["a,b", "[a,b]", "[ 'a', \"b\" ]", "a,b,"])
def test_names_are_listed(value: str) -> None:
    assert names(value) == ["a", "b"]
