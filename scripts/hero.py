"""The README's picture: accuracy under AutoAttack against the cost of training, from results/.

    python scripts/hero.py     writes docs/images/cost-light.svg and cost-dark.svg

The cost is counted in forward passes an image, a training pass being three, over all epochs, as a
share of plain TRADES'. A mark is a run, a ring the mean of a method.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from btrain.pages.pictures import drawn, look

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / "results", ROOT / "docs" / "images"
WIDTH, SIZE = 5.2, 11.5  # inches and points: readable on a telephone, where it is 360 pixels wide
PLAIN = 27.0  # passes an image and epoch of TRADES with ten steps
LOOKS = {
    "light": ("#1f2328", "#59636e", "#d1d9e0", ["#0969da", "#cf222e", "#1a7f37", "#9a6700",
                                                "#8250df", "#57606a", "#bf3989", "#1b7c83",
                                                "#bc4c00"]),
    "dark": ("#e6edf3", "#9198a1", "#3d444d", ["#58a6ff", "#ff7b72", "#3fb950", "#d29922",
                                               "#bc8cff", "#8b949e", "#db61a2", "#39c5cf",
                                               "#f0883e"]),
}  # fmt: skip
"""By a theme: ink, edges, rules, and a colour for each method."""

Points = dict[str, list[tuple[float, float]]]
"""By a method, (cost over TRADES', accuracy in percent) of each run."""


def lines(path: str) -> list[dict[str, Any]]:
    """Return the rows of a results file."""
    return [json.loads(line) for line in (RESULTS / path).read_text().splitlines()]


def mnist() -> Points:
    """Return Table 2 on MNIST, and `experiment=fastest_mnist`."""
    rows = {row["name"]: row["numbers"] for row in
            json.loads((RESULTS / "cpu" / "table2.json").read_text())["rows"]}  # fmt: skip
    found: Points = {}
    for name, label in (("table2_trades", "TRADES"), ("table2_bt_nr2", "BulletTrain"),
                        ("table2_trades_fast", "FAST"), ("table2_yopo", "YOPO")):  # fmt: skip
        accuracy = rows[name]["autoattack"]["seeds"]
        speedup = rows[name]["speedup_flops"]["seeds"]
        found[label] = [(1 / speedup[seed], accuracy[seed]) for seed in accuracy]
    found["fastest"] = [
        (row["units_per_example"] * row["epochs"] / (PLAIN * 10), row["autoattack_acc"])
        for row in lines("mnist/fastest_mnist.jsonl")
        if row["run"] in [f"fastest_mnist-seed{seed}" for seed in range(3)]
    ]
    return found | cheap("mnist", {"BulletTrain, one step": "cheapest_mnist"}, PLAIN * 10)


def cheap(part: str, runs: dict[str, str], plain: float) -> Points:
    """Return rows of results/cheapest that AutoAttack has scored, by what `runs` calls them.

    Args:
        runs: by a label, the start of the runs' names, ahead of the seed.
        plain: passes an image of TRADES' whole training.
    """
    rows = lines(f"cheapest/{part}.jsonl")
    found = {
        label: [
            (row["units_per_example"] * row["epochs"] / plain, row["autoattack_acc"])
            for row in rows
            if row["run"].rpartition("-seed")[0] == name and "autoattack_acc" in row
        ]
        for label, name in runs.items()
    }
    return {label: points for label, points in found.items() if points}


def cifar() -> Points:
    """Return four classes of CIFAR-10 (JPEG)."""
    rows = {row["run"]: row for row in lines("cifar10-jpeg/fastest.jsonl")}
    runs = {
        "TRADES": "trades-lr0.05-warmup",
        "BulletTrain": "bullettrain-lr0.05-warmup",
        "fastest": "fastest",
        "3 steps for all": "fastest-three-steps-for-all",
    }
    found = {
        label: [
            (row["units_per_example"] * row["epochs"] / (PLAIN * 15), row["autoattack_acc"])
            for seed in range(3)
            for row in [rows[f"four_classes-second-processor-{run}-seed{seed}"]]
        ]
        for label, run in runs.items()
    }
    others = {
        "TRADES, fastest's epochs, clipped": "cheap_trades_same-recipe.clip_norm_1.0",
        "FAST": "cheap_rival-rival_fast",
        "BulletTrain, one step": "cheap_bullettrain",
        "cheapest": "cheapest",
    }
    return found | cheap("four_classes", others, PLAIN * 15)


def draw(theme: str) -> bytes:
    """Return the picture as an SVG."""
    from matplotlib.figure import Figure

    ink, edge, rule, colours = LOOKS[theme]
    with look(ink, edge, rule, {"font.size": SIZE, "svg.fonttype": "path", "axes.grid": True,
                                "axes.facecolor": "none", "figure.facecolor": "none"}):  # fmt: skip
        figure = Figure(figsize=(WIDTH, 1.35 * WIDTH), layout="constrained")
        panels = (("MNIST, ε = 0.2", mnist(), (-2, 96)),
                  ("CIFAR-10 (JPEG), four classes, ε = 0.031", cifar(), (30, 52)))  # fmt: skip
        of: dict[str, str] = {}
        rings: dict[str, Any] = {}
        for axes, (title, points, (low, high)) in zip(figure.subplots(2, 1), panels, strict=True):
            for label, runs in points.items():
                of.setdefault(label, colours[min(len(of), len(colours) - 1)])
                costs, accuracies = zip(*runs, strict=True)
                axes.plot(costs, accuracies, "o", ms=3, color=of[label], alpha=0.7)
                mean = statistics.fmean(costs), statistics.fmean(accuracies)
                (ring,) = axes.plot(*mean, "o", ms=9, mfc="none", mew=1.6, color=of[label])
                rings.setdefault(label, ring)
            axes.set(xlim=(0, 1.12), ylim=(low, high), title=title, ylabel="right under attack, %")
        figure.axes[1].set_xlabel("cost of training, TRADES = 1")
        figure.legend(
            rings.values(), rings, loc="outside lower center", frameon=False, ncols=2,
            columnspacing=0.6, handletextpad=0.2,
        )  # fmt: skip
        return drawn(figure, "svg", transparent=True)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for theme in LOOKS:
        (IMAGES / f"cost-{theme}.svg").write_bytes(draw(theme))
