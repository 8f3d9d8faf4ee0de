"""The attack of a run: its ball, its steps, its start, and the mode that the network is in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from btrain.allocation import BOUNDARY, FAR, Allocation, step_sizes
from btrain.attacks.balls import Ball
from btrain.attacks.pgd import InnerLoss, early_exit_pgd, prefix_pgd
from btrain.attacks.shadow import attacked, bare

Start = Callable[[Ball, Tensor, torch.Generator], Tensor]
"""(ball, images, generator) -> what is added to the images before the first step, like them."""


def at_the_image(ball: Ball, x: Tensor, generator: torch.Generator) -> Tensor:
    """Return no noise: the attack starts at the image, where its loss must have a gradient."""
    del ball, generator
    return torch.zeros_like(x)


def within_the_ball(ball: Ball, x: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random point of ball and box, minus the image."""
    return ball.start(x, generator)


def nearby(std: float) -> Start:
    """Return a start with Gaussian noise of this deviation, not projected."""

    def start(ball: Ball, x: Tensor, generator: torch.Generator) -> Tensor:
        del ball
        return torch.zeros_like(x).normal_(0, std, generator=generator)

    return start


@dataclass(frozen=True)
class Attack:
    """Projected gradient ascent on a defense's inner loss, as a run is configured.

    Attributes:
        n_b, step_size_b: the steps of the longest budget N_B, and their size.
        start: the noise ahead of the first step.
        way: the length of all steps of an example with N < N_B, in ε.
        train_mode: whether BatchNorm uses the batch's statistics during the attack.
        probe: a factor on the start's noise where the first gradient is taken; None for a gradient
            at the start itself. See `methods.make.probe_factor`.
        pgd: `prefix_pgd`, or another way to the same result.
        multiple: a number that `pgd` wants the size of each group rounded up to.
    """

    ball: Ball
    inner_loss: InnerLoss
    n_b: int
    step_size_b: float
    start: Start
    way: float = FAR
    train_mode: bool = False
    probe: float | None = None
    pgd: Callable[..., Tensor] = prefix_pgd
    multiple: int = 1

    def noise(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return what is added to the images before the first step, like them."""
        return self.start(self.ball, x, generator)

    def sizes(self, steps: Tensor) -> Tensor:
        """Return each example's step size, (m,) int64 -> (m,)."""
        epsilon = self.ball.epsilon
        assert isinstance(epsilon, float)
        return step_sizes(
            steps, n_b=self.n_b, epsilon=epsilon, step_size_b=self.step_size_b, way=self.way
        )

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        labels: Tensor,
        z: Tensor,
        allocation: Allocation,
        active: Sequence[int],
        noise: Tensor,
    ) -> tuple[Tensor, Allocation, int]:
        """Attack a batch in descending order of steps, of which `active[j]` examples take step j.

        Returns:
            Adversarial examples like x, the allocation with the steps really taken, and how many
            images the attack sent through the network.
        """
        sizes = self.sizes(allocation.steps)
        if allocation.patience is None:
            x_adv = self.evenly(model, x, labels, z, sizes, active, noise)
            return x_adv, allocation, sum(active)
        with attacked(model) as network:
            x_adv, taken, forwarded = early_exit_pgd(
                network,
                x,
                labels,
                z,
                steps=allocation.steps,
                active=active,
                exits=allocation.classes == BOUNDARY,
                patience=allocation.patience,
                step_size=sizes,
                inner_loss=self.inner_loss,
                ball=self.ball,
                noise=noise,
                probe=self._first_offset(noise),
            )
        return x_adv, allocation._replace(steps=taken), forwarded

    def evenly(
        self,
        model: nn.Module,
        x: Tensor,
        labels: Tensor,
        z: Tensor,
        sizes: Tensor,
        active: Sequence[int],
        noise: Tensor,
    ) -> Tensor:
        """Attack with the step sizes (m,), each example for its steps. -> like x"""
        with nullcontext(bare(model)) if self.train_mode else attacked(model) as network:
            return self.pgd(
                network,
                x,
                labels,
                z,
                active=active,
                step_size=sizes,
                inner_loss=self.inner_loss,
                ball=self.ball,
                noise=noise,
                probe=self._first_offset(noise),
            )

    def _first_offset(self, noise: Tensor) -> Tensor | None:
        return None if self.probe is None else self.probe * noise


@dataclass(frozen=True)
class AttackInParts(Attack):
    """The same attack on some of a batch's examples after the others, in less memory.

    Attributes:
        most: how many go through the network at a time.
    """

    most: int = 1

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        labels: Tensor,
        z: Tensor,
        allocation: Allocation,
        active: Sequence[int],
        noise: Tensor,
    ) -> tuple[Tensor, Allocation, int]:
        """Attack a batch as `Attack` does, from the examples with the most steps on."""
        attack, images, steps, forwarded = super().__call__, [], [], 0
        for rows in evenly_cut(len(x), -(-len(x) // self.most)):
            those = [min(n, rows.stop) - rows.start for n in active if n > rows.start]
            x_adv, taken, passed = attack(
                model, x[rows], labels[rows], z[rows], allocation.ordered(rows), those, noise[rows]
            )
            images.append(x_adv)
            steps.append(taken.steps)
            forwarded += passed
        return torch.cat(images), allocation._replace(steps=torch.cat(steps)), forwarded


def evenly_cut(examples: int, parts: int) -> list[slice]:
    """Return consecutive parts of so many examples, whose sizes differ by one at the most."""
    ends = [examples * (part + 1) // parts for part in range(parts)]
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
