"""A network that never sees more than so many images at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class InParts(nn.Module):
    """The same logits from several passes, so that memory bounds the passes and not the batches.

    An attack whose random numbers are drawn for whole batches can thus keep its batches whatever
    the memory. Where gradients are wanted, the backward pass computes each part once more, and the
    activations of one part are all that is kept.
    """

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__()
        self.model, self.most = model, most

    def forward(self, x: Tensor) -> Tensor:
        """(m, C, H, W) -> (m, K)"""
        parts = torch.split(x, self.most)
        if len(parts) > 1 and x.requires_grad and torch.is_grad_enabled():
            return torch.cat([checkpoint(self.model, part, use_reentrant=False) for part in parts])
        return torch.cat([self.model(part) for part in parts])
