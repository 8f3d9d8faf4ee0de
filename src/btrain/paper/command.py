"""`btrain paper`: the paper's tables and figures, trained, evaluated and reported.

Trains and evaluates by the commands that a user would call.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from btrain.durable import check_places, check_within
from btrain.errors import Interrupted, UserError
from btrain.paper.job import Job, check, make_plan, unfinished
from btrain.paper.plan import ALLOCATION, STEP, Plan, Row
from btrain.paper.sheets import bounded, cost
from btrain.paper.target import Sweep, names, read_profile, read_target, row_name, run_name
from btrain.runs.folder import RunFolder
from btrain.runs.read import Runs
from btrain.settings import Config, hints, words
from btrain.settings import compose as configs
from btrain.terminal import complain, show, tell

Command = Callable[[Sequence[str]], int]
"""Runs `btrain <arguments>` and returns its exit status."""

_T = TypeVar("_T")
_FROM_SIGNALS = 128  # exit statuses of commands that a signal ended
_OFFICIAL = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}
_OWN = ("profile", "out", "only", "corruptions_root", "plan")
_OF_A_TARGET = re.compile(r"(table|figure|cheapest_|mixtrain_|sparse_)\w*\.")
_OF_THE_PAPER = re.compile(r"(table|figure)\d")

HELP = """\
usage: btrain paper TARGET [TARGET …] [profile=smoke|cpu|gpu|paper] [option=value …]

TARGET is one of {targets}, or all tables and figures of the paper.

profile=smoke            the scale: a file in configs/paper/profile
out=DIR                  default runs/paper/<profile>; targets share the runs they have in common
only=EXPERIMENT[,…]      these rows alone; the others stay as they are
plan=true                only say what would be run and what it costs, by counted FLOPs
corruptions_root=DIR     the folder of CIFAR-10-C and CIFAR-100-C; without it the corrupted images
                         are made from the test set
Other options go to every training: dataset.root=PATH device=cuda logger=wandb
hydra/launcher=joblib hydra.launcher.n_jobs=2
TARGET.option=value      an option, or only=, of one target alone: table1.dataset.root=PATH

Runs that are finished are not repeated, an interrupted one goes on, one that fails stops no other.
The report is written into DIR/report; `btrain report --watch DIR` shows how far it is.
"""


def run(arguments: Sequence[str], command: Command) -> None:
    """Make the targets that the command line names, one after the other.

    Raises:
        UserError: a target, profile or option is wrong, or runs or a report are missing in the end.
    """
    if {"-h", "--help"} & set(arguments) or not arguments:
        show(HELP.format(targets=", ".join(names("target"))), end="")
        return
    targets, given, own = _sorted(arguments)
    planned = given.pop("plan", "false")
    if planned not in ("true", "false"):
        raise UserError(f"plan is true or false, not {planned}.")
    profile = read_profile(given.pop("profile", "smoke"))
    out = Path(given.pop("out", f"runs/paper/{profile.name}")).expanduser()
    root = given.pop("corruptions_root", None)
    corruptions_root = None if root is None else Path(root).expanduser()
    if corruptions_root is not None and not corruptions_root.is_dir():
        raise UserError(f"corruptions_root={root} is no folder.")
    jobs = []
    for target in map(read_target, targets):
        settings = given | own.get(target.name, {})
        only = words.names(settings.pop("only", ""))
        extra = [configs.with_path_quoted(f"{key}={value}") for key, value in settings.items()]
        jobs.append(Job(target, profile, out, extra, only, corruptions_root))
    _check_only(jobs)
    for job in jobs:
        check(job)
    plans = [make_plan(job) for job in jobs]
    if planned == "true":
        from btrain.paper.estimate import listing

        show(listing(zip(jobs, plans, strict=True)))
        return
    _check_installed(jobs, plans)
    check_folders(out, plans)
    for plan in plans:  # all ahead of the first run, so that a watch knows what is to come
        plan.write(out)
    runs = Runs()
    done = {
        job.target.name: reproduce(job, plan, runs, command)
        for job, plan in zip(jobs, plans, strict=True)
    }
    if unfinished := {name: count for name, (count, _) in done.items() if count}:
        told = ", ".join(f"{count} of {name}" for name, count in unfinished.items())
        raise UserError(f"Runs are missing, failed or not evaluated: {told}; see the report.")
    if unreported := [name for name, (_, reported) in done.items() if not reported]:
        raise UserError(f"There is no report of {', '.join(unreported)}; see above.")


def _sorted(
    arguments: Sequence[str],
) -> tuple[list[str], dict[str, str], dict[str, dict[str, str]]]:
    """Return targets, each once, options by key, and options of one target by target and key."""
    if split := hints.several_words(arguments):
        raise UserError(split)
    for key in (argument.partition("=")[0] for argument in arguments if "=" in argument):
        is_known = "." in key or key in (*_OWN, *Config.__annotations__)
        if not is_known and (meant := hints.meant(key, _OWN)):
            raise UserError(f"There is no setting {key}. Did you mean {meant}?")
    targets = [argument for argument in arguments if "=" not in argument]
    if wrong := [target for target in targets if target.startswith("-")]:
        raise UserError(f"paper has no option {wrong[0]}; see btrain paper --help.")
    if not targets:
        raise UserError("paper needs a target; see btrain paper --help.")
    given = dict(_pairs([argument for argument in arguments if "=" in argument]))
    of_the_paper = [name for name in names("target") if _OF_THE_PAPER.match(name)]
    chosen = of_the_paper if "all" in targets else list(dict.fromkeys(targets))
    own: dict[str, dict[str, str]] = {}
    for key in [key for key in given if _OF_A_TARGET.match(key)]:
        target, _, option = key.partition(".")
        if target not in names("target"):
            raise UserError(f"{key}: there is no target {target}; see btrain paper --help.")
        if target not in chosen:
            raise UserError(f"{key} is of {target}, which is not to be made.")
        own.setdefault(target, {})[option] = given.pop(key)
    return chosen, given, own


def _pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Return keys and values; those that go to a training keep their quotation marks."""
    keys = (argument.partition("=")[0] for argument in arguments)
    paths = {"out", "corruptions_root", *(key for key in keys if key.endswith("dataset.root"))}
    found = []
    for argument, (key, value) in zip(arguments, words.parse(arguments, paths), strict=True):
        is_own = key in _OWN or key.endswith(".only")
        found.append((key, value if is_own else argument.partition("=")[2]))
    return found


