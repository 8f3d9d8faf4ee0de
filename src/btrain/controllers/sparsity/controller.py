"""Masks behind every update: static ones, those of Flying Bird and Flying Bird+."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from btrain.controllers.base import Gradients
from btrain.controllers.sparsity.masks import Masks, noise_like, regrown
from btrain.controllers.sparsity.schedule import drop_rate, switches
from btrain.methods.base import Memory
from btrain.methods.statistics import StepStats


@dataclass(frozen=True)
class Thinned:
    """A network and the weights in it that are masked.

    Attributes:
        weights: by the name of their layer.
        positions: of every layer, masked or not, in how many places its weights are used.
        sizes: of every layer, how many weights it has.
        beside: networks of the same layers that are masked likewise, such as a moving average.
    """

    weights: Mapping[str, nn.Parameter]
    positions: Mapping[str, int]
    sizes: dict[str, int]
    beside: Sequence[Mapping[str, nn.Parameter]] = ()

    @property
    def size(self) -> int:
        """Return how many weights could be masked."""
        return sum(weight.numel() for weight in self.weights.values())


class Sparsity:
    """Masks that do not change; what is masked, and its momenta, is 0 behind every update.

    The masks act in place, so that gradients stay dense and the weights stay where they are.

    Attributes:
        shrinks: whether what is masked is not even computed with.
        memory: the masks, the share of the multiply-adds that they leave (φ), and the cost so far
            in units times φ: of all (`counted_units`), of the epoch's batches (`epoch_units`); and
            without φ what the batches' statistics do not hold (`extra_units`).
        emptied: layers that the masks' rule would have left no weight, which keep one.
        steps: updates of the weights so far, the undone ones as well.
    """

    shrinks: ClassVar[bool] = False

    def __init__(self, thinned: Thinned, masks: Masks, emptied: Sequence[str] = ()) -> None:
        self.thinned, self.emptied, self.steps = thinned, emptied, 0
        self.masks = {
            name: torch.empty_like(weight, requires_grad=False).copy_(masks[name])
            for name, weight in thinned.weights.items()
        }
        device = next(iter(self.masks.values())).device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self.memory: Memory = {f"mask.{name}": mask for name, mask in self.masks.items()}
        self.memory |= {"macs_share": zero + 1, "counted_units": zero.clone()}
        self.memory |= {"epoch_units": zero.clone(), "extra_units": zero.clone()}
        self._at_start = zero + 1  # φ at the beginning of the batch
        self.refresh()

    # ---------------------------------------------------------------- what a run calls

    def active(self, gradients: Gradients) -> Gradients:
        """Return the gradients with zeros where weights are masked."""
        masks = {weight: self.masks[name] for name, weight in self.thinned.weights.items()}
        return {w: g * masks[w] if w in masks else g for w, g in gradients.items()}

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Set what is masked to 0 again, and change the masks where it is time."""
        self.steps += 1
        self.apply(optimizer)
        if self.change():
            self._recount()
            self.apply(optimizer)

    def after_batch(self, done: int, stats: StepStats, skipped: Tensor | None) -> None:
        """Count what the batch has cost, with the masks that it began with."""
        del done, skipped
        self.count(stats)
        self.apply_beside()

    def count(self, stats: StepStats) -> None:
        """Count a batch's work, with the masks that it began with."""
        counted = stats.units.double() * self._at_start
        self.memory["counted_units"] += counted
        self.memory["epoch_units"] += counted
        self._at_start.copy_(self.memory["macs_share"])

    def columns(self) -> dict[str, Any]:
        """Return densities and shares for the log."""
        return {"density": self.density, "macs_share": float(self.memory["macs_share"])}

    def end_epoch(self) -> None:
        """Clear what was counted in the epoch."""
        self.memory["epoch_units"].zero_()

    # ------------------------------------------------------------------------- masks

    def refresh(self) -> None:
        """Take φ anew, and set to 0 what new masks take away."""
        self._recount()
        self._at_start.copy_(self.memory["macs_share"])
        self.apply()
        self.apply_beside()

    def change(self) -> bool:
        """Change the masks if it is time; return whether they were."""
        return False

    @torch.no_grad()
    def apply(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Multiply weights and their momenta by the masks."""
        tensors: list[Tensor] = []
        masks: list[Tensor] = []
        for name, weight in self.thinned.weights.items():
            state = optimizer.state.get(weight, {}) if optimizer is not None else {}
            alike = [v for v in state.values() if isinstance(v, Tensor) and v.shape == weight.shape]
            tensors += [weight, *alike]
            masks += [self.masks[name]] * (1 + len(alike))
        torch._foreach_mul_(tensors, masks)

    @torch.no_grad()
    def apply_beside(self) -> None:
        """Multiply the weights of the networks beside by the masks."""
        for weights in self.thinned.beside:
            torch._foreach_mul_([weights[name] for name in self.masks], [*self.masks.values()])

    def kept(self) -> dict[str, int]:
        """Return how many weights each masked layer keeps; one copy to the host."""
        counts = torch.stack([mask.count_nonzero() for mask in self.masks.values()])
        return dict(zip(self.masks, counts.tolist(), strict=True))

    @property
    def density(self) -> float:
        """Return the share of the weights that could be masked and are not."""
        return sum(self.kept().values()) / self.thinned.size

    def _recount(self) -> None:
        """Take φ anew."""
        sizes, positions = self.thinned.sizes, self.thinned.positions
        left = sizes | self.kept()
        dense = sum(sizes[name] * count for name, count in positions.items())
        now = sum(left[name] * count for name, count in positions.items())
        self.memory["macs_share"].fill_(now / dense)

    # -------------------------------------------------------------------------- cost

    def spend(self, units: float, *, share: float | None = None) -> None:
        """Count units that no batch's statistics hold, at φ or at another share."""
        self.memory["extra_units"] += units
        factor = self.memory["macs_share"] if share is None else share
        self.memory["counted_units"] += units * factor

    # -------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values; masks as bits."""
        return {
            "steps": self.steps,
            "memory": {
                name: tensor > 0 if name.startswith("mask.") else tensor
                for name, tensor in self.memory.items()
            },
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: masks of other shapes, or with other values than 0 and 1.
        """
        memory = saved["memory"]
        if memory.keys() != self.memory.keys() or type(saved["steps"]) is not int:
            raise ValueError("not the masks of this kind of sparsity")
        for name, tensor in self.memory.items():
            if memory[name].shape != tensor.shape:
                raise ValueError("a mask of another shape")
            of_weights = name.startswith(("mask.", "fired."))
            if of_weights and not binary(memory[name]):
                raise ValueError("a mask that is not binary")
            tensor.copy_(memory[name])
        self.steps = saved["steps"]
        self._at_start.copy_(self.memory["macs_share"])


def binary(mask: Tensor) -> bool:
    """Return whether a mask from a file holds nothing but zeros and ones."""
    return mask.dtype is torch.bool and int(mask.view(torch.uint8).max()) <= 1


class Counts(NamedTuple):
    """The numbers of weights of a layer that a mask update drops and grows."""

    drop: int
    grow: int


@dataclass(frozen=True)
class Flight:
    """The way in which Flying Bird changes its masks.

    Attributes:
        steps: updates of the weights in the run.
        changes: those behind which the masks change.
        first, last: κ at the beginning and at the end.
        growth: `gradient` or `random`: what inactive weights are chosen by.
        seed: of random growth.
    """

    steps: int
    changes: frozenset[int]
    first: float
    last: float
    growth: str
    seed: int

    def drop_rate(self, step: int) -> float:
        """Return κ behind so many updates of the weights."""
        return drop_rate(min(step, self.steps), self.steps, first=self.first, last=self.last)

    def chance(self, step: int, number: int) -> torch.Generator:
        """Return the source of a change's random numbers, the same in all processes.

        Args:
            step: updates of the weights so far.
            number: of the draw in this change, below 4099.
        """
        seed = (self.seed * 1_000_003 + step) * 4099 + number
        return torch.Generator().manual_seed(seed % 2**63)


class FlyingBird(Sparsity):
    """Masks that drop their smallest weights and grow as many others in the same layer.

    The growth is by the gradient of the batch just learnt from, ahead of its update.
    """

    def __init__(self, thinned: Thinned, masks: Masks, flight: Flight) -> None:
        super().__init__(thinned, masks)
        self.flight = flight
        self.fired = {name: mask > 0 for name, mask in self.masks.items()}
        self.memory |= {f"fired.{name}": fired for name, fired in self.fired.items()}
        device = self.memory["macs_share"].device
        self.memory["mask_updates"] = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def drop_rate(self) -> float:
        """Return κ of now."""
        return self.flight.drop_rate(self.steps)

    def change(self) -> bool:
        """Drop and grow in every layer that is not dense."""
        if self.steps not in self.flight.changes:
            return False
        kept = self.kept()
        counts = self.counts(kept)
        for number, (name, mask) in enumerate(self.masks.items()):
            weight = self.thinned.weights[name]
            if kept[name] == weight.numel():
                continue
            drop, grow = counts[name]
            mask.copy_(regrown(weight, mask, self.growth(number, weight), drop=drop, grow=grow))
            self.fired[name] |= mask > 0
        self.memory["mask_updates"] += 1
        return True

    def growth(self, number: int, weight: nn.Parameter) -> Tensor:
        """Return what a layer's inactive weights are chosen by."""
        if self.flight.growth == "random":
            return noise_like(weight, self.flight.chance(self.steps, number))
        return torch.zeros_like(weight) if weight.grad is None else weight.grad.abs()

    def moved(self, kept: int) -> int:
        """Return how many of a layer's active weights make room for others."""
        return min(math.ceil(self.drop_rate * kept), kept)

    def counts(self, kept: Mapping[str, int]) -> dict[str, Counts]:
        """Return how many of each layer's active weights go, and how many come."""
        return {name: Counts(self.moved(of), self.moved(of)) for name, of in kept.items()}

    def columns(self) -> dict[str, Any]:
        """Return densities and shares, κ, the masks' updates and the share that ever was active."""
        fired = sum(int(fired.count_nonzero()) for fired in self.fired.values())
        return super().columns() | {
            "fired_share": fired / self.thinned.size,
            "drop_rate": self.drop_rate,
            "mask_updates": int(self.memory["mask_updates"]),
        }


@dataclass(frozen=True)
class Switches:
    """The rule by which Flying Bird+ prunes or grows more.

    Attributes:
        start: the updates of the weights behind which it may.
        listen: those behind which epochs are heard.
        epochs: whose changes are looked at.
        prune_share, grow_share: of these changes, which suffice.
        prune_ratio: of what is dropped anyway, dropped in addition and not grown again.
        growth_ratio: of what is grown anyway, grown in addition.
    """

    start: int
    listen: int
    epochs: int
    prune_share: float
    grow_share: float
    prune_ratio: float
    growth_ratio: float


class FlyingBirdPlus(FlyingBird):
    """Flying Bird that prunes more while it overfits, and grows more while it does worse."""

    def __init__(self, thinned: Thinned, masks: Masks, flight: Flight, rule: Switches) -> None:
        super().__init__(thinned, masks, flight)
        self.rule = rule
        device = self.memory["macs_share"].device
        for name in ("gaps", "losses"):
            empty = torch.full((rule.epochs + 1,), math.nan, dtype=torch.float64, device=device)
            self.memory[name] = empty

    @property
    def listening(self) -> bool:
        """Return whether the epoch that just ended is to be heard."""
        return self.steps > self.rule.listen

    def heard(self, gap: float, loss: float) -> None:
        """Remember an epoch's robust generalisation gap and held-out adversarial loss."""
        for name, value in (("gaps", gap), ("losses", loss)):
            history = self.memory[name]
            history.copy_(torch.cat([history[1:], history.new_tensor([value])]))

    def switched(self) -> tuple[bool, bool]:
        """Return whether to prune more, and whether to grow more."""
        gaps, losses = self.memory["gaps"].tolist(), self.memory["losses"].tolist()
        if self.steps <= self.rule.start or math.isnan(gaps[0]):
            return False, False
        shares = {"prune_share": self.rule.prune_share, "grow_share": self.rule.grow_share}
        return switches(gaps, losses, **shares)

    def counts(self, kept: Mapping[str, int]) -> dict[str, Counts]:
        """Return how many of each layer's weights go, and how many come; one at least stays."""
        prune, grow = self.switched()
        return {
            name: self._counts(of, self.thinned.weights[name].numel(), prune=prune, grow=grow)
            for name, of in kept.items()
        }

    def _counts(self, kept: int, size: int, *, prune: bool, grow: bool) -> Counts:
        moved = self.moved(kept)
        more = math.ceil(self.rule.prune_ratio * self.drop_rate * kept) if prune else 0
        dropped = min(moved + more, kept)
        grown = round((1 + self.rule.growth_ratio) * moved) if grow else moved
        return Counts(dropped, min(max(grown, 1 - (kept - dropped)), size - (kept - dropped)))

    def columns(self) -> dict[str, Any]:
        """Return Flying Bird's, and the switches as they are now."""
        prune, grow = self.switched()
        return super().columns() | {"prune_more": prune, "grow_more": grow}
