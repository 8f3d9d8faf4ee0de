"""The accuracies of a run: after each epoch, and at its end."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from btrain.controllers.sparsity.controller import FlyingBirdPlus
from btrain.data import Data, Split
from btrain.evaluation import Accuracy, evaluate
from btrain.evaluation.pgd import threat_of
from btrain.methods.cost import Costs, speedups
from btrain.methods.make import Known, with_more_steps
from btrain.methods.statistics import UNITS, averages
from btrain.processes.world import World
from btrain.runs import checkpoint
from btrain.runs.folder import RunFolder
from btrain.runs.provenance import device_name, git_commit, git_dirty
from btrain.settings import Config, RivalName
from btrain.settings.compose import to_dict
from btrain.settings.sparsity import FlyingBirdPlusConfig
from btrain.terminal import counted
from btrain.training.epochs import epoch_order
from btrain.training.resume import adopt_best
from btrain.training.safety.inputs import epoch_warnings, fell, is_above, overfitting
from btrain.training.schedule import is_over
from btrain.training.state import TrainState

log = logging.getLogger("btrain")

_PROBE = 1000  # training images that Flying Bird+ is told of where training's accuracy misleads
_WATCHED = 128  # training images of which a fall by 20 points is no chance


@dataclass(frozen=True)
class Evaluator:
    """The evaluations of a run, whose examples its processes share.

    Attributes:
        ahead: called ahead of each batch; a signal that one process got ends all of them there.
        known: what a ball of the user's may want to know.
    """

    config: Config
    world: World
    ahead: Callable[[], None]
    known: Known

    def __call__(self, model: nn.Module, split: Split) -> Accuracy:
        """Return the accuracies under the run's own PGD, in all processes the same."""
        settings = self.config.eval
        return evaluate(
            model,
            split,
            epsilon=settings.epsilon,
            step_size=settings.step_size,
            steps=settings.steps,
            batch_size=settings.batch_size,
            seed=self.config.seed,
            threat=threat_of(self.config.attack, self.known),
            show_progress=self.world.first,
            processes=self.world,
            ahead=self.ahead,
        )


def watched_images(config: Config) -> int:
    """Return how many training images tell of a collapse after each epoch."""
    size, recipe = config.train.batch_size, config.recipe
    acts = recipe.early_stop_on_collapse or recipe.repair_steps > 0
    return max(size, _WATCHED) if acts else size


def after_epoch(
    evaluator: Evaluator,
    state: TrainState,
    data: Data,
    folder: RunFolder,
    metrics: dict[str, Any],
) -> None:
    """Evaluate a complete epoch and count it; add to `metrics`.

    All processes decide the same, the first one writes.

    The PGD accuracy on one training batch tells of FAST's catastrophic overfitting: with
    `recipe.early_stop_on_collapse` a fall by more than 20 points since the epoch before takes the
    run back to that epoch and ends it, as FAST does, unless `recipe.repair_steps` repairs it in the
    next one; a smaller batch is then filled up to 128 images. This accuracy is that of the weights
    in training, whose average would show a fall later; all else is scored on `state.evaluated`.
    `state` changes last, so that a signal within leaves it where the epoch's training ended.
    """
    config, world = evaluator.config, evaluator.world
    size, stops = watched_images(config), config.recipe.early_stop_on_collapse
    filled_up = size if size > config.train.batch_size else None
    batch = part_of(data.train, config.seed, size)
    watched = evaluator(state.model, batch)
    before = state.watched_acc if state.watched_images == filled_up else None
    metrics["pgd_acc_train_batch"] = watched.robust
    overfitted = _overfitting(config, state.epoch, metrics["robust_acc_train"], watched, before)
    wanting = overfitted is not None and config.recipe.repair_steps > 0
    repairs = wanting and not is_over(config, vars(state) | {"epoch": state.epoch + 1})
    metrics["warnings"] += epoch_warnings(metrics, watched, len(batch))
    if overfitted is not None:
        remedy = ""
        if repairs:
            steps = with_more_steps(config).bt.n_b
            remedy = f"; the next epoch takes {counted(steps, 'step')} (recipe.repair_steps)"
        elif _one_step(config) and not config.recipe.repair_steps:
            remedy = "; recipe.repair_steps=1 or more steps for all may be better"
        metrics["warnings"].append(overfitted + remedy)
    if stops and not repairs and fell(before, watched.robust):
        if world.first:
            log.warning(
                "epoch %d: PGD accuracy on %s fell from %.1f to %.1f %%; the run ends with the "
                "weights of epoch %d (recipe.early_stop_on_collapse).",
                state.epoch + 1, counted(len(batch), "training image"), before, watched.robust,
                state.epoch,
            )  # fmt: skip
            state.go_back(checkpoint.load(folder.epoch_start)["state"])
            adopt_best(state, folder)  # as the others have it
        world.copy_weights(state.evaluated)  # all that the others still need
        state.collapsed = True
        return
    bird = state.sparsity
    listens = isinstance(bird, FlyingBirdPlus) and bird.listening
    due = _due(config, state.epoch + 1)
    held_out = None
    if data.val is not None and (due or listens):
        held_out = evaluator(state.evaluated, data.val)
        if due:
            _validate(evaluator, state, held_out, data, folder, metrics)
    if isinstance(bird, FlyingBirdPlus) and listens:
        assert held_out is not None
        assert data.val is not None
        _listen(evaluator, state, bird, data, held_out, metrics)
        if not due:
            bird.spend(len(data.val) * _units(config))
    state.watched_acc, state.watched_images = watched.robust, filled_up
    state.repairs = wanting  # by a run that was cut and goes on, too
    state.end_epoch()


