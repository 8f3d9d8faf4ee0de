"""Weights in and out: other projects' files (`read`), our runs (`from_run`), exports (`write`).

Nothing is imported here before it is asked for: `btrain export --help` answers without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from btrain import lazy

if TYPE_CHECKING:
    from btrain.exchange import from_run, read, write

__all__ = ["from_run", "read", "write"]

__getattr__, __dir__ = lazy.attributes(__name__, ("from_run", "read", "write"))
