"""Stand-in until the exchange is merged: weights of a plain state dict."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from btrain.errors import UserError


def load_weights(model: nn.Module, path: Path) -> None:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is not a readable checkpoint.") from error
    weights = content.get("state_dict", content)
    own = model.state_dict()
    if own.keys() != weights.keys():
        different = sorted(own.keys() ^ weights.keys())[:3]
        raise UserError(f"{path} is of another architecture: {', '.join(different)}.")
    if any(own[key].shape != weights[key].shape for key in own):
        raise UserError(f"{path} does not fit the model.")
    model.load_state_dict(weights)