def _overfitting(
    config: Config, epoch: int, under_attack: float | None, watched: Accuracy, before: float | None
) -> str | None:
    """Return how an epoch, from 0, has overfitted to the training's attack, or None.

    While ε grows the training's attack is the weaker one for that alone, so that only a fall tells.
    """
    whole = config.attack.share(epoch) == 1
    from_start = whole and (_one_step(config) or config.recipe.repair_steps > 0)
    return overfitting(under_attack, watched.robust, before, from_start=from_start)


def _one_step(config: Config) -> bool:
    """Return whether one large step attacks everybody."""
    return config.rival.name in (RivalName.fast, RivalName.nfgsm) and config.bt.n_b == 1


def _due(config: Config, epoch: int) -> bool:
    """Return whether this epoch is scored on the held-out part: every so often, and at the end."""
    return epoch % config.eval.every_epochs == 0 or epoch == config.train.epochs


def _validate(
    evaluator: Evaluator,
    state: TrainState,
    accuracy: Accuracy,
    data: Data,
    folder: RunFolder,
    metrics: dict[str, Any],
) -> None:
    """Keep the best epoch by its robust accuracy on the held-out part.

    By its clean accuracy with AugMix, which is not made against attacks.
    """
    assert data.val is not None
    config = evaluator.config
    metrics |= {"val_clean_acc": accuracy.clean, "val_robust_acc": accuracy.robust}
    if is_above(accuracy, len(data.val)):
        metrics["warnings"].append("held-out PGD accuracy is above the clean accuracy")
    by_clean = "attacking" not in config.defense.kinds
    score, epoch = accuracy.clean if by_clean else accuracy.robust, state.epoch + 1
    if state.best_val_acc is None or score > state.best_val_acc:
        if evaluator.world.first:
            model = {"model": state.evaluated.state_dict(), "epoch": epoch, "val_acc": score}
            content = {"state": model, "config": to_dict(config), **checkpoint.of_images(data)}
            checkpoint.save(folder.best, content)
        state.best_epoch, state.best_val_acc = epoch, score


def _listen(
    evaluator: Evaluator,
    state: TrainState,
    bird: FlyingBirdPlus,
    data: Data,
    held_out: Accuracy,
    metrics: dict[str, Any],
) -> None:
    """Tell Flying Bird+ of the robust generalisation gap and of the held-out adversarial loss.

    The gap's first half is the running accuracy of training, as published, where every example gets
    the whole attack. Elsewhere it would be that of weaker attacks, so a fixed part of the training
    images, not augmented, gets the attack of the held-out ones; likewise where that is asked for.
    """
    config = evaluator.config
    assert isinstance(config.sparsity, FlyingBirdPlusConfig)
    examples, accuracy = config.sparsity.probe_examples, metrics["robust_acc_train"]
    weaker = config.chosen("chooses") or config.chosen("rival")
    whole = weaker is None and "attacking" in config.defense.kinds
    if examples is not None or not whole:
        probe = part_of(data.train, config.seed, examples or _PROBE)
        accuracy = evaluator(state.evaluated, probe).robust
        bird.spend(len(probe) * _units(config))
    gap = accuracy - held_out.robust
    bird.heard(gap, held_out.robust_loss)
    metrics |= {"robust_gap": gap, "val_loss": held_out.robust_loss}


def _units(config: Config) -> int:
    """Return units an example of an evaluation: a clean pass, the attack, and a pass after it."""
    return 2 * config.eval.steps + 2


def sparse_columns(state: TrainState, metrics: dict[str, Any], unit: int) -> dict[str, Any]:
    """Return what an epoch's line says of sparsity; nothing without it.

    `flops_counted` counts a multiply-add by a weight that is 0 as none, `flops` beside it as any
    other: dense kernels execute it. `unit` is the floating-point operations of a forward pass.
    """
    if state.sparsity is None:
        return {}
    counted = float(state.sparsity.memory["epoch_units"])
    speedup, executed = metrics["speedup_flops"], float(state.epoch_sums[UNITS])
    return {
        **state.sparsity.columns(),
        **({"flops": counted * unit} if state.sparsity.shrinks else {}),
        "flops_counted": counted * unit,
        "speedup_counted": None if speedup is None else speedup * executed / counted,
    }


