"""The accuracy of a model on clean, attacked and corrupted images."""

from btrain.evaluation.api import robust_accuracy, sanity_checks
from btrain.evaluation.pgd import Accuracy, evaluate
from btrain.evaluation.result import Result

__all__ = ["Accuracy", "Result", "evaluate", "robust_accuracy", "sanity_checks"]
