"""Several batches of Algorithm 2 attacked at once, then learnt from one after the other.

On a device that a small batch's attack does not fill, one large attack takes less time than several
small ones. Its weights are those ahead of the pool's first update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from btrain.allocation import Allocation, Scored
from btrain.attacks.pgd import active_counts
from btrain.data import Batch, Data
from btrain.data.augmentation import batch_slices
from btrain.methods.base import Loss, Memory, Reach
from btrain.methods.bullettrain import BulletTrain, Examples
from btrain.processes.world import ALONE, World


@dataclass(frozen=True)
class Pool:
    """Algorithm 2 with one attack for all of a pool's batches, and one update for each.

    Attributes:
        one: Algorithm 2 for a batch.
        batch_size: of the batches in a pool; the last one may be smaller.
    """

    one: BulletTrain
    batch_size: int
    world: World = ALONE
    in_units: ClassVar[bool] = True
    by_example: ClassVar[frozenset[str]] = BulletTrain.by_example

    def memory(self, data: Data, device: torch.device) -> Memory:
        """Return what Algorithm 2 remembers."""
        return self.one.memory(data, device)

    def examples(
        self, network: nn.Module, batch: Batch, memory: Memory, generator: torch.Generator
    ) -> Iterator[Examples]:
        """Yield the pool's batches, attacked with the weights and the F_R of now.

        Each batch has its own percentile (eq. 6) and gets the classes that it would get alone. One
        copy to the host, of the step counts.
        """
        one, world, x, labels = self.one, self.world, batch.x, batch.labels
        slices = batch_slices(len(x), self.batch_size)
        _, z = one.forward_clean(network, x)
        score = one.score(z, labels)
        noise = one.attack.noise(x, generator)
        scored = Scored(score, z, labels, memory["robust_fraction"], generator, no_attack)
        allocation = self.allocate(scored, slices)
        steps, dealt, mine, order, active = deal(allocation, slices, world)
        together = mine[order]
        x_adv, attacked, forwarded = one.attack(
            network,
            x[together],
            labels[together],
            z[together],
            allocation.ordered(together),
            active,
            noise[together],
        )
        # Back to the batches, in each of which the order of descending steps remains.
        back = torch.argsort(order)
        x_adv, attacked = x_adv[back], attacked.ordered(back)
        spent = 2 * forwarded / len(mine) + (1 if z.shape[1] else 0)
        ends = list(accumulate(map(len, dealt)))
        for whole, each, own in zip(slices, dealt, map(slice, [0, *ends], ends), strict=True):
            yield Examples(
                x=x[mine[own]],
                labels=labels[mine[own]],
                x_adv=x_adv[own],
                clean_logits=None,
                z=z[mine[own]],
                score=score[mine[own]],
                allocation=Allocation(attacked.classes[own], attacked.steps[own]),
                perturbed=sum(steps[i] > 0 for i in each),
                learnt=len(each),
                units=spent * len(each),
                share=len(each) / (whole.stop - whole.start),
            )

    def loss(
        self, network: nn.Module, examples: Examples, memory: Memory, generator: torch.Generator
    ) -> Loss:
        """Return Algorithm 2's loss of one batch of the pool."""
        return self.one.loss(network, examples, memory, generator)

    def allocate(self, scored: Scored, slices: Sequence[slice]) -> Allocation:
        """Return classes and steps of a pool, (m,): those that each of its batches gets alone."""
        allocations = [
            self.one.allocator(
                scored._replace(score=scored.score[own], z=scored.z[own], labels=scored.labels[own])
            )
            for own in slices
        ]
        return allocations[0]._replace(
            classes=torch.cat([allocation.classes for allocation in allocations]),
            steps=torch.cat([allocation.steps for allocation in allocations]),
        )

    @property
    def eq7(self) -> bool:
        """Return whether eq. 7 describes what it costs."""
        return self.one.eq7

    @property
    def reach(self) -> Reach:
        """Return how far from the clean images it trains."""
        return self.one.reach

    def expected_units(self, fractions: tuple[float, float, float]) -> float | None:
        """Return what Algorithm 2 costs."""
        return self.one.expected_units(fractions)


def no_attack(steps: int, step_size: float) -> Tensor:
    """Raise ValueError: the batches of a pool are attacked together, once all have their steps."""
    del steps, step_size
    raise ValueError("an allocator that attacks by itself has no part in a pool of batches")


class Dealt(NamedTuple):
    """The examples of a pool that are this process'.

    Attributes:
        steps: of all examples, on the host.
        batches: of each batch the examples, as that batch alone would deal them out.
        rows: the same, one batch after the other, (n,) int64.
        order: of `rows`, by descending steps, (n,) int64.
        active: how many of them take the first attack step, the second, …
    """

    steps: list[int]
    batches: list[list[int]]
    rows: Tensor
    order: Tensor
    active: list[int]


def deal(allocation: Allocation, slices: Sequence[slice], world: World) -> Dealt:
    """Return this process' share of every batch, and all of it in the attack's order."""
    steps: list[int] = allocation.steps.tolist()
    dealt = [
        sorted(range(own.start, own.stop), key=lambda i: -steps[i])[
            world.share(own.stop - own.start)
        ]
        for own in slices
    ]
    rows = [i for each in dealt for i in each]
    mine = torch.tensor(rows, device=allocation.steps.device)
    order = torch.argsort(allocation.steps[mine], descending=True, stable=True)
    active = active_counts(sorted((steps[i] for i in rows), reverse=True))
    return Dealt(steps, dealt, mine, order, active)
