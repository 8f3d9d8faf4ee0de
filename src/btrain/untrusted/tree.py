"""Bounds on nested containers: a few shared references can stand for billions of values."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from btrain.untrusted import RefusedError

_DEEPEST = 32


def check_tree(content: object, *, most: int) -> None:
    """Makes sure that walking through mappings, lists, tuples and sets comes to an end soon.

    A container that occurs twice counts twice, as it would when it is copied or printed.

    Args:
        content: what was read from a file; it may contain itself.
        most: how many values it may hold, keys and containers counted.

    Raises:
        RefusedError: there are more values, or more than 32 levels of them.
    """
    left = most
    waiting: list[tuple[object, int]] = [(content, 0)]
    while waiting:
        node, depth = waiting.pop()
        inside: Collection[object] = ()
        if isinstance(node, Mapping):
            inside = [*node.keys(), *node.values()]
        elif isinstance(node, list | tuple | set | frozenset):
            inside = node
        left -= len(inside)
        if left < 0:
            raise RefusedError(f"it holds more than {most:,} values")
        if inside and depth == _DEEPEST:
            raise RefusedError(f"it is nested deeper than {_DEEPEST} levels")
        waiting += [(child, depth + 1) for child in inside]
