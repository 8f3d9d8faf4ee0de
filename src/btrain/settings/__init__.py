"""Every setting of a run, as dataclasses that check their values; the YAML files fill them in.

A new setting has a default here, what was done before it: older run folders do not name it.
"""

from btrain.settings.checks import MISSING
from btrain.settings.combined import Config
from btrain.settings.method import AttackConfig, AugMixConfig, BTConfig, DefenseConfig, RivalConfig
from btrain.settings.names import (
    AllocatorName,
    Architecture,
    AttackMode,
    AttackName,
    CudaGraphs,
    DatasetName,
    DefenseName,
    LoggerName,
    Metric,
    OnNonfinite,
    OptimizerName,
    Precision,
    Resume,
    RivalName,
    ScheduleName,
    Start,
    WandbMode,
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

__all__ = [
    "MISSING",
    "AllocatorName",
    "Architecture",
    "AttackConfig",
    "AttackMode",
    "AttackName",
    "AugMixConfig",
    "BTConfig",
    "Config",
    "CudaGraphs",
    "DatasetConfig",
    "DatasetName",
    "DefenseConfig",
    "DefenseName",
    "EvalConfig",
    "LoggerConfig",
    "LoggerName",
    "Metric",
    "ModelConfig",
    "OnNonfinite",
    "OptimizerName",
    "Precision",
    "RecipeConfig",
    "Resume",
    "RivalConfig",
    "RivalName",
    "RunConfig",
    "ScheduleName",
    "Start",
    "TrainConfig",
    "WandbMode",
]
