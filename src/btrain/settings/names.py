"""The names that settings with a few choices can have."""

from __future__ import annotations

from enum import Enum

ENGINES = ("ibp", "symbolic", "crown_ibp", "crown")
"""The engines of bounds, see `btrain.verify.bounds`."""
ANY = "any"
"""All engines joined, of an evaluation alone."""


class DatasetName(Enum):
    cifar10 = "cifar10"
    cifar100 = "cifar100"
    mnist = "mnist"
    digits = "digits"
    mnist_sample = "mnist_sample"
    imagefolder = "imagefolder"
    own = "own"


class Architecture(Enum):
    wide_resnet = "wide_resnet"
    preact_resnet18 = "preact_resnet18"
    resnet18 = "resnet18"
    small_cnn = "small_cnn"
    by_name = "by_name"
    torchvision = "torchvision"
    timm = "timm"
    own = "own"


class Activation(Enum):
    relu = "relu"
    silu = "silu"


class Shortcut(Enum):
    activated = "activated"
    input = "input"


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
    kept = "kept"


class Store(Enum):
    int8 = "int8"
    bf16 = "bf16"


class Score(Enum):
    fresh = "fresh"
    shared = "shared"
    last = "last"


class AttackMode(Enum):
    eval = "eval"
    train = "train"


class DefenseName(Enum):
    trades = "trades"
    mart = "mart"
    pgd = "pgd"
    augmix = "augmix"
    mixtrain = "mixtrain"
    verified = "verified"
    ibp = "ibp"
    crown_ibp = "crown_ibp"
    mtl_ibp = "mtl_ibp"
    sabr = "sabr"
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
    nfgsm = "nfgsm"
    yopo = "yopo"
    gradalign = "gradalign"
    free = "free"
    mma = "mma"


class SparsityName(Enum):
    none = "none"
    random = "random"
    uniform = "uniform"
    erk = "erk"
    er = "er"
    igq = "igq"
    magnitude = "magnitude"
    snip = "snip"
    grasp = "grasp"
    synflow = "synflow"
    flying_bird = "flying_bird"
    flying_bird_plus = "flying_bird_plus"
    robust_bird = "robust_bird"
    channel_static = "channel_static"
    channel_flying_bird = "channel_flying_bird"
    own = "own"


class LayerDensities(Enum):
    uniform = "uniform"
    erk = "erk"
    er = "er"
    igq = "igq"


class Growth(Enum):
    gradient = "gradient"
    random = "random"


class IntervalUnit(Enum):
    scaled = "scaled"
    iterations = "iterations"
    epochs = "epochs"


class SearchName(Enum):
    plain = "plain"
    fgsm = "fgsm"
    pgd = "pgd"


class Rewind(Enum):
    none = "none"
    init = "init"
    epoch = "epoch"


class Metric(Enum):
    svar = "svar"
    cross_entropy = "cross_entropy"
    grad_norm = "grad_norm"
    margin = "margin"


class MixForm(Enum):
    bernoulli = "bernoulli"
    convex = "convex"


class MixDynamic(Enum):
    schedule = "schedule"
    feedback = "feedback"


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
