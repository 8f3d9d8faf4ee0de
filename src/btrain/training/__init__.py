"""The training loop around Algorithm 2, and a run's entry point `train(config)`."""

from btrain.training.run import train

__all__ = ["train"]
