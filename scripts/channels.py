"""The speedup of a step without channels, and with BulletTrain: CPU time, in turns.

    OMP_NUM_THREADS=1 python scripts/channels.py [preact_resnet18 small_cnn] [--share 0.25]

PGD-10 on 32×32 images: the plain defense on the whole network (nothing computed twice), the plain
defense and BulletTrain (the paper's fractions of boundary, robust and outlier examples) on the
whole network and on one of `sparsity=channel_static`. Medians of the ratios within a repetition.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from btrain.controllers.sparsity.channels import Channels
from btrain.controllers.sparsity.make import Length, make_sparsity
from btrain.data import Data, Split
from btrain.methods.cost import PAPER_FRACTIONS
from btrain.models import build
from btrain.settings.bench import Contender
from btrain.settings.compose import compose
from btrain.training.timing.clock import seconds
from btrain.training.timing.lane import Lane, Workload

CPU = torch.device("cpu")
CASES = {"preact_resnet18": (64, 16, 3), "small_cnn": (32, 128, 9)}
"""network -> width, batch, repetitions"""


def measure(name: str, share: float) -> None:
    """Print the speedups on one network."""
    width, batch, repetitions = CASES[name]
    settings = [
        "dataset=cifar10", f"model={name}", f"model.width={width}", "defense=pgd",
        "attack.steps=10", "attack.mode=eval", f"train.batch_size={batch}", "run.dir=unused",
        "sparsity=channel_static", f"sparsity.macs_share={share}",
    ]  # fmt: skip
    configs = {kind: compose([*settings, f"bt={kind}"]) for kind in ("uniform", "bullettrain")}
    torch.manual_seed(0)
    whole = build(name, width=width, depth=None, classes=10, shape=(3, 32, 32))
    images = torch.rand(batch, 3, 32, 32)
    labels = torch.zeros(batch, dtype=torch.int64)
    few = Split((images * 255).to(torch.uint8), labels)
    data = Data(few, None, few, tuple(map(str, range(10))))
    dense = build(name, width=width, depth=None, classes=10, shape=(3, 32, 32))
    dense.load_state_dict(whole.state_dict())
    sparsity = make_sparsity(
        configs["uniform"].sparsity, whole, data, beside=[], length=Length(1, 1), seed=0
    )
    assert isinstance(sparsity, Channels)
    compact = sparsity.cut.compact(whole, sparsity.channels)
    lanes = {
        (kind, size): Lane(
            configs[kind],
            Contender.lean if kind == "uniform" else Contender.bullettrain,
            Workload(network, lambda repetition: images, None, PAPER_FRACTIONS),
            CPU,
        )
        for kind in configs
        for size, network in (("whole", dense), ("compact", compact))
    }
    times = {key: list[float]() for key in lanes}
    for repetition in range(repetitions + 1):
        for key, lane in lanes.items():
            made = lane.prepare(repetition)
            taken = seconds(lambda lane=lane, made=made: lane.run(made), CPU)
            if repetition:
                times[key].append(taken)
    lean = times["uniform", "whole"]
    left, median = 100 * float(sparsity.memory["macs_share"]), statistics.median(lean)
    print(
        f"{name} of width {width}, {left:.1f} % of the multiply-adds, batches of {batch}; ", end=""
    )
    print(f"plain step {median:.3f} s")
    for (kind, size), taken in times.items():
        ratios = [a / b for a, b in zip(lean, taken, strict=True)]
        print(f"  {kind:12} {size:8} {statistics.median(ratios):.2f}×  "
              f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("networks", nargs="*", choices=[*CASES, []])
    parser.add_argument("--share", type=float, default=0.25)
    given = parser.parse_args()
    for network in given.networks or CASES:
        measure(network, given.share)
