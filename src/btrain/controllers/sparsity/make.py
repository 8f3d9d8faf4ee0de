"""The masks of a run that has not begun, made from its configuration."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from btrain import own
from btrain.controllers.sparsity.channels import (
    Channels,
    FlyingChannels,
    largest,
    same_outputs,
    share_for,
)
from btrain.controllers.sparsity.controller import (
    Flight,
    FlyingBird,
    FlyingBirdPlus,
    Sparsity,
    Switches,
    Thinned,
)
from btrain.controllers.sparsity.masks import (
    DENSITIES,
    Layers,
    Masks,
    layers,
    noise_like,
    positions,
    quotas,
    random_masks,
    top_of_all,
    total_kept,
)
from btrain.controllers.sparsity.schedule import PUBLISHED, mask_updates
from btrain.controllers.sparsity.scores import (
    Batches,
    grasp,
    in_rounds,
    magnitude,
    snip,
    synflow,
)
from btrain.controllers.sparsity.ticket import RobustBird, Ticket
from btrain.data import Data
from btrain.data.augmentation import to_unit
from btrain.errors import UserError
from btrain.models.channels import Cut
from btrain.settings.names import IntervalUnit, Rewind, SparsityName
from btrain.settings.sparsity import (
    ChannelFlyingBirdConfig,
    ChannelStaticConfig,
    FlightConfig,
    FlyingBirdConfig,
    FlyingBirdPlusConfig,
    OwnSparsityConfig,
    RobustBirdConfig,
    ScoredConfig,
    SparsityConfig,
    StaticConfig,
    SynFlowConfig,
)
from btrain.terminal import counted

_BATCH = 128  # of images that are scored


@dataclass(frozen=True)
class Length:
    """The length of the run.

    Attributes:
        epochs: of the run.
        updates: of the weights in an epoch.
    """

    epochs: int
    updates: int

    @property
    def steps(self) -> int:
        """Return updates of the weights in the run."""
        return self.epochs * self.updates


def make_sparsity(
    sparsity: SparsityConfig,
    model: nn.Module,
    data: Data,
    *,
    beside: Sequence[nn.Module],
    length: Length,
    seed: int,
) -> Sparsity | None:
    """Return what masks the network, and mask it; None for `sparsity=none`.

    Args:
        beside: networks that are masked likewise.

    Raises:
        UserError: the settings do not fit the network, the data or the length of the run.
    """
    if isinstance(sparsity, ChannelStaticConfig):
        return make_channels(sparsity, model, data, beside=beside, length=length, seed=seed)
    if not isinstance(sparsity, StaticConfig):
        return None
    thinned = thin(sparsity.exclude, model, data, beside)
    kept = total_kept([w.numel() for w in thinned.weights.values()], sparsity.density)
    match sparsity:
        case RobustBirdConfig():
            return RobustBird(thinned, model, make_ticket(sparsity, kept))
        case FlyingBirdConfig():
            flight = make_flight(sparsity, length, seed, growth=sparsity.growth.value)
            masks = random_by_layer(sparsity.init.value, thinned, sparsity.density, kept, seed)
            if not isinstance(sparsity, FlyingBirdPlusConfig):
                return FlyingBird(thinned, masks, flight)
            if data.val is None:
                raise UserError(
                    "sparsity=flying_bird_plus needs held-out images; set dataset.val_examples."
                )
            return FlyingBirdPlus(thinned, masks, flight, make_switches(sparsity, length))
    masks, emptied = static_masks(sparsity, model, thinned, data, kept, seed)
    return Sparsity(thinned, masks, emptied)


def make_channels(
    sparsity: ChannelStaticConfig,
    model: nn.Module,
    data: Data,
    *,
    beside: Sequence[nn.Module],
    length: Length,
    seed: int,
) -> Channels:
    """Return what takes channels out of the network, and take them out.

    Raises:
        UserError: it has none that can be, or not so many; or as `thin` and `make_flight`.
    """
    written = f"sparsity={sparsity.name.name}"
    layers(model, sparsity.exclude)  # for names that are none
    thinned = thin([], model, data, beside)
    try:
        cut = Cut.found(model, sparsity.exclude, among=thinned.weights)
    except ValueError as error:
        raise UserError(f"{written}: this network's inner_channels are wrong: {error}.") from error
    if not cut.inner:
        raise UserError(
            f"{written}: there are no channels in this network that could be taken out; a module "
            "tells of its own by inner_channels, and sparsity.exclude leaves some."
        )
    share = share_for(cut, thinned, sparsity.macs_share)
    if share is None:
        raise UserError(
            f"sparsity.macs_share={sparsity.macs_share:g} is out of reach: more multiply-adds are "
            "left with one channel a layer."
        )
    kept = largest(model.state_dict(), cut, share)
    if isinstance(sparsity, ChannelFlyingBirdConfig):
        flight = make_flight(sparsity, length, seed, growth="random")
        channels: Channels = FlyingChannels(thinned, model, cut, kept, flight)
    else:
        channels = Channels(thinned, model, cut, kept)
    for network in beside:
        channels.clear(network)
    if not same_outputs(model, cut, kept, to_unit(data.train.images[:2])):
        raise UserError(
            f"{written}: without some channels this network computes something else than with "
            "zeros in their place; its inner_channels are read by more than the layers they name."
        )
    return channels


def thin(
    exclude: Sequence[str], model: nn.Module, data: Data, beside: Sequence[nn.Module]
) -> Thinned:
    """Return the weights that may be masked, and how often each layer uses its own.

    Raises:
        UserError: an excluded name is that of no layer.
    """
    weights = layers(model, exclude)
    return Thinned(
        weights=weights,
        positions=positions(model, data.shape, data.train.images.device),
        sizes={name: weight.numel() for name, weight in layers(model, frozen=True).items()},
        beside=[
            {name: network.get_submodule(name).get_parameter("weight") for name in weights}
            for network in beside
        ],
    )


def random_by_layer(
    densities: str, thinned: Thinned, density: float, kept: int, seed: int
) -> Masks:
    """Return random masks, each layer's density by a rule of `DENSITIES`."""
    weights = thinned.weights
    shares = DENSITIES[densities]([w.shape for w in weights.values()], density)
    numbers = quotas(shares, [w.numel() for w in weights.values()], kept)
    return random_masks(weights, numbers, torch.Generator().manual_seed(seed))


