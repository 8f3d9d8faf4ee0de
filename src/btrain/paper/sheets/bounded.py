"""The numbers of training by bounds: the time of an epoch, and what engines and attacks leave."""

from __future__ import annotations

import math
from collections.abc import Mapping

from btrain.paper.sheets.arithmetic import Values, of_an_epoch
from btrain.runs.read import Run
from btrain.settings.evaluation import VERIFIED

KINDS = ("verified", "front")
"""The kinds of its sheets."""

EPOCH, TIMES, BEST = "epoch_seconds", "times_plain", "verified_best"

METRICS = {
    EPOCH: "s an epoch",
    TIMES: "× baseline's time",
    "time_doublings": "time over the baseline's, doublings",
    BEST: "verified, best engine",
    "stands_by_interval": "interval attack − CW-40, points",
}
"""The numbers of a row beside those of all tables, with their names for people."""

NAMES = {"interval": "interval attack", "pgd40x1-cw": "CW-40"}
"""The names of attacks that other tables do not have."""

LEGEND = (
    "Times are those of an epoch over as many images, seconds of training on the same machine, as "
    "many runs at a time where their folders tell that; seed by seed over the baseline's. Verified "
    "is the share of test images that no change within ε can have misclassified, by the bounds of "
    "one engine."
)


def values(
    runs: Mapping[int, Run], speedup: Values, found: Mapping[str, Values]
) -> dict[str, Values]:
    """Return a row's numbers by seed.

    Args:
        speedup: the baseline's time over the row's own.
        found: the row's other numbers, accuracies of attacks and engines among them.
    """
    best: Values = {}
    for metric, shares in found.items():
        if metric.startswith(VERIFIED):
            best |= {seed: max(share, best.get(seed, 0.0)) for seed, share in shares.items()}
    interval, cw = found.get("interval", {}), found.get("pgd40x1-cw", {})
    times = {seed: 1 / ratio for seed, ratio in speedup.items() if ratio}
    seconds = {seed: of_an_epoch(run, "train_seconds") for seed, run in runs.items()}
    return {
        EPOCH: {seed: own for seed, own in seconds.items() if own is not None},
        TIMES: times,
        "time_doublings": {seed: math.log2(ratio) for seed, ratio in times.items()},
        BEST: best,
        "stands_by_interval": {s: value - cw[s] for s, value in interval.items() if s in cw},
    }
