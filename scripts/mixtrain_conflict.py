"""MixTrain's figures 2 and 4 in small: trainings on a part of MNIST, their course drawn.

    OMP_NUM_THREADS=1 python scripts/mixtrain_conflict.py ROOT OUT.png [IMAGES EPOCHS]

ROOT holds MNIST, as `dataset.root` does. (a) The cross-entropy and the worst-case loss that
symbolic bounds allow, on 200 training images after every epoch: of plain training, of training on
the worst case of 5 images a batch alone, and of MixTrain, which mixes both. (b) Clean accuracy and
that under PGD-20 on 500 test images: training on PGD's images, and on the interval attack's, which
jumps by the coefficients of bounds. The numbers are written beside the picture, OUT.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btrain import models
from btrain.attacks.pgd import pgd
from btrain.data import Data, load
from btrain.data.augmentation import to_unit
from btrain.defenses import ce_inner_loss
from btrain.methods.verified import Weight, at_random
from btrain.verify import bounds, interval_attack, losses
from btrain.verify.graph import Graph, trace

BATCH, EPSILON, FEW = 50, 0.1, 5
WEIGHT, ALPHA, RAMP = Weight(0.3, 10.0, 0.6), 0.8, 0.375  # MixTrain's, as in its configuration
NAMES = {"clean": "clean", "worst": "worst case", "pgd": "PGD-20"}
STEPS, JUMPS = 7, 1  # of the attacks in training
MEASURED, TESTED = 200, 500

Step = Callable[[nn.Module, Graph, Tensor, Tensor, float, torch.Generator], Tensor]
"""(network, graph, images, labels, progress in [0, 1], generator) -> loss"""


def plain(
    network: nn.Module, graph: Graph, x: Tensor, labels: Tensor, progress: float,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    return F.cross_entropy(network(x), labels)


def worst(
    network: nn.Module, graph: Graph, x: Tensor, labels: Tensor, progress: float,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    rows = at_random(x, labels, FEW, generator)
    box = bounds.box(x[rows], min(1.0, progress / RAMP) * EPSILON)
    upper = bounds.margins(graph, box, labels[rows], engine="symbolic", all_rounding=False)
    return losses.worst_case(upper, labels[rows]).mean()


def mixed(
    network: nn.Module, graph: Graph, x: Tensor, labels: Tensor, progress: float,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    loss = plain(network, graph, x, labels, progress, generator)
    if torch.rand((), generator=generator) < ALPHA:
        few = worst(network, graph, x, labels, progress, generator)
        loss = loss + WEIGHT.at(progress) * few
    return loss


def attacked(jumps: bool) -> Step:
    def step(
        network: nn.Module, graph: Graph, x: Tensor, labels: Tensor, progress: float,
        generator: torch.Generator,
    ) -> Tensor:  # fmt: skip
        epsilon = max(0.01, min(1.0, progress / RAMP)) * EPSILON
        adv = interval_attack.attack(
            network, x, labels, epsilon=epsilon, loss="pgd", graph=graph if jumps else None,
            steps=STEPS, step_size=epsilon / 4, jumps=JUMPS,
        )  # fmt: skip
        logits = network(x).detach()
        wrong = logits.argmax(1) != labels  # which the attack leaves as they are
        if wrong.any():
            adv[wrong] = pgd(
                network, x[wrong], labels[wrong], logits[wrong], steps=STEPS, step_size=epsilon / 4,
                inner_loss=ce_inner_loss, noise=None, epsilon=epsilon,
            )  # fmt: skip
        return F.cross_entropy(network(adv), labels)

    return step


def trained(
    step: Step, data: Data, images: int, epochs: int,
    measure: Callable[[nn.Module, Graph], dict[str, float]],
) -> list[dict[str, float]]:  # fmt: skip
    """Return what was measured after each epoch, with the CPU seconds of training so far."""
    torch.manual_seed(0)
    network = models.build("small_cnn", width=4, depth=None, classes=10, shape=(1, 28, 28)).eval()
    graph, generator = trace(network, (1, 28, 28)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    total, done, seconds, course = epochs * (images // BATCH), 0, 0.0, []
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    for epoch in range(epochs):
        began = time.process_time()
        order = torch.randperm(images, generator=generator)
        for rows in order[: images // BATCH * BATCH].split(BATCH):
            x, labels = to_unit(data.train.images[rows]), data.train.labels[rows]
            loss = step(network, graph, x, labels, done / total, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
        seconds += time.process_time() - began
        course.append({"epoch": epoch + 1.0, "seconds": seconds, **measure(network, graph)})
        print({key: round(value, 3) for key, value in course[-1].items()}, flush=True)
    return course


def both_losses(data: Data) -> Callable[[nn.Module, Graph], dict[str, float]]:
    x, labels = to_unit(data.train.images[:MEASURED]), data.train.labels[:MEASURED]

    def measure(network: nn.Module, graph: Graph) -> dict[str, float]:
        with torch.no_grad():
            upper = bounds.margins(graph, bounds.box(x, EPSILON), labels, engine="symbolic")
            clean = F.cross_entropy(network(x), labels).item()
            return {"clean": clean, "worst": losses.worst_case(upper, labels).mean().item()}

    return measure


def both_accuracies(data: Data) -> Callable[[nn.Module, Graph], dict[str, float]]:
    x, labels = to_unit(data.test.images[:TESTED]), data.test.labels[:TESTED]

    def measure(network: nn.Module, graph: Graph) -> dict[str, float]:
        adv = interval_attack.attack(
            network, x, labels, epsilon=EPSILON, loss="pgd", graph=None, steps=20,
            step_size=EPSILON / 8,
        )  # fmt: skip
        with torch.no_grad():
            right = [(network(z).argmax(1) == labels).double().mean().item() for z in (x, adv)]
        return {"clean": 100 * right[0], "pgd": 100 * right[1]}

    return measure


def main(root: Path, out: Path, images: int, epochs: int) -> None:
    data = load("mnist", root, device=torch.device("cpu"))
    conflict = {
        name: trained(step, data, images, epochs, both_losses(data))
        for name, step in (("plain", plain), ("worst case alone", worst), ("MixTrain", mixed))
    }
    robust = {
        name: trained(attacked(jumps), data, images, epochs, both_accuracies(data))
        for name, jumps in (("PGD", False), ("interval attack", True))
    }
    content = {"images": images, "epochs": epochs, "figure 4": conflict, "figure 2": robust}
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draw(conflict, robust, out)


def draw(
    conflict: dict[str, list[dict[str, float]]], robust: dict[str, list[dict[str, float]]],
    out: Path,
) -> None:  # fmt: skip
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for panel, courses, along, keys in (
        (left, conflict, "epoch", ("clean", "worst")),
        (right, robust, "seconds", ("clean", "pgd")),
    ):
        for (name, course), colour in zip(
            courses.items(), ("#d55e00", "#0072b2", "#009e73"), strict=False
        ):
            x = [point[along] for point in course]
            for key, style in zip(keys, (".--", ".-"), strict=True):
                label = f"{name}: {NAMES[key]}"
                panel.plot(x, [point[key] for point in course], style, color=colour, label=label)
        panel.legend(frameon=False, fontsize=8, loc="lower right", ncols=2)
        panel.spines[["top", "right"]].set_visible(False)
    left.set(xlabel="epoch", ylabel="loss on training images", yscale="log", ylim=(0.08, 10))
    left.set_yticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
    left.set_title("(a) two losses in conflict")
    right.set(xlabel="CPU seconds of training; a point is an epoch", xscale="log", ylim=(0, 100))
    right.set_xticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    right.set(ylabel="accuracy on test images (%)", title="(b) training with each attack")
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    sizes = [int(word) for word in sys.argv[3:5]] or [2000, 10]
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sizes)
