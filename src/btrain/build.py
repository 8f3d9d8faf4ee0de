"""The device and network of a configuration."""

from __future__ import annotations

import copy
import math
import os
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from btrain import models, own
from btrain.data import Data
from btrain.data.augmentation import to_unit
from btrain.errors import UserError, first_line
from btrain.settings import (
    Activation,
    ModelConfig,
    OwnModelConfig,
    Shortcut,
    WideResNetConfig,
    WidthConfig,
)
from btrain.settings.run import LibraryModelConfig, NamedModelConfig, PreActResNetConfig

_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")
_TRIED = 8  # images
_USUAL = 100  # channels, or layers; no network that has been published is wider and deeper
_DEEPEST = 10_000  # layers; the modules alone take longer to make than anyone waits
_BYTES = 8  # of memory that a weight takes at the least, with its gradient


def find_device(name: str) -> torch.device:
    """Return the device of a name; `auto` is the first CUDA device, or the CPU where there is none.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not _DEVICE.fullmatch(name):
        raise UserError(
            f"device={name} is no device; there are: auto, cpu, cuda, cuda:0, cuda:1, …."
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(f"device={name} cannot be used ({reason}); try auto or cpu.") from error
    return device


def as_current_gpu(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the one that torch uses inside where none is named; do nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that a device can still hand out; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(available[0]) if available else None


def check_size(model: ModelConfig, classes: int, shape: tuple[int, int, int]) -> None:
    """Make sure, ahead of making it, that a network of btrain's own is one that a machine can hold.

    Raises:
        UserError: `model.width` or `model.depth` is beyond that.
    """
    depth = model.depth if isinstance(model, WideResNetConfig) else 0
    if not isinstance(model, WidthConfig) or max(model.width, depth) <= _USUAL:
        return  # the first network without numbers that a process makes takes two seconds
    if depth > _DEEPEST:
        raise UserError(f"model.depth must be at most {_DEEPEST}, not {depth}.")
    size = "×".join(map(str, shape))
    named = f"model.width={model.width} makes a network for {size} images"
    try:
        with torch.device("meta"):
            network = make_model(model, classes, shape)
        weights = sum(parameter.numel() for parameter in network.parameters())
    except (RuntimeError, TypeError, OverflowError) as error:  # beyond 64 bits
        raise UserError(f"{named} that no memory holds.") from error
    needed, there = _BYTES * weights, _memory()
    if needed > there:
        raise UserError(
            f"{named} with {weights:,} weights, which need {needed / 2**30:,.0f} GiB with their "
            f"gradients; this machine has {there / 2**30:,.0f} GiB."
        )


def _memory() -> float:
    """Return the bytes of memory that this machine has; infinity where it does not tell."""
    if not hasattr(os, "sysconf"):  # on Windows
        return math.inf
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def make_model(model: ModelConfig, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Make the network of a configuration, for K classes of (C, H, W) images, freshly initialised.

    Raises:
        UserError: there is no such network, or the user's own code fails.
    """
    match model:
        case OwnModelConfig():
            network = own.call("model", model.factory, model.settings, classes=classes, shape=shape)
            if not isinstance(network, nn.Module):
                raise UserError(
                    f"model.factory={model.factory} must make a torch.nn.Module, not a thing of "
                    f"type {type(network).__name__}."
                )
            if model.factory.startswith(own.GIVEN):
                network = copy.deepcopy(network)
        case NamedModelConfig():
            network = models.verified.build(model.network, shape=shape, classes=classes)
        case LibraryModelConfig():
            name = model.architecture.value
            network = models.from_library(name, model.settings, classes, shape[0])
        case _:
            assert isinstance(model, WidthConfig)
            depth, activation, shortcut = None, Activation.relu, Shortcut.activated
            if isinstance(model, WideResNetConfig):
                depth, activation = model.depth, model.activation
            if isinstance(model, PreActResNetConfig):
                shortcut = model.shortcut
            return models.build(
                model.architecture.value,
                width=model.width,
                depth=depth,
                classes=classes,
                shape=shape,
                mean=model.mean,
                std=model.std,
                activation=activation.value,
                shortcut=shortcut.value,
            )
    normalise = models.normalisation(shape[0], model.mean, model.std)
    return network if normalise is None else models.Normalised(normalise, network)


def check_network(model: ModelConfig, network: nn.Module, data: Data) -> None:
    """Try a network that is not btrain's on one batch of its data; it is left as it was.

    Raises:
        UserError: it is not what training and attacks assume of a network.
    """
    if (what := _not_ours(model)) is not None:
        models.check(network, *_few(data), len(data.classes), what)


def doubts_of_network(model: ModelConfig, network: nn.Module, data: Data) -> list[str]:
    """Return a sentence if a network that is not btrain's gives probabilities for logits."""
    what = _not_ours(model)
    if what is None or not models.gives_probabilities(network, _few(data)[0]):
        return []
    return [
        f"{what} gives probabilities, rows of numbers from 0 to 1 that add up to 1; it should give "
        "the logits ahead of its softmax, for the losses have a softmax of their own."
    ]


def _not_ours(model: ModelConfig) -> str | None:
    """Return how a network that is not btrain's is named in a sentence; None for btrain's."""
    match model:
        case OwnModelConfig():
            return f"model.factory={model.factory}"
        case LibraryModelConfig():
            return f"model={model.architecture.value}"
    return None


def _few(data: Data) -> tuple[Tensor, Tensor]:
    """Return some training images in [0, 1] and their labels, to try a network on."""
    return to_unit(data.train.images[:_TRIED]), data.train.labels[:_TRIED]
