"""Signs of gradient masking: whether a robust accuracy can be believed.

After Carlini et al., *On Evaluating Adversarial Robustness* (2019), and Athalye et al., *Obfuscated
Gradients Give a False Sense of Security* (2018): more radius and more steps must not help the
model, an unbounded attack must win, a black-box attack must not, and gradients must exist.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module

import torch
from torch import Tensor, nn

from btrain import precision
from btrain.attacks.balls import Ball, LinfBall
from btrain.errors import UserError
from btrain.evaluation.autoattack import BATCH, InParts, library, library_norm, square_refuses
from btrain.evaluation.examples import (
    Examples,
    batches,
    own_random_state,
)
from btrain.evaluation.pgd import Pgd, Threat, farthest, pgd_stands
from btrain.evaluation.result import Check, Sanity, hardly_above_chance
from btrain.terminal import tell

EXAMPLES = 500
STEPS = (0, 1, 2, 5, 10, 20, 50)
RADII = tuple(i / 2 for i in range(9))  # in units of ε
QUERIES = 500

TOLERANCE = 2.0  # points, or two examples if that is more: what one random start may do
FEW_LEFT = 5.0  # percent, of a model that nothing should be left of
_CHECKS = 6
FLAT = 1.0  # percent of the examples
_AT_CHANCE = (
    "{clean:.1f} % of the clean images are classified right, where guessing gives {chance:.1f} %: "
    "of such a network these checks say nothing, passed or not."
)


def check_sanity(
    model: nn.Module,
    examples: Examples,
    correct: Tensor,
    *,
    epsilon: float,
    seed: int,
    batch_size: int,
    threat: Threat = LinfBall,
    show_progress: bool = False,
) -> Sanity:
    """Attack some examples in many ways, in the mode and precision the model is in.

    PGD here has one restart, min(2.5·ε/steps, 2·ε) as step size and counts its last iterate: what
    a failing gradient shows in is not patched up by many tries.

    Args:
        examples: a few hundred suffice.
        correct: which of them are classified correctly when clean, (n,) bool on the CPU.
        threat: from a radius to its ball.
    """
    unbounded = farthest(threat, examples.shape)
    within = correct.clone()  # what no attack within ε has broken

    @cache  # of ε and 20 steps both curves have a point
    def left(radius: float, steps: int, loss: str = "ce", of: Tensor = correct) -> Tensor:
        if radius == 0 or steps == 0:
            return of
        step_size = min(2.5 * radius / steps, 2 * radius)
        attack = Pgd(
            radius, step_size, steps, loss=loss, last_iterate=True, seed=seed, threat=threat
        )
        stands = pgd_stands(
            model,
            examples,
            of,
            attack,
            batch_size=batch_size,
            show_progress=show_progress,
            name=f"sanity, ε {radius:.4g}, {steps} steps",
        )
        if radius <= epsilon:
            within.logical_and_(stands | ~of)
        return stands

    def percent(stands: Tensor) -> float:
        return 100 * int(stands.sum()) / len(examples)

    checks: list[Check] = []

    def done(check: Check) -> None:
        checks.append(check)
        if show_progress:
            tell(f"sanity check {len(checks)} of {_CHECKS}: {check.name}: {check.verdict}")

    tolerance = max(TOLERANCE, 200 / len(examples))
    radii = list(dict.fromkeys(min(factor * epsilon, unbounded) for factor in RADII))
    by_radius = [(radius, percent(left(radius, 20))) for radius in radii]
    done(_falls("accuracy falls with ε", "ε", by_radius, tolerance))
    after = [left(epsilon, steps) for steps in STEPS]
    by_steps = [(float(n), percent(stands)) for n, stands in zip(STEPS, after, strict=True)]
    done(_falls("accuracy falls with steps", "steps", by_steps, tolerance))
    done(_wins(None if unbounded == math.inf else percent(left(unbounded, 50)), unbounded))
    done(_one_step(by_steps, tolerance))
    # Square climbs the margin, so PGD does, too, on what the cross-entropy leaves.
    white_box = percent(left(epsilon, STEPS[-1], "cw", of=after[-1]))
    square = _under_square(model, examples, correct, threat(epsilon), seed, batch_size)
    if isinstance(square, Tensor):
        within.logical_and_(square)
    black_box = percent(square) if isinstance(square, Tensor) else square
    done(_black_box(black_box, white_box, tolerance))
    done(_gradients(model, examples, batch_size))
    curves = {"epsilon": by_radius, "steps": by_steps}
    clean, classes = percent(correct), len(examples.classes)
    warning = _AT_CHANCE.format(clean=clean, chance=100 / classes)
    return Sanity(
        len(examples),
        epsilon,
        tuple(checks),
        curves,
        threat(epsilon).norm,
        warning if hardly_above_chance(clean, classes) else None,
        (~within).nonzero().flatten().tolist(),
    )


def _falls(name: str, unit: str, curve: Sequence[tuple[float, float]], tolerance: float) -> Check:
    """Check that no point of the curve lies more than the tolerance above one before it."""
    rise, least, where = 0.0, curve[0], (curve[0], curve[0])
    for point in curve:
        if point[1] - least[1] > rise:
            rise, where = point[1] - least[1], (least, point)
        least = min(least, point, key=lambda p: p[1])
    (x0, y0), (x1, y1) = where
    detail = (
        f"it rises from {y0:.1f} % at {unit} {x0:.4g} to {y1:.1f} % at {x1:.4g}"
        if rise > tolerance
        else f"from {curve[0][1]:.1f} % to {curve[-1][1]:.1f} % at {unit} {curve[-1][0]:.4g}"
    )
    return Check(name, rise <= tolerance, detail, {"largest_rise": rise})


def _wins(left: float | None, unbounded: float) -> Check:
    name = "an unbounded attack wins"
    if left is None:
        return Check(name, None, "the ball does not measure how far apart images are", {})
    detail = f"{left:.1f} % are left at ε = {unbounded:g}, where every image can become any other"
    return Check(name, left <= FEW_LEFT, detail, {"accuracy": left})


def _one_step(curve: Sequence[tuple[float, float]], tolerance: float) -> Check:
    accuracy = {int(steps): value for steps, value in curve}
    one, many = accuracy[1], min(value for steps, value in accuracy.items() if steps > 1)
    detail = f"{one:.1f} % after one step, {many:.1f} % after many"
    return Check(
        "one step is no stronger than many",
        many <= one + tolerance,
        detail,
        {"one_step": one, "many_steps": many},
    )


def _under_square(
    model: nn.Module, examples: Examples, correct: Tensor, ball: Ball, seed: int, batch_size: int
) -> Tensor | str:
    """Return which examples hold out against Square, (n,) bool, or why it cannot be run.

    Andriushchenko et al., *Square Attack* (2020), which sees logits only.
    """
    try:
        norm = library_norm(ball)
        square = import_module(f"{library()}.square").SquareAttack
    except UserError as error:
        return str(error)
    if reason := square_refuses(ball, examples):
        return reason
    network = InParts(model, batch_size)
    attack = square(
        network, norm=norm, eps=ball.epsilon, n_queries=QUERIES, seed=seed, device=examples.device
    )
    stands = correct.clone()
    with own_random_state(examples.device), torch.no_grad():
        for indices in batches(correct.nonzero().flatten(), BATCH):
            x, labels = examples.batch(indices)
            x_adv = attack.perturb(x, labels)
            stands[indices] = (network(x_adv).argmax(dim=1) == labels).cpu()
    return stands


def _black_box(black_box: float | str, white_box: float, tolerance: float) -> Check:
    """Compare PGD, which sees the gradients, with Square's accuracy, or why there is none."""
    name = "a black-box attack is no stronger than PGD"
    if isinstance(black_box, str):
        return Check(name, None, black_box, {})
    detail = (
        f"{black_box:.1f} % under Square's {QUERIES} queries, "
        f"{white_box:.1f} % under PGD-50 on cross-entropy and margin"
    )
    numbers = {"square": black_box, "pgd": white_box}
    return Check(name, white_box <= black_box + tolerance, detail, numbers)


def _gradients(model: nn.Module, examples: Examples, batch_size: int) -> Check:
    """Count the clean images at which the gradient of the cross-entropy is exactly zero."""
    zero = 0
    for indices in batches(torch.arange(len(examples)), batch_size):
        x, labels = examples.batch(indices)
        x.requires_grad_()
        with torch.enable_grad():
            logits = precision.full(model(x))
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, [x])
        zero += int((gradient.flatten(1) == 0).all(dim=1).sum())
    share = 100 * zero / len(examples)
    detail = f"{share:.1f} % of the examples have a gradient of exactly zero"
    return Check("gradients are not flat", share <= FLAT, detail, {"zero_gradients": share})
