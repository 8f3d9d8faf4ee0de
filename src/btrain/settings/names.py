"""The names that settings with a few choices can have."""

from __future__ import annotations

from enum import Enum


class DatasetName(Enum):
    cifar10 = "cifar10"
    cifar100 = "cifar100"
    mnist = "mnist"
    digits = "digits"
    imagefolder = "imagefolder"
    own = "own"


class Architecture(Enum):
    wide_resnet = "wide_resnet"
    preact_resnet18 = "preact_resnet18"
    resnet18 = "resnet18"
    small_cnn = "small_cnn"
    torchvision = "torchvision"
    timm = "timm"
    own = "own"


class Activation(Enum):
    relu = "relu"
    silu = "silu"


class AttackName(Enum):
    linf_pgd = "linf_pgd"
    madry = "madry"
    l2_pgd = "l2_pgd"
    augmix = "augmix"
    own = "own"


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
    own = "own"


class AllocatorName(Enum):
    bullettrain = "bullettrain"
    uniform = "uniform"
    oracle = "oracle"
    gaussian = "gaussian"
    early_exit = "early_exit"
    random = "random"
    own = "own"


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
