"""`btrain paper`: the paper's tables and figures, trained, evaluated and reported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from btrain.errors import UserError
from btrain.paper.job import Job, check, make_plan
from btrain.paper.plan import Plan
from btrain.paper.run import reproduce
from btrain.paper.target import names, read_profile, read_target
from btrain.runs.read import Runs
from btrain.settings import compose as configs

_OF_A_TARGET = re.compile(r"(table|figure)\d*\.")

HELP = """\
usage: btrain paper TARGET [TARGET …] [profile=smoke|cpu|gpu|paper] [option=value …]

TARGET is one of {targets}, or all.

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


def run(arguments: Sequence[str]) -> None:
    """Makes the targets that the command line names, one after the other.

    Raises:
        UserError: a target, profile or option is wrong, or runs or a report are missing in the end.
    """
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(HELP.format(targets=", ".join(names("target"))), end="")
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
        only = [name for name in settings.pop("only", "").split(",") if name]
        extra = [configs.with_path_quoted(f"{key}={value}") for key, value in settings.items()]
        jobs.append(Job(target, profile, out, extra, only, corruptions_root))
    _check_only(jobs)
    for job in jobs:
        check(job)
    plans = [make_plan(job) for job in jobs]
    if planned == "true":
        from btrain.paper.estimate import listing

        print(listing(zip(jobs, plans, strict=True)))
        return
    _check_installed(jobs, plans)
    for plan in plans:  # all ahead of the first run, so that a watch knows what is to come
        plan.write(out)
    runs = Runs()
    done = {
        job.target.name: reproduce(job, plan, runs) for job, plan in zip(jobs, plans, strict=True)
    }
    if unfinished := {name: count for name, (count, _) in done.items() if count}:
        told = ", ".join(f"{count} of {name}" for name, count in unfinished.items())
        raise UserError(f"Runs are missing, failed or not evaluated: {told}; see the report.")
    if unreported := [name for name, (_, reported) in done.items() if not reported]:
        raise UserError(f"There is no report of {', '.join(unreported)}; see above.")


def _sorted(
    arguments: Sequence[str],
) -> tuple[list[str], dict[str, str], dict[str, dict[str, str]]]:
    """Targets, each once, options by their key, and those of one target by target and key."""
    targets = [argument for argument in arguments if "=" not in argument]
    if wrong := [target for target in targets if target.startswith("-")]:
        raise UserError(f"paper has no option {wrong[0]}; see btrain paper --help.")
    if not targets:
        raise UserError("paper needs a target; see btrain paper --help.")
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    for key in ("profile", "out", "only", "corruptions_root", "plan"):
        if given.get(key) == "":
            raise UserError(f"{key} needs a value.")
    chosen = names("target") if "all" in targets else list(dict.fromkeys(targets))
    own: dict[str, dict[str, str]] = {}
    for key in [key for key in given if _OF_A_TARGET.match(key)]:
        target, _, option = key.partition(".")
        if target not in names("target"):
            raise UserError(f"{key}: there is no target {target}; see btrain paper --help.")
        if target not in chosen:
            raise UserError(f"{key} is of {target}, which is not to be made.")
        own.setdefault(target, {})[option] = given.pop(key)
    return chosen, given, own


def _check_installed(jobs: Sequence[Job], plans: Sequence[Plan]) -> None:
    """Makes sure, ahead of the training, that AutoAttack is there if a row wants it."""
    wanted = (
        row.attacks or ()
        for job, plan in zip(jobs, plans, strict=True)
        for row in plan.rows
        if job.wanted([row.experiment])
    )
    if any("autoattack" in attacks for attacks in wanted):
        from btrain.evaluation.autoattack import library

        library()


def _check_only(jobs: Sequence[Job]) -> None:
    there = {name for job in jobs for sweep in job.sweeps for name in sweep.experiments}
    for name in (name for job in jobs for name in job.only):
        if name not in there:
            rows = ", ".join(sorted(there))
            raise UserError(f"only={name} is no row of what is to be made; there are: {rows}.")
