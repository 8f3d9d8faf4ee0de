"""The learning rate as a function of how far a run has come."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Schedule = Callable[[float], float]
"""The share of the run that is done, in [0, 1], -> the factor on the initial learning rate."""

_COSINE_END = 1e-5


def step_decay(milestones: Sequence[float], factors: Sequence[float]) -> Schedule:
    """1, and from each milestone on, a share of the run, the factor that belongs to it."""
    levels = [1.0, *factors]
    return lambda progress: levels[sum(progress >= milestone for milestone in milestones)]


def cyclic(peak: float) -> Schedule:
    """Rises linearly from 0 to 1 at the share `peak` of the run, and falls to 0 at its end."""
    return lambda progress: progress / peak if progress < peak else (1 - progress) / (1 - peak)


def cosine() -> Schedule:
    """Falls along half a cosine to almost 0."""
    return lambda progress: _COSINE_END + (1 - _COSINE_END) * (1 + math.cos(math.pi * progress)) / 2
