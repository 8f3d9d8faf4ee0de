"""The negative control: each example stops after its own steps, but the work is not left out.

Every example goes through every pass, as a batch with masks does. That must cost what the plain
defense costs: if it measures faster, the measurement is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from btrain.allocation import BOUNDARY, Allocation, by_class, update_robust_fraction
from btrain.attacks.balls import per_image
from btrain.attacks.shadow import attacked
from btrain.data import Batch, Data
from btrain.defenses import augmix_loss
from btrain.methods.augmix import AugMix
from btrain.methods.base import Loss, Memory, Reach
from btrain.methods.bullettrain import BulletTrain
from btrain.methods.statistics import step_stats


@dataclass(frozen=True)
class Masked:
    """One update by masks; the classes, decided before, are `memory["classes"]`, (m,) int64.

    Attributes:
        plain: the plain defense, or AugMix.
        budget: N_O, N_R, N_B, (3,) int64 on the device.
    """

    plain: BulletTrain | AugMix
    budget: Tensor
    in_units: ClassVar[bool] = True
    by_example: ClassVar[frozenset[str]] = frozenset()

    @property
    def eq7(self) -> bool:
        """Return whether eq. 7 describes what it costs."""
        return False

    @property
    def reach(self) -> Reach:
        """Return how far from the clean images it trains."""
        return self.plain.reach

    def memory(self, data: Data, device: torch.device) -> Memory:
        """Return what the plain defense remembers."""
        return self.plain.memory(data, device)

    def examples(
        self, network: nn.Module, batch: Batch, memory: Memory, generator: torch.Generator
    ) -> Iterator[Any]:
        """Yield the batch, attacked by masks; AugMix' views are made with the loss."""
        allocation = by_class(memory["classes"], self.budget)
        if isinstance(self.plain, AugMix):
            yield batch, allocation
            return
        x, labels = batch.x, batch.labels
        clean_logits, z = self.plain.forward_clean(network, x)
        units = len(x) if z.shape[1] and clean_logits is None else 0
        noise = self.plain.attack.noise(x, generator)
        x_adv = _masked_pgd(network, x, labels, z, allocation.steps, noise, self.plain)
        yield batch, allocation, clean_logits, z, x_adv, units

    def loss(
        self, network: nn.Module, examples: Any, memory: Memory, generator: torch.Generator
    ) -> Loss:
        """Return the plain defense's loss, all examples through every pass; remember F_R."""
        if isinstance(self.plain, AugMix):
            return self._of_views(self.plain, network, examples, memory, generator)
        batch, allocation, clean_logits, z, x_adv, units = examples
        x, labels = batch.x, batch.labels
        m, defense = len(x), self.plain.defense
        if defense.outer_reads_clean:
            clean_logits = network(x) if clean_logits is None else clean_logits
            trained = 2 * m
        else:
            clean_logits, trained = z, m
        adv_logits = network(x_adv)
        self._remember(memory, adv_logits, labels)
        loss = defense.outer_loss(clean_logits, adv_logits, labels)
        units += 2 * self.plain.attack.n_b * m + 3 * trained
        stats = step_stats(
            allocation, loss, z, None, clean_logits.detach(), adv_logits, labels, units=units
        )
        return Loss(loss, stats)

    def _of_views(
        self,
        plain: AugMix,
        network: nn.Module,
        examples: tuple[Batch, Allocation],
        memory: Memory,
        generator: torch.Generator,
    ) -> Loss:
        batch, allocation = examples
        x, labels = batch.x, batch.labels
        views = plain.make_views(x.repeat(2, 1, 1, 1), generator, None)
        clean, view1, view2 = network(torch.cat([x, views])).chunk(3)
        seen = (allocation.classes == BOUNDARY)[:, None]
        view1, view2 = torch.where(seen, view1, clean), torch.where(seen, view2, clean)
        loss = augmix_loss(clean, view1, view2, labels, jsd_weight=plain.jsd_weight)
        self._remember(memory, view1, labels)
        z = clean.detach()
        stats = step_stats(allocation, loss, z, None, z, view1, labels, units=9 * len(x))
        return Loss(loss, stats)

    def _remember(self, memory: Memory, logits: Tensor, labels: Tensor) -> None:
        momentum, gamma = self.plain.momentum, self.plain.gamma
        memory["robust_fraction"] = update_robust_fraction(
            memory["robust_fraction"], logits, labels, momentum=momentum, gamma=gamma
        )

    def expected_units(self, fractions: tuple[float, float, float]) -> float | None:
        """Return what the plain defense costs."""
        return self.plain.expected_units(fractions)


def _masked_pgd(
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    z: Tensor,
    steps: Tensor,
    noise: Tensor,
    plain: BulletTrain,
) -> Tensor:
    """Run PGD in which an example's last steps have length 0. -> like x"""
    attack = plain.attack
    sizes, region = attack.sizes(steps), attack.ball.region(x)
    x_adv = x + noise * per_image(steps > 0, x)
    with attacked(network) as frozen:
        for step in range(attack.n_b):
            images = x_adv.detach().requires_grad_()
            with torch.enable_grad():
                loss = plain.defense.inner_loss(frozen(images), z, labels).sum()
            (gradient,) = torch.autograd.grad(loss, [images])
            length = per_image(sizes * (steps > step), x)
            moved = images.detach() + length * attack.ball.direction(gradient)
            x_adv = attack.ball.project(moved, *region)
    return x_adv
