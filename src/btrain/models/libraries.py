"""Networks of torchvision and timm, by the libraries' own names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from btrain.data.download import import_torchvision
from btrain.errors import UserError, first_line

_FETCHES = re.compile(r"weights|pretrained|checkpoint|cache_dir")
"""Settings by which a library downloads or reads files, which a run from elsewhere must not ask
for."""


def from_library(
    library: str, settings: Mapping[str, Any], classes: int, channels: int
) -> nn.Module:
    """Return a freshly initialised network of a library, drawn from torch's global random state.

    Args:
        library: torchvision or timm.
        settings: the network, by `name` (torchvision) or `model_name` (timm), and more that the
            library's function takes.

    Raises:
        UserError: the library is missing, or it has no such network.
    """
    key = {"torchvision": "name", "timm": "model_name"}[library]
    name = settings.get(key)
    example = f"model.settings.{key}=resnet18"
    if not isinstance(name, str) or not re.fullmatch(r"[\w.]+", name):
        raise UserError(f"model={library} needs the name of a network, as in {example}.")
    rest = {setting: value for setting, value in settings.items() if setting != key}
    for setting in rest:
        if _FETCHES.search(setting):
            raise UserError(
                f"model.settings.{setting} is not taken; a network starts from a file's weights "
                "with model.weights=FILE."
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about image readers, and tomorrow's defaults
        module = _imported(library)
        try:
            if library == "timm":
                network = module.create_model(name, num_classes=classes, in_chans=channels, **rest)
            elif name in module.list_models(module=module):
                network = module.get_model(name, weights=None, num_classes=classes, **rest)
            else:
                raise ValueError("torchvision.models has none of that name that classifies images")
        except Exception as error:  # each network raises its own kinds
            raise UserError(f"model={library} cannot make {name}: {first_line(error)}.") from error
    assert isinstance(network, nn.Module)
    return network


def _imported(library: str) -> ModuleType:
    try:
        torchvision = import_torchvision()  # timm needs it, too
        if library == "timm":
            import timm as module
        else:
            module = torchvision.models
    except ModuleNotFoundError as error:
        if error.name != library:
            raise UserError(f"{library} cannot be imported: {first_line(error)}.") from error
        extra = "btrain[timm]" if library == "timm" else library
        raise UserError(f"model={library} needs {library}: pip install '{extra}'.") from error
    except (ImportError, RuntimeError, OSError) as error:  # one that was built for another torch
        raise UserError(
            f"model={library} cannot be used, for {library} does not go with torch "
            f"{torch.__version__} ({first_line(error)})."
        ) from error
    found: ModuleType = module
    return found
