"""The runs of a table or figure: `btrain train` and `btrain eval` as a user would call them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from btrain import cli
from btrain import config as configs
from btrain.errors import UserError
from btrain.paper.plan import Claim, Plan, Row
from btrain.paper.target import Profile, Sweep, Target, merged, row_name
from btrain.schema import Config

_SYMBOLS = {"bt.gamma": "γ", "bt.n_b": "N_B", "bt.n_r": "N_R", "bt.n_o": "N_O"}
_FROM_SIGNALS = 128  # exit statuses of commands that a signal ended


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


def check(job: Job) -> None:
    """Makes sure, ahead of any run, that every experiment takes the settings it will be given.

    Raises:
        UserError: a setting is wrong, or `only` names no experiment of the target.
    """
    experiments = {name for sweep in job.sweeps for name in sweep.experiments}
    for name in job.only:
        if name not in experiments:
            there = ", ".join(sorted(experiments))
            raise UserError(f"only={name} is no row of {job.target.name}; there are: {there}.")
    settings = [setting for setting in job.settings if not setting.startswith("hydra")]
    for name in job.only or sorted(experiments):
        configs.compose([f"experiment={name}", *settings])


def make_plan(job: Job) -> Plan:
    """What the runs will be, as the report wants to know it.

    Raises:
        UserError: an experiment is unknown or wrong.
    """
    target = job.target
    rows = [row for sweep in job.sweeps for row in sweep.rows()]
    experiments = dict.fromkeys(experiment for experiment, _ in rows)
    originals = {name: configs.compose([f"experiment={name}"]) for name in experiments}
    return Plan(
        target=target.name,
        kind=target.kind,
        title=target.title,
        note=target.note,
        profile=job.profile.name,
        baseline=target.baseline,
        attacks=_attacks(job, list(experiments)),
        axis=target.axis,
        rows=[_row(job, name, swept, originals[name]) for name, swept in rows],
        claims=[Claim(**claim) for claim in target.claims],
    )


def reproduce(job: Job) -> int:
    """Trains and evaluates what is not there yet, and reports; returns how many runs are missing.

    A run that fails leaves its log and stops no other.

    Raises:
        UserError: the plan cannot be made or written.
        SystemExit: a signal came; the same command goes on from there.
    """
    plan = make_plan(job)
    plan.write(job.out)
    for sweep in job.sweeps:
        wanted = [name for name in sweep.experiments if not job.only or name in job.only]
        if wanted:
            _command("train", *_training(job, replace(sweep, experiments=wanted)))
    rows = [row for row in plan.rows if not job.only or row.experiment in job.only]
    folders = [(row, job.out / folder) for row in rows for folder in row.runs.values()]
    finished = [(row, folder) for row, folder in folders if (folder / "summary.json").is_file()]
    for row, folder in finished:
        for settings in job.profile.evaluations(job.target.name, row.experiment):
            _command("eval", f"checkpoint={folder}", *_corruptions(job, folder, settings))
        if plan.kind == "allocation":
            from btrain.paper.batch import write_allocation

            write_allocation(folder)
    _command("report", str(job.out), f"target={job.target.name}")
    return len(folders) - len(finished)


def _training(job: Job, sweep: Sweep) -> list[str]:
    """The arguments of the multirun that makes a sweep's runs, all of one seed before the next."""
    name = row_name("${hydra:runtime.choices.experiment}", {k: f"${{{k}}}" for k in sweep.values})
    return [
        "--multirun",
        f"seed={','.join(map(str, job.profile.seeds))}",
        f"experiment={','.join(sweep.experiments)}",
        *job.settings,
        *(f"{key}={','.join(values)}" for key, values in sweep.values.items()),
        f"logger.group={configs.quoted(name)}",
        f"logger.tags=[{job.target.name},{job.profile.name}]",
        f"run.dir={configs.quoted(str(job.out / (name + '-seed${seed}')))}",
    ]


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
        runs={seed: f"{name}-seed{seed}" for seed in job.profile.seeds},
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
        "dataset.train_examples": config.dataset.train_examples,
        "dataset.test_examples": config.dataset.test_examples,
        "attack.epsilon": config.attack.epsilon,
        "attack.epsilon_warmup_epochs": config.attack.epsilon_warmup_epochs,
        "recipe.optimizer": config.recipe.optimizer.name,
        "recipe.lr": config.recipe.lr,
    }


def _attacks(job: Job, experiments: Sequence[str]) -> list[str]:
    """The names of their evaluations, each once, in the profile's order."""
    names: dict[str, None] = {}
    for experiment in experiments:
        for settings in job.profile.evaluations(job.target.name, experiment):
            given = dict(setting.split("=", 1) for setting in settings)
            names |= dict.fromkeys(given["attack"].split(","))
    return list(names)


def _corruptions(job: Job, folder: Path, settings: Sequence[str]) -> list[str]:
    """An evaluation's settings with the corrupted images that it needs, made where there are none.

    Raises:
        UserError: the run's settings cannot be read.
    """
    if "attack=corruptions" not in settings:
        return list(settings)
    from btrain.run_folder import RunFolder

    dataset = RunFolder(folder).settings()["dataset"]
    if job.corruptions_root is not None:
        official = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}
        if dataset["name"] not in official:
            raise UserError(f"corruptions_root= has no images for dataset={dataset['name']}.")
        root = job.corruptions_root / official[dataset["name"]]
    else:
        root = job.out / "corrupted" / dataset["name"]
        given = [f"dataset={dataset['name']}", f"dataset.root={dataset['root']}"]
        given += [
            f"dataset.{key}={dataset[key]}"
            for key in ("test_examples", "image_size")
            if dataset[key] is not None
        ]
        _command("data", "corrupt", *given, f"corrupt.out={root}")
    return [*settings, f"dataset.corruptions_root={root}"]


def _command(*arguments: str) -> None:
    """Runs a command of btrain's; one that fails has said why.

    Raises:
        SystemExit: a signal ended it.
    """
    print(f"$ btrain {shlex.join(arguments)}", flush=True)
    if (status := cli.main(list(arguments))) > _FROM_SIGNALS:
        raise SystemExit(status)
