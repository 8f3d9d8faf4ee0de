"""The pictures of docs/concepts.md, from a trained network and from results/.

    python scripts/concepts.py     writes docs/images/{classes,speedups}-{light,dark}.svg

`classes`: test images of MNIST before and after an attack on results/weights/mnist_bullettrain.pt,
and where BulletTrain's classes lie when images are ordered by signed prediction variance.
`speedups`: what a training step costs, and the four numbers by which a run of Table 2 is faster.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import btrain
from btrain.allocation import (
    BOUNDARY,
    OUTLIER,
    ROBUST,
    signed_prediction_variance,
    theoretical_speedup,
    true_classes,
)
from btrain.attacks import pgd
from btrain.data import load
from btrain.defenses import ce_inner_loss
from btrain.pages.pictures import drawn, look

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
EPSILON = 0.15  # more than the 0.1 of its training, so that all three classes are well filled
WIDTH, SIZE = 5.2, 11.5  # inches and points: readable on a telephone, where it is 360 pixels wide
SHOWN = 3  # images of each class
GROUPS = 50  # of as many images each
CLASSES = {OUTLIER: "outlier", BOUNDARY: "boundary", ROBUST: "robust"}
LOOKS = {
    "light": ("#1f2328", "#59636e", "#d1d9e0", ("#8c959f", "#cf222e", "#1a7f37", "#0969da")),
    "dark": ("#e6edf3", "#9198a1", "#3d444d", ("#6e7681", "#ff7b72", "#3fb950", "#58a6ff")),
}
"""By a theme: ink, edges, rules; the colours of outliers, boundary and robust examples, another."""


@dataclass(frozen=True)
class Attacked:
    """Test images of MNIST, (n, 1, 28, 28), attacked; logits are (n, 10)."""

    images: Tensor
    adversarial: Tensor
    labels: Tensor
    clean_logits: Tensor
    adv_logits: Tensor

    @property
    def classes(self) -> Tensor:
        """Return the true classes, (n,)."""
        return true_classes(self.clean_logits, self.adv_logits, self.labels)


def attacked() -> Attacked:
    """Attack the test images by 20 steps of ε/10."""
    test = load("mnist_sample", Path("unused"), device=torch.device("cpu")).test
    network = btrain.load(ROOT / "results" / "weights" / "mnist_bullettrain.pt")
    images, labels = test.images.float() / 255, test.labels
    with torch.no_grad():
        clean = network(images)
    generator = torch.Generator().manual_seed(0)
    adversarial = pgd(
        network,
        images,
        labels,
        clean,
        steps=torch.full_like(labels, 20),
        step_size=torch.full((len(labels),), EPSILON / 10),
        inner_loss=ce_inner_loss,
        noise=EPSILON * (2 * torch.rand(images.shape, generator=generator) - 1),
        epsilon=EPSILON,
    )
    with torch.no_grad():
        return Attacked(images, adversarial, labels, clean, network(adversarial))


def legend_below(figure: Any, axes: Any, columns: int) -> None:
    """Put the names of what is drawn in these axes below a part of the picture."""
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        columnspacing=0.8,
        handlelength=1,
        handletextpad=0.4,
    )


def draw_classes(seen: Attacked, theme: str) -> bytes:
    """Return pairs of images, clean and attacked, above the scores' distribution, as an SVG."""
    from matplotlib.figure import Figure

    ink, edge, rule, colours = LOOKS[theme]
    with look(ink, edge, rule, {"font.size": SIZE, "svg.fonttype": "path", "axes.facecolor": "none",
                                "figure.facecolor": "none"}):  # fmt: skip
        figure = Figure(figsize=(WIDTH, 1.25 * WIDTH), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=(1.05, 1))
        grid = above.subplots(len(CLASSES), 2 * SHOWN)
        for row, (number, name) in zip(grid, CLASSES.items(), strict=True):
            which = (seen.classes == number).nonzero()[:SHOWN, 0].tolist()
            for place, index in enumerate(which):
                for axes, image, logits, what in (
                    (row[2 * place], seen.images, seen.clean_logits, "clean"),
                    (row[2 * place + 1], seen.adversarial, seen.adv_logits, "attacked"),
                ):
                    axes.imshow(image[index, 0], cmap="gray", vmin=0, vmax=1)
                    axes.set(xticks=[], yticks=[])
                    guess = int(logits[index].argmax())
                    right_guess = guess == int(seen.labels[index])
                    colour = colours[2 if right_guess else 1]
                    axes.set_title(
                        f"{what}\n{guess}", fontsize=SIZE - 1, loc="center", color=colour
                    )
            row[0].set_ylabel(name, color=ink)
        axes = below.subplots()
        order = signed_prediction_variance(seen.clean_logits, seen.labels).argsort()
        groups = seen.classes[order].view(GROUPS, -1)
        begin = torch.zeros(GROUPS)
        for number, name in CLASSES.items():
            share = (groups == number).float().mean(dim=1) * 100
            axes.bar(
                torch.arange(GROUPS) * (100 / GROUPS),
                share,
                width=100 / GROUPS,
                align="edge",
                bottom=begin,
                color=colours[number if number == OUTLIER else 3 - number],
                label=f"{name}, {float((seen.classes == number).float().mean()):.0%}",
            )
            begin += share
        axes.set(
            xlim=(0, 100),
            ylim=(0, 100),
            ylabel="share of each class, %",
            xlabel="wrong and sure  ←  unsure  →  right and sure",
        )
        axes.set_title("2,000 images, ordered by their score, %")
        legend_below(below, axes, columns=3)
        return drawn(figure, "svg", transparent=True)


