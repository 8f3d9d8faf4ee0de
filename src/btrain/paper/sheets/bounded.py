"""The numbers of training by bounds: the time of an epoch, and what engines and attacks leave."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from btrain.paper.plan import STEP
from btrain.paper.sheets.arithmetic import Values, of_an_epoch
from btrain.runs.json_fields import is_number
from btrain.runs.read import FINISHED, Run
from btrain.settings.evaluation import VERIFIED
from btrain.settings.method import DEFENSES, VerifiedConfig
from btrain.untrusted import read_text

KINDS = ("verified", "front")
"""The kinds of its sheets."""

EPOCH, TIMES, MEMORY = "epoch_seconds", "times_plain", "step_memory_mb"
BOUNDED, BEST = "share_bounded", "verified_best"
_LARGEST = 1 << 16  # bytes
_DEFENSE = "defense.name"
_FAMILY = {name.value for name, kind in DEFENSES.items() if kind is VerifiedConfig}

METRICS = {
    BOUNDED: "share bounded",
    EPOCH: "s an epoch",
    TIMES: "× baseline's time",
    MEMORY: "MB in a step",
    "time_doublings": "time over the baseline's, doublings",
    BEST: "verified, best engine",
    "stands_by_interval": "interval attack − CW-40, points",
}
"""The numbers of a row beside those of all tables, with their names for people."""

NAMES = {"interval": "interval attack", "pgd40x1-cw": "CW-40"}
"""The names of attacks that other tables do not have."""

LEGEND = (
    "Times over the baseline's are those of training steps, the run's as it would go on and its "
    "baseline's in turns in one process, on a CPU its CPU time; where a run has none, of an epoch "
    "over as many images, seconds of training on the same machine, as many runs at a time where "
    "their folders tell that. Memory is the most that a step holds at a time, weights and momenta "
    "among it. Verified is the share of test images that no change within ε can have "
    "misclassified, by the bounds of one engine."
)


@dataclass(frozen=True)
class Step:
    """The cost of a training step of a finished run: the content of `step.json`.

    Attributes:
        peak_memory_mb: the most that is held at a time in a training step, weights and momenta
            among it, MiB.
        times_baseline: the mean time of its steps over that of the baseline's, taken in turns in
            one process; CPU time on a CPU. None where the baseline is not trained.
        steps: of either, that were timed; nothing of a run changes by them.
    """

    peak_memory_mb: float
    times_baseline: float | None
    steps: int


def read_step(folder: Path) -> Step | None:
    """Return what a run's `step.json` holds, or None where there is no sound one."""
    try:
        step = Step(**json.loads(read_text(folder / STEP, _LARGEST)))
        known = [step.peak_memory_mb, step.steps]
        known += [] if step.times_baseline is None else [step.times_baseline]
        sound = all(is_number(value) and value >= 0 for value in known)
        sound = sound and step.times_baseline != 0
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return step if sound else None


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
    over = {seed: run for seed, run in runs.items() if run.state == FINISHED}
    steps = {seed: step for seed, run in over.items() if (step := read_step(run.folder))}
    times = {seed: s.times_baseline for seed, s in steps.items() if s.times_baseline is not None}
    if len(times) < len(speedup):
        times = {seed: 1 / ratio for seed, ratio in speedup.items() if ratio}
    seconds = {seed: of_an_epoch(run, "train_seconds") for seed, run in runs.items()}
    return {
        BOUNDED: {s: f for s, f in found["f_b"].items() if runs[s].config.get(_DEFENSE) in _FAMILY},
        EPOCH: {seed: own for seed, own in seconds.items() if own is not None},
        TIMES: times,
        MEMORY: {seed: step.peak_memory_mb for seed, step in steps.items()},
        "time_doublings": {seed: math.log2(ratio) for seed, ratio in times.items()},
        BEST: best,
        "stands_by_interval": {s: value - cw[s] for s, value in interval.items() if s in cw},
    }
