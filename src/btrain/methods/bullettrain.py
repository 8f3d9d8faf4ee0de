"""Algorithm 2 (Hua et al.): one batch, the same code for the plain defense and for BulletTrain.

The numbers at the ends of lines are the algorithm's. m is the batch size, K the number of classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from btrain import allocation as allocators
from btrain.allocation import (
    OUTLIER,
    Allocation,
    Allocator,
    Expected,
    Guard,
    Scored,
    filled_up,
    thinned,
    update_robust_fraction,
)
from btrain.attacks.attack import Attack
from btrain.attacks.kept import KNOWN, STORE, Kept
from btrain.attacks.pgd import by_steps
from btrain.attacks.shadow import attacked
from btrain.data import Batch, Data
from btrain.defenses import Defense, Weights
from btrain.methods.base import Loss, Memory, Reach
from btrain.methods.statistics import step_stats
from btrain.settings import Score

OUTLIERS = "outlier_fraction"
"""The name of F_O's moving average in a method's memory, where a guard watches it."""
SCORES, WEIGHTS = "score", "weight"
"""The names of examples' scores at their last visit and of how many each stands for, (n,) each."""

Regulariser = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]
"""(network, images, labels, generator) -> what is added to the loss, ()"""


class Part(NamedTuple):
    """The place of some of a process' examples among those of a batch, learnt from one by one.

    Attributes:
        share: of this process' examples of the batch.
        last: whether the update follows.
        outcomes: of the parts so far: adversarial logits, (n, K), without their graph, and labels
            and weights.
    """

    share: float
    last: bool
    outcomes: list[tuple[Tensor, Tensor, Weights | None]]


class Examples(NamedTuple):
    """A batch after line 13, in descending order of steps.

    Attributes:
        clean_logits: of a shared clean forward, with their graph, (m, K); else None.
        z: the logits that decided the allocation, (m, K), or (m, 0) where nobody reads them.
        score: of z by the run's metric, (m,); NaN where there are none.
        perturbed: how many examples took a step.
        learnt: how many examples, the first ones, have a part in the loss.
        units: the cost so far, in forward passes of one example.
        share: of the whole batch, which several processes share.
        indices: where the examples stand in the training set, (m,).
        weights: inverse-probability weights; None for ones.
        part: of the batch, where these are not all.
    """

    x: Tensor
    labels: Tensor
    x_adv: Tensor
    clean_logits: Tensor | None
    z: Tensor
    score: Tensor
    allocation: Allocation
    perturbed: int
    learnt: int
    units: float
    share: float = 1.0
    indices: Tensor | None = None
    weights: Weights | None = None
    part: Part | None = None


