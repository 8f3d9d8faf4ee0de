"""The method MMA (Ding et al., "MMA Training: Direct Input Space Margin Maximization …")."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btrain import precision
from btrain.allocation import BOUNDARY, OUTLIER, ROBUST, Allocation
from btrain.attacks.balls import BALLS, per_image
from btrain.attacks.pgd import by_steps, evaluation_mode, prefix_pgd
from btrain.data import Batch, Data
from btrain.methods.base import Loss, Memory, Reach
from btrain.methods.statistics import step_stats

_STEP = 2.5  # a step is 2.5·ε/N
_BEYOND = 1.05  # the search goes to 1.05·d_max


class Examples(NamedTuple):
    """A batch with an adversarial example at the margin of each correct one, these first.

    Attributes:
        clean_logits: in train mode, with their graph, (m, K).
        margin: as found, (m,); 0 for wrong examples.
        correct: how many are.
    """

    x: Tensor
    labels: Tensor
    clean_logits: Tensor
    x_adv: Tensor
    margin: Tensor
    correct: int


@dataclass(frozen=True)
class MMA:
    """The training of each example at its own margin.

    A correct example is trained on its shortest adversarial perturbation found, a wrong one as it
    is; as published, correct means p_y > 1/2. Attack and search are in eval mode, and their result
    stays in the box; the published code searches in train mode and does not clip.

    Attributes:
        norm: of its ball, whose radius is each example's own.
        max_margin: d_max; an example whose margin is larger is left out of the loss.
        first_margin: the least radius of an attack, and where an example begins.
        steps: N of the attack.
        bisections: of the search for the margin.
        clean_weight: of the cross-entropy on clean images beside the margin loss, in [0, 1].
    """

    norm: str
    max_margin: float
    first_margin: float
    steps: int
    bisections: int
    clean_weight: float
    in_units: ClassVar[bool] = False
    by_example: ClassVar[frozenset[str]] = frozenset({"margin"})

    def memory(self, data: Data, device: torch.device) -> Memory:
        """Return F_R, which stays 0, and every training example's margin."""
        return {
            "robust_fraction": torch.zeros((), device=device),
            "margin": torch.zeros(len(data.train), device=device),
        }

    def examples(
        self, network: nn.Module, batch: Batch, memory: Memory, generator: torch.Generator
    ) -> Iterator[Examples]:
        """Yield the batch once, and remember the margins; one copy to the host."""
        x, labels, indices = batch[:3]
        clean_logits = network(x)
        correct = soft_logit_margin(clean_logits.detach(), labels) < 0
        order, counts = by_steps(self.steps * correct)
        x, labels, clean_logits = x[order], labels[order], clean_logits[order]
        n = sum(counts()[:1])
        margin = memory["margin"][indices]
        radius = margin[order].clamp(min=self.first_margin)[:n]
        found = torch.zeros_like(margin)
        x_adv = x.clone()
        if n:
            with evaluation_mode(network):
                x_adv[:n], found[:n] = self.shortest_attack(
                    network, x[:n], labels[:n], radius, generator
                )
        memory["margin"][indices] = torch.zeros_like(found).index_copy_(0, order, found)
        yield Examples(x, labels, clean_logits, x_adv, found, n)

    def loss(
        self, network: nn.Module, examples: Examples, memory: Memory, generator: torch.Generator
    ) -> Loss:
        """Return the loss within d_max and on the clean images.

        In the statistics outliers are wrong, robust examples lie beyond d_max, and no outcome is
        known.
        """
        del memory, generator
        x, labels, clean_logits, x_adv, found, n = examples
        trained = torch.arange(len(x), device=x.device) >= n
        trained |= found < self.max_margin
        logits = network(x_adv)
        each = F.cross_entropy(precision.full(logits), labels, reduction="none")
        clean = F.cross_entropy(precision.full(clean_logits), labels)
        loss = self.clean_weight * clean + (1 - self.clean_weight) * (each * trained).mean()
        classes = torch.where(trained, BOUNDARY, ROBUST)
        classes[n:] = OUTLIER
        steps = self.steps * (classes != OUTLIER)
        z, unread = clean_logits.detach(), x.new_empty(len(x), 0)  # x' lies on the boundary itself
        units = 6.0 * len(x) + (2 * self.steps + 1 + self.bisections) * n
        stats = step_stats(
            Allocation(classes, steps), loss.detach(), z, None, z, unread, labels, units=units
        )
        return Loss(loss, stats)

    def shortest_attack(
        self,
        network: nn.Module,
        x: Tensor,
        labels: Tensor,
        radius: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Return adaptive-norm PGD's examples (Algorithm 1 of Ding et al.) and their margins.

        PGD within each example's radius gives the direction; bisection between 0 and the radius, or
        where that does not fool between the radius and 1.05·d_max, gives the length.
        (n, C, H, W), (n,), (n,) -> adversarial examples like x in the box, and margins (n,)
        """
        ball = BALLS[self.norm](radius)
        x_adv = prefix_pgd(
            network,
            x,
            labels,
            x.new_empty(len(x), 0),
            active=[len(x)] * self.steps,
            step_size=_STEP * radius / self.steps,
            inner_loss=lambda logits, clean, labels: soft_logit_margin(logits, labels),
            ball=ball,
            noise=ball.start(x, generator),
        )
        direction = (x_adv - x) / per_image(radius, x)

        def at(length: Tensor) -> Tensor:
            return (x + per_image(length, x) * direction).clamp(0, 1)

        def fools(length: Tensor) -> Tensor:
            with torch.no_grad():
                return soft_logit_margin(network(at(length)), labels) >= 0

        furthest = torch.full_like(radius, _BEYOND * self.max_margin)
        fooled = fools(radius)
        near = torch.where(fooled, torch.zeros_like(radius), radius)
        far = torch.where(fooled, radius, furthest)
        for _ in range(self.bisections):
            middle = (near + far) / 2
            fooled = fools(middle)
            near, far = torch.where(fooled, near, middle), torch.where(fooled, middle, far)
        margin = (near + far) / 2
        return at(margin), margin

    @property
    def eq7(self) -> bool:
        """Return whether eq. 7 describes what it costs."""
        return False

    @property
    def reach(self) -> Reach:
        """Return how far from the clean images it trains."""
        return Reach(_BEYOND * self.max_margin, self.norm)

    def expected_units(self, fractions: tuple[float, float, float]) -> None:
        """Return None: how many examples are searched for depends on the network."""
        del fractions


def soft_logit_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log Σ_{j≠y} exp(f_j) − f_y, negative where p_y > 1/2. (m, K), (m,) -> (m,)"""
    logits, index = precision.full(logits), labels[:, None]
    others = logits.scatter(1, index, -torch.inf).logsumexp(dim=1)
    return others - logits.gather(1, index).squeeze(1)
