"""The plans in a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from btrain.errors import UserError
from btrain.paper.plan import Plan, read_plan
from btrain.paper.target import names


def find_plans(folder: Path, targets: Sequence[str] | None = None) -> dict[str, Plan]:
    """The plans in a folder by target.

    Args:
        targets: these alone; None for all.

    Raises:
        UserError: there is none, or none of a target's name, or it is damaged.
    """
    return chosen(plans_in(folder), targets, folder)


def chosen(plans: dict[str, Plan], targets: Sequence[str] | None, folder: Path) -> dict[str, Plan]:
    """Those of a folder's plans that were asked for; None for all.

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
    """The plans, in the order of their names; other files are passed over."""
    plans = {}
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(UserError):
            plan = read_plan(path)
            if plan.target == path.stem:
                plans[plan.target] = plan
    return plans


def damaged(plans: dict[str, Plan], folder: Path) -> list[str]:
    """The paper's targets of which there is a file, but no plan in it."""
    missing = (name for name in names("target") if name not in plans)
    return [name for name in missing if (folder / f"{name}.json").is_file()]
