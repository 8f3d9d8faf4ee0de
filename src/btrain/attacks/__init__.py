"""Gradient attacks, what they are confined to, and faster ways to the same results."""

from btrain.attacks.pgd import InnerLoss, evaluation_mode, pgd

__all__ = ["InnerLoss", "evaluation_mode", "pgd"]
