"""The method AugMix on one batch: views of all examples, or of those near the boundary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btrain import precision
from btrain.allocation import (
    BOUNDARY,
    Allocation,
    Allocator,
    Scored,
    Uniform,
    update_robust_fraction,
)
from btrain.attacks.pgd import by_steps
from btrain.data import Batch, Data
from btrain.defenses import augmix_loss
from btrain.methods.base import Loss, Memory, Reach
from btrain.methods.pool import no_attack
from btrain.methods.statistics import step_stats
from btrain.processes.world import ALONE, World


class Passed(NamedTuple):
    """The share of a batch that this process has sent through the network.

    Attributes:
        loss: of the whole batch where `share` is 1, else of this part.
        allocation: the steps are the views of each example.
        score: by the clean logits, (m,), or None.
        passes: training passes of one image each that this process has made.
        share: of the whole batch, by which this loss counts among those of all processes.
    """

    loss: Tensor
    allocation: Allocation
    clean_logits: Tensor
    view_logits: Tensor
    labels: Tensor
    score: Tensor | None
    passes: int
    share: float


@dataclass(frozen=True)
class AugMix:
    """The cross-entropy on clean images and consistency with two views of each.

    Plain AugMix sends an image and its two views through one forward pass of 3m, so that they share
    BatchNorm's statistics. With BulletTrain one train-mode forward of the clean images decides who
    gets views and enters the loss; the views follow in a pass of their own. With several
    processes each gets the whole batch and makes views of its share alone.

    Attributes:
        make_views: one AugMix view of each image, (m, C, H, W) -> (m, C, H, W), or of some rows.
        allocator: gives an example 1, a pair of views, or 0.
        jsd: False for the paper's "– JSD loss": cross-entropy on one view of each image.
        gamma, momentum: γ and p of eq. 5, for the accuracy on the views.
    """

    make_views: Callable[[Tensor, torch.Generator, Tensor | None], Tensor]
    allocator: Allocator
    metric: Callable[[Tensor, Tensor], Tensor]
    jsd: bool
    jsd_weight: float
    gamma: float
    momentum: float
    world: World = ALONE
    in_units: ClassVar[bool] = True
    by_example: ClassVar[frozenset[str]] = frozenset()

    def memory(self, data: Data, device: torch.device) -> Memory:
        """Return F_R before the first batch."""
        del data
        return {"robust_fraction": torch.zeros((), device=device)}

    def examples(
        self, network: nn.Module, batch: Batch, memory: Memory, generator: torch.Generator
    ) -> Iterator[Batch]:
        """Yield the batch as it is: whose views are made depends on the training pass."""
        del network, memory, generator
        yield batch

    def loss(
        self, network: nn.Module, examples: Batch, memory: Memory, generator: torch.Generator
    ) -> Loss:
        """Return the loss over images and views, and remember F_R."""
        x, labels = examples.x, examples.labels
        if not self.jsd:
            passed = self._one_view(network, x, labels, generator)
        elif isinstance(self.allocator, Uniform):
            passed = self._two_views_of_all(network, x, labels, generator)
        else:
            passed = self._two_views_of_some(network, x, labels, memory, generator)
        loss, allocation, clean_logits, view_logits, labels, score, passes, share = passed
        memory["robust_fraction"] = update_robust_fraction(
            memory["robust_fraction"],
            view_logits,
            labels,
            momentum=self.momentum,
            gamma=self.gamma,
            mean=self.world.mean,
        )
        made = allocation._replace(steps=2 * allocation.steps)
        stats = step_stats(
            made, loss, clean_logits, score, clean_logits, view_logits, labels, units=3 * passes
        )
        return Loss(loss, stats, share)

    def _one_view(
        self, network: nn.Module, x: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Passed:
        m, own = len(x), self.world.share(len(x))
        logits = network(self.make_views(x, generator, self.world.rows(m, x.device)))
        labels = labels[own]
        loss = F.cross_entropy(precision.full(logits), labels)
        # No pass beyond ordinary training: no step in the sense of eq. 7.
        nothing = Allocation(torch.full_like(labels, BOUNDARY), torch.zeros_like(labels))
        unread = x.new_empty(len(labels), 0)
        return Passed(loss, nothing, unread, logits, labels, None, len(labels), len(labels) / m)

    def _two_views_of_all(
        self, network: nn.Module, x: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Passed:
        m, own = len(x), self.world.share(len(x))
        views = self._pairs_of_views(x, generator)
        x, labels = x[own], labels[own]
        clean, view1, view2 = network(torch.cat([x, views])).chunk(3)
        loss = augmix_loss(clean, view1, view2, labels, jsd_weight=self.jsd_weight)
        everyone = torch.full_like(labels, BOUNDARY)
        allocation = Allocation(everyone, torch.ones_like(everyone))
        score = self.metric(clean.detach(), labels)
        return Passed(loss, allocation, clean, view1, labels, score, 3 * len(x), len(x) / m)

    def _two_views_of_some(
        self,
        network: nn.Module,
        x: Tensor,
        labels: Tensor,
        memory: Memory,
        generator: torch.Generator,
    ) -> Passed:
        """Make views for BulletTrain, or for the control `random`.

        The clean logits decide where an example's views are made, so that of several processes one
        may hold the clean logits of an example and another those of its views. All logits are
        gathered and every process has the loss of the whole batch, and its gradient for the logits
        that are its own.
        """
        world, m = self.world, len(x)
        own = world.share(m)
        clean = world.attached(network(x[own]), m)  # Algorithm 2, line 11
        z = clean.detach()
        score = self.metric(z, labels)
        allocation = self.allocator(
            Scored(score, z, labels, memory["robust_fraction"], generator, no_attack)
        )
        order, counts = by_steps(allocation.steps)
        x, labels, clean = x[order], labels[order], clean[order]
        n = sum(counts())
        view1 = view2 = clean
        made = 0
        if n:
            views = self._pairs_of_views(x[:n], generator)
            made = len(views) // 2
            logits = network(views) if made else clean.new_empty(0, clean.shape[1])
            view1, view2 = (
                torch.cat([world.attached(part, n), clean[n:]])
                for part in (logits[:made], logits[made:])
            )
        loss = augmix_loss(clean, view1, view2, labels, jsd_weight=self.jsd_weight)
        rows = order[own]
        passes = len(rows) + 2 * made
        allocation, score = allocation.ordered(rows), score[rows]
        return Passed(
            loss, allocation, clean[own], view1[own], labels[own], score, passes, share=1.0
        )

    def _pairs_of_views(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return two views of each image of this process' share, all first ones first.

        (m, C, H, W) -> (2n, C, H, W)
        """
        rows = self.world.rows(len(x), x.device)
        both = None if rows is None else torch.cat([rows, len(x) + rows])
        return self.make_views(x.repeat(2, 1, 1, 1), generator, both)

    @property
    def eq7(self) -> bool:
        """Return whether eq. 7 describes what it costs."""
        return True

    @property
    def reach(self) -> Reach:
        """Return how far from the clean images it trains."""
        return Reach(None)

    def expected_units(self, fractions: tuple[float, float, float]) -> float | None:
        """Return three units for each pass of an image or view."""
        expected = self.allocator.expected(self.allocator.fractions or fractions)
        if expected is None:
            return None
        return 3 + 6 * expected.attacked if self.jsd else 3
