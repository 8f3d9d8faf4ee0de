"""Accuracy under PGD: as TRADES evaluates a training, and with restarts and losses of choice.

A threat model is a function from a radius to a `Ball`, such as `LinfBall` itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btrain import precision
from btrain.attacks.balls import Ball, LinfBall
from btrain.attacks.pgd import InnerLoss, evaluation_mode, prefix_pgd
from btrain.data import Split
from btrain.data.augmentation import to_unit
from btrain.defenses import ce_inner_loss, cw_loss, kl_inner_loss
from btrain.errors import UserError
from btrain.evaluation.examples import Examples
from btrain.evaluation.worst_case import Partial, worst_case
from btrain.methods.make import NOTHING, Known, make_ball
from btrain.settings import AttackConfig

Threat = Callable[[float], Ball]

# So that restart r of one seed is not restart 0 of the next.
_BETWEEN_RESTARTS = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Accuracy:
    """Accuracies in percent of all examples, and the mean cross-entropy of the attacked ones."""

    clean: float
    robust: float
    robust_loss: float = field(default=math.nan, compare=False)


class Processes(Protocol):
    """The processes that share an evaluation.

    Attributes:
        rank: this process', from 0.
        size: how many there are.
    """

    rank: int
    size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of all processes' tensors."""
        ...


def evaluate(
    model: nn.Module,
    split: Split,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    batch_size: int,
    seed: int,
    threat: Threat = LinfBall,
    show_progress: bool = False,
    processes: Processes | None = None,
    ahead: Callable[[], None] = lambda: None,
) -> Accuracy:
    """Return clean and PGD accuracy in eval mode and float32.

    PGD as published with TRADES: a random start, `steps` steps on the cross-entropy, the last
    iterate counts, one restart. The start is drawn on the CPU example by example, so that neither
    batch size nor device changes the numbers drawn.

    Args:
        epsilon, step_size: in [0, 1] pixel units.
        seed: of the random start.
        processes: each attacks its share of the examples, and each returns the same.
        ahead: called ahead of each batch, by all processes equally often.
    """
    rank, size = (0, 1) if processes is None else (processes.rank, processes.size)
    device, ball = split.images.device, threat(epsilon)
    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    with evaluation_mode(model), precision.exactly_float32(device):
        for begin in _progress(range(0, len(split), batch_size * size), show_progress):
            ahead()
            part = slice(begin, begin + batch_size * size)
            images, labels = split.images[part], split.labels[part][rank::size]
            noise = random_start(ball, images, generator)[rank::size].to(device)
            if not len(labels):  # the last examples are fewer than the processes
                continue
            x = to_unit(images[rank::size])
            with torch.no_grad():
                clean_logits = model(x)
            x_adv = prefix_pgd(
                model,
                x,
                labels,
                clean_logits,
                active=[len(x)] * steps,
                step_size=torch.full((len(x),), step_size, device=device),
                inner_loss=ce_inner_loss,
                ball=ball,
                noise=noise,
            )
            with torch.no_grad():
                adv_logits = model(x_adv)
            predicted = torch.stack([clean_logits.argmax(dim=1), adv_logits.argmax(dim=1)])
            sums[:2] += (predicted == labels).sum(dim=1)
            sums[2] += F.cross_entropy(adv_logits, labels, reduction="sum").double()
    clean, robust, loss = (sums if processes is None else processes.sum(sums)).tolist()
    n = len(split)
    return Accuracy(clean=100 * clean / n, robust=100 * robust / n, robust_loss=loss / n)


def threat_of(attack: AttackConfig, known: Known = NOTHING) -> Threat:
    """Return the threat model of a run.

    Args:
        known: what a ball of the user's may want to know.
    """
    return lambda radius: make_ball(replace(attack, epsilon=radius), known=known)


def farthest(threat: Threat, shape: tuple[int, ...]) -> float:
    """Return how far apart two images of this shape (C, H, W) can be: black and white.

    Infinity where a ball of the user's does not measure distances.
    """
    try:
        return float(threat(1.0).distance(torch.ones(1, *shape)))
    except NotImplementedError:
        return math.inf


