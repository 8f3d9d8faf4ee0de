"""How accurate a model is on clean and on attacked images."""

from btrain.evaluation.pgd import Accuracy, evaluate

__all__ = ["Accuracy", "evaluate"]
