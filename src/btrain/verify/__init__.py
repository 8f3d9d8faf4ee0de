"""Bounds that hold for every image in a box, and what is trained and measured by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from btrain import lazy

if TYPE_CHECKING:
    from btrain.verify import accuracy, bounds, graph, interval_attack, losses

__all__ = ["accuracy", "bounds", "graph", "interval_attack", "losses"]

__getattr__, __dir__ = lazy.attributes(
    __name__, ("accuracy", "bounds", "graph", "interval_attack", "losses")
)
