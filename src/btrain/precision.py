"""Where numbers may be short, and where they must not be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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


def to_channels_last(model: nn.Module) -> nn.Module:
    """The model itself, its weights laid out so that convolutions compute channel by channel last.

    The images may stay as they are: the first convolution turns them.
    """
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
