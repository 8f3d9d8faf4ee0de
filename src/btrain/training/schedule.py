"""The learning rate as a function of how far a run has come."""

from __future__ import annotations

from collections.abc import Sequence


def step_decay(progress: float, milestones: Sequence[float], decay: float) -> float:
    """The factor on the initial learning rate: `decay` once for each milestone passed.

    Progress and milestones are shares of the run in [0, 1].
    """
    return decay ** sum(progress >= milestone for milestone in milestones)
