"""All groups together, and what in one does not go with what in another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from btrain.errors import UserError
from btrain.settings.checks import MISSING, seed_in_range
from btrain.settings.method import AttackConfig, BTConfig, DefenseConfig, RivalConfig
from btrain.settings.names import (
    AllocatorName,
    AttackMode,
    CudaGraphs,
    DefenseName,
    RivalName,
    Start,
)
from btrain.settings.run import (
    DatasetConfig,
    EvalConfig,
    LoggerConfig,
    ModelConfig,
    RecipeConfig,
    RunConfig,
    TrainConfig,
)

_ATTACKING = (AllocatorName.oracle, AllocatorName.gaussian, AllocatorName.early_exit)
_NO_POOL = {
    "rival": "a rival is run as published",
    "augmix": "there is no attack",
    "oracle": "it attacks every batch by itself to know the classes",
    "train_mode": "the batches would share BatchNorm's statistics",
    "shared": "the loss needs the logits of newer weights",
}
_NO_COMPILER = {
    "own_step": "its step has another attack",
    "augmix": "there is no attack",
    "train_mode": "only an attack in eval mode is compiled",
}
_NO_GRAPHS = {
    "own_step": "its step has another attack",
    "augmix": "there is no attack",
    "early_exit": "its groups shrink by what the attack finds",
    "pool": "the groups of its batches would be rounded up as one",
    "train_mode": "only an attack in eval mode is recorded",
    "compile": "choose one of them",
}
"""By the kinds of `Config.choices`."""


@dataclass
class Config:
    """Everything that decides a run."""

    dataset: DatasetConfig = MISSING
    model: ModelConfig = MISSING
    attack: AttackConfig = MISSING
    defense: DefenseConfig = MISSING
    bt: BTConfig = MISSING
    rival: RivalConfig = MISSING
    recipe: RecipeConfig = MISSING
    logger: LoggerConfig = MISSING
    train: TrainConfig = MISSING
    eval: EvalConfig = MISSING
    run: RunConfig = MISSING
    seed: int = MISSING
    device: str = MISSING

    def __post_init__(self) -> None:
        seed_in_range("seed", self.seed)
        self._check_combinations()

    def _check_combinations(self) -> None:
        self._check_rival()
        defense, bt = self.defense.name, self.bt
        if (defense is DefenseName.augmix) != (self.attack.augmix is not None):
            raise UserError(
                f"defense={defense.name} does not go with attack={self.attack.name.name}: the "
                "attack augmix belongs to the defense augmix."
            )
        if defense is DefenseName.augmix:
            self._check_augmix()
        elif self.attack.mode is AttackMode.train and bt.name is not AllocatorName.uniform:
            raise UserError(
                f"attack.mode=train needs bt=uniform, not bt={bt.name.name}: the groups of a "
                "batch would each see their own BatchNorm statistics."
            )
        if defense is DefenseName.trades and self.attack.start is Start.clean:
            raise UserError(
                "attack.start=clean does not go with defense=trades: at the clean image its KL "
                "divergence has no gradient."
            )
        for key in ("share_clean_forward", "forward_unperturbed"):
            if getattr(bt, key) and defense in (DefenseName.pgd, DefenseName.augmix):
                raise UserError(f"bt.{key} has no meaning with defense={defense.name}.")
        self._check_switches()
        bt.check_order()

    def _check_switches(self) -> None:
        if self.bt.pool > 1:
            self._refuse(f"bt.pool={self.bt.pool}", _NO_POOL)
        if self.train.compile:
            self._refuse("train.compile=true", _NO_COMPILER)
        if self.train.cuda_graphs is not CudaGraphs.never:
            self._refuse(f"train.cuda_graphs={self.train.cuda_graphs.name}", _NO_GRAPHS)

    def _refuse(self, switch: str, reasons: Mapping[str, str]) -> None:
        """Refuses a switch for what else was chosen: kinds of `choices`, and why not with those.

        Raises:
            UserError: something was.
        """
        chosen = self.choices()
        for kind, why in reasons.items():
            if kind in chosen:
                raise UserError(f"{switch} does not go with {chosen[kind]}: {why}.")

    def choices(self) -> dict[str, str]:
        """What was chosen that some switches do not go with: its kind, and as it is written."""
        bt, rival, train = self.bt, self.rival.name, self.train
        own_step = rival in (RivalName.gradalign, RivalName.free, RivalName.mma)
        kinds = {
            "rival": (f"rival={rival.name}", rival is not RivalName.none),
            "own_step": (f"rival={rival.name}", own_step),
            "augmix": ("defense=augmix", self.defense.name is DefenseName.augmix),
            "oracle": ("bt=oracle", bt.name is AllocatorName.oracle),
            "early_exit": ("bt=early_exit", bt.name is AllocatorName.early_exit),
            "pool": (f"bt.pool={bt.pool}", bt.pool > 1),
            "train_mode": ("attack.mode=train", self.attack.mode is AttackMode.train),
            "shared": ("bt.share_clean_forward=true", bt.share_clean_forward),
            "compile": ("train.compile=true", train.compile),
            "graphs": (
                f"train.cuda_graphs={train.cuda_graphs.name}",
                train.cuda_graphs is not CudaGraphs.never,
            ),
        }
        return {kind: written for kind, (written, chosen) in kinds.items() if chosen}

    def _check_rival(self) -> None:
        rival, defense, bt = self.rival.name, self.defense.name, self.bt
        if rival is RivalName.none:
            return
        if bt.name is not AllocatorName.uniform:
            raise UserError(
                f"rival={rival.name} does not go with bt={bt.name.name}: a rival treats all "
                "examples alike (bt=uniform)."
            )
        own_loss = rival in (RivalName.free, RivalName.mma)
        if defense is DefenseName.augmix or (own_loss and defense is not DefenseName.pgd):
            goes = "defense=pgd" if own_loss else "an adversarial defense"
            raise UserError(
                f"rival={rival.name} does not go with defense={defense.name}: it needs {goes}."
            )
        if bt.warmup_epochs:
            raise UserError(f"bt.warmup_epochs has no meaning with rival={rival.name}.")
        if own_loss and bt.n_b != self.attack.steps:
            raise UserError(f"bt.n_b has no meaning with rival={rival.name}; set attack.steps.")
        if own_loss and self.attack.epsilon_warmup_epochs:
            raise UserError(f"attack.epsilon_warmup_epochs has no meaning with rival={rival.name}.")
        mode = AttackMode.train if rival is RivalName.free else AttackMode.eval
        if own_loss and self.attack.mode is not mode:
            raise UserError(f"attack.mode must be {mode.name} with rival={rival.name}.")

    def _check_augmix(self) -> None:
        bt, attack = self.bt, self.attack
        if attack.mode is AttackMode.train or attack.steps != 2:
            raise UserError(
                "defense=augmix makes two views and no attack: attack.mode must be eval and "
                f"attack.steps 2, not {attack.mode.name} and {attack.steps}."
            )
        if attack.epsilon_warmup_epochs:
            raise UserError("attack.epsilon_warmup_epochs has no meaning with defense=augmix.")
        if bt.name in _ATTACKING:
            raise UserError(
                f"bt={bt.name.name} does not go with defense=augmix: it needs an attack."
            )
        if bt.n_b != 1 or (bt.name is not AllocatorName.uniform and (bt.n_r or bt.n_o)):
            raise UserError(
                "defense=augmix makes views or none: bt.n_b must be 1, bt.n_r and bt.n_o 0, not "
                f"{bt.n_b}, {bt.n_r} and {bt.n_o}."
            )
        if not self.defense.jsd and bt.name is not AllocatorName.uniform:
            raise UserError("defense.jsd=false makes one view of every image: it needs bt=uniform.")

    @property
    def run_dir(self) -> Path:
        """The run folder; `btrain.settings.compose` has named it where the user did not."""
        assert self.run.dir is not None
        return Path(self.run.dir)
