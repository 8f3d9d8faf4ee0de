"""The numbers of training by bounds: the time of an epoch, and what engines and attacks leave."""

from __future__ import annotations

from collections.abc import Mapping

from btrain.paper.sheets import cost
from btrain.paper.sheets.arithmetic import Values, of_an_epoch
from btrain.runs.read import Run
from btrain.settings.evaluation import VERIFIED
from btrain.settings.method import DEFENSES, VerifiedConfig

KINDS = ("verified", "front")
"""The kinds of its sheets."""

EPOCH, BOUNDED, BEST = "epoch_seconds", "share_bounded", "verified_best"
_DEFENSE = "defense.name"
_FAMILY = {name.value for name, kind in DEFENSES.items() if kind is VerifiedConfig}

METRICS = {
    BOUNDED: "share bounded",
    EPOCH: "s an epoch",
    BEST: "verified, best engine",
    "stands_by_interval": "interval attack − CW-40, points",
}
"""The numbers of a row beside those of all tables, with their names for people."""

NAMES = {"interval": "interval attack", "pgd40x1-cw": "CW-40"}
"""The names of attacks that other tables do not have."""

LEGEND = (
    f"{cost.TIMES_LEGEND} Verified is the share of test images that no change within ε can have "
    "misclassified, by the bounds of one engine."
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
    seconds = {seed: of_an_epoch(run, "train_seconds") for seed, run in runs.items()}
    return cost.values(runs, speedup) | {
        BOUNDED: {s: f for s, f in found["f_b"].items() if runs[s].config.get(_DEFENSE) in _FAMILY},
        EPOCH: {seed: own for seed, own in seconds.items() if own is not None},
        BEST: best,
        "stands_by_interval": {s: value - cw[s] for s, value in interval.items() if s in cw},
    }
