"""Where numbers may be short, and where they must not be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def full(logits: Tensor) -> Tensor:
    """Logits in float32, or in float64 if they are; losses and SVar are computed on these."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def exactly_float32(device: torch.device) -> Iterator[None]:
    """No autocast inside, and no TF32 or bf16 in convolutions and products of float32 matrices.

    cuDNN's convolutions use TF32 unless they are told not to; products of matrices where the
    caller allowed it. What was allowed before is allowed again afterwards.
    """
    units = _units()
    precisions = [unit.fp32_precision for unit in units]
    products = _legacy(torch.get_float32_matmul_precision)
    convolutions = _legacy(lambda: torch.backends.cudnn.allow_tf32)
    with torch.autocast(device.type, enabled=False):
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        for unit in units:
            unit.fp32_precision = "ieee"
        try:
            yield
        finally:
            if products is not None:
                torch.set_float32_matmul_precision(products)
            if convolutions is not None:
                torch.backends.cudnn.allow_tf32 = convolutions
            for unit, precision in zip(units, precisions, strict=True):
                unit.fp32_precision = precision


def _units() -> list[Any]:
    """What has a precision of its own in torch 2.9 and later; none in earlier ones."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    names = ("conv", "rnn", "matmul")
    units = [
        torch.backends.cuda.matmul,
        *(getattr(b, n, None) for b in (cudnn, mkldnn) for n in names),
    ]
    return [unit for unit in units if hasattr(unit, "fp32_precision")]


def _legacy(read: Callable[[], T]) -> T | None:
    """A setting of the older interface, which torch refuses to read once the newer one was used."""
    try:
        return read()
    except RuntimeError:
        return None


def to_channels_last(model: nn.Module) -> nn.Module:
    """The model itself, its weights laid out so that convolutions compute channel by channel last.

    The images may stay as they are: the first convolution turns them.
    """
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
