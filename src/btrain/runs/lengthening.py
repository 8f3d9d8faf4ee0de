"""The runs that go on to more epochs than they were begun with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from btrain.errors import UserError

LENGTH = ("train.epochs", "recipe.epochs", "recipe.milestones", "recipe.lr_factors")
"""Settings that may differ in a longer run, if its past epochs would have been the same."""


def lengthened(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the settings in which a longer run may differ from the run that it goes on from.

    Args:
        theirs: the settings that the run was begun with, by their dotted keys.
        ours: today's.

    Raises:
        UserError: it is longer, but its past epochs would have had another learning rate, fewer
            images, or something else that goes by the length of the run.
    """
    before, after = theirs.get("train.epochs"), ours.get("train.epochs")
    if type(before) is not int or type(after) is not int or after <= before:
        return ()
    sentence = f"a run with train.epochs={before} and cannot go on to {after}"
    if (schedule := ours.get("recipe.schedule")) != "step" or theirs["recipe.schedule"] != schedule:
        raise UserError(f"{sentence}: recipe.schedule={schedule} falls until the end of the run.")
    if theirs.get("train.skip"):
        raise UserError(f"{sentence}: train.skip would have left images out of its last epochs.")
    if theirs.get("recipe.repair_steps"):
        raise UserError(
            f"{sentence}: recipe.repair_steps would have looked at its last epoch, too."
        )
    if (by_length := _by_length(theirs)) is not None:
        raise UserError(f"{sentence}: {by_length} is reckoned by the length of the run.")
    try:
        old, new = _falls(theirs, before), _falls(ours, before)
    except (TypeError, KeyError, ValueError, ZeroDivisionError):  # of a damaged file
        return ()
    if len(old) != len(new) or any(
        not math.isclose(a, b, rel_tol=1e-9)
        for one, other in zip(old, new, strict=True)
        for a, b in zip(one, other, strict=True)
    ):
        were = ", ".join(f"{epoch:g}" for epoch, _ in old)
        then = f"fell after epoch {were}" if old else "did not fall"
        stays, rest = divmod(theirs["recipe.epochs"] * after, before)
        stretched = not rest and ours["recipe.epochs"] != stays
        hint = f"; please give recipe.epochs={stays}" if stretched else ""
        raise UserError(
            f"{sentence}: its learning rate {then}, and with these settings would have fallen "
            f"otherwise{hint}."
        )
    return LENGTH


def _by_length(settings: Mapping[str, Any]) -> str | None:
    """Return a setting, as it is typed, that training reckons by the run's length; or None."""
    if "sparsity.first_drop_rate" in settings:
        return f"sparsity={settings['sparsity.name']}"
    grows = settings.get("defense.weight_first") != settings.get("defense.weight_last")
    found = {
        "defense.ramp": settings.get("defense.ramp"),
        "defense.k": settings.get("defense.k") is not None,  # counted in images of the whole run
        "defense.dynamic": settings.get("defense.dynamic") == "feedback",
        "defense.weight_until": grows and settings.get("defense.form") == "bernoulli",
    }
    return next((f"{key}={settings[key]}" for key, does in found.items() if does), None)


def _falls(settings: Mapping[str, Any], end: int) -> list[tuple[float, float]]:
    """Return after how many epochs below `end` the learning rate changes, and the factor then."""
    stretch = settings["train.epochs"] / settings["recipe.epochs"]
    milestones, factors = settings["recipe.milestones"], settings["recipe.lr_factors"]
    falls = [(epoch * stretch, factor) for epoch, factor in zip(milestones, factors, strict=True)]
    return [(epoch, factor) for epoch, factor in falls if epoch < end]
