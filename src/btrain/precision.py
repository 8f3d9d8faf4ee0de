"""Where numbers must not be short."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def full(logits: Tensor) -> Tensor:
    """Logits in float32, or in float64 if they are; losses and SVar are computed on these."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def exactly_float32(device: torch.device) -> Iterator[None]:
    """No autocast inside, and no TF32, which cuDNN convolutions use unless they are told not to."""
    cudnn = torch.backends.cudnn
    with (
        torch.autocast(device.type, enabled=False),
        cudnn.flags(
            enabled=cudnn.enabled,
            benchmark=cudnn.benchmark,
            deterministic=cudnn.deterministic,
            allow_tf32=False,
        ),
    ):
        yield
