"""The group that says which weights stay at zero while the network is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from btrain.settings.checks import MISSING, at_least, no_null, positive, require
from btrain.settings.method import Choice
from btrain.settings.names import (
    Growth,
    IntervalUnit,
    LayerDensities,
    Rewind,
    SearchName,
    SparsityName,
)


@dataclass
class SparsityConfig:
    """No sparsity, and what all kinds of it have."""

    name: SparsityName = SparsityName.none

    kinds: ClassVar[frozenset[str]] = frozenset()
    refuses: ClassVar[Mapping[str, str]] = {}

    def choices(self) -> list[Choice]:
        if not self.kinds:
            return []
        return [Choice(f"sparsity={self.name.name}", self.kinds, self.refuses)]


@dataclass
class StaticConfig(SparsityConfig):
    """Masks that are made once."""

    density: float = MISSING
    exclude: list[str] = field(default_factory=list)

    kinds: ClassVar[frozenset[str]] = frozenset({"sparse"})

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, "sparsity.density", "in (0, 1]", self.density)


@dataclass
class ScoredConfig(StaticConfig):
    """Masks by scores that need training images."""

    examples: int = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(2, "sparsity.examples", self.examples)


@dataclass
class OwnSparsityConfig(ScoredConfig):
    """Masks by scores of the user's."""

    factory: str = MISSING
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        no_null("sparsity.factory", self.factory)


@dataclass
class SynFlowConfig(StaticConfig):
    rounds: int = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, "sparsity.rounds", self.rounds)


@dataclass
class FlightConfig(SparsityConfig):
    """The settings of what comes and goes in the course of training."""

    first_drop_rate: float = MISSING
    last_drop_rate: float = MISSING
    interval: float = MISSING
    late_interval: float = MISSING
    late_from: float = MISSING
    interval_unit: IntervalUnit = MISSING

    kinds: ClassVar[frozenset[str]] = frozenset({"sparse", "moving_masks"})

    def check_flight(self) -> None:
        """Raise UserError for a number that is out of range."""
        for key in ("first_drop_rate", "last_drop_rate", "late_from"):
            require(
                0 <= getattr(self, key) <= 1, f"sparsity.{key}", "in [0, 1]", getattr(self, key)
            )
        positive("sparsity.interval", self.interval)
        positive("sparsity.late_interval", self.late_interval)


@dataclass
class FlyingBirdConfig(FlightConfig, StaticConfig):
    init: LayerDensities = MISSING
    growth: Growth = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_flight()


@dataclass
class FlyingBirdPlusConfig(FlyingBirdConfig):
    switch_from: float = MISSING
    switch_epochs: int = MISSING
    prune_share: float = MISSING
    grow_share: float = MISSING
    prune_ratio: float = MISSING
    growth_ratio: float = MISSING
    probe_examples: int | None = MISSING

    refuses: ClassVar[Mapping[str, str]] = {"augmix": "its switches compare robust accuracies"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("switch_from", "prune_share", "grow_share", "prune_ratio"):
            require(
                0 <= getattr(self, key) <= 1, f"sparsity.{key}", "in [0, 1]", getattr(self, key)
            )
        at_least(1, "sparsity.switch_epochs", self.switch_epochs)
        at_least(0, "sparsity.growth_ratio", self.growth_ratio)
        at_least(1, "sparsity.probe_examples", self.probe_examples)


@dataclass
class RobustBirdConfig(StaticConfig):
    search: SearchName = MISSING
    search_epochs: int = MISSING
    search_milestones: list[float] = MISSING
    threshold: float = MISSING
    window: int = MISSING
    rewind: Rewind = MISSING
    rewind_epoch: int = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, "sparsity.search_epochs", self.search_epochs)
        inside = all(0 <= share <= 1 for share in self.search_milestones)
        rising = sorted(self.search_milestones) == self.search_milestones
        require(
            inside and rising,
            "sparsity.search_milestones",
            "shares of the search in [0, 1], in ascending order",
            self.search_milestones,
        )
        require(0 <= self.threshold <= 1, "sparsity.threshold", "in [0, 1]", self.threshold)
        at_least(2, "sparsity.window", self.window)
        at_least(1, "sparsity.rewind_epoch", self.rewind_epoch)

    def choices(self) -> list[Choice]:
        attacks = {} if self.search is SearchName.plain else {"augmix": "there is no attack"}
        written = f"sparsity.search={self.search.name}"
        return [*super().choices(), Choice(written, frozenset(), attacks)]


@dataclass
class ChannelStaticConfig(SparsityConfig):
    """Whole channels that are taken out once."""

    macs_share: float = MISSING
    exclude: list[str] = field(default_factory=list)

    kinds: ClassVar[frozenset[str]] = frozenset({"sparse"})

    def __post_init__(self) -> None:
        require(0 < self.macs_share <= 1, "sparsity.macs_share", "in (0, 1]", self.macs_share)


@dataclass
class ChannelFlyingBirdConfig(FlightConfig, ChannelStaticConfig):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_flight()


SPARSITIES: dict[SparsityName, type[SparsityConfig]] = {
    SparsityName.none: SparsityConfig,
    SparsityName.random: StaticConfig,
    SparsityName.uniform: StaticConfig,
    SparsityName.erk: StaticConfig,
    SparsityName.er: StaticConfig,
    SparsityName.igq: StaticConfig,
    SparsityName.magnitude: StaticConfig,
    SparsityName.snip: ScoredConfig,
    SparsityName.grasp: ScoredConfig,
    SparsityName.synflow: SynFlowConfig,
    SparsityName.flying_bird: FlyingBirdConfig,
    SparsityName.flying_bird_plus: FlyingBirdPlusConfig,
    SparsityName.robust_bird: RobustBirdConfig,
    SparsityName.channel_static: ChannelStaticConfig,
    SparsityName.channel_flying_bird: ChannelFlyingBirdConfig,
    SparsityName.own: OwnSparsityConfig,
}