def static_masks(
    sparsity: StaticConfig, model: nn.Module, thinned: Thinned, data: Data, kept: int, seed: int
) -> tuple[Masks, list[str]]:
    """Return masks that are made once, and the layers that would have kept no weight but for one.

    They are made by the rule of their name.
    """
    name, exclude = sparsity.name, sparsity.exclude
    if name.value in DENSITIES:
        return random_by_layer(name.value, thinned, sparsity.density, kept, seed), []
    if isinstance(sparsity, SynFlowConfig):

        def score(masks: Layers | None) -> dict[str, Tensor]:
            return synflow(model, exclude, data.shape, masks)

        return in_rounds(score, kept, thinned.size, sparsity.rounds)
    if isinstance(sparsity, OwnSparsityConfig):
        scored = own_scores(sparsity, model, thinned, data, some(sparsity, data, seed))
        return top_of_all(scored, kept)
    scores: dict[SparsityName, Callable[[], dict[str, Tensor]]] = {
        SparsityName.random: lambda: random_scores(thinned, seed),
        SparsityName.magnitude: lambda: magnitude(thinned.weights),
        SparsityName.snip: lambda: snip(model, exclude, some(sparsity, data, seed)),
        SparsityName.grasp: lambda: grasp(model, exclude, some(sparsity, data, seed)),
    }
    return top_of_all(scores[name](), kept)


