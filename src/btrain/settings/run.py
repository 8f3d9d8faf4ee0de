"""The groups that say what is trained, for how long, and where it goes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from btrain.durable import real
from btrain.settings.checks import (
    MISSING,
    at_least,
    finite,
    no_null,
    number,
    pixels,
    positive,
    require,
)
from btrain.settings.method import WEIGHTED, Choice
from btrain.settings.names import (
    Activation,
    Architecture,
    CudaGraphs,
    DatasetName,
    LoggerName,
    OnNonfinite,
    OptimizerName,
    Precision,
    Resume,
    ScheduleName,
    Shortcut,
    WandbMode,
)


@dataclass
class DatasetConfig:
    """The settings that every data set has; each has more of its own."""

    name: DatasetName = MISSING
    train_examples: int | None = None
    test_examples: int | None = None
    val_examples: int = 0
    epsilon: Any = MISSING
    step_size: Any = MISSING
    eval_step_size: Any = MISSING
    l2_epsilon: Any = 128 / 255

    def __post_init__(self) -> None:
        self.epsilon = pixels("dataset.epsilon", self.epsilon, "linf")
        # They follow attack.epsilon and eval.epsilon, which the attack and the evaluation check.
        self.step_size = number("dataset.step_size", self.step_size)
        self.eval_step_size = number("dataset.eval_step_size", self.eval_step_size)
        self.l2_epsilon = pixels("dataset.l2_epsilon", self.l2_epsilon, "l2")
        at_least(2, "dataset.train_examples", self.train_examples)
        at_least(1, "dataset.test_examples", self.test_examples)
        at_least(0, "dataset.val_examples", self.val_examples)

    @property
    def title(self) -> str:
        """Return what folders are called by; images of the user's own go by their own name."""
        return self.name.name


@dataclass
class FilesConfig(DatasetConfig):
    """A data set of files in a known layout, which can be downloaded."""

    root: str = MISSING
    download: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        no_null("dataset.root", self.root)


@dataclass
class ImageFolderConfig(DatasetConfig):
    """A folder of images for each class."""

    root: str = MISSING
    image_size: int = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        no_null("dataset.root", self.root)
        at_least(1, "dataset.image_size", self.image_size)

    @property
    def title(self) -> str:
        return real(self.root).name


@dataclass
class OwnDatasetConfig(DatasetConfig):
    """The data that a function of the user's returns."""

    factory: str = MISSING
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        no_null("dataset.factory", self.factory)

    @property
    def title(self) -> str:
        return Path(self.factory.rpartition(":")[0]).name.removesuffix(".py")


@dataclass
class MNISTSampleConfig(DatasetConfig):
    """The part of MNIST that comes with btrain."""


DATASETS: dict[DatasetName, type[DatasetConfig]] = {
    DatasetName.cifar10: FilesConfig,
    DatasetName.cifar100: FilesConfig,
    DatasetName.mnist: FilesConfig,
    DatasetName.digits: DatasetConfig,
    DatasetName.mnist_sample: MNISTSampleConfig,
    DatasetName.imagefolder: ImageFolderConfig,
    DatasetName.own: OwnDatasetConfig,
}


SHAPES: dict[DatasetName, tuple[int, int, int]] = {
    DatasetName.cifar10: (3, 32, 32),
    DatasetName.cifar100: (3, 32, 32),
    DatasetName.mnist: (1, 28, 28),
    DatasetName.mnist_sample: (1, 28, 28),
    DatasetName.digits: (1, 8, 8),
}
"""(C, H, W) of the images of data sets that are the same for everybody."""

CLASSES = {name: 100 if name is DatasetName.cifar100 else 10 for name in SHAPES}
"""K of them."""

IMAGES = {
    DatasetName.cifar10: (50_000, 10_000),
    DatasetName.cifar100: (50_000, 10_000),
    DatasetName.mnist: (60_000, 10_000),
    DatasetName.mnist_sample: (10_000, 2_000),
    DatasetName.digits: (1_442, 355),
}
"""The numbers of training and of test images of each."""


