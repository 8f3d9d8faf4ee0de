"""L∞ PGD with random restarts, of which each example's worst counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from btrain.attacks.balls import LinfBall
from btrain.attacks.pgd import prefix_pgd
from btrain.errors import UserError
from btrain.evaluation.examples import Examples
from btrain.evaluation.losses import LOSSES
from btrain.evaluation.partial import Partial
from btrain.evaluation.worst_case import worst_case

# So that restart r of one seed is not restart 0 of the next.
_BETWEEN_RESTARTS = 0x9E3779B97F4A7C15


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
    """Which examples hold out against every restart, in the mode and precision the model is in.

    A start is x + U(-ε, ε), drawn for each example by its index and restart, whatever the batch;
    restart 0 is the start of `btrain.evaluation.evaluate`. An example that is fooled is attacked no
    further: it leaves the batch after that step, and later restarts do not see it.

    Args:
        stands: the examples to attack, (n,) bool on the CPU; the others count as fooled.

    Returns:
        (n,) bool on the CPU.

    Raises:
        UserError: the loss needs more classes.
    """
    noise = _Noise(attack, tuple(examples.images.shape[1:]))

    def fooled(restart: int, indices: Tensor) -> Tensor:
        x, labels = examples.batch(indices)
        with torch.no_grad():
            clean_logits = model(x)
        if attack.loss == "dlr" and clean_logits.shape[1] < 3:
            raise UserError("attack.loss=dlr needs at least 3 classes; try cw.")
        run = _fooled_at_the_end if attack.last_iterate else _fooled_on_the_way
        return run(model, x, labels, clean_logits, noise(restart, indices).to(x.device), attack)

    return worst_case(
        fooled,
        stands,
        rounds=_rounds(name, attack.restarts),
        batch_size=batch_size,
        partial=partial,
        show_progress=show_progress,
    )


def pgd_images(model: nn.Module, examples: Examples, attack: Pgd) -> Tensor:
    """Where the first restart ends. -> (n, C, H, W) on the device"""
    indices = torch.arange(len(examples))
    x, labels = examples.batch(indices)
    with torch.no_grad():
        clean_logits = model(x)
    noise = _Noise(attack, tuple(x.shape[1:]))(0, indices).to(x.device)
    return _last_iterate(model, x, labels, clean_logits, noise, attack)


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
        ball=LinfBall(attack.epsilon),
        noise=noise,
    )


def _fooled_at_the_end(
    model: nn.Module, x: Tensor, labels: Tensor, clean_logits: Tensor, noise: Tensor, attack: Pgd
) -> Tensor:
    """Whether the last iterate is misclassified. -> (m,)"""
    x_adv = _last_iterate(model, x, labels, clean_logits, noise, attack)
    with torch.no_grad():
        wrong: Tensor = model(x_adv).argmax(dim=1) != labels
    return wrong


def _fooled_on_the_way(
    model: nn.Module, x: Tensor, labels: Tensor, clean_logits: Tensor, noise: Tensor, attack: Pgd
) -> Tensor:
    """Whether any iterate from the first is misclassified (the start may lie outside the box).

    The iterates are those of `prefix_pgd`. Fooled rows leave the batch. -> (m,)
    """
    inner_loss = LOSSES[attack.loss]
    fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    rows = torch.arange(len(x), device=x.device)
    lower, upper = (x - attack.epsilon).clamp_(0, 1), (x + attack.epsilon).clamp_(0, 1)
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
        x_adv = torch.clamp(images.detach() + attack.step_size * gradient.sign(), lower, upper)
        if len(stay) < len(rows):
            x_adv, lower, upper = x_adv[stay], lower[stay], upper[stay]
            rows, labels, clean_logits = rows[stay], labels[stay], clean_logits[stay]
    return fooled


def _rounds(name: str, restarts: int) -> Sequence[str]:
    if restarts == 1:
        return [name]
    return [f"{name}, restart {number}/{restarts}" for number in range(1, restarts + 1)]


class _Noise:
    """U(-ε, ε) noise for each example and restart, drawn on the CPU in the examples' order."""

    def __init__(self, attack: Pgd, shape: tuple[int, ...]) -> None:
        self._attack = attack
        self._shape = shape
        self._restart = -1
        self._next = 0
        self._generator = torch.Generator()

    def __call__(self, restart: int, indices: Tensor) -> Tensor:
        """Of some examples, in ascending order. (m,) -> (m, C, H, W)"""
        if restart != self._restart or int(indices[0]) < self._next:
            self._generator.manual_seed((self._attack.seed + restart * _BETWEEN_RESTARTS) % 2**63)
            self._restart, self._next = restart, 0
        rows = []
        for index in indices.tolist():
            while self._next <= index:
                row = torch.rand(self._shape, generator=self._generator)
                self._next += 1
            rows.append(row)
        epsilon = self._attack.epsilon
        return torch.stack(rows) * (2 * epsilon) - epsilon
