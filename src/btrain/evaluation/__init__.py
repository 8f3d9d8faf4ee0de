"""The accuracy of a model on clean, attacked and corrupted images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from btrain import lazy

if TYPE_CHECKING:  # a report reads results without torch, which takes a second to import
    from btrain.evaluation import api, pgd, result
    from btrain.evaluation.api import robust_accuracy, sanity_checks
    from btrain.evaluation.pgd import Accuracy, evaluate
    from btrain.evaluation.result import Result

__all__ = [
    "Accuracy",
    "Result",
    "api",
    "evaluate",
    "pgd",
    "result",
    "robust_accuracy",
    "sanity_checks",
]

__getattr__, __dir__ = lazy.attributes(
    __name__,
    ("api", "pgd", "result"),
    {
        "Accuracy": "pgd",
        "Result": "result",
        "evaluate": "pgd",
        "robust_accuracy": "api",
        "sanity_checks": "api",
    },
)
