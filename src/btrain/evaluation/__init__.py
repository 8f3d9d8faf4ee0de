"""The accuracy of a model on clean, attacked and corrupted images."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a report reads results without torch, which takes a second to import
    from btrain.evaluation.api import robust_accuracy, sanity_checks
    from btrain.evaluation.pgd import Accuracy, evaluate
    from btrain.evaluation.result import Result

__all__ = ["Accuracy", "Result", "evaluate", "robust_accuracy", "sanity_checks"]

_PLACES = {
    "Accuracy": "pgd",
    "Result": "result",
    "evaluate": "pgd",
    "robust_accuracy": "api",
    "sanity_checks": "api",
}


def __getattr__(name: str) -> Any:
    """Return a name of `__all__`, imported when it is first asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
