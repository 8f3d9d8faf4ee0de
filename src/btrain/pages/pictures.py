"""The look of all drawings, and how matplotlib's figures become files."""

from __future__ import annotations

import importlib.util
import io
from typing import TYPE_CHECKING, Any

from btrain.errors import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_MATPLOTLIB = "There are no pictures: they need matplotlib (pip install 'btrain[report]')."

_UNSAID = {"png": ("Software",), "svg": ("Format", "Type", "Creator", "Date")}
"""Metadata that would make the same figure other bytes tomorrow."""


def is_available() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def look(ink: str, edge: str, rule: str, own: dict[Any, Any]) -> Any:
    """Return a context in which figures have the common look, and some settings of their own."""
    import matplotlib

    colours = {
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": edge,
        "xtick.color": edge,
        "ytick.color": edge,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "grid.color": rule,
    }
    return matplotlib.rc_context(_LOOK | colours | own)


_LOOK: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.hashsalt": "btrain",  # of which the names inside a file are made
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "grid.linewidth": 0.6,
}


def drawn(figure: Figure, kind: str, **options: Any) -> bytes:
    """Return a figure as "png" or "svg"; the same figure gives the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata=dict.fromkeys(_UNSAID[kind]), **options)
    if kind == "svg":  # in which texts stand as comments and titles
        return printable(file.getvalue().decode(), kept="\n").encode()
    return file.getvalue()
