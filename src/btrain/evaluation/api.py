"""The robust accuracy of anybody's network, and whether to believe it, from Python."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from btrain.attacks.balls import BALLS
from btrain.errors import UserError
from btrain.evaluation import attack as attacks
from btrain.evaluation.attack import Start, Subject
from btrain.evaluation.examples import (
    Examples,
    as_evaluated,
    check_gradient,
    checked,
    clean_logits,
    near_chance,
)
from btrain.evaluation.pgd import farthest
from btrain.evaluation.result import Result, Sanity
from btrain.evaluation.sanity import check_sanity
from btrain.settings.checks import no_farther, number
from btrain.settings.evaluation import (
    AUTOATTACKS,
    INTERVAL_ATTACKS,
    PRESETS,
    EvalSettings,
    PgdChanges,
)


def robust_accuracy(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    norm: str = "linf",
    attack: str = "pgd20",
    step_size: float | None = None,
    steps: int | None = None,
    restarts: int | None = None,
    loss: str | None = None,
    seed: int = 0,
    batch_size: int = 500,
    precision: str = "float32",
    show_progress: bool = False,
) -> Result:
    """Evaluate a network in eval mode, on the device of its parameters; it is left as it was.

    Args:
        model: maps images in [0, 1] to logits; normalisation belongs inside.
        images: (n, C, H, W), uint8, or floats in [0, 1].
        labels: (n,) int64.
        epsilon: radius of the ball, in [0, 1] pixel units.
        norm: linf or l2.
        attack: clean, a preset of PGD, custom, autoattack or autoattack_rand.
        step_size, steps, restarts, loss: change the preset; the step size is ε/10 otherwise.

    Raises:
        UserError: images, labels, logits or settings are not what an attack assumes, or the model
            has no gradient.

    Warns:
        UserWarning: the clean accuracy is close to that of guessing.
    """
    if attack in ("all", "corruptions"):
        raise UserError(f"attack={attack} needs files; please use the command btrain eval.")
    epsilon = number("epsilon", epsilon)
    step_size = None if step_size is None else number("step_size", step_size)
    settings = EvalSettings(
        attacks=[attack],
        pgd=PgdChanges(steps=steps, restarts=restarts, loss=loss, step_size=step_size),
        norm=norm,
        epsilon=epsilon,
        seed=seed,
        batch_size=batch_size,
        precision=precision,
    )
    if attack in INTERVAL_ATTACKS:
        raise UserError(
            f"attack={attack} needs bounds; please use btrain.verify.interval_attack.attack or "
            "the command btrain eval."
        )
    examples = checked(images, labels, next((w.device for w in model.parameters()), None))
    settings.check_lengths(norm)
    no_farther("epsilon", epsilon, farthest(BALLS[norm], examples.shape))
    with as_evaluated(model, examples.device, precision):
        examples = replace(examples, classes=_classes(model, examples))
        started = time.perf_counter()
        correct = attacks.clean_correct(model, examples, batch_size=batch_size)
        seconds = time.perf_counter() - started
        if attack != "clean":
            check_gradient(model, examples)
        hint = near_chance(correct, len(examples.classes))
        if hint is not None:
            warnings.warn(hint, stacklevel=2)
        subject = Subject(
            model=model,
            examples=examples,
            correct=correct,
            epsilon=epsilon,
            step_size=epsilon / 10,
            seed=seed,
            batch_size=batch_size,
            threat=BALLS[norm],
            facts={"device": str(examples.device), "precision": precision, "note": hint},
            clean_seconds=seconds,
            show_progress=show_progress,
        )
        start = Start(subject.correct)
        if attack in AUTOATTACKS:
            return attacks.autoattack(subject, attack, start)
        if attack in PRESETS or attack == "custom":
            return attacks.pgd(subject, *settings.pgd_attack(attack), start)
        return attacks.clean(subject)


def sanity_checks(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    norm: str = "linf",
    seed: int = 0,
    batch_size: int = 500,
    show_progress: bool = False,
) -> Sanity:
    """Look for signs that a network masks its gradients, so that `robust_accuracy` flatters it.

    Args:
        model: maps images in [0, 1] to logits.
        images, labels: (n, C, H, W) and (n,), as for `robust_accuracy`; some hundred suffice.
        epsilon, norm: the ball, in [0, 1] pixel units.

    Raises:
        UserError: images, labels, logits or settings are not what an attack assumes, or the model
            has no gradient.
    """
    epsilon = number("epsilon", epsilon)
    settings = EvalSettings(norm=norm, epsilon=epsilon, seed=seed, batch_size=batch_size)
    examples = checked(images, labels, next((w.device for w in model.parameters()), None))
    settings.check_lengths(norm)
    no_farther("epsilon", epsilon, farthest(BALLS[norm], examples.shape))
    with as_evaluated(model, examples.device):
        examples = replace(examples, classes=_classes(model, examples))
        check_gradient(model, examples)
        return check_sanity(
            model,
            examples,
            attacks.clean_correct(model, examples, batch_size=batch_size),
            epsilon=epsilon,
            seed=seed,
            batch_size=batch_size,
            threat=BALLS[norm],
            show_progress=show_progress,
        )


def _classes(model: nn.Module, examples: Examples) -> tuple[str, ...]:
    """Return a name for each of the model's logits."""
    classes = clean_logits(model, examples, torch.tensor([0])).shape[1]
    if int(examples.labels.max()) >= classes:
        raise UserError(
            f"labels go up to {int(examples.labels.max())}, but the model has {classes} classes."
        )
    return tuple(str(k) for k in range(classes))
