"""YAML of plain values: no reference within the text, which can make it explode, and no tag."""

from __future__ import annotations

from typing import Any

import yaml

from btrain.untrusted import RefusedError

_DEEPEST = 20
_MOST_NODES = 4_000


def parse(text: str) -> Any:
    """Return the value of a document.

    Raises:
        RefusedError: it holds an anchor, an alias or a tag, or too many values or levels of them.
        Exception: it is no YAML; PyYAML raises several kinds.
    """
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise RefusedError("it holds an anchor, an alias or a tag")
        self._nodes += 1
        if self._nodes > _MOST_NODES:
            raise RefusedError(f"it holds more than {_MOST_NODES:,} values")
        if self._depth == _DEEPEST:
            raise RefusedError(f"it is nested deeper than {_DEEPEST} levels")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node
