"""The configuration and the network of a run, from what it left behind."""

from __future__ import annotations

import copy
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from btrain import own
from btrain.build import make_model
from btrain.data.splits import load_configured
from btrain.errors import UserError
from btrain.exchange.read import check_fit, fit, is_state_dict, read_plain
from btrain.models.channels import Cut
from btrain.runs.checkpoint import is_resumable
from btrain.runs.folder import RunFolder
from btrain.runs.json_fields import is_count, read_object
from btrain.settings import (
    Config,
    DatasetConfig,
    ImageFolderConfig,
    ModelConfig,
    OwnModelConfig,
    WideResNetConfig,
    WidthConfig,
)
from btrain.settings import compose as configs
from btrain.settings.older import translated
from btrain.settings.run import SHAPES, LibraryModelConfig
from btrain.untrusted import RefusedError
from btrain.untrusted.tree import check_tree

Which = Literal["last", "best"]

_MOST_SETTINGS = 1_000

_SHALLOW = 1000  # layers, which are quickly outlined, so that the error can name the keys

_MOST_CLASSES, _LARGEST_SIDE = 1 << 20, 1 << 16

_LARGEST_SETTING = 4096  # of a library's network: a width, a depth, an image's side


class UntrustedError(UserError):
    """A run names code that nobody has named or trusted here."""


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint of a run, read and checked; nobody's code was run.

    Attributes:
        config: the run's; own parts that were named again are by their new factories.
        weights: by the network's own names.
        classes: K.
        shape: (C, H, W) of its images.
        compact: whether channels that nothing reads were left out of the weights.
        epochs: begun when the weights were kept; None where the checkpoint does not tell.
        goes_on: whether the run had more to train then; None where the checkpoint does not tell.
    """

    path: Path
    config: Config
    weights: Mapping[str, Tensor]
    classes: int
    shape: tuple[int, int, int]
    compact: bool = False
    epochs: int | None = None
    goes_on: bool | None = None

    def unfinished(self) -> str | None:
        """Return a sentence on weights that are not those of a run's planned end; None of these."""
        goes_on, inside = self.goes_on, self.path.parent.name == "checkpoints"
        summary = self.path.parent.parent / "summary.json"
        ended = inside and summary.is_file()
        if goes_on is None:
            goes_on = inside and not ended
        if not goes_on:
            return None
        where = "" if self.reached is None else f" {self.reached}"
        if ended and not (read_object(summary).get("cut") and self.path.name == "last.pt"):
            return f"These are weights{where}, not the run's last."
        return f"The run {'was cut' if ended else 'is not finished'}: these are its weights{where}."

    @property
    def reached(self) -> str | None:
        """Return how far the run had come, `of epoch 5 of 6`; None where that is not known."""
        of = self.config.train.epochs
        if self.epochs is None:
            return None
        return f"of epoch {self.epochs} of {of}" if self.epochs else f"before epoch 1 of {of}"

    def network(self) -> nn.Module:
        """Return the network with the weights, on the CPU, in eval mode.

        torch's global random state stays as it was.

        Raises:
            UserError: the weights do not fit it, or the user's own code fails.
        """
        model = self.config.model
        if not isinstance(model, OwnModelConfig):
            outlined = outline(model, self.classes, self.shape, self.weights, self.path)
            if self.compact:  # the whole network may be one that no memory holds
                smaller = self._smaller(outlined)
                check_fit(smaller, self.weights, self.path)
                network = smaller.to_empty(device="cpu")
                fit(network, self.weights, self.path)
                return network.eval()
            check_fit(outlined, self.weights, self.path)
        with torch.random.fork_rng(devices=[]):
            network = make_model(model, self.classes, self.shape)
        if self.compact:
            network = self._smaller(network)
        fit(network, self.weights, self.path)
        return network.eval()

    def _smaller(self, network: nn.Module) -> nn.Module:
        """Return a network with as many channels as there are weights for."""
        try:
            smaller = Cut.found(network).like(network, self.weights)
        except (ValueError, TypeError, LookupError) as error:  # of the weights, too
            raise UserError(f"{self.path}: the network's inner_channels are wrong.") from error
        if smaller is None:
            raise UserError(f"{self.path} is no compact form of its network.")
        return smaller


def load_run(
    path: str | Path,
    which: Which = "last",
    *,
    trust_code: bool = False,
    factories: Mapping[str, Any] | None = None,
) -> tuple[Config, nn.Module]:
    """Return the configuration of a run and its network with the weights, on the CPU, in eval mode.

    No data are read, and torch's global random state stays as it was.

    Args:
        path, which, trust_code, factories: as `read_run` takes them.

    Raises:
        UserError: as `read_run`, or the weights do not fit the configuration.
    """
    run = read_run(Path(path), which, trust_code=trust_code, factories=factories)
    return run.config, run.network()


