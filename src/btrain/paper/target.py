"""The definitions in `configs/paper`: targets with their runs, and profiles with their scale."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btrain.errors import UserError
from btrain.settings import compose as configs


@dataclass(frozen=True)
class Sweep:
    """Runs that one `btrain train --multirun` makes: every experiment with every value and seed.

    A key without a dot is that of a group, with one of its options, for Hydra would not take the
    settings of one in a sweep over several.

    Attributes:
        train: the name under which a profile has its settings; None for the target's own.
    """

    experiments: list[str]
    values: dict[str, list[str]]
    train: str | None = None

    def rows(self) -> list[tuple[str, dict[str, str]]]:
        """Return (experiment, the values that are its own), in the sweep's order."""
        points = list(itertools.product(*self.values.values()))
        return [
            (experiment, dict(zip(self.values, point, strict=True)))
            for experiment in self.experiments
            for point in points
        ]


@dataclass(frozen=True)
class Target:
    """A file of `configs/paper/target`; see `btrain.paper.plan.Plan` for what its fields mean.

    Attributes:
        labels, paper: by experiment; of a swept row also by the row's own name, or it has none of
            the paper's numbers.
        evaluate: evaluations of every run; each a list of settings of `btrain eval`.
    """

    name: str
    title: str
    kind: str
    note: str
    baseline: str | None
    axis: str | None
    sweeps: list[Sweep]
    labels: dict[str, str]
    paper: dict[str, dict[str, float]]
    evaluate: list[list[str]]
    claims: list[dict[str, Any]]


@dataclass(frozen=True)
class Profile:
    """A file of `configs/paper/profile`: how large the runs of each target are.

    Attributes:
        seeds: of every row, by target, `default` for the others.
        train: settings of `btrain train` by target, or by the name that a sweep has for its own,
            `default` for the others; in the file a name stands for that target's.
        sweep: swept values by target and key, where fewer than the target's are wanted.
        leave_out: experiments that are no rows at this scale, by target.
        evaluate_more: evaluations of some rows alone, beside the target's, by target and row; in
            the file a name stands for that row's.
        tflops: what a device of this scale is taken to do in a second, for estimates; or None.
    """

    name: str
    seeds: dict[str, list[int]]
    train: dict[str, list[str]]
    sweep: dict[str, dict[str, list[str]]]
    leave_out: dict[str, list[str]]
    evaluate_more: dict[str, dict[str, list[list[str]]]]
    tflops: float | None

    def settings(self, target: str, sweep: str | None = None) -> list[str]:
        """Return the settings of runs besides their experiment: the sweep's, or the target's."""
        own = self.train.get(target, self.train["default"])
        return own if sweep is None else self.train.get(sweep, own)

    def evaluations(self, target: Target, row: str) -> list[list[str]]:
        """Return the settings of each `btrain eval` of a row's runs."""
        return target.evaluate + self.evaluate_more.get(target.name, {}).get(row, [])


def names(group: str) -> list[str]:
    """Return the files in `configs/paper/<group>`: of target, or of profile."""
    return sorted(path.stem for path in _folder(group).glob("*.yaml"))


def read_target(name: str) -> Target:
    """Return a target by its name.

    Raises:
        UserError: there is none, or its file is wrong.
    """
    content, path = _read("target", name)
    try:
        rows = content["rows"]
        return Target(
            name=name,
            title=content["title"],
            kind=content["kind"],
            note=content["note"],
            baseline=content.get("baseline"),
            axis=content.get("axis"),
            sweeps=[sweep for run in content["runs"] for sweep in _sweeps(run)],
            labels={row: fields["label"] for row, fields in rows.items()},
            paper={row: fields.get("paper", {}) for row, fields in rows.items()},
            evaluate=content.get("evaluate", []),
            claims=content.get("claims", []),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no target: {error!r} is wrong in it.") from error


def read_profile(name: str) -> Profile:
    """Return a profile by its name.

    Raises:
        UserError: there is none, or its file is wrong.
    """
    content, path = _read("profile", name)
    try:
        return Profile(
            name=name,
            seeds=_seeds(content["seeds"]),
            train=_by_name(content["train"]),
            sweep={
                target: {key: [str(v) for v in some] for key, some in values.items()}
                for target, values in content.get("sweep", {}).items()
            },
            leave_out={
                target: [str(name) for name in some]
                for target, some in content.get("leave_out", {}).items()
            },
            evaluate_more={
                target: _by_name(of) for target, of in content.get("evaluate_more", {}).items()
            },
            tflops=None if content.get("tflops") is None else float(content["tflops"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is no profile: {error!r} is wrong in it.") from error


def _seeds(content: Any) -> dict[str, list[int]]:
    """Return seeds by target, from a list for all targets or lists by their names."""
    named = content if isinstance(content, Mapping) else {"default": content}
    return {target: [int(seed) for seed in some] for target, some in named.items()}


def _by_name(lists: Mapping[str, Any]) -> dict[str, Any]:
    """Return lists by their names; a name instead of a list stands for the list of that name."""
    return {name: list(lists[of] if isinstance(of, str) else of) for name, of in lists.items()}


def row_name(experiment: str, swept: Mapping[str, Any]) -> str:
    """Return an experiment with the values swept in it: `table2_bt_nr2-bt.gamma_0.65`.

    What is swept is a setting, or a group's choice (`sparsity`).
    """
    return "-".join([experiment, *(f"{key}_{value}" for key, value in swept.items())])


def run_name(row: str, seed: int | str) -> str:
    """Return the folder of a row's run: `table2_bt_nr2-bt.gamma_0.65-seed0`."""
    return f"{row}-seed{seed}"


def merged(*settings: Sequence[str]) -> list[str]:
    """Return `key=value` settings, the last of each key alone, in the order of first mention."""
    by_key: dict[str, str] = {}
    for setting in itertools.chain(*settings):
        by_key[setting.partition("=")[0]] = setting
    return list(by_key.values())


def _sweeps(run: Mapping[str, Any]) -> list[Sweep]:
    """Return a sweep for each combination of the groups' options."""
    values = {key: [str(v) for v in some] for key, some in run.get("sweep", {}).items()}
    groups = [key for key in values if "." not in key]
    return [
        Sweep(
            list(run["experiments"]),
            values | {k: [v] for k, v in zip(groups, some, strict=True)},
            run.get("train"),
        )
        for some in itertools.product(*(values[key] for key in groups))
    ]


def _read(group: str, name: str) -> tuple[dict[str, Any], Path]:
    path = _folder(group) / f"{name}.yaml"
    if name not in names(group):
        raise UserError(f"There is no {group} {name}; there are: {', '.join(names(group))}.")
    return configs.read_yaml(path), path


def _folder(group: str) -> Path:
    return Path(configs.config_dir()) / "paper" / group