def _check_installed(jobs: Sequence[Job], plans: Sequence[Plan]) -> None:
    """Make sure, ahead of the training, that AutoAttack is there if a row wants it."""
    wanted = (
        row.attacks or ()
        for job, plan in zip(jobs, plans, strict=True)
        for row in plan.rows
        if job.wanted([row.experiment])
    )
    if any("autoattack" in attacks for attacks in wanted):
        from btrain.evaluation.autoattack import library

        library()


def check_folders(out: Path, plans: Sequence[Plan]) -> None:
    """Make sure, ahead of the training, that runs and reports are written inside `out`.

    Raises:
        UserError: a link leads out of it, or no file can take the name of one that is to come.
    """
    runs = [out / run for plan in plans for row in plan.rows for run in row.runs.values()]
    for folder in (out / "report", out / "corrupted", *runs):
        check_within(folder, out)
    check_places(out / f"{plan.target}.json" for plan in plans)
    check_places(run / name for run in runs for name in (ALLOCATION, STEP))


def _check_only(jobs: Sequence[Job]) -> None:
    there = {name for job in jobs for sweep in job.sweeps for name in sweep.experiments}
    for name in (name for job in jobs for name in job.only):
        if name not in there:
            rows = ", ".join(sorted(there))
            raise UserError(f"only={name} is no row of what is to be made; there are: {rows}.")


def reproduce(job: Job, plan: Plan, known: Runs, command: Command) -> tuple[int, bool]:
    """Train and evaluate what is not there yet, and report.

    A run that fails leaves its log and stops no other.

    Args:
        known: the runs that the reports have read before.

    Returns:
        How many of the wanted runs are not trained, or not evaluated, at the least; and whether the
        report was written.

    Raises:
        SystemExit: a signal came; the same command goes on from there.
    """
    failed = 0
    for sweep in job.sweeps:
        wanted_sweep = replace(sweep, experiments=job.wanted(sweep.experiments))
        if (left := unfinished(job, wanted_sweep)) is not None:
            failed += not _done(command, "train", *_training(job, *left))
    wanted = set(job.wanted(row.experiment for row in plan.rows))
    runs = [
        _evaluate(job, plan, row, seed, command)
        for row in plan.rows
        if row.experiment in wanted
        for seed in row.runs
    ]
    told = f"btrain report {shlex.quote(str(job.out))} target={job.target.name}"
    from btrain.paper.sheets.files import show_sheets

    reported = _guarded(
        told, lambda: show_sheets(job.out, job.out / "report", [job.target.name], known.read)
    )
    # A finished run of other settings is not what is wanted.
    return max(runs.count(False), failed), reported is not None


