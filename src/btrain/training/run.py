"""The course of a run from its configuration to its summary."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from btrain import own
from btrain.attacks.fast_paths import check_fast_paths, make_fast_paths
from btrain.build import as_current_gpu, find_device
from btrain.controllers.sparsity.ticket import RobustBird
from btrain.data import Data
from btrain.data.augmentation import batch_slices
from btrain.data.splits import load_configured
from btrain.errors import Interrupted
from btrain.methods.cost import Costs, forward_flops, speedups
from btrain.methods.make import make_methods
from btrain.methods.statistics import UNITS
from btrain.precision import bf16_hint
from btrain.processes.world import World, device_of, joined
from btrain.runs.folder import RunFolder
from btrain.runs.lock import RunLock
from btrain.runs.provenance import changed_code, check_same_data, data_hash, extended
from btrain.runs.tracking import open_tracker
from btrain.settings import Config, Precision
from btrain.settings.compose import to_dict
from btrain.settings.method import VerifiedConfig
from btrain.terminal import counted, say
from btrain.training.epochs import (
    Averages,
    batches_in,
    check_weights,
    train_epoch,
)
from btrain.training.lines import at_chance, describe, fractions, headline, number, tell_masks
from btrain.training.record import Record
from btrain.training.resume import (
    adopt_best,
    check_batch,
    check_same_folder,
    load_newest,
    set_damaged_aside,
)
from btrain.training.safety.determinism import deterministic
from btrain.training.safety.inputs import InputGuard
from btrain.training.safety.out_of_memory import explained_memory, smaller_batch
from btrain.training.safety.signals import StopRequest, stop_on_signals
from btrain.training.schedule import is_over, make_plan
from btrain.training.scores import (
    Evaluator,
    after_epoch,
    final_accuracies,
    sparse_columns,
    summarise,
    training_accuracy,
)
from btrain.training.search import search
from btrain.training.setup import (
    check_radius,
    check_shares,
    doubts,
    known_of,
    make_state,
    notes_on_store,
    sparsity_of,
)
from btrain.training.state import TrainState
from btrain.training.timing.graphs_pay import with_graphs_settled
from btrain.training.timing.probe import Probe

log = logging.getLogger("btrain")


def train(
    config: Config, *, jobs: int | None = None, overrides: Sequence[str] | None = None
) -> dict[str, Any]:
    """Train, evaluate, and leave a run folder behind; return its summary.

    A finished run of the same configuration is not repeated; an unfinished one goes on from its
    last checkpoint. Started by torchrun, its processes train one network together, as often as all
    of them call this; the first one writes, the others read the same folder.

    Args:
        jobs: runs that share the machine, this one included, for `provenance.json`; None where
            nobody tells.
        overrides: the settings as they were typed, for the same file; None where none were.

    Raises:
        UserError: bad data, device or folder (then nothing was written), or training had to stop
            (then the last good checkpoint is kept).
        Interrupted: a signal came; the checkpoint is of that moment.
    """
    with joined() as world:
        return _run(config, world, {"jobs": jobs, "overrides": overrides})


def _run(config: Config, world: World, started: Mapping[str, Any]) -> dict[str, Any]:
    """Do as `train`, in one of the processes."""
    folder, summary = RunFolder(config.run_dir), None
    config, note = folder.as_begun(config)
    if world.first:
        folder.check_owner(config)
        folder.check_resume(config.run.resume)
        summary = _finished(config, folder)
    if (summary := world.told(summary)) is not None:
        return summary
    device = find_device(device_of(world, config.device))
    check_fast_paths(config.train, device)
    with deterministic(config.train.deterministic), as_current_gpu(device):
        with explained_memory(device, "the data and the network", "train fewer or smaller ones"):
            with world.first_ahead():
                data = load_configured(config.dataset, device)
            data_sha256 = data_hash(data)
            check_same_data(world, data_sha256)
            check_shares(config, len(data.train), world)
            check_radius(config, data)
            state = make_state(config, data, device)
        with folder.taken(config) if world.first else nullcontext() as lock:
            if world.first:
                summary = _finished(config, folder)  # by another command meanwhile
            if (summary := world.told(summary)) is not None:
                return summary
            notes = [] if note is None else [note]
            return _train(config, state, data, data_sha256, folder, lock, world, started, notes)


def _finished(config: Config, folder: RunFolder) -> dict[str, Any] | None:
    """Return the summary of a run that nothing is left to do for."""
    summary = folder.summary()
    if summary is None:
        return None
    saved, _ = load_newest(folder)
    if saved is not None and not is_over(config, saved["state"]):
        return None
    end = "was ended and evaluated" if summary.get("cut") else "is finished already"
    more = "; a larger train.max_seconds goes on" if summary.get("cut") else ""
    say(f"{folder.path} {end}: {headline(config, summary)}{more}")
    for note in changed_code(folder.provenance, _own_parts(config)):
        say(f"{note} Another run.dir trains it anew.")
    return summary


def _own_parts(config: Config) -> dict[str, Any]:
    """Return what the run folder keeps of the user's own parts."""
    return {
        group: own.facts(group, factory, settings)
        for group, (factory, settings) in own.parts(config).items()
    }


