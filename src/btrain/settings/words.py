"""The arguments `key=value` of the commands that compose no configuration of their own."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

from btrain.errors import UserError
from btrain.settings import hints
from btrain.settings.checks import number, within_64_bits

_T = TypeVar("_T")


def parse(
    arguments: Sequence[str],
    paths: Collection[str] = (),
    known: Collection[str] = (),
    command: str = "",
) -> list[tuple[str, str]]:
    """Return key and value of every argument, in order, by the grammar of Hydra's overrides.

    A value is text as it was typed, without the quotation marks around all of it.

    Args:
        paths: keys whose values, unless they are quoted, are taken whatever they contain.
        known: the keys that the command has, for hints.
        command: whose --help lists them.

    Raises:
        UserError: an argument is not of the form key=value, or a value is empty.
    """
    for position, argument in enumerate(arguments if known else ()):
        if argument.startswith("-"):
            raise UserError(hints.option(arguments[position:], known, command))
    if split := hints.several_words(arguments):
        raise UserError(split)
    return [_parsed(argument, paths) for argument in arguments]


def _parsed(argument: str, paths: Collection[str]) -> tuple[str, str]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, _, typed = argument.partition("=")
    if not key or "=" not in argument:
        raise UserError(f"{argument} is not of the form key=value.")
    is_quoted = typed[:1] in ("'", '"')
    if key not in paths or is_quoted:
        try:
            value = OverridesParser.create().parse_override(argument).value()
        except (HydraException, RecursionError, ValueError) as error:
            raise UserError(f"{argument} is not of the form key=value.") from error
        typed = value if is_quoted and isinstance(value, str) else typed
    if not typed:
        raise UserError(f"{key} needs a value.")
    return key, typed


def names(value: str) -> list[str]:
    """Return the names in `a,b`, `[a,b]` or `['a','b']`."""
    return [name.strip(" '\"") for name in value.strip("[]").split(",") if name.strip()]


def once(
    pairs: Sequence[tuple[str, str]],
    known: Sequence[str],
    command: str,
    free: re.Pattern[str] | None = None,
) -> dict[str, str]:
    """Return the values by their keys.

    Args:
        known: the keys that the command has.
        command: for the sentence that tells where they are listed.
        free: keys that are good as well.

    Raises:
        UserError: a key is unknown, or given twice, or a value refers to another one.
    """
    given: dict[str, str] = {}
    for key, value in pairs:
        if key not in known and not (free and free.fullmatch(key)):
            meant = hints.meant(key, known)
            hint = f"Did you mean {meant}?" if meant else f"{command} --help lists them."
            raise UserError(f"There is no setting {key}. {hint}")
        if key in given:
            raise UserError(f"{key} is given twice.")
        if "${" in value:  # as a run's settings may
            raise UserError(f"{key} must be a plain value, not one that refers to others: {value}.")
        given[key] = value
    return given


def filled(schema: type[_T], given: Mapping[str, Any], fields: Mapping[str, str]) -> _T:
    """Return a structured dataclass, typed and checked, filled with texts.

    A number may be a fraction, like 8/255.

    Args:
        given: texts by the words that were typed; lists and mappings go in as they are.
        fields: the dotted field of a word, where it is not the word itself.

    Raises:
        UserError: a text is none of its field's type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    settings = OmegaConf.structured(schema)
    for key, value in given.items():
        field = fields.get(key, key)
        kind = _kind(schema, field)
        wrong = UserError(f"{key} must be {_KINDS.get(kind, 'a text')}, not {value}.")
        if kind is bool and value.lower() not in ("true", "false"):
            raise wrong
        try:
            OmegaConf.update(settings, field, number(key, value) if kind is float else value)
            within_64_bits(OmegaConf.select(settings, field), key)
        except OmegaConfBaseException as error:
            raise wrong from error
    filled: _T = OmegaConf.to_object(settings)  # type: ignore[assignment]
    return filled


_KINDS = {bool: "one of true, false", int: "a whole number"}


def _kind(schema: type, field: str) -> type:
    """Return the type of a dotted field, without its None."""
    kind: Any = schema
    for name in field.split("."):
        kind = get_type_hints(kind)[name]
        kind = next((part for part in get_args(kind) if part is not type(None)), kind)
    return kind  # type: ignore[no-any-return]
