"""From the arguments of `btrain eval` to its settings and to what is evaluated."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from btrain.errors import UserError
from btrain.settings import Config, DatasetConfig, ModelConfig
from btrain.settings.evaluation import ATTACKS, LOSSES, EvalSettings
from btrain.settings.method import ENGINES

HELP = f"""\
usage: btrain eval checkpoint=RUN|FILE [option=value …]
       btrain eval compare A B [attack=pgd20]

checkpoint=RUN             a run folder (its last checkpoint), or a checkpoint file
attack=NAME[,NAME …]       {" ".join(ATTACKS)} (default pgd20)
attack.steps= attack.restarts= attack.step_size= attack.loss={"|".join(LOSSES)}
                           PGD of your own; also changes a preset
verify=ENGINE[,ENGINE …]   {" ".join(ENGINES)}, several joined by +, or any:
                           which images no attack within epsilon (L∞) can break
attack.extra_corruptions=true
                           the 4 extra corruptions, too; they are no part of the mean
dataset.corruptions_root=  the folder of gaussian_noise.npy … labels.npy
dataset= dataset.root= dataset.test_examples= model= …
                           other than the run's; needed with another project's file
epsilon=                   radius in [0, 1] pixel units, 8/255 works; default: as trained
seed= device=auto|cpu|cuda precision=float32|bf16 eval.batch_size=500
sanity=false               leaves out the sanity checks
report=true                writes a page with curves and images, index.html
out=DIR                    default: RUN/eval, or eval/<name of the file>

compare tests two evaluations example by example (McNemar); A and B are run folders or the folders
of evaluations.
"""


def parse(arguments: Sequence[str]) -> EvalSettings:
    """The settings that a command line asks for.

    Raises:
        UserError: an argument is no key=value, a key is unknown, or a value wrong.
    """
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not re.fullmatch(r"[\w.]+", key):
            raise UserError(f"{argument} is not of the form key=value.")
        if key in given:
            raise UserError(f"{key} is given twice.")
        if key not in _SETTINGS and key not in _CONFIG_KEYS:
            raise UserError(f"There is no setting {key}.{_did_you_mean(key)}")
        if not value:
            raise UserError(f"{key} needs a value.")
        given[key] = value
    if "checkpoint" not in given:
        raise UserError("eval needs checkpoint=, a run folder or a file; see btrain eval --help.")

    fields: dict[str, Any] = {"config": {}, "pgd": {}}
    for key, value in given.items():
        if key in _CONFIG_KEYS:
            fields["config"][key] = _path(key, value) if key == "dataset.root" else value
            continue
        name, convert = _SETTINGS[key]
        where, _, leaf = name.rpartition(".")
        (fields[where] if where else fields)[leaf] = convert(key, value)
    if fields["pgd"] and "attacks" not in fields:
        fields["attacks"] = ("custom",)
    return EvalSettings(**fields)


def parse_compare(arguments: Sequence[str]) -> tuple[Path, Path, str]:
    """The two folders and the attack of `btrain eval compare`.

    Raises:
        UserError: there are not two folders, or there is another setting.
    """
    folders = [argument for argument in arguments if not argument.startswith("attack=")]
    attack = [argument.removeprefix("attack=") for argument in arguments if argument not in folders]
    if len(folders) != 2 or len(attack) > 1:
        raise UserError("compare needs two folders: btrain eval compare A B [attack=pgd20].")
    return Path(folders[0]), Path(folders[1]), attack[0] if attack else "pgd20"


def apply(config: Config, overrides: Mapping[str, str]) -> Config:
    """A run's configuration with another data set, or other settings of its own.

    Raises:
        UserError: an option or a value is wrong.
    """
    for group, kind in (("dataset", DatasetConfig), ("model", ModelConfig)):
        own = {key: value for key, value in overrides.items() if key.startswith(f"{group}.")}
        if group in overrides:
            part = getattr(compose({group: overrides[group], **own}), group)
        elif own:
            part = _merged(kind, getattr(config, group), group, own)
        else:
            continue
        config = dataclasses.replace(config, **{group: part})
    return config


def compose(overrides: Mapping[str, str]) -> Config:
    """The configuration of what is no run of ours, from `dataset=`, `model=` and their settings.

    Raises:
        UserError: an option or a value is wrong.
    """
    from btrain.settings import compose as configs

    quoted = [configs.with_path_quoted(f"{key}={value}") for key, value in overrides.items()]
    config: Config = configs.compose(quoted)
    return config


def _merged(kind: type, node: Any, group: str, overrides: Mapping[str, str]) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from btrain.settings import compose as configs

    settings = OmegaConf.structured(kind)
    try:
        settings = OmegaConf.merge(settings, dataclasses.asdict(node))
        for key, value in overrides.items():
            leaf = key.removeprefix(f"{group}.")
            typed = {leaf: value} if leaf == "root" else OmegaConf.from_dotlist([f"{leaf}={value}"])
            settings = OmegaConf.merge(settings, typed)
        return OmegaConf.to_object(settings)
    except OmegaConfBaseException as error:
        explained = str(configs.explain(error, ()))
        raise UserError(f"{group}.{explained}") from error


def _did_you_mean(key: str) -> str:
    close = get_close_matches(key, [*_SETTINGS, *_CONFIG_KEYS], n=1)
    return f" Did you mean {close[0]}?" if close else " `btrain eval --help` lists them."


def _text(key: str, value: str) -> str:
    return value


def _path(key: str, value: str) -> str:
    return os.path.expanduser(value)  # noqa: PTH111


def _names(key: str, value: str) -> tuple[str, ...]:
    return tuple(name.strip(" '\"") for name in value.strip("[]").split(","))


def _number(key: str, value: str) -> float:
    """A decimal number, or a fraction like 8/255."""
    try:
        above, _, below = value.partition("/")
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{key} must be a number, not {value}.") from error


def _whole(key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise UserError(f"{key} must be a whole number, not {value}.") from error


def _switch(key: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise UserError(f"{key} must be true or false, not {value}.")
    return value.lower() == "true"


# Argument -> (field of EvalSettings, how its value is read).
_SETTINGS: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "checkpoint": ("checkpoint", _path),
    "attack": ("attacks", _names),
    "attack.steps": ("pgd.steps", _whole),
    "attack.restarts": ("pgd.restarts", _whole),
    "attack.step_size": ("pgd.step_size", _number),
    "attack.loss": ("pgd.loss", _text),
    "attack.extra_corruptions": ("extra_corruptions", _switch),
    "dataset.corruptions_root": ("corruptions_root", _path),
    "epsilon": ("epsilon", _number),
    "verify": ("verify", _names),
    "seed": ("seed", _whole),
    "device": ("device", _text),
    "eval.batch_size": ("batch_size", _whole),
    "precision": ("precision", _text),
    "sanity": ("sanity", _switch),
    "report": ("report", _switch),
    "out": ("out", _path),
}

# Arguments that go to the configuration: what decides test images and network.
_CONFIG_KEYS = (
    "dataset",
    "dataset.root",
    "dataset.download",
    "dataset.image_size",
    "dataset.test_examples",
    "model",
    "model.width",
    "model.depth",
    "model.mean",
    "model.std",
)
