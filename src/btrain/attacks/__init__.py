"""Gradient attacks, the balls that they move in, and faster ways to the same results."""

from btrain.attacks.balls import Ball, L2Ball, LinfBall
from btrain.attacks.pgd import InnerLoss, evaluation_mode, pgd

__all__ = ["Ball", "InnerLoss", "L2Ball", "LinfBall", "evaluation_mode", "pgd"]