@dataclass(frozen=True)
class BulletTrain:
    """A defense, an attack, and an allocator that says who is attacked for how long.

    Attributes:
        metric: the score of each example from clean logits and labels, (m, K), (m,) -> (m,).
        gamma, momentum: γ and p of eq. 5.
        scoring: by which logits examples are scored: by a forward pass of their own (line 11), by
            the loss' clean logits, in train mode, or by those of an example's last visit, so that
            now only the attack's targets are computed.
        forward_unperturbed: whether examples without a step go through the adversarial forward.
        regulariser: added to the loss, and what it costs an example.
        kept: the store of the perturbations that attacks start from; None where they do not.
        robust_share: the share of predicted robust examples that are attacked; each counts 1/share
            times.
        guard: what changes while most examples are outliers; None for no guard.
        scores_kept: whether each example's score at its last visit is remembered.
        skips: whether an epoch leaves examples out, by these scores.
    """

    defense: Defense
    attack: Attack
    allocator: Allocator
    metric: Callable[[Tensor, Tensor], Tensor]
    gamma: float
    momentum: float
    scoring: Score = Score.fresh
    forward_unperturbed: bool = False
    regulariser: tuple[Regulariser, float] | None = None
    kept: Kept | None = None
    robust_share: float = 1.0
    guard: Guard | None = None
    scores_kept: bool = False
    skips: bool = False
    in_units: ClassVar[bool] = True
    by_example: ClassVar[frozenset[str]] = frozenset({STORE, KNOWN, SCORES, WEIGHTS})

    def memory(self, data: Data, device: torch.device) -> Memory:
        """Return F_R before the first batch, and stores that are empty."""
        memory = {"robust_fraction": torch.zeros((), device=device)}  # line 8
        if self.kept is not None:
            memory |= self.kept.memory(data, device)
        if self.guard is not None:
            memory[OUTLIERS] = torch.zeros((), device=device)
        if self.scores_kept:
            memory[SCORES] = torch.zeros(len(data.train), device=device)
        if self.skips:
            memory[WEIGHTS] = torch.ones(len(data.train), device=device)
        return memory

    def examples(
        self, network: nn.Module, batch: Batch, memory: Memory, generator: torch.Generator
    ) -> Iterator[Examples]:
        """Yield the batch once, attacked; of the device only counts of steps are read."""
        x, labels = batch.x, batch.labels
        clean_logits, z = self.forward_clean(network, x)  # line 11
        score = (
            memory[SCORES][batch.indices] if self.scoring is Score.last else self.score(z, labels)
        )
        noise = self.start(batch, memory, generator)

        def attacked_logits(steps: int, step_size: float) -> Tensor:
            return self.attacked_logits(network, x, labels, z, noise, steps, step_size)

        allocation = self.allocator(  # line 12
            Scored(score, z, labels, memory["robust_fraction"], generator, attacked_logits)
        )
        share: float | Tensor = self.robust_share
        if self.guard is not None and self.allocator.needs_scores:
            self.remember_outlier_fraction(memory, allocation.classes, batch.weight)
            allocation, share = self.guard(allocation, memory[OUTLIERS], self.robust_share)
        allocation, weights = self.weighted(allocation, share, batch.weight, generator)
        parts, clean_logits, allocation, (learnt, *active) = self.in_order(
            [x, labels, z, score, noise, torch.arange(len(x), device=x.device)],
            clean_logits,
            allocation,
            weights.adv > 0 if weights is not None and self.leaves_spared_out else 1,
        )
        x, labels, z, score, noise, rows = parts
        targets, targeted = self.targets(network, x, z, active)
        x_adv, allocation, forwarded = self.attack(  # line 13
            network, x, labels, targets, allocation, active, noise
        )
        if self.kept is not None:
            self.keep(self.kept, memory, batch, rows, x_adv - x, allocation.steps > 0)
        m, overhead = len(x), allocation.overhead
        units = 2 * forwarded + targeted
        units += m if z.shape[1] and clean_logits is None else 0
        units += m * (2 * overhead + 1) if overhead else 0
        yield Examples(
            x, labels, x_adv, clean_logits, z, score, allocation, sum(active[:1]), learnt, units,
            share=m / len(batch.x),
            indices=batch.indices[rows],
            weights=None if weights is None else Weights(*(weight[rows] for weight in weights)),
        )  # fmt: skip

    def loss(
        self, network: nn.Module, examples: Examples, memory: Memory, generator: torch.Generator
    ) -> Loss:
        """Return the loss of the training passes, and remember F_R."""
        x, labels, x_adv, clean_logits, z, score = examples[:6]
        allocation, perturbed, learnt, units, share = examples[6:11]
        weights = examples.weights
        m = len(x)
        learnt = min(max(learnt, 2), m)  # BatchNorm needs two, and a loss of none has no graph
        if self.defense.outer_reads_clean:  # line 14
            if clean_logits is None:
                clean_logits = forward_prefix(network, x, learnt, z)
            rows = rows_to_forward(learnt if self.forward_unperturbed else perturbed, learnt)
            adv_logits = forward_prefix(network, x_adv, rows, clean_logits)
            trained = learnt + rows
        else:
            clean_logits, adv_logits, trained = z, forward_prefix(network, x_adv, learnt, z), learnt
        self.remember_robust_fraction(memory, examples, adv_logits)  # line 15
        if weights is None:
            loss = self.defense.outer_loss(clean_logits, adv_logits, labels)  # line 16
        else:
            assert self.defense.takes_weights
            loss = self.defense.outer_loss(clean_logits, adv_logits, labels, weights=weights)
        if self.scores_kept:
            self.remember(memory, examples, clean_logits, adv_logits)
        units += 3 * trained
        if self.regulariser is not None:
            regulariser, cost = self.regulariser
            loss = loss + regulariser(network, x, labels, generator)
            units += cost * m
        # z has no columns with Score.last.
        predicted = clean_logits if self.scoring is Score.last else z
        stats = step_stats(
            allocation, loss, predicted, score, clean_logits, adv_logits, labels, units=units,
            weights=weights,
        )  # fmt: skip
        return Loss(loss, stats, share)

    def remember_robust_fraction(
        self, memory: Memory, examples: Examples, adv_logits: Tensor
    ) -> None:
        """Remember F_R, by how many examples of the batch stand. (m, K)

        Robust examples that were spared are stood for by the others. Those that `train.skip` left
        out are not: the percentile of eq. 6, too, is of the examples that were drawn. F_R stays
        where none of them tells, for all were spared.
        """
        before, weights = memory["robust_fraction"], examples.weights
        weight = None if weights is None else weights.adv / weights.clean
        after = update_robust_fraction(
            before,
            adv_logits,
            examples.labels,
            momentum=self.momentum,
            gamma=self.gamma,
            mean=partial(self.mean, weight=weight),
        )
        after = after if weights is None else torch.where(after.isnan(), before, after)
        memory["robust_fraction"] = after

    def remember_outlier_fraction(
        self, memory: Memory, classes: Tensor, weight: Tensor | None
    ) -> None:
        """Remember F_O, by the classes of the whole batch, which every process has. (m,)"""
        f_o = weighted_mean((classes == OUTLIER).float(), weight)
        memory[OUTLIERS] = self.momentum * memory[OUTLIERS] + (1 - self.momentum) * f_o

    def weighted(
        self,
        allocation: Allocation,
        share: float | Tensor,
        weight: Tensor | None,
        generator: torch.Generator,
    ) -> tuple[Allocation, Weights | None]:
        """Spare robust examples the attack; return inverse-probability weights of all examples.

        Args:
            share: the probability of a robust example to be attacked, a number or ().
            weight: that the batch already has, (m,); None for ones.
        """
        if self.robust_share == 1:
            return allocation, None if weight is None else Weights(weight, weight)
        allocation, adv = thinned(allocation, share, generator)
        clean = torch.ones_like(adv) if weight is None else weight
        return allocation, Weights(clean, clean * adv)

    def remember(
        self, memory: Memory, examples: Examples, clean_logits: Tensor, adv_logits: Tensor
    ) -> None:
        """Remember the scores of the batch: of z, or of what was forwarded instead."""
        assert examples.indices is not None
        seen = (logits for logits in (examples.z, clean_logits, adv_logits) if logits.shape[1])
        score = self.metric(next(seen).detach(), examples.labels)
        indices, score = self.remembered(examples.indices, score)
        memory[SCORES][indices] = score.to(memory[SCORES].dtype)

    def remembered(self, indices: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices and scores to remember, (n,) each."""
        return indices, score

    def targets(
        self, network: nn.Module, x: Tensor, z: Tensor, active: Sequence[int]
    ) -> tuple[Tensor, int]:
        """Return the clean logits (m, K) that the attack reads, and for how many it took a forward.

        They are z, or with scores of the last visit those of the examples that take a step; the
        others' are zeros.
        """
        if not (self.scoring is Score.last and self.defense.inner_reads_clean and active):
            return z, 0
        read = active[0]
        logits = eval_logits(network, x[:read])
        return torch.cat([logits, logits.new_zeros(len(x) - read, logits.shape[1])]), read

    def forward_clean(self, network: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the clean logits for the loss, if they are shared, and z.

        z is in the mode of the attack, for a KL between two modes would be large without any; or
        with the shared forward in train mode. It is (m, 0) if nobody reads it, and keeps no graph.
        """
        if self.shares_clean_forward:
            clean_logits = network(x)
            return clean_logits, clean_logits.detach()
        reads = self.defense.inner_reads_clean or self.allocator.needs_scores
        if reads and self.scoring is not Score.last:
            return None, eval_logits(network, x)
        return None, x.new_empty(len(x), 0)

    @property
    def leaves_spared_out(self) -> bool:
        """Return whether spared examples take no training pass.

        None of their loss counts, and their scores come from a pass of their own.
        """
        by_adv = self.defense.weighs_by_adv and self.scoring is Score.fresh
        return self.robust_share < 1 and by_adv

    @property
    def shares_clean_forward(self) -> bool:
        """Return whether line 11 and the loss share one clean forward."""
        in_train_mode = self.attack.train_mode and self.defense.inner_reads_clean
        return self.scoring is Score.shared or in_train_mode

    def score(self, z: Tensor, labels: Tensor) -> Tensor:
        """Return the metric, NaN where no logits were computed. (m, K), (m,) -> (m,)"""
        return self.metric(z, labels) if z.shape[1] else z.new_full((len(z),), math.nan)

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
        sizes = torch.full((len(x),), step_size, device=x.device)
        x_adv = self.attack.evenly(network, x, labels, z, sizes, [len(x)] * steps, noise)
        return eval_logits(network, x_adv)

    def start(self, batch: Batch, memory: Memory, generator: torch.Generator) -> Tensor:
        """Return what is added to the images before the first step, like them."""
        noise = self.attack.noise(batch.x, generator)
        if self.kept is None:
            return noise
        return self.kept.starts(memory, batch, noise, self.scale)

    def keep(
        self,
        kept: Kept,
        memory: Memory,
        batch: Batch,
        rows: Tensor,
        delta: Tensor,
        attacked: Tensor,
    ) -> None:
        """Remember where the attacks of these rows ended, (k,)."""
        new = kept.encoded(delta, self.scale)
        kept.keep(memory, batch, rows, new, attacked)

    @property
    def scale(self) -> float:
        """Return the length that kept perturbations are shares of, in pixel units.

        It is 1, which no pixel's change exceeds, where a ball lets an attack go any distance.
        """
        return self.reach.radius or 1.0

    def in_order(
        self,
        parts: Sequence[Tensor],
        clean_logits: Tensor | None,
        allocation: Allocation,
        learnt: Tensor | int = 1,
    ) -> tuple[list[Tensor], Tensor | None, Allocation, list[int]]:
        """Put the batch in descending order of steps, with groups rounded up as the attack wants.

        Args:
            parts: images, labels, z, score, noise and the numbers of the rows, (m, …) each.
            clean_logits: of a shared clean forward, (m, K), or None.
            learnt: which examples have a part in the loss, (m,) bool; 1 for all. The others take
                no steps and come last.

        Returns:
            The rows of both, their allocation, and how many of them have a part in the loss, take
            the first attack step, the second, …
        """
        order, counts = by_steps(allocation.steps + learnt, self.distance(parts[3]))
        parts = [part[order] for part in parts]
        clean_logits = None if clean_logits is None else clean_logits[order]
        number, *active = counts() or [0]
        allocation, active = self.rounded(allocation, order, active)
        return parts, clean_logits, allocation.ordered(order), [number, *active]

    def distance(self, score: Tensor) -> Tensor | None:
        """Return how far from the boundary examples are, (m,): who is next in a group rounded up.

        None where no group is, or where chance decides, as it does by the batch's order.
        """
        rounds = self.attack.multiple > 1 and self.allocator.by_distance
        return score.abs() if rounds else None

    def rounded(
        self, allocation: Allocation, order: Tensor, active: list[int]
    ) -> tuple[Allocation, list[int]]:
        """Return the allocation and its group sizes, rounded up to the attack's multiple."""
        if self.attack.multiple == 1:
            return allocation, active
        return filled_up(allocation, order, active, self.attack.multiple)

    def mean(self, values: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the mean over the batch, as `weighted_mean` does. (m,) -> ()"""
        return weighted_mean(values, weight)

    @property
    def eq7(self) -> bool:
        """Return whether eq. 7 describes what it costs."""
        unweighted = self.robust_share == 1 and not self.skips and self.guard is None
        return unweighted and self.kept is None and self.regulariser is None

    @property
    def reach(self) -> Reach:
        """Return how far from the clean images it trains."""
        radius = self.attack.ball.reach
        assert not isinstance(radius, Tensor)
        return Reach(radius, self.attack.ball.norm)

    def expected_units(self, fractions: tuple[float, float, float]) -> float | None:
        """Return units an example; None where the allocator cannot tell."""
        fractions = self.allocator.fractions or fractions
        expected = self.expected(fractions)
        if expected is None:
            return None
        reads = self.defense.inner_reads_clean
        scoring = 1.0 if reads or self.allocator.needs_scores else 0.0
        if self.shares_clean_forward:
            scoring = 0.0
        elif self.scoring is Score.last:
            scoring = expected.attacked if reads else 0.0
        spared = (1 - self.share_of_robust(fractions[2])) * fractions[1]
        learnt = 1 - spared if self.leaves_spared_out else 1
        perturbed = learnt if self.forward_unperturbed else expected.attacked
        training = 3 * (learnt + perturbed) if self.defense.outer_reads_clean else 3 * learnt
        choosing = 2 * expected.overhead + 1 if expected.overhead else 0
        penalty = self.regulariser[1] if self.regulariser is not None else 0
        return 2 * expected.steps + scoring + training + choosing + penalty

    def expected(self, fractions: tuple[float, float, float]) -> Expected | None:
        """Return the attack of an average batch, with a share of the robust examples."""
        boundary, robust, outlier = fractions
        allocator, share = self.allocator, self.share_of_robust(outlier)
        if (
            self.guard is not None
            and outlier > self.guard.share
            and isinstance(allocator, allocators.BulletTrain)
        ):
            n_b, n_r, n_o = allocator.steps
            allocator = replace(allocator, steps=(n_b, n_r, max(n_o, self.guard.steps)))
        return allocator.expected((boundary, share * robust, outlier))

    def share_of_robust(self, outlier: float) -> float:
        """Return the share of robust examples that are attacked with this F_O."""
        guarded = self.guard is not None and outlier > self.guard.share
        return 1.0 if guarded else self.robust_share


def weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Return the mean of values by weight, (m,) each, or with None the plain one; () float.

    It is NaN where all weights are 0.
    """
    return values.mean() if weight is None else (weight * values).sum() / weight.sum()


def eval_logits(network: nn.Module, x: Tensor) -> Tensor:
    """Return logits (m, K) in eval mode, without a graph."""
    with attacked(network) as frozen, torch.no_grad():
        logits: Tensor = frozen(x)
    return logits


def rows_to_forward(perturbed: int, m: int) -> int:
    """Return how many examples share the adversarial forward pass when so many are perturbed.

    A single one takes an unperturbed one along, for BatchNorm cannot normalise it alone.
    """
    return min(max(perturbed, 2), m) if perturbed else 0


def forward_prefix(network: nn.Module, x: Tensor, rows: int, logits: Tensor) -> Tensor:
    """Return new logits (m, K) of the first `rows` examples; the others keep those given."""
    if rows == len(x):
        new: Tensor = network(x)
        return new
    return torch.cat([network(x[:rows]), logits[rows:]]) if rows else logits
