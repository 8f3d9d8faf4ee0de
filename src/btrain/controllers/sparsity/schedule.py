"""The times and sizes of changes of masks: pure functions of the updates of the weights so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

PUBLISHED = 70_400
"""Updates of the weights in the paper's runs: 200 epochs of 352 batches."""


def drop_rate(step: int, steps: int, *, first: float, last: float) -> float:
    """Return κ after `step` of `steps` updates of the weights: half a cosine from first to last."""
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2


def mask_updates(steps: int, *, early: int, late: int, late_from: float) -> list[int]:
    """Return the updates of the weights, from 1, behind which the masks change.

    They are `early` apart as long as the next one is within the share `late_from` of the run,
    and `late` apart from there on.
    """
    found: list[int] = []
    at = 0
    while True:
        at += early if at + early <= late_from * steps else late
        if at > steps:
            return found
        found.append(at)


def share_of(signs: Sequence[bool]) -> float:
    """Return the share that is true."""
    return sum(signs) / len(signs)


def switches(
    gaps: Sequence[float], losses: Sequence[float], *, prune_share: float, grow_share: float
) -> tuple[bool, bool]:
    """Return whether Flying Bird+ prunes more, and whether it grows more.

    Args:
        gaps: train minus held-out robust accuracy of the last epochs; the more of its changes are
            positive, the more the network overfits.
        losses: on held-out adversarial examples; changes of 0 count as rises.
        prune_share, grow_share: the shares of such changes that suffice.
    """
    widened = [after > before for before, after in pairwise(gaps)]
    rose = [after >= before for before, after in pairwise(losses)]
    return share_of(widened) >= prune_share, share_of(rose) >= grow_share