def sparse_summary(
    state: TrainState, speedup: float | None, units: float, unit: int
) -> dict[str, Any]:
    """Return what a summary says of sparsity; nothing without it.

    Args:
        speedup: of the batches' work against the plain defense's.
        units: of the batches.
        unit: floating-point operations of a forward pass.

    Returns:
        `flops_executed` is all work, `flops_counted` the same without multiply-adds by weights that
        are 0; both with what was spent beside the batches, a search or a probe. All that is
        executed is counted where channels are missing.
    """
    if state.sparsity is None:
        return {}
    counted = float(state.sparsity.memory["counted_units"])
    extra = float(state.sparsity.memory["extra_units"])
    shrinks = state.sparsity.shrinks
    return {
        **state.sparsity.columns(),
        **({"flops": counted * unit} if shrinks else {}),
        "flops_counted": counted * unit,
        "flops_executed": (counted if shrinks else units + extra) * unit,
        "speedup_counted": speedup * units / counted if speedup and counted else None,
    }


def training_accuracy(evaluator: Evaluator, state: TrainState, data: Data) -> dict[str, float]:
    """Return the accuracies on some training images, not augmented; nothing where none are due."""
    some = evaluator.config.eval.train_examples
    if not some:
        return {}
    found = evaluator(state.evaluated, part_of(data.train, evaluator.config.seed, some))
    return {"train_clean_acc": found.clean, "train_robust_acc": found.robust}


def part_of(split: Split, seed: int, examples: int) -> Split:
    """Return so many examples, the same of the same seed."""
    some = epoch_order(len(split), seed, 0)[:examples]
    return Split(split.images[some], split.labels[some])


def final_accuracies(
    evaluator: Evaluator, state: TrainState, data: Data, folder: RunFolder
) -> tuple[Accuracy, Accuracy | None]:
    """Score the last and, where there is one, the best model on the test set; the best stays."""
    last = evaluator(state.evaluated, data.test)
    if state.best_epoch is None:
        return last, None
    if evaluator.world.first:
        state.evaluated.load_state_dict(checkpoint.load(folder.best)["state"]["model"])
    evaluator.world.copy_weights(state.evaluated)
    return last, evaluator(state.evaluated, data.test)


def summarise(
    config: Config,
    state: TrainState,
    data: Data,
    folder: RunFolder,
    last: Accuracy,
    best: Accuracy | None,
    costs: Costs,
    unit: int,
) -> dict[str, Any]:
    """Return what `summary.json` says of a run with these accuracies.

    Args:
        costs: with which the run's are compared.
        unit: floating-point operations of a forward pass.
    """
    if is_above(last, len(data.test)):
        log.warning("PGD accuracy on the test set is above the clean accuracy.")
    sums, device = state.total_sums + state.epoch_sums, state.device
    units, means, measured = float(sums[UNITS]), averages(sums), folder.logged("speedup_measured")
    compared = speedups(costs, means)
    summary = {
        "clean_acc": last.clean,
        "robust_acc": last.robust,
        "f_b": means["f_b"],
        "f_r": means["f_r"],
        "f_o": means["f_o"],
        **compared,
        "speedup_measured": statistics.fmean(measured) if measured else None,
        "attack_steps_mean": means["attack_steps_mean"],
        "units_per_example": means["units_per_example"],
        "flops": units * unit,
        "train_seconds": state.train_seconds,
        "epochs": state.epoch,
        "cut": _cut(config, state),
        "collapse": _next_epoch(config, state) if state.collapsed else None,
        "eval_steps": config.eval.steps,
        "seed": config.seed,
        "test_examples": len(data.test),
        "classes": len(data.classes),
        "device": device_name(device),
        "torch_version": str(torch.__version__),
        "git_commit": git_commit(),
        "git_dirty": git_dirty(),
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
    }
    summary |= sparse_summary(state, compared["speedup_flops"], units, unit)
    if best is not None:
        summary |= {
            "best_epoch": state.best_epoch,
            "best_val_acc": state.best_val_acc,
            "best_clean_acc": best.clean,
            "best_robust_acc": best.robust,
        }
    return summary


def _cut(config: Config, state: TrainState) -> str | None:
    """Return the time limit that ended a run ahead of its last epoch, and where, or None."""
    if state.epoch >= config.train.epochs or state.collapsed:
        return None
    where = f"{_next_epoch(config, state)}, batch {state.batch}"
    return f"train.max_seconds={config.train.max_seconds:g} in {where}"


def _next_epoch(config: Config, state: TrainState) -> str:
    return f"epoch {state.epoch + 1} of {config.train.epochs}"
