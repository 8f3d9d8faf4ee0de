"""The schema of every setting, and the only module besides `cli` that knows Hydra and OmegaConf.

`Config` is what the rest of the package sees: plain dataclasses whose values are checked.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
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


class AllocatorName(Enum):
    bullettrain = "bullettrain"
    uniform = "uniform"
    oracle = "oracle"
    gaussian = "gaussian"
    random = "random"


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


class LoggerName(Enum):
    jsonl = "jsonl"
    wandb = "wandb"
    tensorboard = "tensorboard"


class WandbMode(Enum):
    online = "online"
    offline = "offline"
    disabled = "disabled"


def _require(condition: bool, key: str, rule: str, value: object) -> None:
    if not condition:
        raise UserError(f"{key} must be {rule}, not {value}.")


def _positive(key: str, value: float) -> None:
    _require(value > 0 and math.isfinite(value), key, "finite and greater than 0", value)


def _at_least(least: float, key: str, value: float | None) -> None:
    if value is not None:
        _require(value >= least and math.isfinite(value), key, f"at least {least}", value)


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
        _require((self.mean is None) == (self.std is None), "model.std", "given with model.mean",
                 self.std)  # fmt: skip
        for mean in self.mean or []:
            _require(math.isfinite(mean), "model.mean", "finite", mean)
        for std in self.std or []:
            _positive("model.std", std)


@dataclass
class AttackConfig:
    name: str = MISSING
    steps: int = MISSING
    epsilon: float = MISSING
    step_size: float = MISSING
    start: Start = MISSING
    start_std: float = MISSING
    mode: AttackMode = MISSING

    def __post_init__(self) -> None:
        _at_least(1, "attack.steps", self.steps)
        _positive("attack.epsilon", self.epsilon)
        _positive("attack.step_size", self.step_size)
        _at_least(0, "attack.start_std", self.start_std)


@dataclass
class DefenseConfig:
    name: DefenseName = MISSING
    beta: float | None = None

    def __post_init__(self) -> None:
        has_beta = self.name in (DefenseName.trades, DefenseName.mart)
        if (self.beta is not None) != has_beta:
            what = "needs a number" if has_beta else "is no setting"
            raise UserError(f"defense.beta {what} with defense={self.name.name}.")
        _at_least(0, "defense.beta", self.beta)


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
    mean_steps: float = MISSING
    oracle_steps: int = MISSING
    forward_unperturbed: bool = MISSING
    share_clean_forward: bool = MISSING

    def __post_init__(self) -> None:
        _at_least(0, "bt.n_o", self.n_o)
        _at_least(0, "bt.n_r", self.n_r)
        _at_least(0, "bt.n_b", self.n_b)
        _require(self.n_o <= self.n_r, "bt.n_o", f"at most bt.n_r = {self.n_r}", self.n_o)
        _require(self.n_r <= self.n_b, "bt.n_r", f"at most bt.n_b = {self.n_b}", self.n_r)
        _require(0 < self.gamma <= 1, "bt.gamma", "in (0, 1]", self.gamma)
        _require(0 <= self.momentum < 1, "bt.momentum", "in [0, 1)", self.momentum)
        _positive("bt.step_size_b", self.step_size_b)
        _at_least(0, "bt.warmup_epochs", self.warmup_epochs)
        _at_least(0, "bt.mean_steps", self.mean_steps)
        _at_least(1, "bt.oracle_steps", self.oracle_steps)


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
    lr_decay: float = 0.1
    peak: float = 0.4
    crop_padding: int = MISSING
    flip: bool = MISSING

    def __post_init__(self) -> None:
        _at_least(1, "recipe.epochs", self.epochs)
        _positive("recipe.lr", self.lr)
        _require(0 <= self.momentum < 1, "recipe.momentum", "in [0, 1)", self.momentum)
        _at_least(0, "recipe.weight_decay", self.weight_decay)
        for milestone in self.milestones:
            _at_least(0, "recipe.milestones", milestone)
        _positive("recipe.lr_decay", self.lr_decay)
        _require(0 < self.peak < 1, "recipe.peak", "in (0, 1)", self.peak)
        _at_least(0, "recipe.crop_padding", self.crop_padding)


@dataclass
class LoggerConfig:
    name: LoggerName = MISSING
    mode: WandbMode = WandbMode.online
    project: str = "btrain"


@dataclass
class TrainConfig:
    epochs: int = MISSING
    batch_size: int = MISSING
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        _at_least(1, "train.epochs", self.epochs)
        _at_least(2, "train.batch_size", self.batch_size)
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


@dataclass
class Config:
    """Everything that decides a run."""

    dataset: DatasetConfig = MISSING
    model: ModelConfig = MISSING
    attack: AttackConfig = MISSING
    defense: DefenseConfig = MISSING
    bt: BTConfig = MISSING
    recipe: RecipeConfig = MISSING
    logger: LoggerConfig = MISSING
    train: TrainConfig = MISSING
    eval: EvalConfig = MISSING
    run: RunConfig = MISSING
    seed: int = MISSING
    device: str = MISSING

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**63, "seed", "in [0, 2^63)", self.seed)
        if self.bt.share_clean_forward and self.defense.name is DefenseName.pgd:
            raise UserError("bt.share_clean_forward has nothing to share with defense=pgd.")
        if self.attack.mode is AttackMode.train and self.bt.name is not AllocatorName.uniform:
            raise UserError(
                f"attack.mode=train needs bt=uniform, not bt={self.bt.name.name}: the groups of a "
                "batch would each see their own BatchNorm statistics."
            )

    @property
    def run_dir(self) -> Path:
        """The run folder; `from_hydra` has named it where the user did not."""
        assert self.run.dir is not None
        return Path(self.run.dir)


def config_dir() -> str:
    """The folder of the YAML files: inside an installed wheel, or at the top of the repository."""
    here = Path(__file__).resolve().parent
    packaged = here / "configs"
    return str(packaged if packaged.is_dir() else here.parents[1] / "configs")


def register() -> None:
    """Makes the schema and the resolver `scale` known to Hydra; calling it again does no harm."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("scale", _scale, replace=True)


