"""Trains 2,000 tiny epochs with a checkpoint each and looks at the process after every one.

    python tests/soaking.py FOLDER EPOCHS

Prints a JSON line for each tenth of the run: resident memory in MiB, open files, and the median
seconds of an epoch, wall-clock and of the CPU.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from btrain.settings.compose import compose
from btrain.training import train

SETTINGS = [
    "dataset=digits", "model=small_cnn", "model.width=2", "dataset.train_examples=64",
    "dataset.test_examples=20", "train.batch_size=32", "attack.steps=2", "bt.n_r=1",
    "eval.steps=1", "device=cpu",
]  # fmt: skip


class Watch(logging.Handler):
    """Notes memory, open files and the time at every line of the log, one an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, int, float, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        self.seen.append((memory, files, time.perf_counter(), time.process_time()))


def main(folder: Path, epochs: int) -> None:
    torch.set_num_threads(1)
    watch = Watch()
    logging.getLogger("btrain").addHandler(watch)
    train(compose([*SETTINGS, f"train.epochs={epochs}", f"run.dir={folder / 'run'}"]))
    after = watch.seen[1 : epochs + 1]  # without the first line and the last
    tenth = epochs // 10
    for begin in range(0, epochs, tenth):
        part = after[begin : begin + tenth]
        wall, cpu = ([b[i] - a[i] for a, b in itertools.pairwise(part)] for i in (2, 3))
        print(json.dumps({
            "epochs": begin + tenth,
            "memory_mib": round(part[-1][0], 1),
            "open_files": part[-1][1],
            "epoch_seconds": round(statistics.median(wall), 4),
            "epoch_cpu_seconds": round(statistics.median(cpu), 4),
        }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
