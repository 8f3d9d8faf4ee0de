"""The settings as earlier versions of btrain wrote them, in today's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from btrain.settings.checks import typed
from btrain.settings.combined import Config
from btrain.settings.method import ALLOCATORS, DEFENSES, RIVALS
from btrain.settings.names import DatasetName

_BUDGETS = {"n_r", "n_o", "warmup_epochs", "patience", "mean_steps", "fractions"}
_ONCE_COMMON: dict[str, tuple[Mapping[Any, type], set[str]]] = {
    "bt": (ALLOCATORS, _BUDGETS | {"oracle_steps", "oracle_step_size"}),
    "defense": (DEFENSES, {"beta", "jsd", "jsd_weight"}),
    "rival": (
        RIVALS,
        {
            "grad_align_weight",
            "replays",
            "max_margin",
            "first_margin",
            "bisections",
            "clean_weight",
        },
    ),
}
"""The options of a group, and the settings that once stood in all of them, read or not."""

_UNREAD_FILES = {"digits": {"root", "download"}, "imagefolder": {"download"}}
"""The settings that once stood in every data set, by those that do not read them."""

_RECIPES = {
    f"{defense}_{data}": defense
    for defense in ("trades", "mart", "pgd", "augmix")
    for data in ("cifar10", "cifar100", "imagefolder")
} | {"mart_mnist": "trades_mnist", "mart_digits": "trades_digits"}


def translated(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved configuration without what its options do not read, by today's names.

    What is unknown today as then stays, for the schema to refuse.
    """
    settings = dict(saved)
    for group, (options, common) in _ONCE_COMMON.items():
        node = settings.get(group)
        if isinstance(node, Mapping):
            kinds = [kind for option, kind in options.items() if option.name == node.get("name")]
            read = {item.name for kind in kinds for item in fields(kind)}
            unread = common - read if kinds else set()
            settings[group] = {key: value for key, value in node.items() if key not in unread}
    bt = settings.get("bt")
    if isinstance(bt, Mapping) and isinstance(shared := bt.get("share_clean_forward"), bool):
        score = "shared" if shared else "fresh"
        settings["bt"] = {**bt, "share_clean_forward": None, "score": score}
    model, dataset = settings.get("model"), settings.get("dataset")
    if isinstance(model, Mapping) and model.get("depth", 0) is None:
        settings["model"] = {key: value for key, value in model.items() if key != "depth"}
    if isinstance(dataset, Mapping):
        unread = {"image_size"} if dataset.get("image_size", 0) is None else set()
        unread |= _UNREAD_FILES.get(str(dataset.get("name")), set())
        settings["dataset"] = {key: item for key, item in dataset.items() if key not in unread}
    recipe = settings.get("recipe")
    if isinstance(recipe, Mapping) and isinstance(recipe.get("name"), str):
        name = recipe["name"]
        settings["recipe"] = {**recipe, "name": _RECIPES.get(name, name)}
    return settings


_AUGMENTATION: dict[str, Any] = {"crop_padding": 4, "flip": True}
"""The settings of a recipe that images of the user's own once had unless they were given."""


def as_begun(config: Config, saved: Mapping[str, Any]) -> tuple[Config, str | None]:
    """Return a configuration with the augmentation that its run has had so far, by default.

    Args:
        saved: the settings that the run was begun with.

    Returns:
        The configuration, and a sentence where that changes it.
    """
    recipe = saved.get("recipe")
    were = recipe if isinstance(recipe, Mapping) else {}
    now = {key: getattr(config.recipe, key) for key in _AUGMENTATION}
    match config.dataset.name:
        case DatasetName.own:
            default = {"crop_padding": 0, "flip": False}
        case DatasetName.imagefolder:
            default = {"crop_padding": min(now["crop_padding"], 3)}
        case _:
            return config, None
    begun = {
        key: _AUGMENTATION[key]
        for key, value in default.items()
        if now[key] == value and were.get(key) == _AUGMENTATION[key]
    }
    if not begun:
        return config, None
    words = ", ".join(f"recipe.{key}={typed(value)}" for key, value in begun.items())
    note = f"goes on as it was begun, with {words}, the default of such images then"
    return replace(config, recipe=replace(config.recipe, **begun)), note
