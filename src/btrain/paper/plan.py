"""Plans: what a table or figure consists of and where its runs lie, `<folder>/<target>.json`.

`btrain paper` writes the plan ahead of its runs, `btrain report` reads it, so that a row that is
missing can be seen to be missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from btrain.durable import make_folder, write_file
from btrain.errors import UserError
from btrain.paper.target import names
from btrain.untrusted import read_text

_LARGEST = 4 << 20  # bytes


@dataclass(frozen=True)
class Row:
    """One line of a table or one point of a figure: runs that differ in their seed.

    Attributes:
        name: unique in the plan; an experiment's name, with the swept values behind it.
        label: for people.
        experiment: the file in `configs/experiment`.
        swept: values that are this row's own in a sweep, by key: `{"bt.gamma": "0.65"}`.
        paper: the paper's numbers by the names of a summary (`clean_acc`, `theoretical_speedup`,
            …), `speedup_measured`, or an attack's name (`pgd100x10`); percent and ratios.
        original: what the experiment uses at the paper's scale, by key (`dataset`, `model`,
            `train.epochs`, …); the report names what differs.
        runs: seed -> run folder, relative to the plan.
        attacks: the evaluations that each of its runs gets; None where the plan does not tell.
    """

    name: str
    label: str
    experiment: str
    swept: dict[str, str]
    paper: dict[str, float]
    original: dict[str, Any]
    runs: dict[int, str]
    attacks: list[str] | None = None


@dataclass(frozen=True)
class Claim:
    """An ordering that the paper reports: `metric` of `row` minus that of `than` lies in a range.

    Attributes:
        text: the claim in a sentence.
        row, than: names of rows; `than` None compares with zero.
        at_least, at_most: of the difference in points (ratios: in their own unit); None for no
            limit.
    """

    text: str
    metric: str
    row: str
    than: str | None = None
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Plan:
    """A target with its rows in the order in which they are shown.

    Attributes:
        target: its name, `table2`.
        kind: how it is shown: table, heatmaps, fractions, scores, allocation or tradeoff.
        title: as in the paper.
        note: what a reader must know beside it.
        profile: the scale: smoke, cpu, gpu or paper.
        baseline: the row that the others are compared with, or None.
        attacks: evaluations that are columns of a table, by name: pgd100x10, autoattack.
        axis: of a tradeoff, the swept key; of heat maps unused.
        rows: see `Row`.
        claims: see `Claim`.
        chosen: settings of the user's own that change the runs, as written: `bt.gamma=0.7`.
    """

    target: str
    kind: str
    title: str
    note: str
    profile: str
    baseline: str | None
    attacks: list[str]
    axis: str | None
    rows: list[Row]
    claims: list[Claim]
    chosen: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> Path:
        """Write `<folder>/<target>.json`.

        Raises:
            UserError: it cannot be written.
        """
        path = folder / f"{self.target}.json"
        make_folder(folder)
        content = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        write_file(path, content.encode() + b"\n")
        return path


def read_plan(path: Path) -> Plan:
    """Return what `Plan.write` wrote.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    try:
        content = json.loads(read_text(path, _LARGEST))
        rows = [Row(**{**row, "runs": _by_seed(row["runs"])}) for row in content.pop("rows")]
        claims = [Claim(**claim) for claim in content.pop("claims")]
        return Plan(**content, rows=rows, claims=claims)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no plan of a table or figure.") from error


def _by_seed(runs: dict[str, str]) -> dict[int, str]:
    """Return run folders by seed, which is text in JSON; a folder stays inside the plan's."""
    folders = {int(seed): folder for seed, folder in runs.items()}
    for folder in folders.values():
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise ValueError(folder)
    return folders


def find_plans(folder: Path, targets: Sequence[str] | None = None) -> dict[str, Plan]:
    """Return the plans in a folder by target.

    Args:
        targets: these alone; None for all.

    Raises:
        UserError: there is none, or none of a target's name, or it is damaged.
    """
    return chosen(plans_in(folder), targets, folder)


def chosen(plans: dict[str, Plan], targets: Sequence[str] | None, folder: Path) -> dict[str, Plan]:
    """Return those of a folder's plans that were asked for; None for all.

    Raises:
        UserError: there is none, or none of a target's name, or it is damaged.
    """
    if wrong := [t for t in damaged(plans, folder) if targets is None or t in targets]:
        raise UserError(f"{folder / wrong[0]}.json is no plan of a table or figure.")
    if not plans:
        raise UserError(f"{folder} holds no plan of a table or figure; btrain paper writes them.")
    if targets is None:
        return plans
    if wrong := [target for target in targets if target not in plans]:
        raise UserError(f"{folder} has no target {wrong[0]}; there are: {', '.join(plans)}.")
    return {target: plans[target] for target in targets}


def plans_in(folder: Path) -> dict[str, Plan]:
    """Return the plans in the order of their names; other files are passed over."""
    plans = {}
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(UserError):
            plan = read_plan(path)
            if plan.target == path.stem:
                plans[plan.target] = plan
    return plans


def damaged(plans: dict[str, Plan], folder: Path) -> list[str]:
    """Return the paper's targets of which there is a file, but no plan in it."""
    missing = (name for name in names("target") if name not in plans)
    return [name for name in missing if (folder / f"{name}.json").is_file()]


def holds_plans(folder: Path) -> bool:
    """Return whether a folder holds a plan, or a file that should be one."""
    plans = plans_in(folder)
    return bool(plans or damaged(plans, folder))
