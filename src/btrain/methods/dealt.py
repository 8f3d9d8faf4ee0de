"""Algorithm 2 on several processes (torchrun), each of which works on its share of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from btrain.allocation import Allocation
from btrain.attacks.kept import Kept
from btrain.attacks.pgd import by_steps
from btrain.data import Batch
from btrain.methods.base import Memory
from btrain.methods.bullettrain import BulletTrain
from btrain.processes.world import ALONE, World


@dataclass(frozen=True)
class DealtBulletTrain(BulletTrain):
    """Algorithm 2, of which each process gets the whole batch and decides the same for it.

    From line 13 on a process works on its share: of every group as many examples as the others, or
    with a shared clean forward those that it has forwarded, for an example stays where its graph
    is.
    """

    world: World = ALONE

    def forward_clean(self, network: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the shared clean logits of this process' examples, and z of all."""
        clean_logits, z = super().forward_clean(network, x[self.world.share(len(x))])
        return clean_logits, self.world.gathered(z, len(x))

    def attacked_logits(
        self,
        network: nn.Module,
        x: Tensor,
        labels: Tensor,
        z: Tensor,
        noise: Tensor,
        steps: int,
        step_size: float,
    ) -> Tensor:
        """Attack this process' examples, and return the logits of all."""
        own = self.world.share(len(x))
        logits = super().attacked_logits(
            network, x[own], labels[own], z[own], noise[own], steps, step_size
        )
        return self.world.gathered(logits, len(x))

    def in_order(
        self,
        parts: Sequence[Tensor],
        clean_logits: Tensor | None,
        allocation: Allocation,
        learnt: Tensor | int = 1,
    ) -> tuple[list[Tensor], Tensor | None, Allocation, list[int]]:
        """Return this process' share of the batch in descending order of steps."""
        own = self.world.share(len(parts[0]))
        if clean_logits is not None:
            own_parts = [part[own] for part in parts]
            return super().in_order(own_parts, clean_logits, allocation.ordered(own), learnt)
        order, counts = by_steps(allocation.steps + learnt, self.distance(parts[3]))
        rows = order[own]
        parts = [part[rows] for part in parts]
        number, *active = counts() or [0]
        allocation, active = self.rounded(allocation, order, active)
        dealt = self.world.dealt([number, *active]) or [0]
        return parts, None, allocation.ordered(rows), dealt

    def keep(
        self,
        kept: Kept,
        memory: Memory,
        batch: Batch,
        rows: Tensor,
        delta: Tensor,
        attacked: Tensor,
    ) -> None:
        """Remember the whole batch: in the next epoch another process may have these examples."""
        m, shape = len(batch.x), delta.shape[1:]
        new = kept.encoded(delta, self.scale).flatten(1)
        told = torch.stack([rows, attacked.long()], dim=1)
        rows, attacked = self.world.gathered(told, m).unbind(dim=1)
        new = self.world.gathered(new.view(torch.int8), m).view(kept.dtype).view(m, *shape)
        kept.keep(memory, batch, rows, new, attacked > 0)

    def remembered(self, indices: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices and scores of all processes, for another process' next visit."""
        told = torch.stack([indices.double(), score.double()], dim=1)
        rows = int(self.world.sum(torch.tensor(len(score), device=score.device)))
        indices, score = self.world.gathered(told, rows).unbind(dim=1)
        return indices.long(), score

    def mean(self, values: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the mean over the whole batch, as `weighted_mean` does. (n,) -> ()"""
        if weight is None:
            return self.world.mean(values)
        sums = self.world.sum(torch.stack([(weight * values).sum(), weight.sum()]))
        return sums[0] / sums[1]