def _train(
    config: Config,
    state: TrainState,
    data: Data,
    data_sha256: str,
    folder: RunFolder,
    lock: RunLock | None,
    world: World,
    started: Mapping[str, Any],
    notes: list[str],
) -> dict[str, Any]:
    """Do the run, in the process that holds the folder's lock and writes, or in another."""
    saved, warning = load_newest(folder)
    if saved is not None:
        state.load_state_dict(saved["state"])
        check_batch(state, batches_in(state, data.train, make_plan(config)), folder)
    elif config.model.weights is not None:
        notes.append(state.start_from(Path(config.model.weights)))
        state.sparsity = sparsity_of(config, state, data)
    notes += notes_on_store(config, data, state)
    adopt_best(state, folder)
    check_same_folder(world, folder, state)  # all have read what is changed below
    recording: AbstractContextManager[Record | None] = nullcontext()
    if lock is not None:
        parts = _own_parts(config)
        notes += changed_code(folder.provenance, parts)
        provenance = extended(
            folder.provenance, data_sha256, state.device, state.epoch, world.size, started, parts
        )
        recording = _recording(config, state, data, provenance, folder, lock, warning, notes)
    with recording as record, stop_on_signals(world) as stop:
        evaluator = Evaluator(config, world, stop.together, known_of(data))
        size = f"train.batch_size={config.train.batch_size}, bt.pool={config.bt.pool}"
        costs = Costs.of(config, evaluator.known)
        with explained_memory(state.device, size, smaller_batch(config.train.accumulate)):
            unit = forward_flops(state.model, data.shape, state.device)
            _train_epochs(config, state, data, folder, stop, evaluator, record, costs, unit)
        if record is not None:
            log.info("evaluation on %s", counted(len(data.test), "test image"))
        with _evaluation(config, state, stop):
            trained = training_accuracy(evaluator, state, data)
            last, best = final_accuracies(evaluator, state, data, folder)
        summary = {}
        if record is not None:
            summary = summarise(config, state, data, folder, last, best, costs, unit) | trained
            summary["data_sha256"] = data_sha256
            record.end(summary)
            log.info("%s: %s", folder.path, headline(config, summary))
            if (warning := at_chance(summary["clean_acc"], len(data.classes))) is not None:
                log.warning("%s", warning)
    return world.told(summary)


@contextmanager
def _recording(
    config: Config,
    state: TrainState,
    data: Data,
    provenance: dict[str, Any],
    folder: RunFolder,
    lock: RunLock,
    warning: str | None,
    notes: list[str],
) -> Iterator[Record]:
    """Begin or take up what is written of a run; a `warning` is of the state it goes on from.

    Args:
        notes: sentences for the log about how the run begins.
    """
    resumed = folder.last.is_file() or folder.previous.is_file()
    folder.begin(config, provenance)
    with (
        folder.log_file(),  # which hears of a tracker that fails at its beginning or end, too
        open_tracker(config.logger, folder.path, to_dict(config), resumed=resumed) as tracker,
    ):
        if warning is not None:
            log.warning("%s", warning)
            set_damaged_aside(folder)
        partial = state.collapsed or (state.batch > 0 and is_over(config, vars(state)))
        folder.keep_metrics(state.epoch + partial)
        log.info("%s: %s", folder.path, describe(config, data, state))
        for note in notes:
            log.info("%s", note)
        for doubt in doubts(config, state, data):
            log.warning("%s", doubt)
        if state.sparsity is not None:
            tell_masks(state.sparsity)
        yield Record(config, state, data, folder, tracker, lock)


