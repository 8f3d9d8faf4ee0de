"""The cost of a loss by bounds on this machine, against a plain training step of 50 images.

    OMP_NUM_THREADS=1 python scripts/bounds.py [symbolic crown_ibp …]

CPU milliseconds forward and backward on mixtrain_mnist_small at ε = 0.3, medians, each engine with
1, 5 and 50 images; and how far the process's memory grows, in a process of its own.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from btrain.models import verified
from btrain.settings.names import ENGINES
from btrain.verify import bounds
from btrain.verify.graph import trace

EPSILON = 0.3
IMAGES = (1, 5, 50)


def median_ms(step: Callable[[], None], times: int) -> float:
    """CPU milliseconds of a step, after two that are not counted."""
    spent = []
    for turn in range(times + 2):
        began = time.process_time()
        step()
        if turn >= 2:
            spent.append(1e3 * (time.process_time() - began))
    return statistics.median(spent)


def megabytes() -> float:
    """The most that this process has held so far, as Linux tells it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main(engines: list[str], memory_of: int | None) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = verified.build("mixtrain_mnist_small", shape=(1, 28, 28), classes=10)
    graph = trace(network, (1, 28, 28))
    optimizer = torch.optim.Adam(network.parameters())
    x, labels = torch.rand(50, 1, 28, 28), torch.arange(50) % 10

    def plain() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(x), labels).backward()
        optimizer.step()

    def bounded(engine: str, count: int) -> None:
        optimizer.zero_grad()
        box = bounds.box(x[:count], EPSILON)
        upper = bounds.margins(graph, box, labels[:count], engine=engine, all_rounding=False)
        F.cross_entropy(upper, labels[:count]).backward()

    if memory_of is not None:
        plain()
        bounds.size(graph, engines[0], joint=True, like=x)
        before = megabytes()
        for _ in range(3):
            bounded(engines[0], memory_of)
        print(f"{megabytes() - before:.0f}")
        return
    base = median_ms(plain, 40)
    print(f"plain step of 50 images: {base:.2f} ms")
    for engine in engines:
        for count in IMAGES:
            spent = median_ms(lambda e=engine, n=count: bounded(e, n), 15 if count < 50 else 5)
            arguments = [sys.executable, __file__, engine, f"memory={count}"]
            grown = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
            print(
                f"{engine:<10} {count:>3} images {spent:8.1f} ms {spent / base:6.1f} x "
                f"{grown.strip():>5} MB"
            )


if __name__ == "__main__":
    wanted = [word for word in sys.argv[1:] if "=" not in word] or list(ENGINES)
    words = [word.removeprefix("memory=") for word in sys.argv[1:] if "=" in word]
    main(wanted, int(words[0]) if words else None)
