"""The CPU time of an epoch of several finished runs, by turns in one process.

    OMP_NUM_THREADS=1 python scripts/epoch_times.py RUN [RUN …] [--turns 7] [--batches 30]

A turn takes some batches of the middle epoch with the run's last weights, stores and fractions, at
a learning rate of 0, and counts them as many as that epoch has. Medians, as multiples of the last
run's too; on a machine that others use a turn's runs suffer alike.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from btrain.attacks.fast_paths import make_fast_paths
from btrain.build import load_data
from btrain.data import Data
from btrain.exchange.from_run import read_config
from btrain.methods.make import make_method
from btrain.runs import checkpoint
from btrain.settings import Config
from btrain.settings.compose import read_yaml
from btrain.training.epochs import batches_in, train_epoch
from btrain.training.schedule import make_plan
from btrain.training.setup import make_state
from btrain.training.state import TrainState


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--batches", type=int, default=30)
    wanted = parser.parse_args()
    lanes = [lane(run) for run in wanted.runs]
    seconds: list[list[float]] = [[] for _ in lanes]
    for turn in range(wanted.turns + 1):
        for times, (config, state, data) in zip(seconds, lanes, strict=True):
            spent = epoch_seconds(config, state, data, wanted.batches)
            if turn:  # the first one warms up
                times.append(spent)
    for run, times in zip(wanted.runs, seconds, strict=True):
        ratio = statistics.median(b / a for a, b in zip(times, seconds[-1], strict=True))
        quartiles = statistics.quantiles(times, n=4)
        print(
            f"{run.name}: {statistics.median(times):.2f} s an epoch (quartiles {quartiles[0]:.2f}, "
            f"{quartiles[2]:.2f}), the last run's {ratio:.2f} times as long"
        )


def lane(run: Path) -> tuple[Config, TrainState, Data]:
    config = read_config(read_yaml(run / "config.yaml"), run / "config.yaml")
    data = load_data(config, torch.device("cpu"))
    state = make_state(config, data, torch.device("cpu"))
    state.load_state_dict(checkpoint.load(run / "checkpoints" / "last.pt")["state"])
    return config, state, data


def epoch_seconds(config: Config, state: TrainState, data: Data, batches: int) -> float:
    """Return what the middle epoch takes, by its first batches."""
    state.epoch, state.batch, state.epoch_work = config.train.epochs // 2, 0, 0.0
    plan = replace(make_plan(config), lr=0.0, max_seconds=None)
    paths = make_fast_paths(config.train, state.device)
    train_epoch(
        state, data.train, make_method(config, state.device, paths=paths), plan, see=paths.view,
        tick=lambda: None, show=lambda means: None, stopped=lambda: state.batch >= batches,
    )  # fmt: skip
    state.epoch_sums.zero_()
    taken = state.batch
    return state.epoch_work / taken * batches_in(state, len(data.train), plan)


if __name__ == "__main__":
    main()
