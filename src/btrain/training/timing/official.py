"""The step structure of TRADES' published code, to measure what leaving it gains.

The clean images are forwarded again in every attack step, and twice in the loss: 3 units an attack
step and 9 for the update where 2 and 7 do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btrain.allocation import BOUNDARY, Allocation
from btrain.attacks.shadow import attacked
from btrain.data import Batch, Data
from btrain.defenses import kl_inner_loss
from btrain.methods.base import Loss, Memory, Reach
from btrain.methods.bullettrain import BulletTrain
from btrain.methods.statistics import step_stats


@dataclass(frozen=True)
class Official:
    """One update like plain TRADES' up to rounding, without BatchNorm; F_R stays as it is.

    Attributes:
        plain: plain TRADES, whose attack it takes.
    """

    plain: BulletTrain
    beta: float
    in_units: ClassVar[bool] = True
    by_example: ClassVar[frozenset[str]] = frozenset()

    @property
    def eq7(self) -> bool:
        """Return whether eq. 7 describes what it costs."""
        return True

    @property
    def reach(self) -> Reach:
        """Return how far from the clean images it trains."""
        return self.plain.reach

    def memory(self, data: Data, device: torch.device) -> Memory:
        """Return what plain TRADES remembers."""
        return self.plain.memory(data, device)

    def examples(
        self, network: nn.Module, batch: Batch, memory: Memory, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield images, labels and adversarial examples."""
        del memory
        x, labels = batch.x, batch.labels
        attack = self.plain.attack
        region = attack.ball.region(x)
        x_adv = x + attack.noise(x, generator)
        with attacked(network) as frozen:
            for _ in range(attack.n_b):
                x_adv = x_adv.detach().requires_grad_()
                with torch.enable_grad():
                    divergence = F.kl_div(
                        F.log_softmax(frozen(x_adv), dim=1),
                        F.softmax(frozen(x), dim=1),
                        reduction="sum",
                    )
                (gradient,) = torch.autograd.grad(divergence, [x_adv])
                step = attack.step_size_b * attack.ball.direction(gradient)
                x_adv = attack.ball.project(x_adv.detach() + step, *region)
        yield x, labels, x_adv

    def loss(
        self,
        network: nn.Module,
        examples: tuple[Tensor, Tensor, Tensor],
        memory: Memory,
        generator: torch.Generator,
    ) -> Loss:
        """Return TRADES' loss with a forward pass of the clean images for each of its terms."""
        del memory, generator
        x, labels, x_adv = examples
        clean_logits, adv_logits, again = network(x), network(x_adv), network(x)
        divergence = kl_inner_loss(adv_logits, again, labels).mean()
        loss = F.cross_entropy(clean_logits, labels) + self.beta * divergence
        n_b, z = self.plain.attack.n_b, clean_logits.detach()
        everyone = torch.full_like(labels, BOUNDARY)
        allocation = Allocation(everyone, torch.full_like(labels, n_b))
        units = (3 * n_b + 9) * len(x)
        return Loss(loss, step_stats(allocation, loss, z, None, z, adv_logits, labels, units=units))

    def expected_units(self, fractions: tuple[float, float, float]) -> float:
        """Return three units an attack step and nine for the update."""
        del fractions
        return 3 * self.plain.attack.n_b + 9