@dataclass
class ModelConfig:
    """The settings that every network has; each architecture has more of its own."""

    name: str = MISSING
    architecture: Architecture = MISSING
    mean: list[float] | None = None
    std: list[float] | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        require((self.mean is None) == (self.std is None), "model.std", "given with model.mean",
                 self.std)  # fmt: skip
        for mean in self.mean or []:
            rule = "in [0, 1], in pixel units like 0.4914"
            require(finite(mean) and 0 <= mean <= 1, "model.mean", rule, mean)
        for std in self.std or []:
            positive("model.std", std)
        no_null("model.weights", self.weights)


@dataclass
class WidthConfig(ModelConfig):
    """A network with a number of channels to choose."""

    width: int = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, "model.width", self.width)


@dataclass
class SmallCNNConfig(WidthConfig):
    """The network of two convolutions and two linear layers."""


@dataclass
class PreActResNetConfig(WidthConfig):
    """The pre-activation ResNet-18.

    Attributes:
        shortcut: what a block's 1×1 convolution takes, the activated input or the input itself.
    """

    shortcut: Shortcut = Shortcut.activated


@dataclass
class ResNetConfig(WidthConfig):
    """The ResNet-18 with activations after the additions."""


@dataclass
class WideResNetConfig(WidthConfig):
    """WRN-depth-width."""

    depth: int = MISSING
    activation: Activation = Activation.relu


@dataclass
class NamedModelConfig(ModelConfig):
    """A network of verified training, made as in its paper, for images of one size."""

    network: str = MISSING


@dataclass
class LibraryModelConfig(ModelConfig):
    """A network that a library makes by the settings, with the library's own names for them."""

    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class TorchvisionConfig(LibraryModelConfig):
    """A network of torchvision.models."""


@dataclass
class TimmConfig(LibraryModelConfig):
    """A network of timm."""


@dataclass
class OwnModelConfig(ModelConfig):
    """The network that a class or a function of the user's makes."""

    factory: str = MISSING
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        no_null("model.factory", self.factory)


MODELS: dict[Architecture, type[ModelConfig]] = {
    Architecture.wide_resnet: WideResNetConfig,
    Architecture.preact_resnet18: PreActResNetConfig,
    Architecture.resnet18: ResNetConfig,
    Architecture.small_cnn: SmallCNNConfig,
    Architecture.by_name: NamedModelConfig,
    Architecture.torchvision: TorchvisionConfig,
    Architecture.timm: TimmConfig,
    Architecture.own: OwnModelConfig,
}


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
    clip_norm: float | None = None
    repair_steps: int = 0

    def __post_init__(self) -> None:
        at_least(1, "recipe.epochs", self.epochs)
        positive("recipe.lr", self.lr)
        require(0 <= self.momentum < 1, "recipe.momentum", "in [0, 1)", self.momentum)
        at_least(0, "recipe.weight_decay", self.weight_decay)
        for milestone in self.milestones:
            at_least(0, "recipe.milestones", milestone)
        ascending = sorted(self.milestones) == self.milestones
        require(ascending, "recipe.milestones", "in ascending order", self.milestones)
        require(
            len(self.lr_factors) == len(self.milestones),
            "recipe.lr_factors",
            f"as many as recipe.milestones ({len(self.milestones)})",
            len(self.lr_factors),
        )
        for factor in self.lr_factors:
            positive("recipe.lr_factors", factor)
        require(0 < self.peak < 1, "recipe.peak", "in (0, 1)", self.peak)
        rolls = self.momentum > 0 and self.optimizer is OptimizerName.sgd
        require(rolls or not self.nesterov, "recipe.nesterov", "false without SGD's momentum", True)
        at_least(0, "recipe.crop_padding", self.crop_padding)
        require(0 <= self.ema < 1, "recipe.ema", "in [0, 1)", self.ema)
        if self.clip_norm is not None:
            positive("recipe.clip_norm", self.clip_norm)
        at_least(0, "recipe.repair_steps", self.repair_steps)

    def choices(self) -> list[Choice]:
        if not self.repair_steps:
            return []
        return [Choice(f"recipe.repair_steps={self.repair_steps}", frozenset(), _NO_REPAIR)]


_NO_REPAIR = {
    "own_step": "its step has another attack",
    "augmix": "there is no attack",
    "chooses": "what training sees resist its attack would count examples that nobody attacks",
}