def read_run(
    path: Path,
    which: Which = "last",
    *,
    trust_code: bool = False,
    factories: Mapping[str, Any] | None = None,
    needed: Sequence[str] = ("model",),
) -> SavedRun:
    """Return what a run left behind.

    A folder's configuration is its `config.yaml`, which must agree with its checkpoint's on what
    decides an evaluation; a checkpoint file brings its own, so it may lie anywhere. The number of
    classes and the shape of the images are what the checkpoint says; in those of older versions,
    what its classifier and its data set tell.

    Args:
        path: a run folder, or a checkpoint that a run wrote.
        which: of a folder, `checkpoints/last.pt` or `best.pt`.
        trust_code: whether code that the run names may be imported.
        factories: by `model`, `dataset`, …, the user's own part in the place of the one that the
            run names: a factory, or an object.
        needed: the groups whose own parts will be imported.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, its configuration does not
            fit this version of btrain, or it names code that is needed and neither trusted nor
            named again.
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
    saved = _checkpoint(path)
    weights = saved["state"]["model"]
    config = read_config(saved["config"], path)
    if run is not None:
        config = agreed(read_config(settings, run / "config.yaml"), config, run, path)
    config = trusted(config, run or path, trust_code, factories or {}, needed)
    classes, shape = _images(saved, path)
    if classes is None:
        classes = len(list(weights.values())[-1])  # the bias of the classifier, (K,)
    shape = shape or image_shape(config.dataset)
    epochs, goes_on = _progress(saved["state"], config)
    return SavedRun(
        path, config, weights, classes, shape, saved.get("compact") is True, epochs, goes_on
    )


def _progress(state: dict[str, Any], config: Config) -> tuple[int | None, bool | None]:
    """Return how many epochs were begun when a state was kept, and whether more was to come."""
    epoch: Any = state.get("epoch")
    batch: Any = state.get("batch", 0)
    if not is_count(epoch) or not is_count(batch):
        return None, None
    whole = epoch >= config.train.epochs or state.get("collapsed") is True
    return epoch + (batch > 0), not whole if is_resumable(state) else None


def trusted(
    config: Config,
    origin: Path,
    trust_code: bool,
    factories: Mapping[str, Any],
    needed: Sequence[str] = (),
) -> Config:
    """Return a run's configuration with the user's own parts in the place of those it names.

    Raises:
        UntrustedError: a needed part is neither trusted nor named again.
        UserError: what was named again is not the user's own in the run.
    """
    parts = own.parts(config)
    for group, named in factories.items():
        if group not in parts:
            raise UserError(f"{group}.factory is given, but {origin} has no {group}=own.")
        part = getattr(config, group)
        if isinstance(named, str):
            own.allow(named)
            part = replace(part, factory=named)
        else:
            settings = part.settings if own.makes(named) else {}
            part = replace(part, factory=own.give(named, group), settings=settings)
        config = replace(config, **{group: part})
    if trust_code:
        own.allow_parts(config)
        return config
    code = [
        f"{group}.factory={factory}"
        for group, (factory, _) in parts.items()
        if group in needed and group not in factories
    ]
    if code:
        raise UntrustedError(
            f"{origin} needs code, {' and '.join(code)}, and nothing is imported because a file "
            "says so; please name it again in the same words, or a file of your own, or say "
            "trust_code=true if you trust it."
        )
    return config


# Settings that decide what a run's evaluation comes to.
_DECISIVE = (
    *("dataset.name", "dataset.image_size", "dataset.test_examples", "dataset.factory"),
    *("dataset.settings", "model.architecture", "model.width", "model.depth", "model.activation"),
    *("model.network", "model.shortcut", "model.factory", "model.settings", "model.mean"),
    *("model.std", "attack.epsilon", "attack.norm", "attack.factory", "attack.settings"),
    *("eval.epsilon", "eval.step_size", "seed"),
)


def agreed(config: Config, brought: Config, run: Path, checkpoint: Path) -> Config:
    """Return a run folder's configuration, if its checkpoint was trained and evaluated by it.

    Args:
        config: what `config.yaml` says.
        brought: what the checkpoint says.

    Raises:
        UserError: they differ in something that an evaluation depends on.
    """
    for key in _DECISIVE:
        theirs, its = _value(config, key), _value(brought, key)
        if theirs != its:
            raise UserError(
                f"{run / 'config.yaml'} says {key}={_shown(theirs)}, but {checkpoint} was made "
                f"with {_shown(its)}; please restore the one that was changed."
            )
    return config


def _value(config: Config, key: str) -> object:
    """Return a setting by its dotted key; None where the option has none of that name."""
    group, _, name = key.partition(".")
    return getattr(getattr(config, group), name, None) if name else getattr(config, group)


def _shown(value: object) -> object:
    return value.name if isinstance(value, Enum) else value


def outline(
    model: ModelConfig,
    classes: int,
    shape: tuple[int, int, int],
    weights: Mapping[str, Tensor],
    origin: Path,
) -> nn.Module:
    """Return the network of some settings as shapes without numbers (torch's meta device).

    Settings from elsewhere may ask for a network that no memory holds: compare the weights with
    this before the network is made.

    Raises:
        UserError: there is no such network, or it is deeper than there are weights.
    """
    if isinstance(model, LibraryModelConfig):
        for number in _whole_numbers(model.settings):
            if number > max(len(weights), _LARGEST_SETTING):
                raise UserError(f"{origin} asks for a network with {number} in model.settings.")
    depth = model.depth if isinstance(model, WideResNetConfig) else 0
    if depth > max(len(weights), _SHALLOW):
        raise UserError(f"{origin} holds fewer weights than model.depth={depth} has.")
    try:
        with torch.device("meta"):
            return make_model(model, classes, shape)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:  # beyond 64 bits
        size = f"model.width={model.width}" if isinstance(model, WidthConfig) else model.name
        raise UserError(
            f"{origin}: there is no network of {size} for {'×'.join(map(str, shape))} images."
        ) from error


def _whole_numbers(settings: Any) -> list[int]:
    """Return all of them in plain containers."""
    match settings:
        case Mapping():
            return [number for value in settings.values() for number in _whole_numbers(value)]
        case list() | tuple():
            return [number for value in settings for number in _whole_numbers(value)]
        case int():
            return [settings]
    return []


def image_shape(dataset: DatasetConfig) -> tuple[int, int, int]:
    """Return (C, H, W) of a data set's images, without reading more than it must."""
    if dataset.name in SHAPES:
        return SHAPES[dataset.name]
    if isinstance(dataset, ImageFolderConfig):
        return 3, dataset.image_size, dataset.image_size
    return load_configured(dataset, torch.device("cpu"), train_examples=2).shape


def _checkpoint(path: Path) -> Mapping[str, Any]:
    """Return a checkpoint of a run, with its `config` and the weights in its `state`.

    Raises:
        UserError: it is none of ours.
    """
    match read_plain(path):
        case {"config": dict(), "state": {"model": dict() as weights}} as saved:
            if is_state_dict(weights) and (
                "classes" in saved or list(weights.values())[-1].dim() == 1
            ):
                return cast(Mapping[str, Any], saved)
    raise UserError(
        f"{path} is no checkpoint of a btrain run: it holds no settings to build the network by."
    )


def _images(saved: Mapping[str, Any], path: Path) -> tuple[int | None, tuple[int, int, int] | None]:
    """Return classes and shape as a checkpoint says; None and None in one of an older version.

    Raises:
        UserError: it says something impossible.
    """
    if "classes" not in saved and "shape" not in saved:
        return None, None
    match saved:
        case {"classes": int() as classes, "shape": [int() as c, int() as h, int() as w]}:
            if 1 <= classes <= _MOST_CLASSES and all(1 <= n <= _LARGEST_SIDE for n in (c, h, w)):
                return classes, (c, h, w)
    raise UserError(f"{path} is damaged: it does not say what images its network is for.")


def read_config(saved: Mapping[str, Any], origin: Path) -> Config:
    """Return plain containers, as `config.to_dict` made them, in the schema with all its checks.

    Settings that this version has gained since get what a run of the same options would have today.

    Args:
        saved: read from a file; nothing in it is executed or looked up.
        origin: that file, for the error.

    Raises:
        UserError: a setting is unknown, of another type or out of range, or refers to something
            else (`${…}`), or one is missing that the options do not give.
    """
    _check_plain(saved, origin)
    key = repr(saved)
    if key not in _read:
        config = _checked(dict(translated(saved)), origin)
        _read.clear()
        _read[key] = config
    return copy.deepcopy(_read[key])


_read: dict[str, Config] = {}
"""The configuration read last: a run's `config.yaml` and its checkpoint mostly say the same."""


def _checked(saved: dict[str, Any], origin: Path) -> Config:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        settings = OmegaConf.merge(configs.schema_of(saved), OmegaConf.create(saved))
        missing = sorted(OmegaConf.missing_keys(settings))
        if missing:
            settings = OmegaConf.merge(_defaults(saved), OmegaConf.create(saved))
        config: Config = configs.from_hydra(settings, ())
        return config
    except OmegaConfBaseException as error:
        raise UserError(f"{origin}: {configs.explain(error, ())}") from error
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error


# Each setting group with the key that names its option.
_GROUPS = ("dataset", "model", "attack", "bt", "defense", "rival", "sparsity", "recipe", "logger")


def _defaults(saved: Mapping[str, Any]) -> Any:
    """Return what a saved configuration's options come to today, not resolved: a default that
    follows another setting will follow the saved one.
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
    """Raise UserError for more than numbers, texts and lists of a moderate size.

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
