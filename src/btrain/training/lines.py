"""The lines in which a run speaks of itself in the log."""

from __future__ import annotations

import logging
from typing import Any

from btrain.controllers.sparsity.controller import Sparsity
from btrain.data import Data
from btrain.evaluation.result import hardly_above_chance, wilson
from btrain.settings import Config, Score
from btrain.settings.method import BulletTrainConfig, RandomConfig, UniformConfig, VerifiedConfig
from btrain.terminal import counted, plural
from btrain.training.state import TrainState

log = logging.getLogger("btrain")

_MANY = 0.5
_BALLS = {"linf": "L∞", "l2": "L2"}


def fractions(means: dict[str, Any]) -> str:
    return "/".join(number(means[key]) for key in ("f_b", "f_r", "f_o"))


def describe(config: Config, data: Data, state: TrainState) -> str:
    """Return what a run trains on, how images are augmented and how far they are attacked."""
    held_out = f", {len(data.val)} held out" if data.val is not None else ""
    where = f"from epoch {state.epoch + 1}" if state.epoch or state.batch else "from the start"
    train, test, classes = len(data.train), len(data.test), len(data.classes)
    return (
        f"{counted(train, 'training image')}{held_out}, {counted(test, 'test image')}, "
        f"{counted(classes, 'class')}; {_augmentation(config)}; {_radius(config)}{where} on "
        f"{state.device}"
    )


def _augmentation(config: Config) -> str:
    """Return how the images are moved before they are trained on."""
    padding = config.recipe.crop_padding
    crops = f"random crops ({padding} pixels)" if padding else "no crops"
    return f"{crops}, {'random' if config.recipe.flip else 'no'} flips"


def _radius(config: Config) -> str:
    """Return the radius that is trained against; empty where nobody is attacked or bounded."""
    if config.attack.augmix is not None or config.bt.n_b == 0:
        return ""
    ball = _BALLS.get(config.attack.norm, "own ball")
    return f"ε {config.attack.epsilon:.3g} ({ball}); "


def tell_masks(sparsity: Sparsity) -> None:
    """Log how many weights each layer keeps, and which would have kept none."""
    kept, weights = sparsity.kept(), sparsity.thinned.weights
    layers = ", ".join(f"{name} {kept[name]} of {weights[name].numel()}" for name in kept)
    columns = sparsity.columns()
    density, share = columns["density"], 100 * columns["macs_share"]
    log.info("density %.4f, %.1f %% of the multiply-adds; kept: %s", density, share, layers)
    if sparsity.emptied:
        log.warning(
            "The masks would have emptied %s; each keeps one weight.", ", ".join(sparsity.emptied)
        )


def epoch_line(config: Config, metrics: dict[str, Any]) -> str:
    """Return what an epoch came to, as far as it is known.

    Its robust accuracy is under the attack of the training.
    """
    verified = isinstance(config.defense, VerifiedConfig)
    kinds = {
        "clean_acc_train": "clean",
        "robust_acc_train": "verified" if verified else "under the training's attack",
    }
    known = [f"{metrics[k]:.2f} % {kind}" for k, kind in kinds.items() if metrics[k] is not None]
    held_out = (
        f", held-out {metrics['val_clean_acc']:.2f} % clean, {metrics['val_robust_acc']:.2f} % PGD"
        if "val_clean_acc" in metrics
        else ""
    )
    return (
        f"epoch {metrics['epoch']}: loss {metrics['loss']:.4f}"
        f"{', training images ' if known else ''}{', '.join(known)}{held_out}; "
        f"{_shares(config, metrics)}"
        f"{speedup(metrics)}{metrics['train_seconds']:.1f} s"
    )


