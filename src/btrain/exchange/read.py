"""Weights from a file of ours or of another project; nothing in the file is ever executed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor, nn

from btrain.errors import UserError
from btrain.exchange import names
from btrain.models import Normalise, Normalised
from btrain.models.preact_resnet import PreActResNet
from btrain.models.resnet import ResNet
from btrain.models.small_cnn import SmallCNN
from btrain.models.wide_resnet import WideResNet
from btrain.terminal import counted, plural
from btrain.untrusted import RefusedError, check_hash, tensors
from btrain.untrusted.pickles import AsksForCodeError

log = logging.getLogger("btrain")

# Where a state dict lies in a checkpoint: ours is ["state"]["model"].
_WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "net", "net_state_dict", "network", "weights"),
    *("params", "model_state", "state"),
)
_AVERAGED = (
    *("ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "model_ema_state_dict"),
    *("ema_model_state_dict", "net_ema", "params_ema", "ema", "swa_state_dict", "swa_model"),
)
"""The keys of averaged weights, which go before raw ones: they are the ones that are evaluated."""
_RESAVING = 'torch.save(model.state_dict(), "weights.pt")'
_SHOWN = 3
_CONSTANTS = (names.MEAN, names.STD)
_BTRAINS = (WideResNet, PreActResNet, ResNet, SmallCNN)
"""The networks that hold their normalisation as `normalise`, and whose first layer is `conv1`."""


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a file into a network, whatever device that is on.

    A normalisation in the file (`mu` and `sigma`, or our own) becomes the model's where that has
    none. Where the file has none the model keeps its own: that is how to read weights whose images
    were normalised outside of the network.

    Raises:
        UserError: the file cannot be read, is of another architecture, shape or number of classes,
            or normalises otherwise than the model. The model is as it was.
    """
    path = Path(path)
    _load(weights_for(model, path), model, path)


def _load(weights: Mapping[str, Tensor], model: nn.Module, path: Path) -> None:
    """Do as `load_weights` with the weights that were read from the path."""
    if not isinstance(model, _BTRAINS):
        fit(model, weights, path)
        return
    before = model.normalise
    model.normalise = _agreed_normalisation(model, weights, path)
    constants = {f"normalise.{key}": value for key, value in model.normalise.state_dict().items()}
    try:
        fit(model, {**weights, **constants}, path)
    except UserError:
        model.normalise = before
        raise


def start_from(model: nn.Module, path: Path) -> str:
    """Load a file or a run into a network to be trained, but for a head of other classes.

    The head is the network's last linear layer.

    Args:
        model: freshly initialised, on any device.
        path: a file that `read_weights` understands, or the folder of a run; no code is run.

    Returns:
        A sentence that says what was taken.

    Raises:
        UserError: as `load_weights`; the model is as it was.
    """
    if path.is_dir():
        path = path / "checkpoints" / "last.pt"
    weights, own = weights_for(model, path), model.state_dict()
    for key in _CONSTANTS:
        if key in weights and key not in own:
            raise UserError(
                f"{path} normalises its images: {key} is {_values(weights[key])}; please give "
                "model.mean=[…] and model.std=[…], too."
            )
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    head = [key for key in own if layers and key.rpartition(".")[0] == layers[-1]]
    other = [key for key in head if key in weights and weights[key].shape != own[key].shape]
    if not other or any(weights[key].shape[1:] != own[key].shape[1:] for key in other):
        load_weights(model, path)
        return f"The network starts from all weights of {path}."
    _load({**weights, **{key: own[key] for key in head}}, model, path)
    there, here = len(weights[other[0]]), len(own[other[0]])
    return (
        f"The network starts from the weights of {path} but for a new head, {layers[-1]}: there "
        f"{plural(here, 'is', 'are')} {counted(here, 'class')} here and {there} there."
    )


def check_architecture(outline: nn.Module, weights: Mapping[str, Tensor], origin: Path) -> None:
    """Raise UserError unless weights are a network's, whatever either normalises with.

    Args:
        outline: the network, maybe without numbers.
        weights: by our names.

    Raises:
        UserError: names, shapes or types differ.
    """
    own = {key: value for key, value in outline.state_dict().items() if key in _CONSTANTS}
    theirs = {key: value for key, value in weights.items() if key not in _CONSTANTS}
    theirs = _by_architecture(outline, theirs)
    check_fit(outline, {**theirs, **own}, origin)


