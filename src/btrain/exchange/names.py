"""One network, several names for its weights: ours, RobustBench's, TRADES', AWP's, AugMix', ….

Ours are RobustBench's but for the constants of the normalisation, and for the residual networks,
whose stages of blocks are numbered through.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

MEAN, STD = "normalise.mean", "normalise.std"

# DataParallel, RobustBench, torch.compile, and the attribute of a Lightning module
_WRAPPED = re.compile(r"^((module|model|_orig_mod|net|network)\.)+")
_AVERAGED = re.compile(
    r"^(module\.)?(ema|ema_model|model_ema|ema_net|net_ema|ema_network|averaged_model|swa_model)\."
)
# TRADES' and MART's second copy of the first stage, the network within robustness' attacker, and
# the counter of torch.optim.swa_utils.AveragedModel
_UNUSED = re.compile(r"(sub_block1|attacker)\.|n_averaged$")
_CONSTANTS = {"mu": MEAN, "sigma": STD}
_NORMALISATION = re.compile(
    r"(?:(?:normali[sz]e|normali[sz]er|normali[sz]ation|normali[sz]e_layer|norm|0)\.)?"
    r"(?:new_)?(?:(mean|mu)|(std|sigma))"
)
_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.(.+)")
_OF_A_SEQUENCE = re.compile(r"(\d+)\.(weight|bias)")
_SMALL_CNN = {"conv1": 4, "conv2": 4, "fc1": 2, "fc2": 2}  # layers with the dimensions of weights


def averaged(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the averaged weights of those that a module holds beside its raw ones.

    Their names lose that of the average; empty where there are none.
    """
    return {
        key[match.end() :]: value
        for key, value in theirs.items()
        if (match := _AVERAGED.match(key)) is not None
    }


def has_raw_beside_averaged(theirs: Iterable[str]) -> bool:
    """Return whether some of the names are of weights that are not an average's."""
    return any(key.endswith(".weight") and not _AVERAGED.match(key) for key in theirs)


def ours(theirs: Iterable[str]) -> dict[str, str | None]:
    """Return btrain's names of weights by their own; None for those that no forward pass ever uses.

    google-research/augmix calls the shortcut `conv_shortcut`; RobustBench's AugMix network holds
    `mu` and `sigma`, robustness' `normalizer.new_mean`, and an `nn.Sequential` of a normalisation
    and a network begins every name with 0 or 1.
    """
    inner = {key: _WRAPPED.sub("", key) for key in theirs}
    used = {key: name for key, name in inner.items() if not _UNUSED.match(name)}
    places = {name.partition(".")[0] for name in used.values() if _constant(name) is None}
    if places == {"1"}:
        used = {key: _WRAPPED.sub("", name.removeprefix("1.")) for key, name in used.items()}
    return {key: _ours(used[key]) if key in used else None for key in inner}


def _ours(name: str) -> str:
    return _constant(name) or name.replace(".conv_shortcut.", ".convShortcut.")


def _constant(name: str) -> str | None:
    """Return `normalise.mean` or `normalise.std` where the name is of one of these constants."""
    match = _NORMALISATION.fullmatch(name)
    return None if match is None else MEAN if match[1] else STD


def of_residual_networks(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return by our names the weights of a (PreAct)ResNet whose stages are `layer1` to `layer4`.

    kuangliu/pytorch-cifar names them so, and TRADES, AWP, FastAT and others follow it.
    """
    blocks = {match.group(1, 2) for match in map(_BLOCK.match, theirs) if match is not None}
    order = sorted(blocks, key=lambda block: (int(block[0]), int(block[1])))
    numbers = {block: number for number, block in enumerate(order)}
    weights = {}
    for key, value in theirs.items():
        name = re.sub(r"^linear\.", "fc.", key)
        if (match := _BLOCK.match(key)) is not None:
            inside = match[3]
            if f"layer{match[1]}.{match[2]}.shortcut.1.weight" not in theirs:  # of BatchNorm
                inside = inside.replace("shortcut.0.", "shortcut.")
            name = f"blocks.{numbers[match.group(1, 2)]}.{inside}"
        weights[name] = value
    return weights


def of_a_sequence(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a sequence of the layers of `small_cnn` by our names; else as given.

    FastAT's MNIST network is an `nn.Sequential` of them.
    """
    others = {key for key in theirs if key not in (MEAN, STD)}
    places = {int(m[1]) for m in map(_OF_A_SEQUENCE.fullmatch, others) if m is not None}
    keys = {
        f"{place}.{kind}": f"{layer}.{kind}"
        for place, layer in zip(sorted(places), _SMALL_CNN, strict=False)
        for kind in ("weight", "bias")
    }
    if others != keys.keys() or len(places) != len(_SMALL_CNN):
        return dict(theirs)
    weights = {keys.get(key, key): value for key, value in theirs.items()}
    dimensions = {layer: weights[f"{layer}.weight"].dim() for layer in _SMALL_CNN}
    return weights if dimensions == _SMALL_CNN else dict(theirs)


def robustbench(weights: Mapping[str, Tensor], *, sub_block1: bool) -> dict[str, Tensor]:
    """Return a WideResNet's weights as `WideResNet` and, with a normalisation inside,
    `Hendrycks2020AugMixWRNNet` of RobustBench load them with `strict=True`.

    Args:
        weights: by our names.
        sub_block1: whether to add that stage, a copy of the first, for classes that insist on it.
    """
    channels = weights["conv1.weight"].shape[1]
    theirs = {key: value for key, value in weights.items() if key not in (MEAN, STD)}
    for name, key in _CONSTANTS.items():
        if key in weights:
            theirs[name] = weights[key].reshape(1, -1, 1, 1).expand(1, channels, 1, 1).clone()
    if sub_block1:
        first = {key: value for key, value in weights.items() if key.startswith("block1.")}
        theirs |= {f"sub_{key}": value.clone() for key, value in first.items()}
    return theirs