def _train_epochs(
    config: Config,
    state: TrainState,
    data: Data,
    folder: RunFolder,
    stop: StopRequest,
    evaluator: Evaluator,
    record: Record | None,
    costs: Costs,
    unit: int,
) -> None:
    """Train all epochs that are left; write log lines and checkpoints where there is a record.

    Args:
        costs: with which the run's are compared.
        unit: floating-point operations of a forward pass.
    """
    device, plan, world = state.device, make_plan(config), evaluator.world
    short = record is not None and config.train.precision is Precision.bf16
    if short and (hint := bf16_hint("train.precision", device)):
        log.warning("%s", hint)
    if record is not None and isinstance(config.defense, VerifiedConfig):
        for hint in config.defense.hints(config.dataset.val_examples or 0):
            log.warning("%s", hint)
    config = with_graphs_settled(config, state, data.train)
    paths = make_fast_paths(config.train, device)
    method_of = make_methods(config, device, paths=paths, known=known_of(data), world=world,
                             held_out=data.val)  # fmt: skip
    if isinstance(state.sparsity, RobustBird) and state.sparsity.searching:
        search(
            config, state, data, paths=paths, world=world, stopped=stop.made,
            save=record.save if record is not None else lambda: None,
        )  # fmt: skip
        if stop.agreed():
            if record is not None:
                record.save()
            stop.obey()
        if state.sparsity.searching:  # the time is up
            if record is not None:
                record.save()
            return
    batches = len(batch_slices(len(data.train), plan.batch_size))
    probe = Probe(config, data.train, costs, known_of(data), world)
    done = state.epoch * batches + state.batch
    hidden = None if world.first else True  # None: where nobody would see it
    with tqdm(total=plan.epochs * batches, initial=done, unit="batch", disable=hidden) as bar:

        def show(means: Averages) -> None:
            bar.set_postfix_str(
                f"loss {means['loss']:.3f}, boundary/robust/outlier {fractions(means)}, "
                f"speedup {number(speedups(costs, means)['speedup_flops'])}",
                refresh=False,
            )

        while not is_over(config, vars(state)):
            method = method_of(state.epoch, state.repairs)
            watch = InputGuard(method.reach)
            bar.set_description(f"epoch {state.epoch + 1}/{plan.epochs}", refresh=False)
            if record is not None:
                record.save_epoch_start()
            with record.offending_batch_kept() if record is not None else nullcontext():
                means = train_epoch(
                    state, data.train, method, plan, see=paths.view,
                    tick=bar.update, show=show, stopped=stop.made, watch=watch, world=world,
                )  # fmt: skip
            if means is not None:
                check_weights(state, data.train)
            if stop.agreed():
                if record is not None:
                    record.save()
                stop.obey()
            if means is None:
                if record is not None and not folder.last.is_file():
                    record.save()  # for more time to go on from
                break
            metrics: dict[str, Any] = {"epoch": state.epoch + 1} | means
            metrics |= speedups(costs, means)
            metrics["flops"] = float(state.epoch_sums[UNITS]) * unit
            metrics["warnings"] = watch.warnings()
            metrics["speedup_measured"] = None
            metrics |= sparse_columns(state, metrics, unit)
            complete = state.batch == batches_in(state, data.train, plan)
            if complete:
                bar.update(batches - state.batch)  # those that train.skip has spared
                try:
                    with _evaluation(config, state, stop):
                        metrics["speedup_measured"] = world.told(probe.speedup(state))
                        after_epoch(evaluator, state, data, folder, metrics)
                except Interrupted:
                    if record is not None:
                        record.save()
                    raise
            if record is not None:
                record.epoch(metrics)
                due = state.epoch % config.train.checkpoint_every == 0
                if due or not complete or is_over(config, vars(state)):
                    record.save()


@contextmanager
def _evaluation(config: Config, state: TrainState, stop: StopRequest) -> Iterator[None]:
    """Let a signal end an evaluation at once, and put missing memory down to its batches."""
    size = f"eval.batch_size={config.eval.batch_size}"
    with (
        explained_memory(state.device, size, "a smaller eval.batch_size may fit"),
        stop.at_once(),
    ):
        yield
