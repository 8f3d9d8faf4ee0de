"""The groups that say how the network is made robust: attack, defense, rival, BulletTrain."""

from __future__ import annotations

import math
from dataclasses import dataclass

from btrain.errors import UserError
from btrain.settings.checks import MISSING, at_least, check_settings, positive, require
from btrain.settings.names import (
    AllocatorName,
    AttackMode,
    AttackName,
    DefenseName,
    Metric,
    RivalName,
    Start,
)


@dataclass
class AugMixConfig:
    width: int = MISSING
    depth: int = MISSING
    severity: float = MISSING
    all_ops: bool = MISSING

    def __post_init__(self) -> None:
        at_least(1, "attack.augmix.width", self.width)
        require(
            self.depth == -1 or self.depth >= 1, "attack.augmix.depth", "-1 or positive", self.depth
        )
        in_range = 0.1 <= self.severity <= 10
        require(in_range, "attack.augmix.severity", "in [0.1, 10]", self.severity)


@dataclass
class AttackConfig:
    name: AttackName = MISSING
    norm: str = "linf"
    steps: int = MISSING
    epsilon: float = MISSING
    step_size: float = MISSING
    start: Start = MISSING
    start_std: float = MISSING
    epsilon_warmup_epochs: int = 0
    mode: AttackMode = MISSING
    augmix: AugMixConfig | None = None

    def __post_init__(self) -> None:
        at_least(1, "attack.steps", self.steps)
        positive("attack.epsilon", self.epsilon)
        positive("attack.step_size", self.step_size)
        at_least(0, "attack.start_std", self.start_std)
        at_least(0, "attack.epsilon_warmup_epochs", self.epsilon_warmup_epochs)

    def share(self, epoch: int) -> float:
        """What ε and the step sizes are in an epoch, from 0, as a share of what they will be."""
        return min(1.0, (epoch + 1) / (self.epsilon_warmup_epochs + 1))


@dataclass
class DefenseConfig:
    name: DefenseName = MISSING
    beta: float | None = None
    jsd: bool | None = None
    jsd_weight: float | None = None

    def __post_init__(self) -> None:
        check_settings("defense", self, _DEFENSE_SETTINGS[self.name])
        at_least(0, "defense.beta", self.beta)
        at_least(0, "defense.jsd_weight", self.jsd_weight)


_DEFENSE_SETTINGS = {
    DefenseName.trades: {"beta"},
    DefenseName.mart: {"beta"},
    DefenseName.pgd: set[str](),
    DefenseName.augmix: {"jsd", "jsd_weight"},
}


@dataclass
class RivalConfig:
    name: RivalName = RivalName.none
    grad_align_weight: float | None = None
    replays: int | None = None
    max_margin: float | None = None
    first_margin: float | None = None
    bisections: int | None = None
    clean_weight: float | None = None

    def __post_init__(self) -> None:
        check_settings("rival", self, _RIVAL_SETTINGS.get(self.name, set()))
        at_least(0, "rival.grad_align_weight", self.grad_align_weight)
        at_least(1, "rival.replays", self.replays)
        at_least(1, "rival.bisections", self.bisections)
        if self.name is RivalName.mma:
            assert self.first_margin is not None
            assert self.max_margin is not None
            assert self.clean_weight is not None
            positive("rival.first_margin", self.first_margin)
            require(
                self.max_margin >= self.first_margin and math.isfinite(self.max_margin),
                "rival.max_margin",
                f"finite and at least rival.first_margin = {self.first_margin:g}",
                self.max_margin,
            )
            require(
                0 <= self.clean_weight <= 1, "rival.clean_weight", "in [0, 1]", self.clean_weight
            )


_RIVAL_SETTINGS = {
    RivalName.gradalign: {"grad_align_weight"},
    RivalName.free: {"replays"},
    RivalName.mma: {"max_margin", "first_margin", "bisections", "clean_weight"},
}


@dataclass
class BTConfig:
    name: AllocatorName = MISSING
    n_b: int = MISSING
    n_r: int = MISSING
    n_o: int = MISSING
    gamma: float = MISSING
    momentum: float = MISSING
    step_size_b: float = MISSING
    metric: Metric = MISSING
    warmup_epochs: int = MISSING
    patience: int = MISSING
    mean_steps: float = MISSING
    fractions: list[float] | None = None
    oracle_steps: int = MISSING
    oracle_step_size: float = MISSING
    forward_unperturbed: bool = MISSING
    share_clean_forward: bool = MISSING
    pool: int = 1
    probe_every: int | None = None

    def __post_init__(self) -> None:
        at_least(0, "bt.n_o", self.n_o)
        at_least(0, "bt.n_r", self.n_r)
        at_least(0, "bt.n_b", self.n_b)
        require(0 < self.gamma <= 1, "bt.gamma", "in (0, 1]", self.gamma)
        require(0 <= self.momentum < 1, "bt.momentum", "in [0, 1)", self.momentum)
        positive("bt.step_size_b", self.step_size_b)
        at_least(0, "bt.warmup_epochs", self.warmup_epochs)
        at_least(0, "bt.patience", self.patience)
        at_least(0, "bt.mean_steps", self.mean_steps)
        self._check_fractions()
        at_least(1, "bt.pool", self.pool)
        at_least(0, "bt.probe_every", self.probe_every)
        at_least(1, "bt.oracle_steps", self.oracle_steps)
        positive("bt.oracle_step_size", self.oracle_step_size)

    def _check_fractions(self) -> None:
        if self.fractions is None:
            return
        if self.name is not AllocatorName.random:
            raise UserError(f"bt.fractions is no setting with bt={self.name.name}.")
        shares = len(self.fractions) == 3 and min(self.fractions) >= 0
        require(
            shares and abs(sum(self.fractions) - 1) < 0.005,
            "bt.fractions",
            "F_B, F_R and F_O, which add up to 1",
            self.fractions,
        )

    def check_order(self) -> None:
        """N_O ≤ N_R ≤ N_B, but for the allocators that ignore them or study them."""
        if self.name not in (AllocatorName.uniform, AllocatorName.oracle):
            require(self.n_o <= self.n_r, "bt.n_o", f"at most bt.n_r = {self.n_r}", self.n_o)
            require(self.n_r <= self.n_b, "bt.n_r", f"at most bt.n_b = {self.n_b}", self.n_r)