def own_scores(
    sparsity: OwnSparsityConfig, model: nn.Module, thinned: Thinned, data: Data, batches: Batches
) -> dict[str, Tensor]:
    """Return what the user's callable says of a copy of the network in train mode.

    Raises:
        UserError: it fails, or does not score every weight with a finite number.
    """
    factory, network = sparsity.factory, copy.deepcopy(model).train()
    known = {"classes": len(data.classes), "shape": data.shape}
    score = own.call("sparsity", factory, sparsity.settings, **known)
    where = f"sparsity.factory={factory}"
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with own.explained(where):
        scored = dict(score(network, images, labels))
    for name, weight in thinned.weights.items():
        found = scored.get(name)
        if not isinstance(found, Tensor) or found.shape != weight.shape:
            raise UserError(f"{where} has no scores of the shape {tuple(weight.shape)} for {name}.")
        if not torch.isfinite(found).all():
            raise UserError(f"{where}: a score for {name} is not finite.")
    return {name: scored[name].detach().to(weight) for name, weight in thinned.weights.items()}


def random_scores(thinned: Thinned, seed: int) -> dict[str, Tensor]:
    """Return independent numbers, by which all layers together are thinned alike."""
    generator = torch.Generator().manual_seed(seed)
    return {name: noise_like(weight, generator) for name, weight in thinned.weights.items()}


def some(sparsity: StaticConfig, data: Data, seed: int) -> Batches:
    """Return the training images that scores are taken from, the same in all processes."""
    assert isinstance(sparsity, ScoredConfig)
    drawn = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    chosen = drawn[: sparsity.examples].to(data.train.images.device)
    return [
        (to_unit(data.train.images[part]), data.train.labels[part])
        for part in torch.split(chosen, _BATCH)
    ]


def make_flight(sparsity: FlightConfig, length: Length, seed: int, *, growth: str) -> Flight:
    """Return how Flying Bird changes its masks in a run of this length.

    Raises:
        UserError: it would not once.
    """
    early, late = (
        interval(value, sparsity.interval_unit, length)
        for value in (sparsity.interval, sparsity.late_interval)
    )
    changes = mask_updates(length.steps, early=early, late=late, late_from=sparsity.late_from)
    if not changes:
        raise UserError(
            f"sparsity.interval={sparsity.interval:g} ({sparsity.interval_unit.name}) is longer "
            f"than the run, whose weights are updated {counted(length.steps, 'time')}."
        )
    return Flight(
        steps=length.steps,
        changes=frozenset(changes),
        first=sparsity.first_drop_rate,
        last=sparsity.last_drop_rate,
        growth=growth,
        seed=seed,
    )


def interval(value: float, unit: IntervalUnit, length: Length) -> int:
    """Return an interval in updates of the weights, at least 1."""
    factor = {
        IntervalUnit.scaled: length.steps / PUBLISHED,
        IntervalUnit.iterations: 1.0,
        IntervalUnit.epochs: float(length.updates),
    }[unit]
    return max(1, round(value * factor))


def make_switches(sparsity: FlyingBirdPlusConfig, length: Length) -> Switches:
    """Return when Flying Bird+ prunes or grows more in a run of this length."""
    start = round(sparsity.switch_from * length.steps)
    return Switches(
        start=start,
        listen=start - (sparsity.switch_epochs + 1) * length.updates,
        epochs=sparsity.switch_epochs,
        prune_share=sparsity.prune_share,
        grow_share=sparsity.grow_share,
        prune_ratio=sparsity.prune_ratio,
        growth_ratio=sparsity.growth_ratio,
    )


def make_ticket(sparsity: RobustBirdConfig, kept: int) -> Ticket:
    """Return when Robust Bird's search is over.

    Raises:
        UserError: it cannot come to the epoch whose weights the run is to begin with.
    """
    if sparsity.rewind is Rewind.epoch and sparsity.rewind_epoch > sparsity.search_epochs:
        raise UserError(
            f"sparsity.rewind_epoch={sparsity.rewind_epoch} is behind the search, which takes at "
            f"most sparsity.search_epochs={sparsity.search_epochs}."
        )
    rewind = {Rewind.none: None, Rewind.init: 0, Rewind.epoch: sparsity.rewind_epoch}
    return Ticket(
        kept=kept,
        density=sparsity.density,
        threshold=sparsity.threshold,
        window=sparsity.window,
        epochs=sparsity.search_epochs,
        rewind=rewind[sparsity.rewind],
    )
