"""The bounds on nested containers: a few shared references can stand for billions of values."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from btrain.untrusted import RefusedError

_DEEPEST = 32

_Measures = dict[int, tuple[int, int]]
"""The number of values and of levels of them in each container, by its id."""


def check_tree(content: object, *, most: int) -> None:
    """Make sure that walking through mappings, lists, tuples and sets comes to an end soon.

    A container that occurs twice counts twice, as it would when it is copied or printed; here it is
    gone through once.

    Args:
        content: what was read from a file; it may contain itself.
        most: how many values it may hold, keys and containers counted.

    Raises:
        RefusedError: there are more values, or more than 32 levels of them.
    """
    values, levels = _measure(content, {}, 0)
    if values > most:
        raise RefusedError(f"it holds more than {most:,} values")
    if levels > _DEEPEST:
        raise RefusedError(f"it is nested deeper than {_DEEPEST} levels")


def _measure(node: object, known: _Measures, depth: int) -> tuple[int, int]:
    inside: Collection[object] = ()
    if isinstance(node, Mapping):
        inside = [*node.keys(), *node.values()]
    elif isinstance(node, list | tuple | set | frozenset):
        inside = node
    if not inside:
        return 0, 0
    if depth > _DEEPEST:
        raise RefusedError(f"it is nested deeper than {_DEEPEST} levels")
    if id(node) not in known:
        parts = [_measure(child, known, depth + 1) for child in inside]
        values = len(parts) + sum(values for values, _ in parts)
        known[id(node)] = values, 1 + max(levels for _, levels in parts)
    return known[id(node)]
