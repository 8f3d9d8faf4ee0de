"""Algorithm 2 on a batch whose passes do not fit in memory together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from btrain.attacks.attack import evenly_cut
from btrain.data import Batch
from btrain.defenses import Weights
from btrain.methods.base import Loss, Memory
from btrain.methods.bullettrain import Examples, Part
from btrain.methods.dealt import DealtBulletTrain


@dataclass(frozen=True)
class AccumulatedBulletTrain(DealtBulletTrain):
    """Algorithm 2 that decides for the whole batch and makes its passes in parts.

    Scores, classes, F_R, who is attacked for how long, random numbers, loss and update are the
    batch's, and all of it is attacked ahead of the first training pass. A part has of every group
    as many examples as the others, so that BatchNorm, whose statistics in training are a part's,
    sees the same mixture in each.

    Attributes:
        batch_size: of a batch that is not an epoch's last.
        parts: of such a batch; of a smaller one they are fewer, not smaller.
    """

    batch_size: int = 1
    parts: int = 1

    def parts_of(self, m: int) -> int:
        """Return in how many parts a batch of m examples goes, of two or more in each process."""
        in_proportion = -(-m * self.parts // self.batch_size)
        return max(1, min(self.parts, in_proportion, m // (2 * self.world.size)))

    def forward_clean(self, network: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return no logits to share, and z of all."""
        forward = super().forward_clean
        parts = [x[rows] for rows in evenly_cut(len(x), self.parts_of(len(x)))]
        return None, torch.cat([forward(network, part)[1] for part in parts])

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
        """Return the logits (m, K) after an attack of this length on everybody."""
        attacked = super().attacked_logits
        return torch.cat([
            attacked(network, x[part], labels[part], z[part], noise[part], steps, step_size)
            for part in evenly_cut(len(x), self.parts_of(len(x)))
        ])  # fmt: skip

    def examples(
        self, network: nn.Module, batch: Batch, memory: Memory, generator: torch.Generator
    ) -> Iterator[Examples]:
        """Yield the parts of the batch, which is attacked."""
        (whole,) = super().examples(network, batch, memory, generator)
        m, parts = len(whole.x), self.parts_of(len(batch.x))
        outcomes: list[tuple[Tensor, Tensor, Weights | None]] = []
        for number in range(parts):
            part = rows_of(whole, slice(number, m, parts))
            share, last = len(part.x) / m, number + 1 == parts
            yield part._replace(part=Part(share, last, outcomes))

    def loss(
        self, network: nn.Module, examples: Examples, memory: Memory, generator: torch.Generator
    ) -> Loss:
        """Return what a part adds to the loss of the batch."""
        assert examples.part is not None
        loss = super().loss(network, examples, memory, generator)
        return loss._replace(value=examples.part.share * loss.value, last=examples.part.last)

    def remember_robust_fraction(
        self, memory: Memory, examples: Examples, adv_logits: Tensor
    ) -> None:
        """Remember F_R once the last part is known. (n, K)"""
        assert examples.part is not None
        outcomes = examples.part.outcomes
        outcomes.append((adv_logits.detach(), examples.labels, examples.weights))
        if not examples.part.last:
            return
        logits, labels, weights = zip(*outcomes, strict=True)
        whole = examples._replace(
            labels=torch.cat(labels),
            weights=None
            if weights[0] is None
            else Weights(*map(torch.cat, zip(*weights, strict=True))),
        )
        super().remember_robust_fraction(memory, whole, torch.cat(logits))


def rows_of(whole: Examples, rows: slice) -> Examples:
    """Return some of a batch's examples, with their share of what it has cost so far."""
    x, weights = whole.x[rows], whole.weights
    assert whole.clean_logits is None
    return whole._replace(
        x=x,
        labels=whole.labels[rows],
        x_adv=whole.x_adv[rows],
        z=whole.z[rows],
        score=whole.score[rows],
        allocation=whole.allocation.ordered(rows),
        perturbed=len(range(whole.perturbed)[rows]),
        learnt=len(range(whole.learnt)[rows]),
        units=whole.units * len(x) / len(whole.x),
        indices=None if whole.indices is None else whole.indices[rows],
        weights=None if weights is None else Weights(*(weight[rows] for weight in weights)),
    )
