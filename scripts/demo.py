"""TRADES on a part of MNIST, plain and with BulletTrain, three seeds each, by turns.

    python scripts/demo.py [FOLDER]     runs/demo unless it is named

It prints the runs as a table, says what was seen and whether that is more than chance, and draws
it.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from btrain.cli import main as btrain
from btrain.pages import tables
from btrain.pages.pictures import drawn, is_available
from btrain.paper.sheets.arithmetic import interval
from btrain.runs.folder import RunFolder

WAYS = {"TRADES": "uniform", "BulletTrain": "bullettrain"}
HALVES = (
    (("TRADES", 0), ("BulletTrain", 0), ("TRADES", 2)),
    (("TRADES", 1), ("BulletTrain", 1), ("BulletTrain", 2)),
)
"""The runs of two processes, about equally long, one thread each."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SEEDS = (0, 1, 2)
WIDE = 0.5
BUSY = " (so wide where other programs use the cores, too; it was 1.79 to 1.89 without)"
"""The interval of an idle machine is that of docs/measurements.md."""


def main(folder: Path) -> int:
    """Train, compare, draw; return the exit status."""
    runs = {(way, seed): run_of(folder, way, seed) for half in HALVES for way, seed in half}
    for run in runs.values():
        shutil.rmtree(run, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "second.log").open("w") as log:
        command = [sys.executable, __file__, str(folder)]
        second = subprocess.Popen([*command, "1"], env=ENVIRONMENT, stdout=log,
                                  stderr=subprocess.STDOUT)  # fmt: skip
        first = subprocess.run([*command, "0"], env=ENVIRONMENT, check=False)
        if status := first.returncode or second.wait():
            print(f"A training failed; see {log.name} for what the second process said.")
            return status
    summaries = {key: RunFolder(run).summary() or {} for key, run in runs.items()}
    clean, accuracy, seconds, work = (
        {key: float(summary[name]) for key, summary in summaries.items()}
        for name in ("clean_acc", "robust_acc", "train_seconds", "flops")
    )
    head = ["mean ± deviation", "clean %", "PGD-20 %", "TFLOP", "seconds of training"]
    rows = [
        [way, *(spread([of[way, s] for s in SEEDS]) for of in (clean, accuracy)),
         f"{statistics.fmean(work[way, s] for s in SEEDS) / 1e12:.2f}",
         spread([seconds[way, s] for s in SEEDS])]
        for way in WAYS
    ]  # fmt: skip
    print("\n" + tables.text(head, rows) + "\n")
    more = {s: accuracy["BulletTrain", s] - accuracy["TRADES", s] for s in SEEDS}
    times, works = (
        {s: of["TRADES", s] / of["BulletTrain", s] for s in SEEDS} for of in (seconds, work)
    )
    print(said(more, times, works))
    if is_available():
        picture = folder / "demo.png"
        picture.write_bytes(draw(accuracy, seconds))
        print(f"Picture: {picture}")
    run = runs["BulletTrain", 0]
    print(f"Next: btrain eval checkpoint={run} attack=all report=true")
    print(f"More: btrain report --merge-seeds {folder}")
    return 0


def run_of(folder: Path, way: str, seed: int) -> Path:
    """Return the folder of a run."""
    return folder / f"{way}-seed{seed}"


def train(folder: Path, half: int) -> int:
    """Train the runs of one process; return the exit status."""
    statuses = [
        btrain(["train", "experiment=demo", f"bt={WAYS[way]}", f"seed={seed}",
                f"run.dir={run_of(folder, way, seed)}"])
        for way, seed in HALVES[half]
    ]  # fmt: skip
    return max(statuses)


def spread(values: list[float]) -> str:
    """Return a mean ± the deviation of a sample."""
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def said(more: dict[int, float], times: dict[int, float], works: dict[int, float]) -> str:
    """Return two sentences, on differences in accuracy and on ratios of times and of work by seed.

    Counted work is the same on every machine; where other programs take the cores, times are not.
    """
    ends, ratios = interval(more), interval(times)
    assert ends is not None
    assert ratios is not None
    mean = statistics.fmean(more.values())
    chance = "no more than chance" if ends[0] <= 0 <= ends[1] else "more than chance"
    side = "above" if mean > 0 else "below"
    return (
        f"Under PGD-20 BulletTrain ends {abs(mean):.2f} points {side} TRADES, 95 % interval "
        f"{ends[0]:.2f} to {ends[1]:.2f}: {chance}.\n"
        f"Its training counts {statistics.fmean(works.values()):.2f} times fewer operations and "
        f"took {statistics.fmean(times.values()):.2f} times less time, 95 % interval "
        f"{ratios[0]:.2f} to {ratios[1]:.2f}"
        f"{BUSY if ratios[1] - ratios[0] > WIDE else ''}.\n"
        "(Four attack steps for every example do as well on these images; where the choice of "
        "examples matters, docs/measurements.md tells.)"
    )


def draw(accuracy: dict[tuple[str, int], float], seconds: dict[tuple[str, int], float]) -> bytes:
    """Return a PNG of robust accuracy against training time, a mark for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot()
    for way, mark in zip(WAYS, "so", strict=True):
        keys = [key for key in accuracy if key[0] == way]
        axes.plot([seconds[key] for key in keys], [accuracy[key] for key in keys], mark, label=way)
    axes.set_xlim(left=0)
    middle = sum(accuracy.values()) / len(accuracy)
    axes.set_ylim(middle - 5, min(middle + 5, 100))  # so that chance looks like chance
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("right under PGD-20, %")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn(figure, "png", dpi=150)


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    sys.exit(train(place, int(sys.argv[2])) if len(sys.argv) > 2 else main(place))
