"""The statistics of a sheet: means over seeds, their intervals, a paired test, speedups."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from btrain.evaluation.compare import compare
from btrain.evaluation.result import student
from btrain.runs.read import FINISHED, Run, images_of

FEWEST_DIFFERING = 25  # examples, for z to be nearly normal

HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"

Values = dict[int, float]
"""seed -> value"""

Scores = npt.NDArray[np.float64]
"""(n,): the share of an example's trials that a model came through."""


@dataclass(frozen=True)
class Spread:
    """Values of several seeds; the sample standard deviation (n − 1) is None with one."""

    n: int
    mean: float
    sd: float | None


def spread(values: Mapping[int, float]) -> Spread | None:
    """Return mean and standard deviation over seeds; None of none."""
    if not values:
        return None
    numbers = list(values.values())
    sd = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Spread(len(numbers), statistics.fmean(numbers), sd)


def interval(values: Mapping[int, float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean by Student's t with n − 1 degrees of freedom; n ≥ 2."""
    found = spread(values)
    if found is None or found.sd is None:
        return None
    return student(found.mean, found.sd, found.n)


def verdict(
    differences: Mapping[int, float], *, at_least: float | None, at_most: float | None
) -> str:
    """Return whether a difference lies in [at_least, at_most], as far as its seeds tell.

    It holds if the whole 95 % interval of the mean lies inside, ends included, and fails if the
    whole interval lies outside. Differences that are all the limit itself, as equal numbers are
    where one shall be above the other, decide nothing.
    """
    ends = interval(differences)
    if ends is None:
        return f"{UNDECIDED} (one seed)" if differences else UNDECIDED
    if ends[0] == ends[1] and ends[0] in (at_least, at_most):
        return f"{UNDECIDED} (all differences are the limit)"
    low = -math.inf if at_least is None else at_least
    high = math.inf if at_most is None else at_most
    if low <= ends[0] and ends[1] <= high:
        return HOLDS
    return FAILS if ends[1] < low or ends[0] > high else UNDECIDED


@dataclass(frozen=True)
class Paired:
    """A paired test on the same examples.

    Attributes:
        difference: of the mean correctness, in points.
        z: Σdᵢ / √Σdᵢ².
        p: two-sided; None of too few differing examples for z's normal tail.
        seeds: whose mean correctness was compared.
        differing: examples with dᵢ ≠ 0.
    """

    difference: float
    z: float
    p: float | None
    seeds: int
    differing: int


def paired(ours: Mapping[int, Scores], theirs: Mapping[int, Scores]) -> Paired | None:
    """Test whether two rows differ by more than the test examples explain.

    dᵢ is the difference of example i's correctness, each the mean over the seeds that both rows
    have. Under the hypothesis that the sign of every dᵢ is a coin's, Σdᵢ has the variance Σdᵢ².
    p is twice the normal tail beyond z, from `FEWEST_DIFFERING` examples with dᵢ ≠ 0 on; with one
    seed and one attack it is that of McNemar's exact test, however few differ. The test knows
    nothing of what another seed would have trained. None without a common seed.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    d = np.mean([ours[seed] - theirs[seed] for seed in seeds], axis=0)
    square = float((d**2).sum())
    z = float(d.sum()) / math.sqrt(square) if square else 0.0
    differing = int(np.count_nonzero(d))
    p = math.erfc(abs(z) / math.sqrt(2)) if differing >= FEWEST_DIFFERING else None
    if len(seeds) == 1:
        pair = theirs[seeds[0]], ours[seeds[0]]
        if all(np.isin(scores, (0, 1)).all() for scores in pair):  # no mean over corruptions
            p = compare(pair[0] == 1, pair[1] == 1).p
    return Paired(100 * float(d.mean()), z, p, len(seeds), differing)


def measured_speedup(
    ours: Mapping[int, Run], theirs: Mapping[int, Run]
) -> tuple[Values, str | None]:
    """Return the baseline's over the own time of an epoch, by seed, and why a pair was refused.

    Only runs of one machine, made as many at a time, and of the same training images are compared.
    """
    ratios, refused = {}, None
    for seed, a, b in pairs(ours, theirs):
        own, base = of_an_epoch(a, "train_seconds"), of_an_epoch(b, "train_seconds")
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
    """Return the baseline's over the own counted FLOPs of an epoch over as many images."""
    ratios = {}
    for seed, a, b in pairs(ours, theirs):
        own, base = of_an_epoch(a, "flops"), of_an_epoch(b, "flops")
        if same_images(a, b) and own and base:
            ratios[seed] = base / own
    return ratios


def of_an_epoch(run: Run, metric: str) -> float | None:
    """Return a summary's total by its epochs."""
    total, epochs = run.number(metric), run.number("epochs")
    return None if total is None or not epochs else total / epochs


def pairs(ours: Mapping[int, Run], theirs: Mapping[int, Run]) -> list[tuple[int, Run, Run]]:
    """Return the finished runs of the seeds that both rows have."""
    both = ((seed, run, theirs[seed]) for seed, run in sorted(ours.items()) if seed in theirs)
    return [(seed, a, b) for seed, a, b in both if a.state == b.state == FINISHED]


def same_images(a: Run, b: Run) -> bool:
    """Return whether two runs were trained on the same images, as far as the settings tell."""
    one, other = ((images_of(run.config), run.config.get("dataset.val_examples")) for run in (a, b))
    return one == other