def _training(job: Job, sweep: Sweep, seeds: Sequence[int]) -> list[str]:
    """Return the arguments of the multirun that makes a sweep's runs, a seed after the other."""
    swept = {
        key: f"${{{key}}}" if "." in key else f"${{hydra:runtime.choices.{key}}}"
        for key in sweep.values
    }
    name = row_name("${hydra:runtime.choices.experiment}", swept)
    return [
        "--multirun",
        f"seed={','.join(map(str, seeds))}",
        f"experiment={','.join(sweep.experiments)}",
        *job.settings(sweep),
        *(f"{key}={','.join(values)}" for key, values in sweep.values.items()),
        f"logger.group={configs.quoted(name)}",
        f"logger.tags=[{job.target.name},{job.profile.name}]",
        f"run.dir={configs.quoted(str(job.out / run_name(name, '${seed}')))}",
    ]


def _evaluate(job: Job, plan: Plan, row: Row, seed: int, command: Command) -> bool:
    """Make a run's evaluations; return whether it is trained and all of them are there."""
    folder = job.out / row.runs[seed]
    if not (folder / "summary.json").is_file():
        return False
    try:
        done = [
            _done(
                command,
                "eval",
                f"checkpoint={folder}",
                *_corruptions(job, folder, settings, command),
            )
            for settings in job.profile.evaluations(job.target, row.name)
        ]
        if plan.kind == "allocation":
            from btrain.paper.batch import write_allocation

            write_allocation(folder)
        if plan.kind in (*bounded.KINDS, cost.KIND):
            from btrain.paper.sheets.sheet import baseline_of
            from btrain.paper.step import write_step

            base = job.out / run_name(baseline_of(plan, row) or row.name, seed)
            done.append(_safely(lambda: write_step(folder, base)) is not None)
    except UserError as error:
        complain(error)
        return False
    return all(done)


def _corruptions(job: Job, folder: Path, settings: Sequence[str], command: Command) -> list[str]:
    """Return an evaluation's settings, with the corrupted images that it needs made if need be.

    Raises:
        UserError: the run's settings cannot be read, or there are no official images of its data.
    """
    if "attack=corruptions" not in settings:
        return list(settings)
    dataset = RunFolder(folder).settings()["dataset"]
    if job.corruptions_root is None:
        root = _regenerated(job, dataset, command)
    elif dataset["name"] in _OFFICIAL:
        root = job.corruptions_root / _OFFICIAL[dataset["name"]]
    else:
        raise UserError(f"corruptions_root= holds no images of dataset={dataset['name']}.")
    return [*settings, f"dataset.corruptions_root={root}"]


def _regenerated(job: Job, dataset: dict[str, Any], command: Command) -> Path:
    """Make the corrupted test set of a data set unless it is there; return its folder."""
    root = job.out / "corrupted" / str(dataset["name"])
    if not (root / "labels.npy").is_file():
        given = [f"dataset={dataset['name']}"]
        given += [
            f"dataset.{key}={dataset[key]}"
            for key in ("root", "test_examples", "image_size")
            if dataset.get(key) is not None
        ]
        _done(command, "data", "corrupt", *given, f"corrupt.out={root}")
    return root


def _done(command: Command, *arguments: str) -> bool:
    """Run a command of btrain's; return whether it did what it should; if not, it has said why.

    Raises:
        SystemExit: a signal ended it.
    """
    status = _guarded(f"btrain {shlex.join(arguments)}", lambda: command(arguments))
    if status is not None and status > _FROM_SIGNALS:
        raise SystemExit(status)
    return status == 0


def _guarded(told: str, what: Callable[[], _T]) -> _T | None:
    """Say and do it, safely."""
    tell(f"$ {told}")
    return _safely(what)


def _safely(what: Callable[[], _T]) -> _T | None:
    """Do it; a mistake or a defect is told, and is no reason to lose other runs."""
    try:
        return what()
    except (Interrupted, KeyboardInterrupt):
        raise
    except UserError as error:
        complain(error)
    except Exception as error:
        complain(f"{type(error).__name__}: {error}")
    return None
