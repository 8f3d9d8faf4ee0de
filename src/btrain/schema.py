"""Every setting of a run, as dataclasses that check their values; the YAML files fill them in.

A new setting has a default here, what was done before it: older run folders do not name it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from btrain.errors import UserError

MISSING: Any = "???"  # OmegaConf's mark for a value that the user or a YAML file must give


class DatasetName(Enum):
    cifar10 = "cifar10"
    cifar100 = "cifar100"
    mnist = "mnist"
    digits = "digits"
    imagefolder = "imagefolder"


class Architecture(Enum):
    wide_resnet = "wide_resnet"
    preact_resnet18 = "preact_resnet18"
    small_cnn = "small_cnn"


class AttackName(Enum):
    linf_pgd = "linf_pgd"
    madry = "madry"
    augmix = "augmix"


class Start(Enum):
    normal = "normal"
    uniform = "uniform"
    clean = "clean"


class AttackMode(Enum):
    eval = "eval"
    train = "train"


class DefenseName(Enum):
    trades = "trades"
    mart = "mart"
    pgd = "pgd"
    augmix = "augmix"


class AllocatorName(Enum):
    bullettrain = "bullettrain"
    uniform = "uniform"
    oracle = "oracle"
    gaussian = "gaussian"
    early_exit = "early_exit"
    random = "random"


class RivalName(Enum):
    none = "none"
    fast = "fast"
    yopo = "yopo"
    gradalign = "gradalign"
    free = "free"
    mma = "mma"


class Metric(Enum):
    svar = "svar"
    cross_entropy = "cross_entropy"
    grad_norm = "grad_norm"
    margin = "margin"


class OptimizerName(Enum):
    sgd = "sgd"
    adam = "adam"


class ScheduleName(Enum):
    step = "step"
    cyclic = "cyclic"
    cosine = "cosine"


class Precision(Enum):
    float32 = "float32"
    bf16 = "bf16"


class CudaGraphs(Enum):
    never = "never"
    auto = "auto"
    always = "always"


class LoggerName(Enum):
    jsonl = "jsonl"
    wandb = "wandb"
    tensorboard = "tensorboard"


class WandbMode(Enum):
    online = "online"
    offline = "offline"
    disabled = "disabled"


class OnNonfinite(Enum):
    stop = "stop"
    skip = "skip"


class Resume(Enum):
    never = "never"
    auto = "auto"
    must = "must"


def _require(condition: bool, key: str, rule: str, value: object) -> None:
    if not condition:
        raise UserError(f"{key} must be {rule}, not {value}.")


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _no_null(key: str, path: str | None) -> None:
    _require("\0" not in (path or ""), key, "a path, without a null character", repr(path))


def _positive(key: str, value: float) -> None:
    _require(value > 0 and _finite(value), key, "finite and greater than 0", value)


def _at_least(least: float, key: str, value: float | None) -> None:
    if value is not None:
        _require(value >= least and _finite(value), key, f"at least {least}", value)


@dataclass
class DatasetConfig:
    name: DatasetName = MISSING
    root: str = MISSING
    download: bool = True
    image_size: int | None = None
    train_examples: int | None = None
    test_examples: int | None = None
    val_examples: int = 0
    epsilon: float = MISSING
    step_size: float = MISSING
    eval_step_size: float = MISSING

    def __post_init__(self) -> None:
        _at_least(2, "dataset.train_examples", self.train_examples)
        _at_least(1, "dataset.test_examples", self.test_examples)
        _at_least(0, "dataset.val_examples", self.val_examples)
        _at_least(1, "dataset.image_size", self.image_size)
        _no_null("dataset.root", self.root)
        resizes = self.name is DatasetName.imagefolder
        _require(
            resizes or self.image_size is None, "dataset.image_size", "null here", self.image_size
        )


@dataclass
class ModelConfig:
    name: str = MISSING
    architecture: Architecture = MISSING
    width: int = MISSING
    depth: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None

    def __post_init__(self) -> None:
        _at_least(1, "model.width", self.width)
        deep = self.architecture is Architecture.wide_resnet
        _require(deep or self.depth is None, "model.depth", "null here", self.depth)
        _require((self.mean is None) == (self.std is None), "model.std", "given with model.mean",
                 self.std)  # fmt: skip
        for mean in self.mean or []:
            _require(_finite(mean), "model.mean", "finite", mean)
        for std in self.std or []:
            _positive("model.std", std)


@dataclass
class AugMixConfig:
    width: int = MISSING
    depth: int = MISSING
    severity: float = MISSING
    all_ops: bool = MISSING

    def __post_init__(self) -> None:
        _at_least(1, "attack.augmix.width", self.width)
        _require(
            self.depth == -1 or self.depth >= 1, "attack.augmix.depth", "-1 or positive", self.depth
        )
        in_range = 0.1 <= self.severity <= 10
        _require(in_range, "attack.augmix.severity", "in [0.1, 10]", self.severity)


@dataclass
class AttackConfig:
    name: AttackName = MISSING
    steps: int = MISSING
    epsilon: float = MISSING
    step_size: float = MISSING
    start: Start = MISSING
    start_std: float = MISSING
    epsilon_warmup_epochs: int = 0
    mode: AttackMode = MISSING
    augmix: AugMixConfig | None = None

    def __post_init__(self) -> None:
        _at_least(1, "attack.steps", self.steps)
        _positive("attack.epsilon", self.epsilon)
        _positive("attack.step_size", self.step_size)
        _at_least(0, "attack.start_std", self.start_std)
        _at_least(0, "attack.epsilon_warmup_epochs", self.epsilon_warmup_epochs)

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
        _check_settings("defense", self, _DEFENSE_SETTINGS[self.name])
        _at_least(0, "defense.beta", self.beta)
        _at_least(0, "defense.jsd_weight", self.jsd_weight)


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
        _check_settings("rival", self, _RIVAL_SETTINGS.get(self.name, set()))
        _at_least(0, "rival.grad_align_weight", self.grad_align_weight)
        _at_least(1, "rival.replays", self.replays)
        _at_least(1, "rival.bisections", self.bisections)
        if self.name is RivalName.mma:
            assert self.first_margin is not None
            assert self.max_margin is not None
            assert self.clean_weight is not None
            _positive("rival.first_margin", self.first_margin)
            _require(
                self.max_margin >= self.first_margin and math.isfinite(self.max_margin),
                "rival.max_margin",
                f"finite and at least rival.first_margin = {self.first_margin:g}",
                self.max_margin,
            )
            _require(
                0 <= self.clean_weight <= 1, "rival.clean_weight", "in [0, 1]", self.clean_weight
            )


_RIVAL_SETTINGS = {
    RivalName.gradalign: {"grad_align_weight"},
    RivalName.free: {"replays"},
    RivalName.mma: {"max_margin", "first_margin", "bisections", "clean_weight"},
}


def _check_settings(group: str, node: Any, wanted: set[str]) -> None:
    """Each setting but the name is given where the option has it, and only there."""
    for key in (item.name for item in fields(node) if item.name != "name"):
        if (getattr(node, key) is not None) != (key in wanted):
            what = "needs a value" if key in wanted else "is no setting"
            raise UserError(f"{group}.{key} {what} with {group}={node.name.name}.")


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
        _at_least(0, "bt.n_o", self.n_o)
        _at_least(0, "bt.n_r", self.n_r)
        _at_least(0, "bt.n_b", self.n_b)
        _require(0 < self.gamma <= 1, "bt.gamma", "in (0, 1]", self.gamma)
        _require(0 <= self.momentum < 1, "bt.momentum", "in [0, 1)", self.momentum)
        _positive("bt.step_size_b", self.step_size_b)
        _at_least(0, "bt.warmup_epochs", self.warmup_epochs)
        _at_least(0, "bt.patience", self.patience)
        _at_least(0, "bt.mean_steps", self.mean_steps)
        self._check_fractions()
        _at_least(1, "bt.pool", self.pool)
        _at_least(0, "bt.probe_every", self.probe_every)
        _at_least(1, "bt.oracle_steps", self.oracle_steps)
        _positive("bt.oracle_step_size", self.oracle_step_size)

    def _check_fractions(self) -> None:
        if self.fractions is None:
            return
        if self.name is not AllocatorName.random:
            raise UserError(f"bt.fractions is no setting with bt={self.name.name}.")
        shares = len(self.fractions) == 3 and min(self.fractions) >= 0
        _require(
            shares and abs(sum(self.fractions) - 1) < 0.005,
            "bt.fractions",
            "F_B, F_R and F_O, which add up to 1",
            self.fractions,
        )

    def check_order(self) -> None:
        """N_O ≤ N_R ≤ N_B, but for the allocators that ignore them or study them."""
        if self.name not in (AllocatorName.uniform, AllocatorName.oracle):
            _require(self.n_o <= self.n_r, "bt.n_o", f"at most bt.n_r = {self.n_r}", self.n_o)
            _require(self.n_r <= self.n_b, "bt.n_r", f"at most bt.n_b = {self.n_b}", self.n_r)


_ATTACKING = (AllocatorName.oracle, AllocatorName.gaussian, AllocatorName.early_exit)


@dataclass
class RecipeConfig:
    name: str = MISSING
    epochs: int = MISSING
    batch_size: int = MISSING
    optimizer: OptimizerName = OptimizerName.sgd
    lr: float = MISSING
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = MISSING
    schedule: ScheduleName = ScheduleName.step
    milestones: list[float] = field(default_factory=list)
    lr_factors: list[float] = field(default_factory=list)
    peak: float = 0.4
    crop_padding: int = MISSING
    flip: bool = MISSING
    early_stop_on_collapse: bool = False
    ema: float = 0.0

    def __post_init__(self) -> None:
        _at_least(1, "recipe.epochs", self.epochs)
        _positive("recipe.lr", self.lr)
        _require(0 <= self.momentum < 1, "recipe.momentum", "in [0, 1)", self.momentum)
        _at_least(0, "recipe.weight_decay", self.weight_decay)
        for milestone in self.milestones:
            _at_least(0, "recipe.milestones", milestone)
        ascending = sorted(self.milestones) == self.milestones
        _require(ascending, "recipe.milestones", "in ascending order", self.milestones)
        _require(
            len(self.lr_factors) == len(self.milestones),
            "recipe.lr_factors",
            f"as many as recipe.milestones ({len(self.milestones)})",
            len(self.lr_factors),
        )
        for factor in self.lr_factors:
            _positive("recipe.lr_factors", factor)
        _require(0 < self.peak < 1, "recipe.peak", "in (0, 1)", self.peak)
        rolls = self.momentum > 0 and self.optimizer is OptimizerName.sgd
        _require(
            rolls or not self.nesterov, "recipe.nesterov", "false without SGD's momentum", True
        )
        _at_least(0, "recipe.crop_padding", self.crop_padding)
        _require(0 <= self.ema < 1, "recipe.ema", "in [0, 1)", self.ema)


@dataclass
class LoggerConfig:
    name: LoggerName = MISSING
    mode: WandbMode = WandbMode.online
    project: str = "btrain"
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class TrainConfig:
    epochs: int = MISSING
    batch_size: int = MISSING
    max_seconds: float | None = None
    checkpoint_every: int = 1
    score_every: int | None = None
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    deterministic: bool = False
    precision: Precision = Precision.float32
    channels_last: bool = False
    compile: bool = False
    cuda_graphs: CudaGraphs = CudaGraphs.never

    def __post_init__(self) -> None:
        _at_least(1, "train.epochs", self.epochs)
        _at_least(2, "train.batch_size", self.batch_size)
        _at_least(1, "train.checkpoint_every", self.checkpoint_every)
        _at_least(1, "train.score_every", self.score_every)
        if self.max_seconds is not None:
            _positive("train.max_seconds", self.max_seconds)


@dataclass
class EvalConfig:
    epsilon: float = MISSING
    step_size: float = MISSING
    steps: int = MISSING
    batch_size: int = MISSING
    every_epochs: int = MISSING

    def __post_init__(self) -> None:
        _positive("eval.epsilon", self.epsilon)
        _positive("eval.step_size", self.step_size)
        _at_least(0, "eval.steps", self.steps)
        _at_least(1, "eval.batch_size", self.batch_size)
        _at_least(1, "eval.every_epochs", self.every_epochs)


@dataclass
class RunConfig:
    dir: str | None = None
    resume: Resume = Resume.auto

    def __post_init__(self) -> None:
        _no_null("run.dir", self.dir)


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
        _require(0 <= self.seed < 2**63, "seed", "in [0, 2^63)", self.seed)
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
        """The run folder; `btrain.config` has named it where the user did not."""
        assert self.run.dir is not None
        return Path(self.run.dir)
