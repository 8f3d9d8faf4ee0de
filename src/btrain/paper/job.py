"""A target at a scale, in a folder: its configurations, the plan of its runs, what is left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from btrain.errors import UserError
from btrain.paper.plan import Claim, Plan, Row
from btrain.paper.target import Profile, Sweep, Target, merged, row_name, run_name
from btrain.runs.folder import RunFolder
from btrain.settings import Config
from btrain.settings import compose as configs
from btrain.settings.evaluation import EvalSettings, parse
from btrain.settings.run import is_learnt

_SYMBOLS = {
    "attack.epsilon": "ε",
    "bt.gamma": "γ",
    "bt.n_b": "N_B",
    "bt.n_r": "N_R",
    "bt.n_o": "N_O",
}
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
        """Return the target's sweeps with what the profile leaves out left out."""
        values = self.profile.sweep.get(self.target.name, {})
        without = self.profile.leave_out.get(self.target.name, [])
        return [
            replace(
                sweep,
                experiments=left,
                values={key: values.get(key, own) for key, own in sweep.values.items()},
            )
            for sweep in self.target.sweeps
            if (left := [name for name in sweep.experiments if name not in without])
        ]

    def settings(self, sweep: Sweep) -> list[str]:
        """Return the settings of a sweep's trainings, but for experiment, seed and swept values."""
        return merged(self.profile.settings(self.target.name, sweep.train), self.extra)

    @property
    def seeds(self) -> list[int]:
        """Return the seeds of every row."""
        return self.profile.seeds.get(self.target.name, self.profile.seeds["default"])

    def wanted(self, experiments: Iterable[str]) -> list[str]:
        """Return those of the experiments that the user asked for."""
        return [name for name in experiments if not self.only or name in self.only]


def check(job: Job) -> None:
    """Make sure, ahead of any run, that every experiment takes the settings it will be given.

    Raises:
        UserError: a setting is wrong, or not the user's to choose.
    """
    swept = {key for sweep in job.sweeps for key in sweep.values}
    for key in (setting.partition("=")[0].lstrip("+~") for setting in job.extra):
        if key in _OURS or key in swept:
            raise UserError(f"{key} is set by btrain paper itself in {job.target.name}.")
    for sweep in job.sweeps:
        for name in job.wanted(sweep.experiments):
            _config(job, sweep, name, {})


def config_of(job: Job, experiment: str, swept: Mapping[str, str]) -> Config:
    """Return the configuration of a run, but for its seed and folder.

    Raises:
        UserError: the experiment does not take its settings.
    """
    _, sweep = max(
        ((len(values), sweep) for sweep in job.sweeps for name, values in sweep.rows()
         if name == experiment and values.items() <= swept.items()),
        key=lambda found: found[0],
    )  # fmt: skip
    return _config(job, sweep, experiment, swept)


def _config(job: Job, sweep: Sweep, experiment: str, swept: Mapping[str, str]) -> Config:
    from omegaconf import OmegaConf

    own = [setting for setting in job.settings(sweep) if not setting.startswith("hydra")]
    groups = [f"{key}={value}" for key, value in swept.items() if "." not in key]
    words = [f"experiment={experiment}", *groups, *own]
    point, _ = configs.without_replaced(_composed(*words).copy(), [*words, *swept])
    for key, value in swept.items():
        if "." in key:
            OmegaConf.update(point, key, value)
    config: Config = configs.from_hydra(point, [])
    return config


@lru_cache(maxsize=64)  # for a sweep has many points
def _composed(*settings: str) -> Any:
    return configs.composed(settings, "train")


def make_plan(job: Job) -> Plan:
    """Return the plan of a job's runs.

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
        attacks=_attacks(job, [row.name for row in rows]),
        axis=target.axis,
        rows=rows,
        claims=[Claim(**claim) for claim in target.claims if _is_there(claim, rows)],
        chosen=_chosen(job, rows[0].original),
    )


def _chosen(job: Job, told: Iterable[str]) -> list[str]:
    """Return the user's settings that change the result and are not told by a row's scale."""
    keys = {setting: setting.partition("=")[0].lstrip("+~") for setting in job.extra}
    told = {"dataset.root", *told}  # where the data are, not what
    return [setting for setting, key in keys.items() if is_learnt(key) and key not in told]


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
        label=target.labels.get(name, f"{label}, {values}" if values else label),
        experiment=experiment,
        swept=point,
        paper=target.paper.get(name, {}),
        original=_scale(original),
        runs={seed: run_name(name, seed) for seed in job.seeds},
        attacks=_attacks(job, [name]),
    )


def _is_there(claim: Mapping[str, Any], rows: Sequence[Row]) -> bool:
    """Return whether a claim's rows are some at this scale."""
    there = {None, *(row.name for row in rows)}
    return claim["row"] in there and claim.get("than") in there


def _scale(config: Config) -> dict[str, Any]:
    """Return what decides how large an experiment is, and its images."""
    return {
        "dataset": config.dataset.name.name,
        "model": config.model.name,
        "model.width": getattr(config.model, "width", None),
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


def _attacks(job: Job, rows: Sequence[str]) -> list[str]:
    """Return the names of their evaluations, each once, in the profile's order."""
    names: dict[str, None] = {}
    for row in rows:
        for settings in job.profile.evaluations(job.target, row):
            names |= dict.fromkeys(_results(*settings))
    return list(names)


@lru_cache  # for the rows of a table share their evaluations
def _results(*settings: str) -> tuple[str, ...]:
    return tuple(asked(settings).results)


def asked(settings: Sequence[str]) -> EvalSettings:
    """Return what an evaluation's settings ask for, of no run, and of no folder of corruptions."""
    return parse(["checkpoint=.", "dataset.corruptions_root=.", *settings])


def unfinished(job: Job, sweep: Sweep) -> tuple[Sweep, list[int]] | None:
    """Return the smallest sweep, with its seeds, that makes all runs that are left; None: none is.

    As a sweep is every experiment with every value and seed, it may hold finished runs as well.
    A finished run of other settings counts as left, so that `btrain train` says what is wrong.

    Raises:
        UserError: an experiment does not take its settings.
    """
    left: list[tuple[str, dict[str, str], int]] = []
    for experiment in sweep.experiments:
        for swept in (swept for name, swept in sweep.rows() if name == experiment):
            folders = {
                seed: job.out / run_name(row_name(experiment, swept), seed) for seed in job.seeds
            }
            ended = [seed for seed in folders if (folders[seed] / "summary.json").is_file()]
            config = _config(job, sweep, experiment, swept) if ended else None
            left += [
                (experiment, swept, seed)
                for seed, folder in folders.items()
                if config is None or seed not in ended or not _is_finished(folder, config, seed)
            ]
    if not left:
        return None
    seeds = [seed for seed in job.seeds if any(seed == s for _, _, s in left)]
    values = {
        key: [value for value in some if any(value == swept[key] for _, swept, _ in left)]
        for key, some in sweep.values.items()
    }
    experiments = [name for name in sweep.experiments if any(name == e for e, _, _ in left)]
    return replace(sweep, experiments=experiments, values=values), seeds


def _is_finished(folder: Path, config: Config, seed: int) -> bool:
    """Return whether a run of this configuration has done all its epochs and was evaluated."""
    run = RunFolder(folder)
    try:
        run.check_owner(replace(config, seed=seed, run=replace(config.run, dir=str(folder))))
        summary = run.summary()
    except UserError:
        return False
    return summary is not None and summary.get("epochs") == config.train.epochs
