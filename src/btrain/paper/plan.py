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
from btrain.errors import UserError, printable
from btrain.paper.target import names
from btrain.runs.json_fields import Fields

KINDS = (
    "table",
    "heatmaps",
    "fractions",
    "scores",
    "allocation",
    "tradeoff",
    "sparse",
    "verified",
    "front",
    "cost",
)
"""The ways in which a target is shown."""
ALLOCATION = "allocation.json"
"""The file that `btrain paper` adds to the run of a target of that kind."""
STEP = "step.json"
"""The file that `btrain paper` adds to a run of a target that tells costs: those of a step."""
_SEED_DIGITS = 20
_LONGEST_PART = 255  # bytes of a folder's name


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
        kind: how it is shown, of `KINDS`.
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
    """Return what `Plan.write` wrote, each value checked.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    try:
        return _plan(Fields.of(path))
    except UserError as error:
        reason = str(error).removeprefix(f"{path} is damaged: ")
        if reason == str(error):
            raise
        raise UserError(f"{path} is no plan of a table or figure: {reason}") from error


def _plan(fields: Fields) -> Plan:
    fields.only(*_keys(Plan))
    if fields.optional("kind") not in KINDS:
        raise fields.wrong("kind", f"one of {', '.join(KINDS)}")
    rows = [_row(row) for row in fields.objects("rows")]
    if len({row.name for row in rows}) != len(rows):
        raise fields.wrong("rows", "rows of different names")
    return Plan(
        target=fields.name("target"),
        kind=fields.name("kind"),
        title=fields.text("title"),
        note=fields.text("note"),
        profile=fields.text("profile"),
        baseline=_name_or_none(fields, "baseline"),
        attacks=fields.names("attacks"),
        axis=_name_or_none(fields, "axis"),
        rows=rows,
        claims=[_claim(claim) for claim in fields.objects("claims")],
        chosen=fields.names("chosen") if "chosen" in fields.values else [],
    )


def _row(fields: Fields) -> Row:
    fields.only(*_keys(Row))
    swept, paper = fields.object("swept"), fields.object("paper")
    original, runs = fields.object("original"), fields.object("runs")
    return Row(
        name=fields.name("name"),
        label=fields.text("label"),
        experiment=fields.name("experiment"),
        swept={printable(key): swept.name(key) for key in swept.values},
        paper={printable(key): paper.any_number(key) for key in paper.values},
        original={printable(key): _setting(original, key) for key in original.values},
        runs={_seed(runs, key): _folder(runs, key) for key in runs.values},
        attacks=None if fields.optional("attacks") is None else fields.names("attacks"),
    )


def _claim(fields: Fields) -> Claim:
    fields.only(*_keys(Claim))
    low, high = (
        None if fields.optional(key) is None else fields.any_number(key)
        for key in ("at_least", "at_most")
    )
    return Claim(
        text=fields.text("text"),
        metric=fields.name("metric"),
        row=fields.name("row"),
        than=_name_or_none(fields, "than"),
        at_least=low,
        at_most=high,
    )


def _keys(kind: type[Plan | Row | Claim]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _name_or_none(fields: Fields, key: str) -> str | None:
    return None if fields.optional(key) is None else fields.name(key)


def _setting(fields: Fields, key: str) -> Any:
    """Return a setting's value, as plain as all of them are."""
    value = fields.optional(key)
    if isinstance(value, str):
        return printable(value)
    if value is not None and not isinstance(value, bool):
        fields.any_number(key)
    return value


def _seed(fields: Fields, key: str) -> int:
    """Return a seed, which is text in JSON."""
    if not (key.isascii() and key.isdecimal() and len(key) <= _SEED_DIGITS):
        raise fields.wrong(key, "of a seed")
    return int(key)


def _folder(fields: Fields, key: str) -> str:
    """Return a run's folder, which stays inside the plan's."""
    folder = fields.name(key)
    parts = Path(folder).parts
    if (
        Path(folder).is_absolute()
        or ".." in parts
        or any(len(part.encode()) > _LONGEST_PART for part in parts)
    ):
        raise fields.wrong(key, "a folder beside the plan")
    return folder


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
