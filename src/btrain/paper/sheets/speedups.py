"""Speedups over a baseline by time and by counted operations, seed by seed."""

from __future__ import annotations

from collections.abc import Mapping

from btrain.runs.read import FINISHED, Run

Values = dict[int, float]
"""seed -> value"""


def measured_speedup(
    ours: Mapping[int, Run], theirs: Mapping[int, Run]
) -> tuple[Values, str | None]:
    """Baseline's over own training time of an epoch, by seed, and why a pair was refused, if so.

    Only runs of one machine, made as many at a time, and of the same training images are compared.
    """
    ratios, refused = {}, None
    for seed, a, b in pairs(ours, theirs):
        own, base = _of_an_epoch(a, "train_seconds"), _of_an_epoch(b, "train_seconds")
        if None in (a.machine, b.machine):
            refused = "machine unknown"
        elif a.machine != b.machine:
            refused = "other machine"
        elif a.jobs != b.jobs:
            refused = "other load"
        elif not same_images(a, b):
            refused = "other images"
        elif own and base:
            ratios[seed] = base / own
    return ratios, refused


def flops_speedup(ours: Mapping[int, Run], theirs: Mapping[int, Run]) -> Values:
    """Baseline's over own counted FLOPs of one epoch over the same number of images."""
    ratios = {}
    for seed, a, b in pairs(ours, theirs):
        own, base = _of_an_epoch(a, "flops"), _of_an_epoch(b, "flops")
        if same_images(a, b) and own and base:
            ratios[seed] = base / own
    return ratios


def _of_an_epoch(run: Run, metric: str) -> float | None:
    """A summary's total by its epochs."""
    total, epochs = run.number(metric), run.number("epochs")
    return None if total is None or not epochs else total / epochs


def pairs(ours: Mapping[int, Run], theirs: Mapping[int, Run]) -> list[tuple[int, Run, Run]]:
    """The finished runs of the seeds that both rows have."""
    both = ((seed, run, theirs[seed]) for seed, run in sorted(ours.items()) if seed in theirs)
    return [(seed, a, b) for seed, a, b in both if a.state == b.state == FINISHED]


def same_images(a: Run, b: Run) -> bool:
    keys = ("dataset.name", "dataset.train_examples", "dataset.val_examples")
    return all(a.config.get(key) == b.config.get(key) for key in keys)
