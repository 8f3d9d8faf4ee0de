"""The cost of training: forward passes an image, a step's memory, time over the baseline's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from btrain.paper.plan import STEP
from btrain.paper.sheets.arithmetic import Values
from btrain.runs.json_fields import is_number
from btrain.runs.read import FINISHED, Run
from btrain.untrusted import read_text

KIND = "cost"
"""The kind of its sheets."""

UNITS, ALL_UNITS = "units_per_example", "units"
TIMES, MEMORY, DOUBLINGS = "times_plain", "step_memory_mb", "time_doublings"
_LARGEST = 1 << 16  # bytes

METRICS = {
    UNITS: "u an epoch",
    ALL_UNITS: "u in all",
    TIMES: "× baseline's time",
    MEMORY: "MB in a step",
    DOUBLINGS: "time over the baseline's, doublings",
}
"""The numbers of a row beside those of all tables, with their names for people."""

TIMES_LEGEND = (
    "Times over the baseline's are those of an average epoch by steps of the middle one, the run's "
    "and its baseline's in turns in one process, on a CPU its CPU time; where a run has "
    "none, of an epoch over as many images, seconds of training on the same machine, as many runs "
    "at a time where their folders tell that. Memory is the most that a step holds at a time, "
    "weights and momenta among it."
)
"""The sentences on time and memory, which sheets of training by bounds have, too."""

LEGEND = (
    "u is one forward pass of one training image, an attack step two and a training pass three; "
    f"u in all is that of the whole training. {TIMES_LEGEND}"
)


@dataclass(frozen=True)
class Step:
    """The cost of a training step of a finished run: the content of `step.json`.

    Attributes:
        peak_memory_mb: the most that is held at a time in a training step, weights and momenta
            among it, MiB.
        times_baseline: its training time over the baseline's, by steps of the middle epoch of
            either, taken in turns in one process, and by how many an epoch has on average; CPU
            time on a CPU. None where the baseline is not trained.
        steps: of either, that were timed; nothing of a run changes by them.
        epoch: whose steps they are, from 1. Older files have none and told the time of a step of
            the last epoch over the baseline's: they count as not there.
    """

    peak_memory_mb: float
    times_baseline: float | None
    steps: int
    epoch: int


def read_step(folder: Path) -> Step | None:
    """Return what a run's `step.json` holds, or None where there is no sound one."""
    try:
        step = Step(**json.loads(read_text(folder / STEP, _LARGEST)))
        known = [step.peak_memory_mb, step.steps, step.epoch]
        known += [] if step.times_baseline is None else [step.times_baseline]
        sound = all(is_number(value) and value >= 0 for value in known)
        sound = sound and step.times_baseline != 0
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return step if sound else None


def values(runs: Mapping[int, Run], speedup: Values) -> dict[str, Values]:
    """Return a row's numbers by seed.

    Args:
        speedup: the baseline's time over the row's own.
    """
    over = {seed: run for seed, run in runs.items() if run.state == FINISHED}
    steps = {seed: step for seed, run in over.items() if (step := read_step(run.folder))}
    times = {seed: s.times_baseline for seed, s in steps.items() if s.times_baseline is not None}
    if len(times) < len(speedup):
        times = {seed: 1 / ratio for seed, ratio in speedup.items() if ratio}
    found: dict[str, Values] = {UNITS: {}, ALL_UNITS: {}}
    for seed, run in over.items():
        units, epochs = run.number(UNITS), run.number("epochs")
        if units is not None and epochs is not None:
            found[UNITS][seed], found[ALL_UNITS][seed] = units, units * epochs
    return found | {
        TIMES: times,
        MEMORY: {seed: step.peak_memory_mb for seed, step in steps.items()},
        DOUBLINGS: {seed: math.log2(ratio) for seed, ratio in times.items()},
    }
