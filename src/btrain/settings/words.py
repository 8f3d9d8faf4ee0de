"""Arguments `key=value` of the commands that compose no configuration of their own."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from btrain.errors import UserError


def parse(arguments: Sequence[str], paths: Collection[str] = ()) -> list[tuple[str, str]]:
    """Return key and value of every argument, in order, by the grammar of Hydra's overrides.

    A value is text as it was typed, without the quotation marks around all of it.

    Args:
        paths: keys whose values, unless they are quoted, are taken whatever they contain.

    Raises:
        UserError: an argument is not of the form key=value, or a value is empty.
    """
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
        except HydraException as error:
            raise UserError(f"{argument} is not of the form key=value.") from error
        typed = value if is_quoted and isinstance(value, str) else typed
    if not typed:
        raise UserError(f"{key} needs a value.")
    return key, typed


def names(value: str) -> list[str]:
    """Return the names in `a,b`, `[a,b]` or `['a','b']`."""
    return [name.strip(" '\"") for name in value.strip("[]").split(",") if name.strip()]