def _scale(length: float, factor: float, divisor: float) -> float:
    """`${scale:ε,1.7,N}` = 1.7·ε / N; N = 0, where no step is taken, counts as 1."""
    return factor * length / max(divisor, 1)


def compose(overrides: Sequence[str] = (), task: str = "train") -> Config:
    """The configuration that `btrain <task> <overrides>` would run.

    Raises:
        UserError: an unknown key or option, a wrong type, a value out of range.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=config_dir()):
            cfg = hydra_compose(task, overrides=list(overrides), return_hydra_config=True)
            return from_hydra(cfg, overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise explain(error, overrides) from error


def from_hydra(cfg: Any, overrides: Sequence[str]) -> Config:
    """Turns a composed configuration into checked dataclasses and names the run folder.

    Args:
        cfg: what Hydra composed; a top-level `hydra` node is ignored.
        overrides: the command line's, for the name of the run folder.

    Raises:
        UserError: a value is missing or out of range, or `+key=value` added a key.
    """
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.pop("hydra", None)
    try:
        config = OmegaConf.to_object(cfg)
    except MissingMandatoryValue as error:
        raise UserError(
            f"{error.full_key} has no default; please give {error.full_key}=…."
        ) from error
    except OmegaConfBaseException as error:
        raise explain(error, overrides) from error
    assert isinstance(config, Config)
    _reject_added_keys(config, "")
    if config.run.dir is None:
        config.run.dir = str(Path("runs") / run_name(config, overrides))
    return config


def _reject_added_keys(node: Any, prefix: str) -> None:
    """`+foo=1` passes OmegaConf's schema as an extra attribute; here it fails as unknown."""
    known = {field.name for field in dataclasses.fields(node)}
    for name, value in vars(node).items():
        if name not in known:
            raise UserError(_unknown_key(prefix + name))
        if dataclasses.is_dataclass(value):
            _reject_added_keys(value, f"{prefix}{name}.")


