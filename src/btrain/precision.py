"""Where numbers must not be short."""

import torch
from torch import Tensor


def full(logits: Tensor) -> Tensor:
    """Logits in float32, or in float64 if they are; losses and SVar are computed on these."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
