"""MixTrain's figures 3 and 5 on a trained run, as far as they have a meaning at its scale.

    OMP_NUM_THREADS=1 python scripts/mixtrain_figures.py RUN OUT.png [IMAGES]

(a) The largest loss that PGD, CW and the interval attack reach, on test images that all of them
leave standing (an image that is broken is attacked no further); paired differences with their 95 %
intervals are printed. (b) The distribution of the worst-case loss over a few training images, as
MixTrain draws them, beside that over many, with the largest distance between the two.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from btrain.data.augmentation import to_unit
from btrain.data.splits import load_configured
from btrain.exchange.from_run import load_run
from btrain.verify import bounds, interval_attack, losses
from btrain.verify.graph import trace

FEW = (50, 200)
DRAWS = 200


def attacked_losses(network: Any, x: Tensor, labels: Tensor, epsilon: float) -> dict[str, Tensor]:
    """Return the best wrong logit minus the right one, at the end of each attack, (m,)."""
    graph = trace(network, tuple(x.shape[1:]))
    found = {}
    for name, loss, jumps in (
        ("PGD-40", "pgd", None),
        ("CW-40", "cw", None),
        ("interval", "cw", graph),
    ):
        end = interval_attack.attack(network, x, labels, epsilon=epsilon, loss=loss, graph=jumps)
        with torch.no_grad():
            found[name] = interval_attack.cw(network(end), labels)
    return found


def worst_losses(network: Any, x: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """The cross-entropy of the worst logits that symbolic bounds allow, (m,)."""
    graph = trace(network, tuple(x.shape[1:]))
    with torch.no_grad():
        upper = bounds.margins(graph, bounds.box(x, epsilon), labels, engine="symbolic")
        return losses.worst_case(upper, labels)


def distance(some: np.ndarray, all_: np.ndarray) -> float:
    """The largest difference of two empirical distribution functions."""
    places = np.concatenate([some, all_])
    return float(np.abs(share_below(some, places) - share_below(all_, places)).max())


def share_below(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.sort(values), places, side="right") / len(values)


def told(difference: Tensor) -> str:
    half = 1.96 * difference.std().item() / len(difference) ** 0.5
    return f"{difference.mean().item():+.4f} ± {half:.4f} (95 % interval over images)"


def main(run: Path, out: Path, images: int) -> None:
    config, network = load_run(run)
    data, epsilon = load_configured(config.dataset, torch.device("cpu")), config.attack.epsilon
    x, labels = to_unit(data.test.images[:images]), data.test.labels[:images]
    found = attacked_losses(network, x, labels, epsilon)
    standing = torch.stack([values < 0 for values in found.values()]).all(dim=0)
    for name, values in found.items():
        print(f"{name}: {100 * (values < 0).double().mean().item():.1f} % of {images} stand")
    for name in ("PGD-40", "CW-40"):
        difference = (found["interval"] - found[name])[standing]
        print(f"largest loss, interval − {name}, {len(difference)} standing: {told(difference)}")
    trained = to_unit(data.train.images[:images]), data.train.labels[:images]
    many = worst_losses(network, *trained, epsilon).numpy()
    generator = np.random.default_rng(0)
    for few in FEW:
        distances = [
            distance(generator.choice(many, few, replace=False), many) for _ in range(DRAWS)
        ]
        print(
            f"k = {few} of {images}: largest distance of the distributions {np.mean(distances):.3f}"
            f" on average over {DRAWS} draws, 95 % below {np.quantile(distances, 0.95):.3f}"
        )
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for (name, values), style in zip(found.items(), ("-", "--", ":"), strict=True):
        ends = np.sort(values[standing].numpy())
        left.plot(ends, np.arange(1, len(ends) + 1) / len(ends), style, label=name, linewidth=2)
    left.set(xlabel="best wrong logit − right one", ylabel="share of the standing images below",
             title=f"(a) after each attack, ε = {epsilon:g}")  # fmt: skip
    left.legend(frameon=False)
    places = np.sort(many)
    right.plot(places, share_below(many, places), linewidth=2.5, color="black",
               label=f"{images} training images")  # fmt: skip
    for few, style in zip(FEW, ("--", ":"), strict=True):
        some = generator.choice(many, few, replace=False)
        right.plot(
            places, share_below(some, places), style, linewidth=1.6, label=f"k = {few} of them"
        )
    right.set(xlabel="worst-case loss by symbolic bounds", ylabel="share of the images below",
              title="(b) over few and over many images")  # fmt: skip
    right.set_xscale("symlog", linthresh=0.1)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1000)
