"""A run from its configuration to its summary."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from btrain import checkpoint
from btrain.config import to_dict
from btrain.data import Data, Split
from btrain.data.augmentation import batch_slices
from btrain.evaluation import Accuracy, evaluate
from btrain.run_folder import RunFolder
from btrain.schema import Config, DefenseName
from btrain.tracking import Tracker, open_tracker
from btrain.training.cost import forward_flops, speedups
from btrain.training.loop import Averages, check_weights, epoch_order, train_epoch
from btrain.training.methods import make_step
from btrain.training.setup import find_device, load_data, make_plan, make_state
from btrain.training.state import TrainState
from btrain.training.statistics import StepStats, averages

log = logging.getLogger("btrain")

_COLLAPSE = 20.0  # points
_UNITS = StepStats._fields.index("units")


def train(config: Config) -> dict[str, Any]:
    """Trains, evaluates, and leaves a run folder behind; returns its summary.

    A finished run of the same configuration is not repeated; an unfinished one goes on from its
    last checkpoint.

    Raises:
        UserError: bad data, device or folder (then nothing was written), or a loss that is not
            finite (then the last good checkpoint is kept).
    """
    folder = RunFolder(config.run_dir)
    folder.check_owner(config)
    saved = checkpoint.load(folder.last) if folder.last.is_file() else None
    summary = folder.summary()
    if summary is not None and (saved is None or _is_over(config, saved["state"])):
        print(f"{folder.path} is finished already: {_headline(summary)}")
        return summary

    device = find_device(config.device)
    data = load_data(config, device)
    state = make_state(config, data, device)
    if saved is not None:
        state.load_state_dict(saved["state"])
    with (
        folder.created(config),
        open_tracker(config.logger, folder.path, to_dict(config)) as tracker,
        folder.log_file(),
    ):
        folder.keep_metrics(state.epoch)
        log.info("%s: %s", folder.path, _describe(data, state))
        _train_epochs(config, state, data, folder, tracker)
        summary = _summarise(config, state, data, folder)
        tracker.summarise(summary)
        folder.write_summary(summary)
        log.info("%s: %s", folder.path, _headline(summary))
    return summary


def _train_epochs(
    config: Config, state: TrainState, data: Data, folder: RunFolder, tracker: Tracker
) -> None:
    """All epochs that are left, each with its log line and checkpoint."""
    device, plan = state.device, make_plan(config)
    step, warm_up = make_step(config, device), make_step(config, device, warm_up=True)
    batches = len(batch_slices(len(data.train), plan.batch_size))
    unit = forward_flops(state.model, data.shape, device)
    done = state.epoch * batches + state.batch
    with tqdm(total=plan.epochs * batches, initial=done, unit="batch", disable=None) as bar:

        def show(means: Averages) -> None:
            bar.set_postfix_str(
                f"loss {means['loss']:.3f}, F_B/F_R/F_O {_fractions(means)}, "
                f"speedup {_number(speedups(config, means)['theoretical_speedup'])}",
                refresh=False,
            )

        while not _is_over(config, vars(state)):
            bar.set_description(f"epoch {state.epoch + 1}/{plan.epochs}", refresh=False)
            now = warm_up if state.epoch < config.bt.warmup_epochs else step
            means = train_epoch(state, data.train, now, plan, tick=bar.update, show=show)
            if means is None:
                break
            check_weights(state, data.train)
            metrics: dict[str, Any] = {"epoch": state.epoch + 1} | means
            metrics |= speedups(config, means)
            metrics["flops"] = float(state.epoch_sums[_UNITS]) * unit
            if state.batch == batches:
                state.end_epoch()
                metrics |= _watch(config, state, data, folder)
                if data.val is not None and not state.collapsed and _due(config, state.epoch):
                    metrics |= _validate(config, state, data.val, folder)
            folder.append_metrics(metrics)
            tracker.log(metrics, metrics["epoch"])
            log.info(_epoch_line(metrics))
            checkpoint.save(folder.last, {"state": state.state_dict(), "config": to_dict(config)})


def _is_over(config: Config, progress: Mapping[str, Any]) -> bool:
    """Whether nothing is left to train; `progress` are a state's numbers, live or from a file."""
    limit = config.train.max_seconds
    timed_out = limit is not None and progress["train_seconds"] >= limit
    return bool(timed_out or progress["collapsed"] or progress["epoch"] >= config.train.epochs)


def _watch(config: Config, state: TrainState, data: Data, folder: RunFolder) -> dict[str, float]:
    """PGD accuracy on one training batch: if it collapses, FAST's catastrophic overfitting.

    With `recipe.early_stop_on_collapse` a fall by more than 20 points since the epoch before takes
    the run back to that epoch and ends it, as FAST does.
    """
    some = epoch_order(len(data.train), config.seed, 0)[: config.train.batch_size]
    batch = Split(data.train.images[some], data.train.labels[some])
    before, now = state.watched_acc, _evaluate(config, state.model, batch).robust
    state.watched_acc = now
    fell = before is not None and now < before - _COLLAPSE
    if fell and config.recipe.early_stop_on_collapse:
        log.info(
            "PGD accuracy on a training batch fell from %.1f to %.1f %%: stopped.", before, now
        )
        state.load_state_dict(checkpoint.load(folder.last)["state"])
        state.collapsed = True
    return {"pgd_acc_train_batch": now}


