"""A run from its configuration to its summary."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from tqdm import tqdm

from btrain.config import to_dict
from btrain.data import Data
from btrain.data.augmentation import batch_slices
from btrain.errors import Interrupted, UserError
from btrain.run_folder import RunFolder
from btrain.run_lock import RunLock
from btrain.schema import Config
from btrain.tracking import open_tracker
from btrain.training.choice import with_graphs_settled
from btrain.training.cost import forward_flops, speedups
from btrain.training.determinism import deterministic
from btrain.training.fast_paths import check_fast_paths
from btrain.training.guards import make_input_guard
from btrain.training.lines import describe, fractions, headline, number
from btrain.training.loop import Averages, check_weights, train_epoch
from btrain.training.memory import explained_memory
from btrain.training.methods import make_steps
from btrain.training.parallel import World, device_of, joined
from btrain.training.probe import Probe
from btrain.training.provenance import extended
from btrain.training.record import Record
from btrain.training.resume import adopt_best, load_newest, set_damaged_aside
from btrain.training.scores import after_epoch, summarise
from btrain.training.setup import check_shares, find_device, load_data, make_plan, make_state
from btrain.training.signals import StopRequest, stop_on_signals
from btrain.training.state import TrainState
from btrain.training.statistics import UNITS

log = logging.getLogger("btrain")


def train(config: Config) -> dict[str, Any]:
    """Trains, evaluates, and leaves a run folder behind; returns its summary.

    A finished run of the same configuration is not repeated; an unfinished one goes on from its
    last checkpoint. Started by torchrun, its processes train one network together; the first one
    writes, the others read the same folder.

    Raises:
        UserError: bad data, device or folder (then nothing was written), or training had to stop
            (then the last good checkpoint is kept).
        Interrupted: a signal came; the checkpoint is of that moment.
    """
    with joined(config.device) as world:
        return _run(config, world)


def _run(config: Config, world: World) -> dict[str, Any]:
    """`train`, by one of the processes."""
    folder, summary = RunFolder(config.run_dir), None
    if world.first:
        folder.check_owner(config)
        folder.check_resume(config.run.resume)
        summary = _finished(config, folder)
    if (summary := world.told(summary)) is not None:
        return summary
    device = find_device(device_of(world, config.device))
    check_fast_paths(config.train, device)
    with deterministic(config.train.deterministic):
        with explained_memory(device, "the data and the network", "train fewer or smaller ones"):
            with world.first_ahead():
                data = load_data(config, device)
            check_shares(config, len(data.train), world)
            state = make_state(config, data, device)
        if not world.first:
            return _follow(config, state, data, folder, world)
        with folder.taken(config) as lock:
            summary = _finished(config, folder)  # by another command meanwhile
            if world.told(summary) is not None:
                return summary or {}
            return _train(config, state, data, folder, lock, world)


def _finished(config: Config, folder: RunFolder) -> dict[str, Any] | None:
    """The summary of a run that nothing is left to do for."""
    summary = folder.summary()
    if summary is None:
        return None
    saved, _ = load_newest(folder)
    if saved is not None and not _is_over(config, saved["state"]):
        return None
    print(f"{folder.path} is finished already: {headline(summary)}")
    return summary


def _follow(
    config: Config, state: TrainState, data: Data, folder: RunFolder, world: World
) -> dict[str, Any]:
    """The run, in a process that writes nothing."""
    nothing: dict[str, Any] | None = None
    if (summary := world.told(nothing)) is not None:
        return summary
    saved, _ = load_newest(folder)
    if saved is not None:
        state.load_state_dict(saved["state"])
    world.wait()
    if world.told([0, 0]) != [state.epoch, state.batch]:
        raise UserError(f"run.dir={folder.path} must be one folder for all machines; it is not.")
    with stop_on_signals(world) as stop:
        size = f"train.batch_size={config.train.batch_size}"
        with explained_memory(state.device, size, "a smaller train.batch_size or model may fit"):
            _train_epochs(config, state, data, world, stop, None)
        return world.told({})


def _train(
    config: Config, state: TrainState, data: Data, folder: RunFolder, lock: RunLock, world: World
) -> dict[str, Any]:
    """The run, in a folder of its own."""
    saved, warning = load_newest(folder)
    if saved is not None:
        state.load_state_dict(saved["state"])
    world.wait()  # until the others have read what is changed below
    world.told([state.epoch, state.batch])
    provenance = extended(folder.provenance, data, state.device, state.epoch, world.size)
    folder.begin(config, provenance)
    settings, resumed = to_dict(config), saved is not None
    with (
        folder.log_file(),  # which hears of a tracker that fails at its beginning or end, too
        open_tracker(config.logger, folder.path, settings, resumed=resumed) as tracker,
        stop_on_signals(world) as stop,
    ):
        if warning is not None:
            log.warning("%s", warning)
            set_damaged_aside(folder)
        adopt_best(state, folder)
        partial = state.collapsed or (state.batch > 0 and _is_over(config, vars(state)))
        folder.keep_metrics(state.epoch + partial)
        log.info("%s: %s", folder.path, describe(data, state))
        size = f"train.batch_size={config.train.batch_size}, bt.pool={config.bt.pool}"
        with explained_memory(state.device, size, "a smaller one or a smaller model may fit"):
            record = Record(config, state, folder, tracker, lock)
            _train_epochs(config, state, data, world, stop, record)
        with _evaluation(config, state, stop):
            summary = summarise(config, state, data, folder)
        summary["data_sha256"] = provenance["data_sha256"]
        lock.check()
        folder.write_summary(summary)
        tracker.summarise(summary)
        log.info("%s: %s", folder.path, headline(summary))
    return world.told(summary)


def _train_epochs(
    config: Config,
    state: TrainState,
    data: Data,
    world: World,
    stop: StopRequest,
    record: Record | None,
) -> None:
    """All epochs that are left; with their log lines and checkpoints where there is a record."""
    device, plan = state.device, make_plan(config)
    config = with_graphs_settled(config, state, data.train)
    step_of = make_steps(config, device, world)
    guard = make_input_guard(config)
    batches = len(batch_slices(len(data.train), plan.batch_size))
    unit = forward_flops(state.model, data.shape, device)
    probe = Probe(config, data.train)
    done = state.epoch * batches + state.batch
    hidden = None if world.first else True  # None: where nobody would see it
    with tqdm(total=plan.epochs * batches, initial=done, unit="batch", disable=hidden) as bar:

        def show(means: Averages) -> None:
            bar.set_postfix_str(
                f"loss {means['loss']:.3f}, F_B/F_R/F_O {fractions(means)}, "
                f"speedup {number(speedups(config, means)['theoretical_speedup'])}",
                refresh=False,
            )

        while not _is_over(config, vars(state)):
            bar.set_description(f"epoch {state.epoch + 1}/{plan.epochs}", refresh=False)
            if record is not None:
                record.save_epoch_start()
            with record.offending_batch_kept() if record is not None else nullcontext():
                means = train_epoch(
                    state, data.train, step_of(state.epoch), plan, tick=bar.update, show=show,
                    stopped=stop.made, guard=guard, world=world,
                )  # fmt: skip
            if means is not None:
                check_weights(state, data.train)
            if stop.agreed(world):
                if record is not None:
                    record.save()
                stop.obey()
            if means is None:
                break
            metrics: dict[str, Any] = {"epoch": state.epoch + 1} | means
            metrics |= speedups(config, means)
            metrics["flops"] = float(state.epoch_sums[UNITS]) * unit
            metrics["warnings"] = guard.warnings()
            metrics["speedup_measured"] = None
            complete = state.batch == batches
            if complete and record is not None:
                try:
                    with _evaluation(config, state, stop):
                        if world.size == 1:  # the probe times one process
                            metrics["speedup_measured"] = probe.speedup(state)
                        after_epoch(config, state, data, record.folder, metrics)
                except Interrupted:
                    record.save()
                    raise
            if complete:
                numbers = world.told(state.numbers())
                if record is None:
                    state.follow(numbers)
            if record is not None:
                record.epoch(metrics)
                due = state.epoch % config.train.checkpoint_every == 0
                if due or not complete or _is_over(config, vars(state)):
                    record.save()


@contextmanager
def _evaluation(config: Config, state: TrainState, stop: StopRequest) -> Iterator[None]:
    """Where a signal ends the run at once, and memory is that of the evaluation's batches."""
    size = f"eval.batch_size={config.eval.batch_size}"
    with (
        explained_memory(state.device, size, "a smaller eval.batch_size may fit"),
        stop.at_once(),
    ):
        yield


def _is_over(config: Config, progress: Mapping[str, Any]) -> bool:
    """Whether nothing is left to train; `progress` are a state's numbers, live or from a file."""
    limit = config.train.max_seconds
    timed_out = limit is not None and progress["train_seconds"] >= limit
    return bool(timed_out or progress["collapsed"] or progress["epoch"] >= config.train.epochs)
