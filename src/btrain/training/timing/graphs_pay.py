"""The answer to `train.cuda_graphs=auto`: whether graphs pay, by a few steps on copies."""

from __future__ import annotations

import logging
import statistics
from dataclasses import replace
from functools import partial

import torch

from btrain.data import Split
from btrain.data.augmentation import to_unit
from btrain.errors import first_reason
from btrain.methods.cost import PAPER_FRACTIONS
from btrain.settings import Config, CudaGraphs
from btrain.training.state import TrainState

log = logging.getLogger("btrain")

_WARM_UP, _TIMED = 3, 7  # steps


def with_graphs_settled(config: Config, state: TrainState, split: Split) -> Config:
    """Return the configuration with `always` or `never` for `auto`, which a line in the log says.

    On a CPU it is `never`. The answer is part of the state, for with graphs groups are rounded up:
    a run that goes on keeps to it. Nothing else of the run moves: the steps are the bench's.
    """
    if config.train.cuda_graphs is not CudaGraphs.auto:
        return config
    if state.device.type != "cuda":
        return _with(config, CudaGraphs.never)
    if state.graphs is None:
        state.graphs = faster(config, state, split)
    else:
        log.info("CUDA graphs: %s, as when the run began", "used" if state.graphs else "not used")
    return _with(config, CudaGraphs.always if state.graphs else CudaGraphs.never)


def faster(config: Config, state: TrainState, split: Split) -> bool | None:
    """Return whether a step with graphs takes less time than one without, by the medians of seven.

    None where they could not be timed.
    """
    from btrain.settings.bench import Contender
    from btrain.training.timing.clock import seconds  # here, for the bench imports what trains
    from btrain.training.timing.lane import Lane, Workload

    device = state.device
    images = to_unit(split.images[: config.train.batch_size])
    # The fractions of a trained network, which a fresh one has not.
    workload = Workload(state.model, lambda repetition: images, None, PAPER_FRACTIONS)
    choices = (CudaGraphs.never, CudaGraphs.always)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            lanes = [
                Lane(_with(config, choice), Contender.bullettrain, workload, device)
                for choice in choices
            ]
            times: list[list[float]] = [[] for _ in lanes]
            for repetition in range(_WARM_UP + _TIMED):
                for lane, taken in zip(lanes, times, strict=True):
                    batch = lane.prepare(repetition)
                    taken.append(seconds(partial(lane.run, batch), device))
    except RuntimeError as error:  # no memory for two more networks, or what a graph cannot hold
        log.warning("CUDA graphs: not used (%s).", first_reason(error))
        return None
    plain, graphs = (statistics.median(taken[_WARM_UP:]) for taken in times)
    log.info(
        "CUDA graphs: %s, %.2f ms a step with them and %.2f without",
        "used" if graphs < plain else "not used", 1000 * graphs, 1000 * plain,
    )  # fmt: skip
    return graphs < plain


def _with(config: Config, choice: CudaGraphs) -> Config:
    return replace(config, train=replace(config.train, cuda_graphs=choice))