def _agreed_normalisation(
    model: nn.Module, weights: Mapping[str, Tensor], origin: Path
) -> nn.Module:
    """Return the model's own normalisation if the file has none or the same, else the file's."""
    own, mean, std = model.normalise, weights.get(names.MEAN), weights.get(names.STD)
    assert isinstance(own, nn.Module)
    channels = model.get_parameter("conv1.weight").shape[1]
    for constants in (mean, std):
        if constants is not None and constants.numel() not in (1, channels):
            raise UserError(
                f"{origin} normalises {counted(constants.numel(), 'channel')}, "
                f"the model has {channels}."
            )
        if constants is not None and not constants.is_floating_point():
            raise UserError(f"{origin} normalises with constants of type {_type(constants)}.")
    if isinstance(own, Normalise):
        for ours, theirs in ((own.mean, mean), (own.std, std)):
            if theirs is not None and not _same_constants(ours.cpu(), theirs):
                raise UserError(
                    f"{origin} normalises with {_values(theirs)} where the model (model.mean, "
                    f"model.std) has {_values(ours)}."
                )
        return own
    if mean is None or std is None:
        return own
    constants_there = (constants.flatten().tolist() for constants in (mean, std))
    return Normalise(*constants_there).to(model.get_parameter("conv1.weight").device)


