"""The defenses, balls and allocators of the user's, checked before the first batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, SupportsFloat

import torch
import torch.nn.functional as F
from torch import Tensor

from btrain import own
from btrain.allocation import BOUNDARY, Allocation, Allocator, Expected, Scored, classify
from btrain.attacks.balls import Ball
from btrain.defenses import Defense
from btrain.errors import UserError
from btrain.settings.checks import number, whole

_M, _K, _SHAPE = 4, 3, (1, 4, 4)
_MANY = 64  # examples of a doubt
_RIGHT = 4  # times the logits' deviation: a network that has learnt, so that its labels are right
_BESIDE = 0.1  # of the logits' deviation, so that a divergence has a gradient
_STEPS, _LENGTH = 20, 0.05  # far enough from there, and short enough not to step over a minimum
_SUM = 1.5


def checked_defense(made: Any, factory: str, known: Mapping[str, Any]) -> Defense:
    """Return the losses of an object with `inner_loss` and `outer_loss`, tried on a few logits.

    `inner_reads_clean` and `outer_reads_clean` say which of them read the clean logits; both do
    unless the object has attributes that say otherwise.

    Raises:
        UserError: it has no such losses, or they do not return (m,) and () with a gradient.
    """
    where = f"defense.factory={factory}"
    for name in ("inner_loss", "outer_loss"):
        if not callable(getattr(made, name, None)):
            raise UserError(f"{where}: what it returns has no {name}.")

    def explained(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        loss = getattr(made, name)

        def called(first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
            with own.explained(f"{where}: {name}"):
                value: Tensor = loss(first, second, labels)
            return value

        return called

    defense = Defense(
        explained("inner_loss"),
        explained("outer_loss"),
        inner_reads_clean=bool(getattr(made, "inner_reads_clean", True)),
        outer_reads_clean=bool(getattr(made, "outer_reads_clean", True)),
    )
    clean, adv, labels = _logits(known, _M)

    def inner(clean: Tensor) -> None:
        at = adv.clone().requires_grad_()
        each = defense.inner_loss(at, clean, labels)
        _check_tensor(where, "inner_loss", each, (_M,))
        _gradient(where, "inner_loss", each, at)

    def outer(clean: Tensor) -> None:
        at = adv.clone().requires_grad_()
        loss = defense.outer_loss(clean, at, labels)
        _check_tensor(where, "outer_loss", loss, ())
        _gradient(where, "outer_loss", loss, at)

    _try_loss("inner", inner, clean, reads=defense.inner_reads_clean)
    _try_loss("outer", outer, clean, reads=defense.outer_reads_clean)
    return defense


def _gradient(where: str, name: str, loss: Tensor, at: Tensor) -> Tensor:
    """Return the gradient of a loss of the user's at the adversarial logits, like them.

    Raises:
        UserError: there is none, or autograd cannot take it.
    """
    up = None
    if loss.requires_grad:
        with own.explained(f"{where}: the gradient of {name}"):
            (up,) = torch.autograd.grad(loss.sum(), [at], allow_unused=True)
    if up is None:
        raise UserError(f"{where}: {name} has no gradient at the adversarial logits.")
    return up


def _try_loss(name: str, check: Callable[[Tensor], None], clean: Tensor, *, reads: bool) -> None:
    """Try a loss with the clean logits that it gets, none of them where it says so.

    Raises:
        UserError: the check fails; the sentence tells if it is for want of the clean logits.
    """
    try:
        check(clean if reads else clean[:, :0])
    except UserError as error:
        if reads:
            raise
        try:
            check(clean)
        except UserError:
            raise error from None
        raise UserError(
            f"{str(error).removesuffix('.')}: {name}_loss reads the clean logits, which it does "
            f"not get with {name}_reads_clean = False."
        ) from None


def doubts_of_defense(defense: Defense, factory: str, known: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each way in which a defense of the user's is probably meant otherwise.

    The attack helps where steps that raise the inner loss, from near the clean logits, lower the
    outer loss, or each example's cross-entropy. The outer loss is a sum where it is twice as large
    for a batch taken twice.
    """
    where = f"defense.factory={factory}"
    clean, noise, labels = _logits(known, _MANY)
    clean = clean + _RIGHT * F.one_hot(labels, clean.shape[1])
    start = clean + _BESIDE * noise

    def outer(adv: Tensor, times: int = 1) -> float:
        first = clean if defense.outer_reads_clean else clean[:, :0]
        parts = [part.repeat(times, *[1] * (part.dim() - 1)) for part in (first, adv, labels)]
        return float(defense.outer_loss(*parts).detach())

    read = clean if defense.inner_reads_clean else clean[:, :0]
    moved = start
    for _ in range(_STEPS):
        at = moved.clone().requires_grad_()
        up = _gradient(where, "inner_loss", defense.inner_loss(at, read, labels), at)
        length = up.norm(dim=1, keepdim=True).clamp(min=torch.finfo(up.dtype).tiny)
        moved = moved + _LENGTH * up / length
    before, after = (F.cross_entropy(x, labels, reduction="none") for x in (start, moved))
    found = []
    if outer(moved) < outer(start) or bool((after < before).all()):
        found.append(
            f"{where}: an attack that ascends inner_loss makes the examples easier for the "
            "network; is its sign wrong?"
        )
    once, twice = outer(start), outer(start, 2)
    if once > 0 and twice > _SUM * once:
        found.append(
            f"{where}: outer_loss is {twice / once:.1f} times as large for a batch taken twice; it "
            "should be the mean over the examples, not their sum, for which the learning rates are "
            "too large."
        )
    return found


