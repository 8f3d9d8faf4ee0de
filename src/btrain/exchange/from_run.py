"""From what a run left behind back to its configuration and its network."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from enum import Enum
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from btrain.build import make_model
from btrain.errors import UserError
from btrain.exchange.read import check_fit, fit, is_state_dict, read_plain
from btrain.runs.folder import RunFolder
from btrain.settings import Config, DatasetConfig, DatasetName, ModelConfig
from btrain.settings import compose as configs
from btrain.settings.older import translated
from btrain.untrusted import RefusedError
from btrain.untrusted.tree import check_tree

Which = Literal["last", "best"]

_MOST_SETTINGS = 1_000

_SHALLOW = 1000  # layers, which are quickly outlined, so that the error can name the keys

_SHAPES = {
    DatasetName.cifar10: (3, 32, 32),
    DatasetName.cifar100: (3, 32, 32),
    DatasetName.mnist: (1, 28, 28),
    DatasetName.digits: (1, 8, 8),
}


def load_run(path: Path, which: Which = "last") -> tuple[Config, nn.Module]:
    """The configuration of a run and its network with the weights, on the CPU, in eval mode.

    A folder's configuration is its `config.yaml`, which must agree with its checkpoint's on what
    decides an evaluation; a checkpoint file brings its own, so it may lie anywhere. The number of
    classes is that of the checkpoint's classifier, the shape of the images that of the data set. No
    data are read, and torch's global random state stays as it was.

    Args:
        path: a run folder, or a checkpoint that a run wrote.
        which: of a folder, `checkpoints/last.pt` or `best.pt`.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, its configuration does not
            fit this version of btrain, or its weights do not fit its configuration.
    """
    run = path if path.is_dir() else None
    if run is not None:
        folder = RunFolder(run)
        settings = folder.settings()
        path = folder.best if which == "best" else folder.last
        if which == "best" and not path.is_file():
            raise UserError(f"{path} does not exist: the run held no examples out to choose by.")
    elif which != "last":
        raise UserError(f"which={which} goes with a run folder; {path} is one checkpoint.")
    saved, weights = _checkpoint(path)
    config = read_config(saved, path)
    if run is not None:
        config = agreed(read_config(settings, run / "config.yaml"), config, run, path)
    classes = len(list(weights.values())[-1])  # the bias of the classifier, (K,)
    shape = image_shape(config.dataset)
    check_fit(outline(config.model, classes, shape, weights, path), weights, path)
    with torch.random.fork_rng(devices=[]):
        model = make_model(config.model, classes, shape)
    fit(model, weights, path)
    return config, model.eval()


# Settings that decide what a run's evaluation comes to.
_DECISIVE = (
    *("dataset.name", "dataset.image_size", "dataset.test_examples", "model.architecture"),
    *("model.width", "model.depth", "model.mean", "model.std", "attack.epsilon"),
    *("eval.epsilon", "eval.step_size", "seed"),
)


def agreed(config: Config, brought: Config, run: Path, checkpoint: Path) -> Config:
    """The configuration of a run folder, if its checkpoint was trained and evaluated by it.

    Args:
        config: what `config.yaml` says.
        brought: what the checkpoint says.

    Raises:
        UserError: they differ in something that an evaluation depends on.
    """
    for key in _DECISIVE:
        theirs, its = attrgetter(key)(config), attrgetter(key)(brought)
        if theirs != its:
            raise UserError(
                f"{run / 'config.yaml'} says {key}={_shown(theirs)}, but {checkpoint} was made "
                f"with {_shown(its)}; please restore the one that was changed."
            )
    return config


def _shown(value: object) -> object:
    return value.name if isinstance(value, Enum) else value


def outline(
    model: ModelConfig,
    classes: int,
    shape: tuple[int, int, int],
    weights: Mapping[str, Tensor],
    origin: Path,
) -> nn.Module:
    """The network of some settings as shapes without numbers (torch's meta device).

    Settings from elsewhere may ask for a network that no memory holds: compare the weights with
    this before the network is made.

    Raises:
        UserError: there is no such network, or it is deeper than there are weights.
    """
    if (model.depth or 0) > max(len(weights), _SHALLOW):
        raise UserError(f"{origin} holds fewer weights than model.depth={model.depth} has.")
    try:
        with torch.device("meta"):
            return make_model(model, classes, shape)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:  # beyond 64 bits
        raise UserError(
            f"{origin}: there is no network of model.width={model.width} "
            f"for {'×'.join(map(str, shape))} images."
        ) from error


def image_shape(dataset: DatasetConfig) -> tuple[int, int, int]:
    """(C, H, W) of a data set's images, without reading them.

    Raises:
        UserError: `dataset.image_size` is not given and the data set has no size of its own.
    """
    if dataset.name in _SHAPES:
        return _SHAPES[dataset.name]
    if dataset.image_size is None:
        raise UserError(f"dataset.image_size must be given for dataset={dataset.name.name}.")
    return 3, dataset.image_size, dataset.image_size


def _checkpoint(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """The configuration and the weights in a checkpoint of a run.

    Raises:
        UserError: it is none of ours.
    """
    match read_plain(path):
        case {"config": dict() as config, "state": {"model": dict() as weights}}:
            if is_state_dict(weights) and list(weights.values())[-1].dim() == 1:
                return config, weights
    raise UserError(
        f"{path} is no checkpoint of a btrain run: it holds no settings to build the network by."
    )


def read_config(saved: Mapping[str, Any], origin: Path) -> Config:
    """Plain containers, as `config.to_dict` made them, back in the schema with all its checks.

    Settings that this version has gained since get what a run of the same options would have today.

    Args:
        saved: read from a file; nothing in it is executed or looked up.
        origin: that file, for the error.

    Raises:
        UserError: a setting is unknown, of another type or out of range, or refers to something
            else (`${…}`), or one is missing that the options do not give.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _check_plain(saved, origin)
    try:
        saved = translated(saved)
        settings = OmegaConf.merge(configs.schema_of(saved), OmegaConf.create(dict(saved)))
        missing = sorted(OmegaConf.missing_keys(settings))
        if missing:
            settings = OmegaConf.merge(_defaults(saved), OmegaConf.create(dict(saved)))
        config: Config = configs.from_hydra(settings, ())
        return config
    except OmegaConfBaseException as error:
        raise UserError(f"{origin}: {configs.explain(error, ())}") from error
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error


# Each setting group with the key that names its option.
_GROUPS = ("dataset", "model", "attack", "bt", "defense", "rival", "recipe", "logger")


def _defaults(saved: Mapping[str, Any]) -> Any:
    """What the options of a saved configuration come to today, not resolved: a default that follows
    another setting will follow the saved one.
    """
    groups = {group: saved.get(group) for group in _GROUPS}
    options = {
        group: settings.get("name")
        for group, settings in groups.items()
        if isinstance(settings, Mapping)
    }
    return configs.composed(
        [
            f"{group}={option}"
            for group, option in options.items()
            if isinstance(option, str) and re.fullmatch(r"[\w-]+", option)
        ],
        "train",
    )


def _check_plain(saved: Mapping[str, Any], origin: Path) -> None:
    """Raises UserError for more than numbers, texts and lists of a moderate size.

    A text with an interpolation in it is none: OmegaConf would look it up or compute it.
    """
    try:
        check_tree(saved, most=_MOST_SETTINGS)
    except RefusedError as error:
        raise UserError(f"{origin} is no configuration of a run: {error}.") from error
    waiting: list[object] = [saved]
    while waiting:
        match waiting.pop():
            case Mapping() as node:
                waiting += [*node.keys(), *node.values()]
            case list() | tuple() as node:
                waiting += node
            case str() as text if "${" in text:
                raise UserError(f"{origin} refers to {text}; a run's settings are plain values.")
            case bool() | float() | str() | None:
                pass
            case int() as number if -(2**63) <= number < 2**63:
                pass
            case other:
                shown = reprlib.repr(other)
                raise UserError(f"{origin} holds {shown}, which is no setting of a run.")