def _due(config: Config, epoch: int) -> bool:
    """Whether the held-out part is scored after this epoch: every so often, and at the end."""
    return epoch % config.eval.every_epochs == 0 or epoch == config.train.epochs


def _validate(config: Config, state: TrainState, val: Split, folder: RunFolder) -> dict[str, float]:
    """Scores the held-out part and keeps the best epoch by its robust accuracy.

    By its clean accuracy with AugMix, which is not made against attacks.
    """
    accuracy = _evaluate(config, state.model, val)
    by_clean = config.defense.name is DefenseName.augmix
    score = accuracy.clean if by_clean else accuracy.robust
    if state.best_val_acc is None or score > state.best_val_acc:
        state.best_epoch, state.best_val_acc = state.epoch, score
        content = {"state": {"model": state.model.state_dict(), "epoch": state.epoch}}
        checkpoint.save(folder.best, content | {"config": to_dict(config)})
    return {"val_clean_acc": accuracy.clean, "val_robust_acc": accuracy.robust}


def _evaluate(config: Config, model: nn.Module, split: Split) -> Accuracy:
    return evaluate(
        model,
        split,
        epsilon=config.eval.epsilon,
        step_size=config.eval.step_size,
        steps=config.eval.steps,
        batch_size=config.eval.batch_size,
        seed=config.seed,
        show_progress=True,
    )


def _summarise(config: Config, state: TrainState, data: Data, folder: RunFolder) -> dict[str, Any]:
    """Evaluates the last and, where there is one, the best model on the test set."""
    last = _evaluate(config, state.model, data.test)
    sums, device = state.total_sums + state.epoch_sums, state.device
    means = averages(sums)
    summary = {
        "clean_acc": last.clean,
        "robust_acc": last.robust,
        "f_b": means["f_b"],
        "f_r": means["f_r"],
        "f_o": means["f_o"],
        **speedups(config, means),
        "attack_steps_mean": means["attack_steps_mean"],
        "units_per_example": means["units_per_example"],
        "flops": float(sums[_UNITS]) * forward_flops(state.model, data.shape, device),
        "train_seconds": state.train_seconds,
        "epochs": state.epoch,
        "seed": config.seed,
        "test_examples": len(data.test),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch_version": str(torch.__version__),
        "git_commit": git_commit(),
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
    }
    if state.best_epoch is not None:
        state.model.load_state_dict(checkpoint.load(folder.best)["state"]["model"])
        best = _evaluate(config, state.model, data.test)
        summary |= {
            "best_epoch": state.best_epoch,
            "best_val_acc": state.best_val_acc,
            "best_clean_acc": best.clean,
            "best_robust_acc": best.robust,
        }
    return summary


def git_commit() -> str | None:
    """The commit of btrain's own source, or None where it is not a checkout."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None


def _fractions(means: dict[str, Any]) -> str:
    return f"{means['f_b']:.2f}/{means['f_r']:.2f}/{means['f_o']:.2f}"


def _describe(data: Data, state: TrainState) -> str:
    held_out = f", {len(data.val)} held out" if data.val is not None else ""
    where = f"from epoch {state.epoch + 1}" if state.epoch or state.batch else "from the start"
    return (
        f"{len(data.train)} training images{held_out}, {len(data.test)} test images, "
        f"{len(data.classes)} classes; {where} on {state.device}"
    )


def _epoch_line(metrics: dict[str, Any]) -> str:
    held_out = (
        f", held-out clean {metrics['val_clean_acc']:.2f} robust {metrics['val_robust_acc']:.2f}"
        if "val_clean_acc" in metrics
        else ""
    )
    return (
        f"epoch {metrics['epoch']}: loss {metrics['loss']:.4f}, train clean "
        f"{_number(metrics['clean_acc_train'])} robust {_number(metrics['robust_acc_train'])}"
        f"{held_out}, "
        f"F_B/F_R/F_O {_fractions(metrics)}, "
        f"speedup {_number(metrics['theoretical_speedup'])} (eq. 7), "
        f"{metrics['train_seconds']:.1f} s"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _headline(summary: dict[str, Any]) -> str:
    return (
        f"clean {summary['clean_acc']:.2f} %, PGD {summary['robust_acc']:.2f} %, F_B/F_R/F_O "
        f"{_fractions(summary)}, speedup {_number(summary['theoretical_speedup'])} (eq. 7), "
        f"{summary['train_seconds']:.1f} s of training"
    )
