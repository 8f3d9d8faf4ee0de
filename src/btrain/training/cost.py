"""The work of a network, for the log's FLOPs."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from btrain.attacks import evaluation_mode


def forward_flops(model: nn.Module, shape: tuple[int, int, int], device: torch.device) -> int:
    """Floating-point operations of one image's forward pass, by torch's counter.

    A multiply-add counts as two. `shape` is (C, H, W).
    """
    with evaluation_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape, device=device))
    return int(counter.get_total_flops())
