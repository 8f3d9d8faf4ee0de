"""From a configuration to its device, data and network."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from btrain import models
from btrain.data import Data, load
from btrain.errors import UserError, first_line
from btrain.settings import Config, ModelConfig


def find_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, or the CPU where there is none.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(f"device={name} cannot be used ({reason}); try auto or cpu.") from error
    return device


def meant(device: torch.device) -> AbstractContextManager[object]:
    """Where no GPU is named inside, it is this one: of several processes each has its own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def load_data(config: Config, device: torch.device) -> Data:
    dataset = config.dataset
    return load(
        dataset.name.value,
        Path(dataset.root),
        device=device,
        download=dataset.download,
        image_size=dataset.image_size,
        train_examples=dataset.train_examples,
        test_examples=dataset.test_examples,
        val_examples=dataset.val_examples,
    )


def make_model(model: ModelConfig, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """The network of a configuration, for K classes of (C, H, W) images, freshly initialised."""
    return models.build(
        model.architecture.value,
        width=model.width,
        depth=model.depth,
        classes=classes,
        shape=shape,
        mean=model.mean,
        std=model.std,
    )