def random_start(ball: Ball, images: Tensor, generator: torch.Generator) -> Tensor:
    """Return random points of the ball minus the images, drawn on the CPU example by example.

    In L∞ x + U(-ε, ε), which may lie outside of [0, 1], as published with TRADES.

    Args:
        images: (m, C, H, W), uint8, or floats in [0, 1].
    """
    if type(ball) is LinfBall:
        noise = torch.rand(images.shape, generator=generator)
        return noise * (2 * ball.epsilon) - ball.epsilon
    x = images.cpu()
    x = to_unit(x) if x.dtype == torch.uint8 else x
    return torch.cat([ball.start(row, generator) for row in torch.split(x, 1)])


@dataclass(frozen=True)
class Pgd:
    """The settings of an attack.

    Attributes:
        epsilon, step_size: in [0, 1] pixel units.
        loss: a key of `LOSSES`.
        last_iterate: whether only the last step counts, as published with TRADES, or any of them.
    """

    epsilon: float
    step_size: float
    steps: int
    restarts: int = 1
    loss: str = "ce"
    last_iterate: bool = False
    seed: int = 0
    threat: Threat = LinfBall


def pgd_stands(
    model: nn.Module,
    examples: Examples,
    stands: Tensor,
    attack: Pgd,
    *,
    batch_size: int,
    partial: Partial | None = None,
    show_progress: bool = False,
    name: str = "PGD",
) -> Tensor:
    """Return which examples hold out against every restart.

    The model is attacked in the mode and precision it is in. A random start is drawn for each
    example by its index and restart, whatever the batch; restart 0 is the start of `evaluate`. An
    example that is fooled is attacked no further: it leaves the batch after that step, and later
    restarts do not see it.

    Args:
        stands: the examples to attack, (n,) bool on the CPU; the others count as fooled.

    Returns:
        (n,) bool on the CPU.

    Raises:
        UserError: the loss needs more classes.
    """
    noise = _Noise(attack)

    def fooled(restart: int, indices: Tensor) -> Tensor:
        x, labels = examples.batch(indices)
        with torch.no_grad():
            clean_logits = model(x)
        if attack.loss == "dlr" and clean_logits.shape[1] < 3:
            raise UserError("attack.loss=dlr needs at least 3 classes; try cw.")
        run = _fooled_at_the_end if attack.last_iterate else _fooled_on_the_way
        return run(model, x, labels, clean_logits, noise(restart, indices, x), attack)

    return worst_case(
        fooled,
        stands,
        rounds=_rounds(name, attack.restarts),
        batch_size=batch_size,
        partial=partial,
        show_progress=show_progress,
    )


def pgd_images(model: nn.Module, examples: Examples, attack: Pgd) -> Tensor:
    """Return the last iterates of the first restart, (n, C, H, W) on the device."""
    indices = torch.arange(len(examples))
    x, labels = examples.batch(indices)
    with torch.no_grad():
        clean_logits = model(x)
    return _last_iterate(model, x, labels, clean_logits, _Noise(attack)(0, indices, x), attack)


def _last_iterate(
    model: nn.Module, x: Tensor, labels: Tensor, clean_logits: Tensor, noise: Tensor, attack: Pgd
) -> Tensor:
    return prefix_pgd(
        model,
        x,
        labels,
        clean_logits,
        active=[len(x)] * attack.steps,
        step_size=torch.full((len(x),), attack.step_size, device=x.device),
        inner_loss=LOSSES[attack.loss],
        ball=attack.threat(attack.epsilon),
        noise=noise,
    )


def _fooled_at_the_end(
    model: nn.Module, x: Tensor, labels: Tensor, clean_logits: Tensor, noise: Tensor, attack: Pgd
) -> Tensor:
    """Return whether the last iterate is misclassified, (m,)."""
    x_adv = _last_iterate(model, x, labels, clean_logits, noise, attack)
    with torch.no_grad():
        wrong: Tensor = model(x_adv).argmax(dim=1) != labels
    return wrong