def draw_speedups(theme: str) -> bytes:
    """Return the passes of a step, and the four speedups of Table 2's BulletTrain, as an SVG."""
    from matplotlib.figure import Figure

    rows = json.loads((ROOT / "results" / "cpu" / "table2.json").read_text())["rows"]
    (row,) = (row["numbers"] for row in rows if row["name"] == "table2_bt_nr2")
    shares = tuple(row[key]["mean"] for key in ("f_b", "f_r", "f_o"))
    steps = shares[0] * 10 + shares[1] * 2
    attacked_share = shares[0] + shares[1]
    # Forward passes an image: in attacks, in clean passes that nothing is learnt from, in training.
    # The published code forwards clean images again in every step, and twice in the loss.
    work = {
        "published TRADES": (
            2 * 10,
            10,
            9,
        ),
        "plain TRADES": (2 * 10, 1, 6),
        "BulletTrain": (2 * steps, 1, 3 + 3 * attacked_share),
    }
    passes = {name: sum(parts) for name, parts in work.items()}
    speedups = {
        "eq. 7": theoretical_speedup(fractions=shares, steps=(10, 2, 0), baseline_steps=10),
        "official": passes["published TRADES"] / passes["BulletTrain"],
        "FLOPs": passes["plain TRADES"] / passes["BulletTrain"],
        "measured": row["speedup_measured"]["mean"],
    }
    ink, edge, rule, colours = LOOKS[theme]
    with look(ink, edge, rule, {"font.size": SIZE, "svg.fonttype": "path", "axes.facecolor": "none",
                                "figure.facecolor": "none"}):  # fmt: skip
        figure = Figure(figsize=(WIDTH, WIDTH), layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=(1.3, 1))
        above, below = upper.subplots(), lower.subplots()
        begin = [0.0] * len(work)
        parts = ("attack steps", "clean passes beside them", "update of the weights")
        for place, (part, colour) in enumerate(zip(parts, (1, 0, 3), strict=True)):
            widths = [cost[place] for cost in work.values()]
            above.barh(
                list(work), widths, left=begin, label=part, color=colours[colour], height=0.6
            )
            begin = [start + width for start, width in zip(begin, widths, strict=True)]
        for place, total in enumerate(passes.values()):
            above.text(total + 0.4, place, f"{total:.1f}", va="center")
        above.set_title("forward passes an image and step")
        above.set_xlim(0, 45)
        above.invert_yaxis()
        legend_below(upper, above, columns=2)
        below.barh(list(speedups), list(speedups.values()), color=colours[3], height=0.6)
        for place, value in enumerate(speedups.values()):
            below.text(value + 0.05, place, f"{value:.2f}", va="center")
        below.set_title("times faster")
        below.set_xlim(0, 3.3)
        below.invert_yaxis()
        return drawn(figure, "svg", transparent=True)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    seen = attacked()
    for theme in LOOKS:
        (IMAGES / f"classes-{theme}.svg").write_bytes(draw_classes(seen, theme))
        (IMAGES / f"speedups-{theme}.svg").write_bytes(draw_speedups(theme))
    shares = torch.bincount(seen.classes, minlength=3) / len(seen.classes)
    print({name: round(float(shares[number]), 3) for number, name in CLASSES.items()})