def to_dict(config: Config) -> dict[str, Any]:
    """Plain containers: what `config.yaml` and checkpoints hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value.name if isinstance(value, Enum) else value

    return plain(dataclasses.asdict(config))  # type: ignore[no-any-return]


def to_yaml(config: Config) -> str:
    """The text of a run folder's `config.yaml`."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def read_yaml(path: Path) -> dict[str, Any]:
    """A run folder's `config.yaml` as plain containers.

    Raises:
        UserError: the file cannot be read as YAML.
    """
    from omegaconf import OmegaConf

    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:
        raise UserError(f"{path} is not a readable configuration: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a readable configuration: it holds no mapping.")
    return {str(key): value for key, value in content.items()}


# Settings that name the run already, or that do not change its result.
_NOT_IN_NAME = re.compile(
    r"(dataset|model|defense|bt|logger|seed|device)$|(run|logger|hydra|dataset\.root|dataset\.download)\b"
)
_LONGEST_NAME = 150


def run_name(config: Config, overrides: Sequence[str]) -> str:
    """A readable folder name, different for different settings.

    `mnist-small_cnn-trades-bullettrain-attack.epsilon_0.1-seed0`; an image folder goes by its own
    name.
    """
    data = config.dataset.name.name
    if config.dataset.name is DatasetName.imagefolder:
        data = Path(config.dataset.root).resolve().name
    plain = [override.lstrip("+~") for override in overrides]
    last = {override.partition("=")[0]: override for override in plain}
    changed = [override for key, override in last.items() if not _NOT_IN_NAME.match(key)]
    parts = [data, config.model.name, config.defense.name.name, config.bt.name.name]
    name = "-".join([*parts, *sorted(changed), f"seed{config.seed}"])
    name = re.sub(r"[^\w.-]+", "_", name)
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def explain(error: Exception, overrides: Sequence[str]) -> UserError:
    """One sentence for what Hydra or OmegaConf raised while they composed a configuration."""
    if override := re.match(r"Ambiguous value for argument '(.*?)'", str(error)):
        return UserError(f"{override.group(1)} gives several values; a sweep needs --multirun.")
    if type(error).__name__ == "OverrideParseException":
        return UserError(f"{vars(error)['override']} is not of the form key=value.")
    cause = error.__cause__ or error
    unknown = re.search(r"Key '(.*?)' (is )?not in", str(cause)) or re.search(
        r"Could not override '(.*?)'\.\s*$", str(cause).split("\n")[0] + "\n"
    )
    key = re.search(r"full_key: (\S+)", str(cause))
    if unknown:
        return UserError(_unknown_key(key.group(1) if key else unknown.group(1)))
    option = re.search(r"Could not find '(.*?)'", str(error))
    if option:
        return UserError(_unknown_option(*option.group(1).rpartition("/")[::2]))
    if key:
        return UserError(f"{key.group(1)}: {_first_line(cause)}")
    for group, _, value in (override.partition("=") for override in overrides):
        folder = Path(config_dir()) / group
        if group and folder.is_dir() and not (folder / f"{value}.yaml").is_file():
            return UserError(_unknown_option(group, value))
    return UserError(_first_line(cause))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _unknown_key(key: str) -> str:
    return f"There is no setting {key}.{_did_you_mean(key, _all_keys(Config, ''))}"


def _unknown_option(group: str, option: str) -> str:
    if not group:
        return f"There is no configuration file {option}.yaml."
    files = sorted(path.stem for path in (Path(config_dir()) / group).glob("*.yaml"))
    return f"{group}={option} is no option; there are: {', '.join(files)}."


def _did_you_mean(word: str, words: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f" Did you mean {close[0]}?" if close else " `btrain train --help` lists them."


def _all_keys(node: type, prefix: str) -> list[str]:
    import typing

    keys = []
    for name, kind in typing.get_type_hints(node).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            keys += _all_keys(typing.cast(type, kind), f"{prefix}{name}.")
    return keys