def _fooled_on_the_way(
    model: nn.Module, x: Tensor, labels: Tensor, clean_logits: Tensor, noise: Tensor, attack: Pgd
) -> Tensor:
    """Return whether any iterate from the first is misclassified, (m,).

    The start does not count, for it may lie outside the box. The iterates are those of
    `prefix_pgd`. Fooled rows leave the batch.
    """
    inner_loss, ball = LOSSES[attack.loss], attack.threat(attack.epsilon)
    fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    rows = torch.arange(len(x), device=x.device)
    region = ball.region(x)
    x_adv = x + noise
    for step in range(attack.steps + 1):
        images = x_adv.requires_grad_()
        with torch.enable_grad():
            logits = model(images)
        wrong = logits.detach().argmax(dim=1) != labels
        wrong &= step > 0
        fooled[rows] = wrong
        stay = (~wrong).nonzero().flatten()  # the one copy to the host of a step
        if step == attack.steps or not len(stay):
            break
        with torch.enable_grad():
            loss = inner_loss(logits, clean_logits, labels).sum()
        (gradient,) = torch.autograd.grad(loss, [images])
        moved = images.detach() + attack.step_size * ball.direction(gradient)
        x_adv = ball.project(moved, *region)
        if len(stay) < len(rows):
            x_adv, region = x_adv[stay], tuple(part[stay] for part in region)
            rows, labels, clean_logits = rows[stay], labels[stay], clean_logits[stay]
    return fooled


def _rounds(name: str, restarts: int) -> Sequence[str]:
    if restarts == 1:
        return [name]
    return [f"{name}, restart {number}/{restarts}" for number in range(1, restarts + 1)]


class _Noise:
    """A random start for each example and restart, drawn on the CPU in the examples' order."""

    def __init__(self, attack: Pgd) -> None:
        self._attack = attack
        self._ball = attack.threat(attack.epsilon)
        self._restart = -1
        self._next = 0
        self._generator = torch.Generator()

    def __call__(self, restart: int, indices: Tensor, x: Tensor) -> Tensor:
        """Return the starts minus x of some examples, in ascending order, on x's device.

        (m,), (m, C, H, W) -> (m, C, H, W)
        """
        if restart != self._restart or int(indices[0]) < self._next:
            self._generator.manual_seed((self._attack.seed + restart * _BETWEEN_RESTARTS) % 2**63)
            self._restart, self._next = restart, 0
        rows = []
        for index, image in zip(indices.tolist(), torch.split(x.cpu(), 1), strict=True):
            while self._next <= index:  # those left out are drawn as well, in this one's place
                row = random_start(self._ball, image, self._generator)
                self._next += 1
            rows.append(row)
        return torch.cat(rows).to(x.device)


def dlr_loss(adv_logits: Tensor, clean_logits: Tensor, labels: Tensor) -> Tensor:
    """Return `cw_loss` over the distance of the first from the third logit (K ≥ 3).

    Unchanged where all logits are scaled or shifted, so that a model cannot flatten it. Croce &
    Hein, *Reliable evaluation of adversarial robustness*, eq. 6.
    """
    first, _, third = precision.full(adv_logits).topk(3, dim=1).values.unbind(dim=1)
    return cw_loss(adv_logits, clean_logits, labels) / (first - third + 1e-12)


LOSSES: dict[str, InnerLoss] = {
    "ce": ce_inner_loss,
    "kl": kl_inner_loss,
    "cw": cw_loss,
    "dlr": dlr_loss,
}
"""Losses to ascend: adversarial (m, K) and clean logits (m, K), labels (m,) -> (m,)."""


def _progress(starts: Iterable[int], show: bool) -> Iterable[int]:
    from tqdm import tqdm

    bar: Iterable[int] = tqdm(starts, "evaluating", leave=False, disable=None if show else True)
    return bar
