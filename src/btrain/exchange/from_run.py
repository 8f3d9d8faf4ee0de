"""Stand-in until the exchange is merged: a run folder's or checkpoint's network."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn

from btrain import config as configs
from btrain import models
from btrain.errors import UserError
from btrain.schema import Config, DatasetName

_SHAPES = {
    DatasetName.cifar10: (3, 32, 32),
    DatasetName.cifar100: (3, 32, 32),
    DatasetName.mnist: (1, 28, 28),
    DatasetName.digits: (1, 8, 8),
}


def load_run(path: Path, which: Literal["last", "best"] = "last") -> tuple[Config, nn.Module]:
    from omegaconf import OmegaConf

    if path.is_dir():
        path = path / "checkpoints" / f"{which}.pt"
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is not a readable checkpoint.") from error
    if not isinstance(content, dict) or "config" not in content:
        raise UserError(f"{path} is not a checkpoint of a run of btrain's.")
    merged = OmegaConf.merge(OmegaConf.structured(Config), content["config"])
    config = configs.from_hydra(merged, ())
    weights = content["state"]["model"]
    size = config.dataset.image_size or 0
    model = models.build(
        config.model.architecture.value,
        width=config.model.width,
        depth=config.model.depth,
        classes=len(next(reversed(weights.values()))),
        shape=_SHAPES.get(config.dataset.name, (3, size, size)),
        mean=config.model.mean,
        std=config.model.std,
    )
    model.load_state_dict(weights)
    return config, model.eval()
