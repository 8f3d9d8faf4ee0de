"""A target at a scale, in a folder, and the plan of its runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from btrain.errors import UserError
from btrain.paper.plan import Claim, Plan, Row
from btrain.paper.target import Profile, Sweep, Target, merged, row_name, run_name
from btrain.settings import Config
from btrain.settings import compose as configs

_SYMBOLS = {"bt.gamma": "γ", "bt.n_b": "N_B", "bt.n_r": "N_R", "bt.n_o": "N_O"}
_PLACES = ("dataset.root", "dataset.download", "device", "logger", "hydra", "run.")
"""How the keys begin that change nothing of what is learnt."""
_OURS = ("experiment", "seed", "run.dir", "logger.group", "logger.tags")


@dataclass(frozen=True)
class Job:
    """A target at a scale, in a folder.

    Attributes:
        extra: the user's settings of every training; they win over the profile's.
        only: experiments to run; empty for all.
        corruptions_root: the folder of CIFAR-10-C and CIFAR-100-C; None makes corrupted test sets.
    """

    target: Target
    profile: Profile
    out: Path
    extra: list[str]
    only: list[str]
    corruptions_root: Path | None

    @property
    def sweeps(self) -> list[Sweep]:
        """The target's, with what the profile leaves out left out."""
        values = self.profile.sweep.get(self.target.name, {})
        return [
            replace(sweep, values={key: values.get(key, own) for key, own in sweep.values.items()})
            for sweep in self.target.sweeps
        ]

    @property
    def settings(self) -> list[str]:
        """Of every training, but for its experiment, seed and swept values."""
        return merged(self.profile.settings(self.target.name), self.extra)

    def wanted(self, experiments: Iterable[str]) -> list[str]:
        """Those of them that the user asked for."""
        return [name for name in experiments if not self.only or name in self.only]


def check(job: Job) -> None:
    """Makes sure, ahead of any run, that every experiment takes the settings it will be given.

    Raises:
        UserError: a setting is wrong, or not the user's to choose.
    """
    swept = {key for sweep in job.sweeps for key in sweep.values}
    for key in (setting.partition("=")[0].lstrip("+~") for setting in job.extra):
        if key in _OURS or key in swept:
            raise UserError(f"{key} is set by btrain paper itself in {job.target.name}.")
    experiments = dict.fromkeys(name for sweep in job.sweeps for name in sweep.experiments)
    for name in job.wanted(experiments):
        config_of(job, name, {})


def config_of(job: Job, experiment: str, swept: Mapping[str, str]) -> Config:
    """The configuration of a run, but for its seed and folder.

    Raises:
        UserError: the experiment does not take its settings.
    """
    from omegaconf import OmegaConf

    own = (setting for setting in job.settings if not setting.startswith("hydra"))
    point = _composed(f"experiment={experiment}", *own).copy()
    for key, value in swept.items():
        OmegaConf.update(point, key, value)
    config: Config = configs.from_hydra(point, [])
    return config


@lru_cache(maxsize=64)  # for a sweep has many points
def _composed(*settings: str) -> Any:
    return configs.composed(settings, "train")


def make_plan(job: Job) -> Plan:
    """What the runs will be, as the report wants to know it.

    Raises:
        UserError: an experiment is unknown or wrong.
    """
    target = job.target
    points = [row for sweep in job.sweeps for row in sweep.rows()]
    experiments = dict.fromkeys(experiment for experiment, _ in points)
    originals = {name: configs.compose([f"experiment={name}"]) for name in experiments}
    rows = [_row(job, name, swept, originals[name]) for name, swept in points]
    return Plan(
        target=target.name,
        kind=target.kind,
        title=target.title,
        note=target.note,
        profile=job.profile.name,
        baseline=target.baseline,
        attacks=_attacks(job, list(experiments)),
        axis=target.axis,
        rows=rows,
        claims=[Claim(**claim) for claim in target.claims],
        chosen=_chosen(job, rows[0].original),
    )


def _chosen(job: Job, told: Iterable[str]) -> list[str]:
    """The user's settings that change what is learnt, but for those that a row's scale tells."""
    keys = {setting: setting.partition("=")[0].lstrip("+~") for setting in job.extra}
    return [s for s, key in keys.items() if key not in told and not key.startswith(_PLACES)]


def _row(job: Job, experiment: str, swept: dict[str, str], original: Config) -> Row:
    target, name = job.target, row_name(experiment, swept)
    point = dict(swept)
    if target.axis is not None and experiment != target.baseline:
        group, _, key = target.axis.partition(".")
        point = {target.axis: str(getattr(getattr(original, group), key))} | swept
    values = ", ".join(f"{_SYMBOLS.get(key, key)} = {value}" for key, value in point.items())
    label = target.labels[experiment]
    return Row(
        name=name,
        label=f"{label}, {values}" if values else label,
        experiment=experiment,
        swept=point,
        paper={} if swept else target.paper[experiment],
        original=_scale(original),
        runs={seed: run_name(name, seed) for seed in job.profile.seeds},
        attacks=_attacks(job, [experiment]),
    )


def _scale(config: Config) -> dict[str, Any]:
    """What decides how large and on which images an experiment is."""
    return {
        "dataset": config.dataset.name.name,
        "model": config.model.name,
        "model.width": config.model.width,
        "train.epochs": config.train.epochs,
        "train.batch_size": config.train.batch_size,
        "train.precision": config.train.precision.name,
        "dataset.train_examples": config.dataset.train_examples,
        "dataset.test_examples": config.dataset.test_examples,
        "attack.epsilon": config.attack.epsilon,
        "attack.steps": config.attack.steps,
        "attack.epsilon_warmup_epochs": config.attack.epsilon_warmup_epochs,
        "recipe.optimizer": config.recipe.optimizer.name,
        "recipe.lr": config.recipe.lr,
        "defense.beta": getattr(config.defense, "beta", None),
        "eval.steps": config.eval.steps,
    }


def _attacks(job: Job, experiments: Sequence[str]) -> list[str]:
    """The names of their evaluations, each once, in the profile's order."""
    names: dict[str, None] = {}
    for experiment in experiments:
        for settings in job.profile.evaluations(job.target, experiment):
            given = dict(setting.split("=", 1) for setting in settings)
            names |= dict.fromkeys(given["attack"].split(","))
    return list(names)
