"""Whole channels: a smaller network is trained, whose kernels are really smaller.

Outside of its epochs a run has the whole network, with zeros where channels are missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from btrain.attacks.pgd import evaluation_mode
from btrain.controllers.averaging import WeightAverage
from btrain.controllers.base import Gradients
from btrain.controllers.sparsity.controller import Flight, Sparsity, Thinned
from btrain.controllers.sparsity.masks import Masks
from btrain.methods.statistics import StepStats
from btrain.models.channels import Cut, Kept


class Trained(NamedTuple):
    """A network in training, with its optimizer and the average of its weights."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None

    def networks(self) -> list[nn.Module]:
        """Return the network, and its average where there is one."""
        return [self.model, *([] if self.average is None else [self.average.network])]


@dataclass(frozen=True)
class Pair:
    """A whole network and the one of its kept channels, both with all that training changes.

    The smaller one's tensors stay where they are, so that what was made of it once (graphs, a
    frozen copy, a wrapper for several processes) stays good when other channels come into it.
    """

    cut: Cut
    whole: Trained
    small: Trained

    @staticmethod
    def of(cut: Cut, whole: Trained, kept: Kept) -> Pair:
        """Return a network with a smaller copy of it."""
        model, optimizer, average = whole
        small = cut.compact(model, kept)
        ours = {parameter: name for name, parameter in model.named_parameters()}
        groups = [
            {**group, "params": [small.get_parameter(ours[p]) for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        kind: Any = type(optimizer)
        smaller = kind(groups, **optimizer.defaults)
        average = None if average is None else average.of(small)
        return Pair(cut, whole, Trained(small, smaller, average))

    @torch.no_grad()
    def take(self, kept: Kept) -> None:
        """Bring the smaller network to where the whole one is."""
        for whole, small in zip(self.whole.networks(), self.small.networks(), strict=True):
            there = small.state_dict()
            for name, tensor in whole.state_dict().items():
                there[name].copy_(self.cut.part(name, tensor, kept))
        for name, key, parameter, value in self._momenta(self.whole, self.small):
            of_weights = value.dim() > 0
            part = self.cut.part(name, value, kept) if of_weights else value
            self.small.optimizer.state[parameter][key] = part.clone()

    @torch.no_grad()
    def give(self, kept: Kept) -> None:
        """Bring the whole network to where the smaller one is."""
        for whole, small in zip(self.whole.networks(), self.small.networks(), strict=True):
            there = whole.state_dict()
            for name, tensor in small.state_dict().items():
                there[name].copy_(self.cut.whole(name, tensor, kept))
        for name, key, parameter, value in self._momenta(self.small, self.whole):
            like = parameter if value.dim() > 0 else value
            part = self.cut.whole(name, value, kept) if value.dim() > 0 else value
            self.whole.optimizer.state[parameter][key] = torch.empty_like(
                like, requires_grad=False
            ).copy_(part)
        groups = zip(self.whole.optimizer.param_groups, self.small.optimizer.param_groups,
                     strict=True)  # fmt: skip
        for theirs, ours in groups:
            theirs |= {key: value for key, value in ours.items() if key != "params"}

    @staticmethod
    def _momenta(
        source: Trained, target: Trained
    ) -> Iterator[tuple[str, str, nn.Parameter, Tensor]]:
        """Yield what the source's optimizer holds; the target's holds nothing from here on.

        Each with the names of parameter and momentum, and the target's parameter.
        """
        target.optimizer.state.clear()
        for name, parameter in source.model.named_parameters():
            for key, value in source.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield name, key, target.model.get_parameter(name), value


class Channels(Sparsity):
    """Channels that are taken out once; the network without them is what an epoch trains.

    Attributes:
        cut: where they lie.
    """

    shrinks = True
    _pair: Pair | None

    def __init__(self, thinned: Thinned, model: nn.Module, cut: Cut, kept: Kept) -> None:
        self.cut, self._pair = cut, None
        super().__init__(thinned, self.masks_of(kept, thinned))
        self.clear(model)

    def masks_of(self, kept: Kept, thinned: Thinned) -> Masks:
        """Return masks of weights, 1 where both channels of a weight are kept."""
        masks = {}
        for layer, weight in thinned.weights.items():
            name = f"{layer}.weight"
            ones = torch.ones_like(weight, requires_grad=False)
            masks[layer] = self.cut.whole(name, self.cut.part(name, ones, kept), kept)
        return masks

    @property
    def channels(self) -> dict[str, Tensor]:
        """Return which channels of each layer are kept, ascending."""
        return {
            maker: self.masks[maker].flatten(1).any(dim=1).nonzero()[:, 0]
            for maker in self.cut.sizes
        }

    def clear(self, model: nn.Module) -> None:
        """Set to zero what missing channels have in a network beside their weights."""
        self.cut.clear(model, self.channels)

    @contextmanager
    def at_work(self, whole: Trained) -> Iterator[Trained]:
        """Lend the smaller network for training; afterwards the whole one has its weights."""
        if self._pair is None or self._pair.whole != whole:
            self._pair = Pair.of(self.cut, whole, self.channels)
        self._pair.take(self.channels)
        try:
            yield self._pair.small
        finally:
            self._pair.give(self.channels)

    def active(self, gradients: Gradients) -> Gradients:
        """Return the gradients: a network without the channels has none of theirs."""
        return gradients

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the update: a network without the channels has nothing to be masked."""
        del optimizer
        self.steps += 1

    def after_batch(self, done: int, stats: StepStats, skipped: Tensor | None) -> None:
        """Count what the batch has cost."""
        del done, skipped
        self.count(stats)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: as other masks, or the masks are not those of as many channels.
        """
        numbers = {maker: len(kept) for maker, kept in self.channels.items()}
        super().load_state_dict(saved)
        kept = self.channels
        masks = self.masks_of(kept, self.thinned)
        if numbers != {maker: len(some) for maker, some in kept.items()} or not all(
            torch.equal(mask, masks[layer]) for layer, mask in self.masks.items()
        ):
            raise ValueError("masks that are not of so many channels")


class FlyingChannels(Channels):
    """Channels that come and go: the least of each layer are dropped, and as many grown elsewhere.

    A channel counts by the norms of what it is made by and of what reads it. A grown one begins
    with weights to make it and none that read it, so that the network's outputs stay as they are.
    Growth is random: the smaller network knows no gradients of channels that it has not.
    """

    def __init__(
        self, thinned: Thinned, model: nn.Module, cut: Cut, kept: Kept, flight: Flight
    ) -> None:
        super().__init__(thinned, model, cut, kept)
        self.flight = flight
        device = self.memory["macs_share"].device
        self.memory["mask_updates"] = torch.zeros((), dtype=torch.int64, device=device)
        self._changed = 0  # the update behind which was looked whether it is time

    def after_batch(self, done: int, stats: StepStats, skipped: Tensor | None) -> None:
        """Count what the batch has cost, and exchange channels where it is time."""
        super().after_batch(done, stats, skipped)
        due = any(step in self.flight.changes for step in range(self._changed + 1, self.steps + 1))
        self._changed = self.steps
        if due and self._pair is not None and (skipped is None or not bool(skipped)):
            self._pair.give(self.channels)
            self.exchange(self._pair.whole)
            self._pair.take(self.channels)

    @torch.no_grad()
    def exchange(self, whole: Trained) -> None:
        """Drop and grow channels of every layer that lacks some."""
        tensors = whole.model.state_dict()
        before = self._flags(self.channels)
        after = {
            inner.maker: self._exchanged(tensors, number, before[inner.maker])
            for number, inner in enumerate(self.cut.inner)
        }
        kept = {maker: there.nonzero()[:, 0] for maker, there in after.items()}
        for layer, mask in self.masks_of(kept, self.thinned).items():
            self.masks[layer].copy_(mask)
        for number in range(len(self.cut.inner)):
            self._grow(tensors, number, before, after)
        for network in whole.networks():
            self.clear(network)
        self.memory["mask_updates"] += 1

    def _flags(self, kept: Kept) -> dict[str, Tensor]:
        """Return which of each layer's channels are kept, (n,) bool."""
        flags = {}
        for maker, channels in kept.items():
            there = channels.new_zeros(self.cut.sizes[maker], dtype=torch.bool)
            there[channels] = True
            flags[maker] = there
        return flags

    def _exchanged(self, tensors: Mapping[str, Tensor], number: int, there: Tensor) -> Tensor:
        """Return which channels of a layer are there behind an exchange, (n,) bool."""
        kept = there.nonzero()[:, 0]
        if len(kept) == len(there):
            return there
        moved = min(math.ceil(self.flight.drop_rate(self.steps) * len(kept)), len(kept))
        sizes = channel_sizes(tensors, self.cut, number)[kept]
        after = torch.zeros_like(there)
        after[kept[sizes.topk(len(kept) - moved).indices]] = True
        others = (~after).nonzero()[:, 0]
        chance = self.flight.chance(self.steps, number)
        order = torch.randperm(len(others), generator=chance).to(others.device)
        after[others[order[:moved]]] = True
        return after

    def _grow(
        self,
        tensors: Mapping[str, Tensor],
        number: int,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
    ) -> None:
        """Give a layer's new channels weights as large as its others', from channels that stayed.

        Of channels that are new as well they read nothing, for of those nothing shall be read yet.
        """
        maker, norm, _ = self.cut.inner[number]
        old, grown = before[maker], after[maker] & ~before[maker]
        if not bool(grown.any()):
            return
        weight = tensors[f"{maker}.weight"]
        chance = self.flight.chance(self.steps, number + len(self.cut.inner))
        drawn = torch.randn(weight.shape, generator=chance).to(weight)
        active = weight[old]
        scale = active.square().sum().div(max(int(active.count_nonzero()), 1)).sqrt()
        fresh = drawn * scale
        for axis in self.cut.axes[f"{maker}.weight"]:
            if axis.dim == 1:
                stayed = (before[axis.maker] & after[axis.maker]).repeat_interleave(axis.entries)
                fresh *= stayed.view(1, -1, *[1] * (weight.dim() - 2))
        weight[grown] = fresh[grown]
        gamma = tensors.get(f"{norm}.weight")
        if gamma is not None:
            gamma[grown] = gamma[old].abs().mean()

    def columns(self) -> dict[str, Any]:
        """Return densities and shares, κ and the number of exchanges."""
        return super().columns() | {
            "drop_rate": self.flight.drop_rate(self.steps),
            "mask_updates": int(self.memory["mask_updates"]),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        super().load_state_dict(saved)
        self._changed = self.steps


def channel_sizes(tensors: Mapping[str, Tensor], cut: Cut, number: int) -> Tensor:
    """Return how much each of a layer's channels matters, (n,).

    It is the norm of the weights that read a channel times that of those that make it; behind a
    norm, which undoes the latter, times its weight.
    """
    inner = cut.inner[number]
    made = tensors[f"{inner.maker}.weight"]
    read = tensors[f"{inner.reader}.weight"].transpose(0, 1).reshape(len(made), -1)
    scale = tensors.get(f"{inner.norm}.weight")
    by = made.flatten(1).norm(dim=1) if scale is None else scale.abs()
    sizes: Tensor = read.norm(dim=1) * by
    return sizes


def largest(tensors: Mapping[str, Tensor], cut: Cut, share: float) -> dict[str, Tensor]:
    """Return the channels that matter most, about a share of each layer's, one at least."""
    kept = {}
    for number, inner in enumerate(cut.inner):
        count = channels_of(cut.sizes[inner.maker], share)
        best = channel_sizes(tensors, cut, number).topk(count).indices
        kept[inner.maker] = best.sort().values
    return kept


def channels_of(size: int, share: float) -> int:
    """Return how many of so many channels a share is, one at least."""
    return max(1, round(share * size))


def work_left(cut: Cut, thinned: Thinned, share: float) -> float:
    """Return φ, the share of the multiply-adds, with a share of each layer's channels."""
    left = dict.fromkeys(thinned.sizes, 1.0)
    for maker, _, reader in cut.inner:
        kept = channels_of(cut.sizes[maker], share) / cut.sizes[maker]
        left[maker] *= kept
        left[reader] *= kept
    costs = {name: thinned.sizes[name] * used for name, used in thinned.positions.items()}
    return sum(costs[name] * left[name] for name in costs) / sum(costs.values())


def share_for(cut: Cut, thinned: Thinned, wanted: float) -> float | None:
    """Return the largest share of each layer's channels with at most so many multiply-adds.

    None if one channel a layer has more.
    """
    low, high = 0.0, 1.0
    if work_left(cut, thinned, low) > wanted:
        return None
    if work_left(cut, thinned, high) <= wanted:
        return high
    for _ in range(50):
        middle = (low + high) / 2
        if work_left(cut, thinned, middle) <= wanted:
            low = middle
        else:
            high = middle
    return low


def same_outputs(model: nn.Module, cut: Cut, kept: Kept, images: Tensor) -> bool:
    """Return whether a network of the kept channels computes what the whole one with zeros does."""
    try:
        small = cut.compact(model, kept)
        with evaluation_mode(model), evaluation_mode(small), torch.no_grad():
            ours, theirs = model(images), small(images)
    except RuntimeError:  # of shapes that do not go together
        return False
    return bool(torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4))
