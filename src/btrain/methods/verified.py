"""Training by bounds: MixTrain, and its family of settings.

The settings say which images are bounded, within which box, by which engine, and what their
worst-case loss is mixed with: MixTrain (Wang et al.) bounds a few images of each batch, Wong &
Kolter, IBP and CROWN-IBP bound all, SABR bounds small boxes around attacked images, MTL-IBP mixes
with the loss of attacked images. BulletTrain's rule can choose the few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btrain import precision
from btrain.allocation import BOUNDARY, OUTLIER, ROBUST, Allocation
from btrain.attacks.attack import Attack
from btrain.attacks.shadow import in_float32
from btrain.data import Batch, Data, Split
from btrain.data.augmentation import to_unit
from btrain.errors import UserError
from btrain.methods.base import Loss, Memory, Reach
from btrain.methods.statistics import step_stats
from btrain.processes.world import ALONE, World
from btrain.settings.method import FEEDBACK_IMAGES
from btrain.terminal import counted
from btrain.verify import bounds, losses
from btrain.verify.graph import Graph, evaluating, trace

MIX = "mix_share"
"""The memory's name for the worst case's share of the loss, with feedback."""
LISTENED = "listened"
"""The memory's name for how often the mix has followed the held-out images."""

Choose = Callable[[Tensor, Tensor, int, torch.Generator], Tensor]
"""(clean logits (m, K), labels (m,), k', generator) -> rows of the images to bound (k',)"""


class Examples(NamedTuple):
    """A batch, attacked where the loss wants it.

    Attributes:
        progress: of the training, in [0, 1].
        x_adv: like x; x itself without an attack.
        units: that the attack of an example has cost.
    """

    x: Tensor
    labels: Tensor
    x_adv: Tensor
    progress: float
    units: float


@dataclass(frozen=True)
class Weight:
    """The worst-case loss's factor, which grows geometrically.

    Attributes:
        first, last: at the beginning and from `until` on.
        until: a share of the training, in (0, 1].
    """

    first: float
    last: float
    until: float

    def at(self, progress: float) -> float:
        """Return the factor at a point of the training, in [0, 1]."""
        grown: float = (self.last / self.first) ** min(1.0, progress / self.until)
        return self.first * grown