def many_outliers(config: Config, metrics: dict[str, Any], classes: int) -> str | None:
    """Return a warning, half-way through a run, if most examples are outliers and not attacked.

    Outliers are the misclassified, but for `bt=random`, which draws them: where they are as many as
    by guessing, to attack them would not help. Warm-up epochs count none, so that the first one
    behind them is looked at if it is later.
    """
    bt, epochs, share = config.bt, config.train.epochs, metrics["f_o"]
    looked_at = metrics["epoch"] == max((epochs + 1) // 2, bt.plain_epochs + 1)
    guarded = isinstance(bt, BulletTrainConfig) and bt.guard < 1 and bt.guard_steps > 0
    spared = isinstance(bt, BulletTrainConfig) and bt.n_o == 0 and bt.n_b > 0 and not guarded
    spared = spared and not isinstance(bt, RandomConfig)
    spared = spared and not isinstance(config.defense, VerifiedConfig)
    if not (looked_at and spared and share is not None and share > _MANY):
        return None
    so_far = f"epoch {metrics['epoch']} of {epochs}: {100 * share:.0f} % of the examples"
    if hardly_above_chance(100 * (1 - share), classes):
        grows = " or an attack that grows (attack.epsilon_warmup_epochs)"
        return (
            f"{so_far} are misclassified, nearly as many as by guessing: the network has not begun "
            "to learn; more epochs (train.epochs), another rate (recipe.lr)"
            f"{grows if config.attack.augmix is None else ''} can help."
        )
    everybody = f"bt=uniform{' bt.score=fresh' if bt.score is Score.last else ''}"
    return (
        f"{so_far} count as outliers and are not attacked, which can cost robust accuracy; more "
        f"epochs make them fewer, and {everybody} attacks everybody."
    )


def at_chance(clean: float, classes: int) -> str | None:
    """Return a warning where a network hardly does better than guessing on clean images.

    Args:
        clean: its accuracy in percent.
    """
    if not hardly_above_chance(clean, classes):
        return None
    return (
        f"Only {clean:.1f} % of the clean images are classified right, where guessing gives "
        f"{100 / classes:.1f} %: the training failed, or has only begun, and neither robust "
        "accuracy nor speedup says anything."
    )


def speedup(numbers: dict[str, Any]) -> str:
    """Return by how much less work a run takes than the plain defense, as far as it is known."""
    work, time = numbers.get("speedup_flops"), numbers.get("speedup_measured")
    if work is None and time is None:
        return ""
    known = ([f"{work:.2f} by FLOPs"] if work is not None else []) + (
        [f"{time:.2f} measured"] if time is not None else []
    )
    return f"speedup {', '.join(known)}; "


def _shares(config: Config, numbers: dict[str, Any]) -> str:
    """Return who was attacked for how long, or how many were bounded; empty where all are alike."""
    if isinstance(config.defense, VerifiedConfig):
        share = "–" if numbers["f_b"] is None else f"{100 * numbers['f_b']:.1f}"
        return f"{share} % of the images bounded; "
    if isinstance(config.bt, UniformConfig):
        return ""
    return f"boundary/robust/outlier {fractions(numbers)}; "


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def headline(config: Config, summary: dict[str, Any]) -> str:
    """Return what a run came to; first of all what ended it early, if anything did."""
    cut, collapse = summary.get("cut"), summary.get("collapse")
    return (
        f"{f'cut by {cut}; ' if cut else ''}"
        f"{f'ended by a collapse in {collapse}; ' if collapse else ''}"
        f"clean {number(summary['clean_acc'])} %, "
        f"{_attack(summary)} {number(summary['robust_acc'])} %; {_shares(config, summary)}"
        f"{speedup(summary)}{summary['train_seconds']:.1f} s of training"
    )


def in_words(config: Config, summary: dict[str, Any]) -> str | None:
    """Return the accuracies of a run for who sees such numbers for the first time.

    None where the summary of an earlier version does not tell them all.
    """
    n, clean, robust = (summary.get(key) for key in ("test_examples", "clean_acc", "robust_acc"))
    if type(n) is not int or n < 1 or clean is None or robust is None:
        return None
    least, most = wilson(round(min(max(robust / 100, 0.0), 1.0) * n), n)
    ball = _BALLS.get(config.attack.norm, "radius")
    return (
        f"{clean:.1f} % of {n:,} test {plural(n, 'image is', 'images are')} classified right, and "
        f"{robust:.1f} % also under {_attack(summary)} ({ball}, ε {config.eval.epsilon:.3g}). On "
        f"other images like these the {robust:.1f} % would be between {100 * least:.1f} and "
        f"{100 * most:.1f} % (95 % interval)."
    )


def _attack(summary: dict[str, Any]) -> str:
    """Return under what the final accuracy is; without a step that is the random start alone."""
    steps = summary.get("eval_steps")
    return "the start's noise alone" if steps == 0 else f"PGD-{steps}" if steps else "PGD"