@dataclass
class LoggerConfig:
    """The loggers of a run: `name`, and each whose own option was chosen beside it."""

    name: LoggerName = MISSING
    wandb: bool = False
    tensorboard: bool = False
    mode: WandbMode = WandbMode.online
    project: str = "btrain"
    group: str | None = None
    tags: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[LoggerName]:
        """Return all of them, each once."""
        beside = {LoggerName.wandb: self.wandb, LoggerName.tensorboard: self.tensorboard}
        return [name for name in LoggerName if name is self.name or beside.get(name)]


@dataclass
class TrainConfig:
    epochs: int = MISSING
    batch_size: int = MISSING
    max_seconds: float | None = None
    checkpoint_every: int = 1
    score_every: int | None = None
    accumulate: int = 1
    skip: float = 0.0
    skip_last: float = 0.15
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    deterministic: bool = False
    precision: Precision = Precision.float32
    channels_last: bool = False
    compile: bool = False
    cuda_graphs: CudaGraphs = CudaGraphs.never

    def __post_init__(self) -> None:
        at_least(1, "train.epochs", self.epochs)
        at_least(2, "train.batch_size", self.batch_size)
        at_least(1, "train.checkpoint_every", self.checkpoint_every)
        at_least(1, "train.score_every", self.score_every)
        parts = f"between 1 and half of train.batch_size = {self.batch_size}"
        fit = 1 <= self.accumulate <= self.batch_size // 2
        require(fit, "train.accumulate", parts, self.accumulate)
        require(0 <= self.skip < 1, "train.skip", "in [0, 1)", self.skip)
        require(0 <= self.skip_last <= 1, "train.skip_last", "in [0, 1]", self.skip_last)
        if self.max_seconds is not None:
            positive("train.max_seconds", self.max_seconds)

    def choices(self) -> list[Choice]:
        found = []
        if self.accumulate > 1:
            written = f"train.accumulate={self.accumulate}"
            found.append(Choice(written, frozenset({"parts"}), _NO_PARTS))
        if self.skip:
            written = f"train.skip={self.skip:g}"
            found.append(Choice(written, frozenset({"skips"}), WEIGHTED | _NO_SKIPPING))
        else:
            found.append(Choice("train.skip=0", unread=frozenset({"train.skip_last"})))
        if self.compile:
            found.append(Choice("train.compile=true", frozenset({"compile"}), _NO_COMPILER))
        if self.cuda_graphs is not CudaGraphs.never:
            written = f"train.cuda_graphs={self.cuda_graphs.name}"
            found.append(Choice(written, frozenset({"graphs"}), _NO_GRAPHS))
        return found


_NO_PARTS = {
    "own_step": "its step is one of the whole batch",
    "augmix": "an image and its views share a pass, or the pass that chooses is the loss's",
    "pool": "a pool makes passes larger, parts make them smaller",
    "shared": "the shared pass with its graph is one of the whole batch",
    "train_mode": "BatchNorm's statistics in the attack are those of the whole batch",
    "graphs": "its groups are rounded up in the whole batch, not in the parts",
}
_NO_SKIPPING = {"moving_masks": "the masks change after so many batches"}
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
    "own_ball": "only btrain's own balls are recorded",
    "compile": "choose one of them",
}


@dataclass
class EvalConfig:
    epsilon: Any = MISSING
    step_size: Any = MISSING
    steps: int = MISSING
    batch_size: int = MISSING
    every_epochs: int = MISSING
    train_examples: int = 0

    def __post_init__(self) -> None:
        at_least(0, "eval.train_examples", self.train_examples)
        self.epsilon = pixels("eval.epsilon", self.epsilon, "l2")  # see Config for L∞
        self.step_size = pixels("eval.step_size", self.step_size, "l2")
        at_least(0, "eval.steps", self.steps)
        at_least(1, "eval.batch_size", self.batch_size)
        at_least(1, "eval.every_epochs", self.every_epochs)


@dataclass
class RunConfig:
    dir: str | None = None
    resume: Resume = Resume.auto

    def __post_init__(self) -> None:
        no_null("run.dir", self.dir)


_NOT_LEARNT = (
    *("run", "logger", "hydra", "device", "dataset.download", "defense.memory"),
    *("train.checkpoint_every", "train.score_every", "bt.probe_every"),
)


def is_learnt(key: str) -> bool:
    """Return whether the setting of a dotted key, or of a group, can change what a run learns."""
    return not any(re.match(rf"{re.escape(of)}\b", key) for of in _NOT_LEARNT)
