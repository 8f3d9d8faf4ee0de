"""One network, several names for its weights: ours, RobustBench's, TRADES' and AugMix'.

Ours are RobustBench's but for the constants of the normalisation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

MEAN, STD = "normalise.mean", "normalise.std"

_WRAPPED = re.compile(r"^((module|model|_orig_mod)\.)+")  # DataParallel, RobustBench, torch.compile
_UNUSED = "sub_block1."
_CONSTANTS = {"mu": MEAN, "sigma": STD}


def ours(theirs: str) -> str | None:
    """btrain's name of a weight; None for `sub_block1`, which no forward pass ever calls.

    TRADES' and MART's releases carry that second copy of the first stage; google-research/augmix
    calls the shortcut `conv_shortcut`; RobustBench's AugMix network holds `mu` and `sigma`.
    """
    name = _WRAPPED.sub("", theirs)
    if name.startswith(_UNUSED):
        return None
    return _CONSTANTS.get(name, name.replace(".conv_shortcut.", ".convShortcut."))


def robustbench(weights: Mapping[str, Tensor], *, sub_block1: bool) -> dict[str, Tensor]:
    """A WideResNet's weights as `WideResNet` and, with a normalisation inside,
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
