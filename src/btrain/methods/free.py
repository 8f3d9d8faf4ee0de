"""The method Free (Shafahi et al., "Adversarial Training for Free!")."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btrain import precision
from btrain.allocation import BOUNDARY, Allocation
from btrain.attacks.balls import Ball
from btrain.data import Batch, Data
from btrain.methods.base import Loss, Memory, Reach
from btrain.methods.statistics import step_stats


class Replay(NamedTuple):
    """One of the updates on a batch; the log shows the last."""

    x: Tensor
    labels: Tensor
    delta: Tensor
    last: bool


@dataclass(frozen=True)
class Free:
    """Several updates on each batch; each backward pass gives both gradients.

    The weights descend the cross-entropy of x + δ and δ ascends it by a step of length ε, within
    ball and box. In the mode the network is in: train, as published. δ goes on from where it ended
    for the batch before.

    Attributes:
        ball: of the attack; its radius is the step, too.
        batch_size: of the largest batch; a last batch of one example joins its neighbour.
    """

    replays: int
    ball: Ball
    batch_size: int
    in_units: ClassVar[bool] = False
    by_example: ClassVar[frozenset[str]] = frozenset()

    def memory(self, data: Data, device: torch.device) -> Memory:
        """Return F_R, which stays 0, and δ."""
        return {
            "robust_fraction": torch.zeros((), device=device),
            "delta": torch.zeros(self.batch_size + 1, *data.shape, device=device),
        }

    def examples(
        self, network: nn.Module, batch: Batch, memory: Memory, generator: torch.Generator
    ) -> Iterator[Replay]:
        """Yield the batch once for each replay, and move δ behind each update."""
        del network, generator
        x, labels = batch.x, batch.labels
        delta = memory["delta"][: len(x)]
        region = self.ball.region(x)
        for replay in range(self.replays):
            delta = delta.detach().requires_grad_()
            yield Replay(x, labels, delta, last=replay + 1 == self.replays)
            assert delta.grad is not None
            moved = delta.detach() + self.ball.epsilon * self.ball.direction(delta.grad)
            delta = self.ball.project(x + moved, *region) - x
        memory["delta"][: len(x)] = delta

    def loss(
        self, network: nn.Module, examples: Replay, memory: Memory, generator: torch.Generator
    ) -> Loss:
        """Return the cross-entropy of x + δ."""
        del memory, generator
        x, labels, delta, last = examples
        logits = network(x + delta)
        loss = F.cross_entropy(precision.full(logits), labels)
        if not last:
            return Loss(loss, None)
        everyone = torch.full_like(labels, BOUNDARY)
        allocation = Allocation(everyone, torch.full_like(labels, self.replays))
        unread = x.new_empty(len(x), 0)
        units = 3.0 * self.replays * len(x)
        stats = step_stats(
            allocation, loss.detach(), unread, None, unread, logits, labels, units=units
        )
        return Loss(loss, stats)

    @property
    def eq7(self) -> bool:
        """Return whether eq. 7 describes what it costs."""
        return False

    @property
    def reach(self) -> Reach:
        """Return how far from the clean images it trains."""
        epsilon = self.ball.epsilon
        assert isinstance(epsilon, float)
        return Reach(epsilon, self.ball.norm, slack=epsilon)  # δ of the batch before leaves the box

    def expected_units(self, fractions: tuple[float, float, float]) -> None:
        """Return None: an epoch of Free is many epochs of others."""
        del fractions