def _logits(known: Mapping[str, Any], m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return clean and other logits, (m, K), that are always the same, and labels, (m,)."""
    generator = torch.Generator().manual_seed(0)
    classes = known.get("classes", _K)
    clean, other = (torch.randn(m, classes, generator=generator) for _ in range(2))
    return clean, other, torch.arange(m) % classes


def checked_ball(made: Any, factory: str, known: Mapping[str, Any]) -> Ball:
    """Return the ball, tried on a few images.

    Raises:
        UserError: it is no `btrain.attacks.Ball`, its reach is no number, its region has not a row
            for each image, its start, direction or projection are not like the images, or the
            projection leaves [0, 1].
    """
    where = f"attack.factory={factory}"
    if not isinstance(made, Ball):
        kind = type(made).__name__
        raise UserError(f"{where} returns a {kind}; a ball is a subclass of btrain.attacks.Ball.")
    if not isinstance(getattr(made, "epsilon", None), SupportsFloat):
        raise UserError(f"{where}: its epsilon is no number; call super().__init__(epsilon).")
    made.epsilon = number(f"{where}: epsilon", made.epsilon)
    with own.explained(f"{where}: reach"):
        reach = made.reach
    if not isinstance(reach, float | int | None):
        raise UserError(f"{where}: reach must be a number or None, not a {type(reach).__name__}.")
    generator = torch.Generator().manual_seed(0)
    shape = known.get("shape", _SHAPE)
    m = next(m for m in count(_M) if m not in shape)  # so that rows are told from channels
    x = torch.rand(m, *shape, generator=generator)
    gradient = torch.randn(x.shape, generator=generator)
    with own.explained(f"{where}: start"):
        _check_tensor(where, "start", made.start(x, generator), x.shape)
    with own.explained(f"{where}: direction"):
        direction = made.direction(gradient.clone())
        _check_tensor(where, "direction", direction, x.shape)
    with own.explained(f"{where}: region"):
        region = made.region(x)
    if not isinstance(region, tuple) or not all(isinstance(part, Tensor) for part in region):
        raise UserError(f"{where}: region must return a tuple of tensors.")
    for part in region:
        if part.dim() == 0 or len(part) != m:
            raise UserError(
                f"{where}: region must return tensors with a row for each image, ({m}, …), not "
                f"{tuple(part.shape)}; what is the same for all belongs to the ball itself."
            )
    with own.explained(f"{where}: project"):
        projected = made.project(x + direction, *region)
        _check_tensor(where, "project", projected, x.shape)
        if projected.min() < 0 or projected.max() > 1:
            raise UserError(f"{where}: project leaves the pixel box [0, 1].")
    return made


def doubts_of_ball(ball: Ball, factory: str, known: Mapping[str, Any]) -> list[str]:
    """Return a sentence if a step in the direction of a ball of the user's goes downhill."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(_M, *known.get("shape", _SHAPE), generator=generator)
    ascent = (gradient * ball.direction(gradient.clone())).flatten(1).sum(dim=1)
    if not (ascent < 0).all():
        return []
    return [f"attack.factory={factory}: direction goes down the gradient; is its sign wrong?"]


def with_own_steps(made: Any, factory: str) -> Allocator:
    """Return an allocator by a callable that gives a batch its steps, or an allocation.

    Raises:
        UserError: it cannot be called.
    """
    if not callable(made):
        kind = type(made).__name__
        raise UserError(f"bt.factory={factory} returns a {kind}, which cannot be called.")
    return OwnSteps(made, factory)


@dataclass(frozen=True)
class OwnSteps:
    """An allocator of the user's, each of whose answers is checked.

    On a GPU, where that would make the host wait, the values of steps and classes are not, and
    steps below 0 become 0.
    """

    decide: Callable[[Scored], Any]
    factory: str
    needs_scores: ClassVar[bool] = True
    by_distance: ClassVar[bool] = True
    fractions: ClassVar[None] = None

    def __call__(self, batch: Scored) -> Allocation:
        """Return its allocation; of steps alone the classes are BulletTrain's, for the log.

        It is handed copies, for it may write into them, through NumPy, too.

        Raises:
            UserError: it fails, the steps or classes are not (m,) integers from 0, there are
                other classes, or overhead or patience are no counts.
        """
        where = f"bt.factory={self.factory}"
        copies = batch._replace(
            score=batch.score.clone(),
            z=batch.z.clone(),
            labels=batch.labels.clone(),
            robust_fraction=batch.robust_fraction.clone(),
        )
        with own.explained(f"{where}: the allocator"):
            decided = self.decide(copies)
        if isinstance(decided, Tensor):
            decided = Allocation(classify(batch.score, batch.robust_fraction), decided)
        if not isinstance(decided, Allocation):
            kind = type(decided).__name__
            raise UserError(f"{where} returned a {kind}, neither steps nor an Allocation.")
        m = len(batch.labels)
        _check_integers(f"{where}: steps", decided.steps, m, most=None)
        _check_integers(f"{where}: classes", decided.classes, m, most=BOUNDARY)
        for name, count_of in (("overhead", decided.overhead), ("patience", decided.patience)):
            if count_of is None and name == "overhead":
                raise UserError(f"{where}: overhead must be a whole number, not None.")
            whole(0, f"{where}: {name}", count_of)
        return decided._replace(steps=decided.steps.long().clamp(min=0))

    def expected(self, fractions: tuple[float, float, float]) -> Expected | None:
        """Return what the user's own says, if it has an `expected`; else None.

        Raises:
            UserError: it fails, or says what no attack can be.
        """
        where = f"bt.factory={self.factory}: expected"
        with own.explained(where):
            theirs = getattr(self.decide, "expected", None)
            told = None if theirs is None else theirs(fractions)
        if told is None:
            return None
        if not isinstance(told, Expected):
            kind = type(told).__name__
            raise UserError(
                f"{where} returns a {kind}, neither btrain.allocation.Expected nor None."
            )
        numbers = all(isinstance(part, int | float) and 0 <= part < math.inf for part in told)
        if not numbers or told.attacked > 1:
            raise UserError(
                f"{where} must return numbers from 0, and an attacked share up to 1, not {told}."
            )
        return told


def _check_integers(what: str, given: object, m: int, *, most: int | None) -> None:
    """Raise UserError unless these are (m,) integers from 0; their values are read on a CPU alone.

    Args:
        what: the name of the part, for the sentence.
        most: the largest integer; None for any.
    """
    rule = f"{what} must be ({m},) integers"
    if not isinstance(given, Tensor):
        raise UserError(f"{rule} of torch, not a {type(given).__name__}.")
    no_integers = given.is_floating_point() or given.is_complex() or given.dtype is torch.bool
    if given.shape != (m,) or no_integers:
        raise UserError(f"{rule}, not {tuple(given.shape)} of {given.dtype}.")
    if given.device.type != "cpu" or not m:
        return
    first, last = int(given.min()), int(given.max())
    if first < 0 or (most is not None and last > most):
        wrong, end = (first if first < 0 else last), "or more" if most is None else f"to {most}"
        raise UserError(f"{what} must be 0 {end}, not {wrong}.")


def _check_tensor(where: str, what: str, value: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(shape):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"{where}: {what} must return {tuple(shape)}, not {got}.")
    if not torch.isfinite(value).all():
        raise UserError(f"{where}: {what} returns numbers that are not finite.")