def _same_constants(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether they are equal but for rounding; one value stands for all channels."""
    sizes = {ours.numel(), theirs.numel()}
    return len(sizes - {1}) <= 1 and bool((ours - theirs).abs().max() < 1e-5)


def _values(constants: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in constants.flatten().tolist())


def weights_for(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Return the weights in a file by the names of a network.

    Names that are the network's own stay as they are, with `network.` before them where the file is
    of a network that the model normalises for; otherwise they are read as `read_weights` does.

    Raises:
        UserError: as `read_weights`.
    """
    saved, note = _saved_weights(path)
    if note is not None:
        log.warning("%s", note)
    if isinstance(model, _BTRAINS):
        weights = _renamed(saved, path)
        preact = isinstance(model, PreActResNet) and not model.of_input
        if preact and any(key.startswith("layer1.") for key in weights):
            log.warning(
                "The names of the layers in %s are another project's and do not tell what a "
                "block's shortcut takes: here the activated input, as in AWP's network; with "
                "model.shortcut=input the input itself, as in FastAT's.", path,
            )  # fmt: skip
        return _by_architecture(model, weights)
    counters = ".num_batches_tracked"
    own = {key for key in model.state_dict() if not key.endswith(counters)}
    constants = {key: value for key, value in model.state_dict().items() if key in _CONSTANTS}
    if own <= saved.keys():
        return dict(saved)
    unwrapped = _renamed(saved, path)
    if isinstance(model, Normalised):
        for named in (saved, unwrapped):
            inside = {f"network.{key}": value for key, value in named.items()} | constants
            if own <= inside.keys():
                return inside
    return unwrapped


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights in a file, on the CPU, by the names of btrain's networks.

    Understands a state dict, bare or wrapped (`state_dict`, `model_state_dict`, `model`, `net`, …,
    our own checkpoints, or the only one there is), and `*.safetensors`; averaged weights are taken
    where there are raw ones beside them. See `names.ours` for what is renamed or left out.

    Raises:
        UserError: the file is missing, cannot be read without executing it, or holds no weights.
    """
    return _renamed(_saved_weights(path)[0], path)


def _by_architecture(network: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights by our names where other projects name this network's layers otherwise."""
    if isinstance(network, PreActResNet | ResNet):
        return names.of_residual_networks(weights)
    return names.of_a_sequence(weights) if isinstance(network, SmallCNN) else weights


def _saved_weights(path: Path) -> tuple[Mapping[str, Tensor], str | None]:
    """Return the weights in a file by its own names, and which were taken of several."""
    found = _find(read_plain(path))
    if found is None:
        raise UserError(
            f"{path} holds no weights: there is no state dict, neither bare nor under "
            f"{', '.join(_WRAPPERS[:-2])} or {_WRAPPERS[-2]}, nor a single one under another name; "
            f"please save the network's alone, {_RESAVING}."
        )
    place, saved, beside = found
    averaged = names.averaged(saved)
    if averaged and names.has_raw_beside_averaged(saved):
        place, beside = "under the name of an average", "beside them"
    elif beside is not None:
        place, beside = f"under {place}", f"under {beside}"
    if beside is None:
        return averaged or saved, None
    return averaged or saved, (
        f"{path} holds averaged weights {place} and raw ones {beside}; the averaged are taken."
    )


def _renamed(saved: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    by_name = names.ours(saved)
    for key, value in saved.items():
        name = by_name[key]
        if name in weights:
            raise UserError(f"{path} holds {name} twice, once of them as {key}.")
        if name is not None:
            constant = name in _CONSTANTS
            weights[name] = value.reshape(-1, 1, 1) if constant else value
    return weights


def read_plain(path: Path) -> Any:
    """Return tensors and plain containers, as `torch.save` or safetensors wrote them.

    Raises:
        UserError: there is no such file, it is damaged, or it asks for code.
    """
    if not path.is_file():
        what = "is a folder, not a checkpoint" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        return tensors.load(path)
    except Exception as error:  # a damaged archive raises many kinds
        raise UserError(f"{path} is not a readable checkpoint{_reason(error)}.") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(
            f'{path} needs the package safetensors: pip install "btrain[export]".'
        ) from error
    try:
        check_hash(path)
        return dict(load_file(path))
    except Exception as error:  # its own kind, and OSError
        raise UserError(f"{path} is not a readable checkpoint{_reason(error)}.") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f" ({error.strerror})"
    if isinstance(error, AsksForCodeError):
        return f": {error}; if you trust it, save its weights alone where it was made, {_RESAVING}"
    return f": {error}" if isinstance(error, RefusedError) else ""


_Found = tuple[str, Mapping[str, Tensor], str | None]
"""A state dict with its key, and the key of raw weights beside averaged ones."""


def _find(content: object) -> _Found | None:
    """Return the state dict in a checkpoint: averaged weights, else raw ones, else the only one
    there.
    """
    if is_state_dict(content):
        return "", content, None
    if not isinstance(content, Mapping):
        return None
    averaged, raw = (_first(content, wrappers) for wrappers in (_AVERAGED, _WRAPPERS))
    if averaged is not None:
        return averaged[0], averaged[1], None if raw is None else raw[0]
    if raw is not None:
        return raw[0], raw[1], None
    others = [(str(key), value) for key, value in content.items() if is_state_dict(value)]
    return (*others[0], None) if len(others) == 1 else None


def _first(
    content: Mapping[Any, Any], wrappers: tuple[str, ...]
) -> tuple[str, Mapping[str, Tensor]] | None:
    """Return the first state dict under one of these names, or under one that is found there."""
    for name in wrappers:
        inner = content.get(name)
        if is_state_dict(inner):
            return name, inner
        if isinstance(inner, Mapping):
            for wrapper in _WRAPPERS:
                if is_state_dict(innermost := inner.get(wrapper)):
                    return f"{name}.{wrapper}", innermost
    return None


def is_state_dict(content: object) -> TypeGuard[Mapping[str, Tensor]]:
    """Return whether it maps names to tensors, at least one."""
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    )


def fit(model: nn.Module, weights: Mapping[str, Tensor], origin: Path) -> None:
    """Load weights by our names; only BatchNorm's batch counters may be missing.

    Args:
        model: the network; its classifier is what it registers last.
        weights: by its names.
        origin: the file that the weights come from, for the error.

    Raises:
        UserError: names, shapes or types differ. The model is as it was.
    """
    weights = check_fit(model, weights, origin)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # a type that torch does not convert
        raise UserError(f"{origin} holds weights that cannot be copied into the model.") from error


def check_fit(model: nn.Module, weights: Mapping[str, Tensor], origin: Path) -> dict[str, Tensor]:
    """Return the weights, completed by BatchNorm's batch counters, if they are the model's.

    Raises:
        UserError: names, shapes or types differ.
    """
    own = model.state_dict()
    counters = {key: own[key] for key in own if key.endswith(".num_batches_tracked")}
    weights = {**counters, **weights}
    missing = [key for key in own if key not in weights]
    unknown = [key for key in weights if key not in own]
    if missing or unknown:
        differences = [f"it lacks {_listed(missing)}"] if missing else []
        differences += [f"the model has no {_listed(unknown)}"] if unknown else []
        raise UserError(
            f"{origin} is of another architecture than the model: {' and '.join(differences)}."
        )
    _check_shapes(own, weights, origin)
    return weights


def _listed(keys: list[str]) -> str:
    rest = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _check_shapes(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], origin: Path) -> None:
    wrong = [key for key in own if own[key].shape != theirs[key].shape]
    weight, bias = ["", "", *own][-2:]  # of the classifier, (K, features) and (K,)
    if wrong == [weight, bias] and theirs[weight].shape[1:] == own[weight].shape[1:]:
        classes, k = len(theirs[weight]), len(own[weight])
        raise UserError(f"{origin} has {counted(classes, 'class')}, the model {k}.")
    if wrong:
        key = wrong[0]
        more = f" ({len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
        raise UserError(
            f"{origin} does not fit the model: {key} is {_shape(theirs[key])} there and "
            f"{_shape(own[key])} in the model{more}."
        )
    for key in own:
        if own[key].is_floating_point() != theirs[key].is_floating_point():
            kind = _type(theirs[key])
            raise UserError(f"{origin} does not fit the model: {key} is of type {kind} there.")


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a single number"