@dataclass(frozen=True)
class Verified:
    """The cross-entropy of a batch, and the worst case that bounds allow for some of its images.

    Attributes:
        epsilon: L∞, in pixel units.
        ramp: the share of the training in which ε grows from 0.
        epochs: of the training.
        choose: who is bounded where not everybody is.
        k: images bounded in an epoch, spread over its batches, some of which have none where they
            are few; None for `per_batch`.
        per_batch: images bounded in a batch; None for all.
        alpha: with `convex` the loss is (1 - α)·CE + α·worst case, else CE + weight·worst case in
            a share α of the batches, drawn by chance. A batch without bounded images has the same
            without its second term.
        box: a share of ε: the radius of a box around an attacked image; 1 for the whole box.
        attack: at a share of ε, for small boxes and for the plain loss on attacked images; or None.
        plain_on_attacked: whether the cross-entropy is that of attacked images.
        regulariser: weight of Shi et al.'s, while ε grows.
        memory_limit: of the bounds, in bytes, about.
        feedback: whether α (convex) or the weight follows what held-out images tell.
        held_out: those images; None where the mix stays as the memory has it.
        world: the processes that share a batch. Each decides the same for the whole of it, attacks
            its share of the images, and bounds its share of those that are bounded.
    """

    engine: str
    epsilon: float
    ramp: float
    epochs: int
    choose: Choose
    k: int | None
    per_batch: int | None
    convex: bool
    alpha: float
    weight: Weight
    box: float
    attack: Callable[[float], Attack] | None
    plain_on_attacked: bool
    regulariser: float
    memory_limit: int = bounds.MEMORY
    feedback: bool = False
    held_out: Split | None = None
    world: World = ALONE
    in_units: ClassVar[bool] = False
    by_example: ClassVar[frozenset[str]] = frozenset()

    def memory(self, data: Data, device: torch.device) -> Memory:
        """Return F_R, which stays 0, and how many images were trained on, and how many will be.

        Raises:
            UserError: more images an epoch are to be bounded than there are.
        """
        images = len(data.train)
        if self.k is not None and self.k > images:
            raise UserError(
                f"defense.k={self.k} is more than the {counted(images, 'image')} of an "
                "epoch; null bounds all."
            )
        memory = {
            "robust_fraction": torch.zeros((), device=device),
            "trained": torch.zeros((), dtype=torch.int64),
            "to_train": torch.tensor(images * self.epochs),
        }
        if self.feedback:
            memory |= {MIX: torch.tensor(0.5), LISTENED: torch.zeros((), dtype=torch.int64)}
        return memory

    def check(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        """Raise UserError if there are no bounds of a network, or none that fit into memory."""
        graph = _graph(in_float32(network), shape)
        with evaluating(network), torch.enable_grad():
            bounds.check_memory(
                graph, engine=self.engine, like=torch.empty(0), memory=self.memory_limit
            )

    def examples(
        self, network: nn.Module, batch: Batch, memory: Memory, generator: torch.Generator
    ) -> Iterator[Examples]:
        """Yield the batch once."""
        x, labels = batch.x, batch.labels
        progress = min(1.0, memory["trained"].item() / memory["to_train"].item())
        if self.held_out is not None and self.feedback:
            an_epoch = memory["to_train"].item() / self.epochs
            if memory["trained"].item() >= an_epoch * memory[LISTENED].item():
                self._listen(network, self.held_out, memory, progress)
                memory[LISTENED] += 1
        x_adv, units = x, 0.0
        share = self._share(progress)
        if self.attack is not None and share > 0:
            attack = self.attack(share)
            own, noise = self.world.share(len(x)), attack.noise(x, generator)
            some = x[own]
            sizes = torch.full((len(some),), attack.step_size_b, device=x.device)
            unread = some.new_empty(len(some), 0)
            active = [len(some)] * attack.n_b
            x_adv = attack.evenly(network, some, labels[own], unread, sizes, active, noise[own])
            if self.world.size > 1:
                x_adv = self.world.gathered(x_adv.flatten(1), len(x)).view_as(x)
            units = 2.0 * attack.n_b
        yield Examples(x, labels, x_adv, progress, units)
        memory["trained"] += len(x)

    def loss(
        self, network: nn.Module, examples: Examples, memory: Memory, generator: torch.Generator
    ) -> Loss:
        """Return the mix of cross-entropy and worst case.

        In the statistics the bounded images are boundary, the others robust or outliers; the
        accuracy under attack is the verified one where everybody is bounded, else unknown.
        """
        x, labels, x_adv, progress, units = examples
        m, own = len(x), self.world.share(len(x))
        logits = precision.full(network((x_adv if self.plain_on_attacked else x)[own]))
        loss = self._part(F.cross_entropy(logits, labels[own], reduction="none"), m)
        epsilon = self._share(progress) * self.epsilon
        z = self.world.gathered(logits.detach(), m)
        rows = self._rows(z, labels, memory, generator)
        bounded, upper = rows[self.world.share(len(rows))], x.new_empty(len(logits), 0)
        plain = in_float32(network)
        graph = _graph(plain, tuple(x.shape[1:]))
        with evaluating(plain):
            worst = loss.new_zeros(())
            if len(bounded):
                some = labels[bounded]
                upper = self._margins(graph, x[bounded], x_adv[bounded], some, epsilon)
                worst = self._part(losses.worst_case(upper, some), len(rows))
            share, weight = self._mix(memory, progress)
            loss = losses.mixed(loss, worst, share=share) if self.convex else loss + weight * worst
            if self.regulariser and 0 < progress < self.ramp:
                box = bounds.box(x, epsilon)
                penalty = losses.regulariser(box, bounds.before_relus(graph, box))
                penalty = penalty / self.world.size  # which all compute: it is no mean over images
                loss = loss + self.regulariser * (1 - progress / self.ramp) * penalty
        right = z.argmax(dim=1) == labels
        classes = torch.where(right, ROBUST, OUTLIER)
        classes[rows] = BOUNDARY
        everybody = len(rows) == m
        classes, n = classes[own], len(logits)
        stats = step_stats(
            Allocation(classes, torch.zeros_like(classes)),
            loss.detach() * (m / n),  # so that the processes' add up to that of the batch
            logits.detach(),
            None,
            x.new_empty(n, 0) if self.plain_on_attacked else logits.detach(),
            upper.detach() if everybody else x.new_empty(n, 0),
            labels[own],
            units=(units + 3.0) * n,
        )
        return Loss(loss, stats)

    def _part(self, values: Tensor, of: int) -> Tensor:
        """Return what this process' values add to the mean over so many. (n,) -> ()"""
        return values.mean() * (len(values) / of)

    def _mix(self, memory: Memory, progress: float) -> tuple[float, float]:
        """Return α of the convex mix, and the weight of the other."""
        if not self.feedback:
            return self.alpha, self.weight.at(progress)
        share = memory[MIX].item()
        return share, share / (1 - share)

    def _listen(self, network: nn.Module, held_out: Split, memory: Memory, progress: float) -> None:
        """Let the mix follow the errors on held-out images, ahead of an epoch.

        Our reading of the paper's "adaptively for each epoch": the worst case's share is that of
        images not verified, at the ε of this moment, among those and the misclassified ones, a mean
        over the epochs that halves with each, in [0.1, 0.95].
        """
        some = slice(FEEDBACK_IMAGES)
        x, labels = to_unit(held_out.images[some]), held_out.labels[some]
        plain = in_float32(network)
        graph = _graph(plain, tuple(x.shape[1:]))
        with evaluating(plain), torch.no_grad():
            wrong = (plain(x).argmax(dim=1) != labels).double().mean().item()
            box = bounds.box(x, self._share(progress) * self.epsilon)
            upper = self._upper(graph, box, labels)
            open_ = 1 - bounds.verified(upper, labels).double().mean().item()
        found = open_ / (open_ + wrong) if open_ else 0.5
        before = memory[MIX].item() if progress > 0 else found
        memory[MIX].fill_(min(0.95, max(0.1, (before + found) / 2)))

    def _share(self, progress: float) -> float:
        """Return ε at a point of the training as a share of what it will be."""
        return min(1.0, progress / self.ramp) if self.ramp > 0 else 1.0

    def _rows(
        self, logits: Tensor, labels: Tensor, memory: Memory, generator: torch.Generator
    ) -> Tensor:
        """Return the rows to bound in this batch, (k',)."""
        m, device = len(labels), labels.device
        nobody = torch.empty(0, dtype=torch.int64, device=device)
        if not self.convex and self.alpha < 1:
            drawn = torch.rand((), generator=generator, device=device)
            if drawn.item() >= self.alpha:
                return nobody
        many = m
        if self.k is not None:
            trained, images = int(memory["trained"]), int(memory["to_train"]) // self.epochs
            before, after = (  # rounded, so that an epoch's differences add up to k
                (self.k * n + images // 2) // images for n in (trained, trained + m)
            )
            many = after - before
        elif self.per_batch is not None:
            many = self.per_batch
        if many >= m:
            return torch.arange(m, device=device)
        if many == 0:
            return nobody
        return self.choose(logits, labels, many, generator)

    def _margins(
        self, graph: Graph, x: Tensor, x_adv: Tensor, labels: Tensor, epsilon: float
    ) -> Tensor:
        box = (
            bounds.box(x, epsilon)
            if self.box == 1
            else losses.small_box(x, x_adv, epsilon=epsilon, share=self.box)
        )
        return self._upper(graph, box, labels)

    def _upper(self, graph: Graph, box: bounds.Box, labels: Tensor) -> Tensor:
        """Return the margins' upper bounds, (k', K), without what a loss does not need."""
        return bounds.margins(
            graph, box, labels, engine=self.engine, memory=self.memory_limit, all_rounding=False
        )

    @property
    def eq7(self) -> bool:
        """Return whether eq. 7 describes what it costs."""
        return False

    @property
    def reach(self) -> Reach:
        """Return how far from the clean images it trains."""
        return Reach(self.epsilon)

    def expected_units(self, fractions: tuple[float, float, float]) -> None:
        """Return None: a bound is no forward pass."""
        del fractions


def at_random(logits: Tensor, labels: Tensor, many: int, generator: torch.Generator) -> Tensor:
    """Return as many rows by chance, without replacement: the paper's."""
    del logits
    return torch.randperm(len(labels), generator=generator, device=labels.device)[:many]


def nearest_right(metric: Callable[[Tensor, Tensor], Tensor]) -> Choose:
    """Return BulletTrain's choice: the right predictions nearest the boundary, by a metric.

    Wrong ones follow where there are too few.
    """

    def choose(logits: Tensor, labels: Tensor, many: int, generator: torch.Generator) -> Tensor:
        del generator
        score = metric(logits, labels)
        wrong = torch.signbit(score)
        order = torch.where(wrong, score.abs() + 2, score)  # scores are at most √2
        return order.argsort()[:many]

    return choose


@lru_cache(maxsize=1)
def _graph(network: nn.Module, shape: tuple[int, ...]) -> Graph:
    """Return the graph of the network in training, traced once."""
    return trace(network, shape)
