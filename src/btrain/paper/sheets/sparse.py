"""The numbers of sparse training: robust overfitting, the generalisation gap, three costs."""

from __future__ import annotations

from collections.abc import Mapping

from btrain.paper.sheets.arithmetic import Values, pairs, same_images
from btrain.runs.read import FINISHED, Run

METRICS = {
    "best_robust_acc": "best",
    "overfitting": "best − final",
    "gap": "train − test",
    "gap_share": "train − test over the baseline's",
    "density": "density",
    "macs_share": "φ",
    "counted": "counted work",
    "executed": "executed work",
}
"""The numbers of a row beside those of all tables, with their names for people."""

LEGEND = (
    "Best − final is robust overfitting, train − test the robust generalisation gap at the end, "
    "on training images that are not augmented. φ is the share of multiply-adds by weights that "
    "are not 0, at the end. Work is floating-point operations of training over the baseline's, a "
    "search and probes included: counted leaves out multiplications by zeros, executed does not. "
    "The measured speedup is each run's own: of dense steps of the plain defense, now and then "
    "timed beside its own, in the device's own time."
)


def values(ours: Mapping[int, Run], theirs: Mapping[int, Run]) -> dict[str, Values]:
    """Return a row's numbers by seed; `theirs` are the runs of its baseline."""
    found: dict[str, Values] = {metric: {} for metric in METRICS}
    for seed, run in ours.items():
        if run.state == FINISHED:
            for metric, value in _of(run).items():
                if value is not None:
                    found[metric][seed] = value
    for seed, a, b in pairs(ours, theirs):
        gap, other = _of(a)["gap"], _of(b)["gap"]
        if gap is not None and other:
            found["gap_share"][seed] = gap / other
        for metric, key in (("counted", "flops_counted"), ("executed", "flops_executed")):
            work, whole = _work(a, key), _work(b, "flops_executed")
            if work is not None and whole and same_images(a, b):
                found[metric][seed] = work / whole
    return found


def _of(run: Run) -> dict[str, float | None]:
    """Return the numbers of one run; without sparsity all of it is there."""
    best, final = run.number("best_robust_acc"), run.number("robust_acc")
    train = run.number("train_robust_acc")
    dense = run.config.get("sparsity.name") in (None, "none")
    return {
        "best_robust_acc": best,
        "overfitting": None if best is None or final is None else best - final,
        "gap": None if train is None or final is None else train - final,
        "density": 1.0 if dense else run.number("density"),
        "macs_share": 1.0 if dense else run.number("macs_share"),
    }


def _work(run: Run, key: str) -> float | None:
    return run.number(key) if key in run.summary else run.number("flops")
