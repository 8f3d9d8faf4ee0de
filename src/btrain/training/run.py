"""A run from its configuration to its summary."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from btrain import checkpoint
from btrain.config import to_dict
from btrain.data import Data
from btrain.data.augmentation import batch_slices
from btrain.errors import Interrupted, UserError
from btrain.run_folder import RunFolder
from btrain.run_lock import RunLock
from btrain.schema import Config
from btrain.tracking import Tracker, open_tracker
from btrain.training.cost import forward_flops, speedups
from btrain.training.determinism import deterministic
from btrain.training.guards import make_input_guard
from btrain.training.lines import describe, epoch_line, fractions, headline, number
from btrain.training.loop import Averages, check_weights, train_epoch
from btrain.training.memory import explained_memory
from btrain.training.methods import make_steps
from btrain.training.nonfinite import NotFiniteError
from btrain.training.probe import Probe
from btrain.training.provenance import extended
from btrain.training.resume import adopt_best, load_newest, set_damaged_aside
from btrain.training.scores import after_epoch, summarise
from btrain.training.setup import find_device, load_data, make_plan, make_state
from btrain.training.signals import StopRequest, stop_on_signals
from btrain.training.state import TrainState
from btrain.training.statistics import UNITS

log = logging.getLogger("btrain")


def train(config: Config) -> dict[str, Any]:
    """Trains, evaluates, and leaves a run folder behind; returns its summary.

    A finished run of the same configuration is not repeated; an unfinished one goes on from its
    last checkpoint.

    Raises:
        UserError: bad data, device or folder (then nothing was written), or training had to stop
            (then the last good checkpoint is kept).
        Interrupted: a signal came; the checkpoint is of that moment.
    """
    folder = RunFolder(config.run_dir)
    folder.check_owner(config)
    folder.check_resume(config.run.resume)
    if (summary := _finished(config, folder)) is not None:
        return summary
    device = find_device(config.device)
    with deterministic(config.train.deterministic):
        with explained_memory(device, "the data and the network", "train fewer or smaller ones"):
            data = load_data(config, device)
            state = make_state(config, data, device)
        with folder.taken(config) as lock:
            if (summary := _finished(config, folder)) is not None:  # by another process meanwhile
                return summary
            return _train(config, state, data, folder, lock)


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


def _train(
    config: Config, state: TrainState, data: Data, folder: RunFolder, lock: RunLock
) -> dict[str, Any]:
    """The run, in a folder of its own."""
    saved, warning = load_newest(folder)
    if saved is not None:
        state.load_state_dict(saved["state"])
    provenance = extended(folder.provenance, data, state.device, state.epoch)
    folder.begin(config, provenance)
    settings, resumed = to_dict(config), saved is not None
    with (
        folder.log_file(),  # which hears of a tracker that fails at its beginning or end, too
        open_tracker(config.logger, folder.path, settings, resumed=resumed) as tracker,
        stop_on_signals() as stop,
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
            _train_epochs(config, state, data, folder, tracker, lock, stop)
        with _evaluation(config, state, stop):
            summary = summarise(config, state, data, folder)
        summary["data_sha256"] = provenance["data_sha256"]
        lock.check()
        folder.write_summary(summary)
        tracker.summarise(summary)
        log.info("%s: %s", folder.path, headline(summary))
    return summary


def _train_epochs(
    config: Config,
    state: TrainState,
    data: Data,
    folder: RunFolder,
    tracker: Tracker,
    lock: RunLock,
    stop: StopRequest,
) -> None:
    """All epochs that are left, each with its log line, and the checkpoints."""
    device, plan = state.device, make_plan(config)
    step_of = make_steps(config, device)
    guard = make_input_guard(config)
    batches = len(batch_slices(len(data.train), plan.batch_size))
    unit = forward_flops(state.model, data.shape, device)
    probe = Probe(config, data.train)
    done = state.epoch * batches + state.batch

    def save() -> None:
        lock.check()
        content = {"state": state.state_dict(), "config": to_dict(config)}
        checkpoint.save(folder.last, content, previous=folder.previous)

    with tqdm(total=plan.epochs * batches, initial=done, unit="batch", disable=None) as bar:

        def show(means: Averages) -> None:
            bar.set_postfix_str(
                f"loss {means['loss']:.3f}, F_B/F_R/F_O {fractions(means)}, "
                f"speedup {number(speedups(config, means)['theoretical_speedup'])}",
                refresh=False,
            )

        while not _is_over(config, vars(state)):
            bar.set_description(f"epoch {state.epoch + 1}/{plan.epochs}", refresh=False)
            if config.recipe.early_stop_on_collapse and state.batch == 0:
                checkpoint.save(folder.epoch_start, {"state": state.state_dict()})
            with _offending_batch_kept(folder):
                means = train_epoch(
                    state, data.train, step_of(state.epoch), plan, tick=bar.update, show=show,
                    stopped=stop.made, guard=guard,
                )  # fmt: skip
            if means is not None:
                check_weights(state, data.train)
            if stop.made():
                save()
                stop.obey()
            if means is None:
                break
            metrics: dict[str, Any] = {"epoch": state.epoch + 1} | means
            metrics |= speedups(config, means)
            metrics["flops"] = float(state.epoch_sums[UNITS]) * unit
            metrics["warnings"] = guard.warnings()
            metrics["speedup_measured"] = None
            if complete := state.batch == batches:
                try:
                    with _evaluation(config, state, stop):
                        metrics["speedup_measured"] = probe.speedup(state)
                        after_epoch(config, state, data, folder, metrics)
                except Interrupted:
                    save()
                    raise
            for warning in metrics["warnings"]:
                log.warning("epoch %d: %s.", metrics["epoch"], warning)
            lock.check()
            folder.append_metrics(metrics)
            tracker.log(metrics, metrics["epoch"])
            log.info(epoch_line(metrics))
            due = state.epoch % config.train.checkpoint_every == 0
            if due or not complete or _is_over(config, vars(state)):
                save()


@contextmanager
def _evaluation(config: Config, state: TrainState, stop: StopRequest) -> Iterator[None]:
    """Where a signal ends the run at once, and memory is that of the evaluation's batches."""
    size = f"eval.batch_size={config.eval.batch_size}"
    with (
        explained_memory(state.device, size, "a smaller eval.batch_size may fit"),
        stop.at_once(),
    ):
        yield


@contextmanager
def _offending_batch_kept(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except NotFiniteError as error:
        with suppress(UserError):  # the first sentence is the one that matters
            checkpoint.save(folder.nonfinite, {"state": error.batch})
        raise


def _is_over(config: Config, progress: Mapping[str, Any]) -> bool:
    """Whether nothing is left to train; `progress` are a state's numbers, live or from a file."""
    limit = config.train.max_seconds
    timed_out = limit is not None and progress["train_seconds"] >= limit
    return bool(timed_out or progress["collapsed"] or progress["epoch"] >= config.train.epochs)
