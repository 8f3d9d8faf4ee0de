"""The places where numbers may be short, and those where they must not be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btrain.errors import UserError

T = TypeVar("T")
_SLOW = 2  # times float32's time: more than the noise of a timing
_FEWEST = 8  # input channels


def full(logits: Tensor) -> Tensor:
    """Return logits in float32, or float64 if they are; losses and SVar are computed on these."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def bf16_hint(key: str, device: torch.device) -> str | None:
    """Return a sentence for who chose bf16, as `key`, on a CPU that is slower in it; else None."""
    if device.type != "cpu" or (slowdown := bf16_slowdown()) < _SLOW:
        return None
    return (
        f"{key}=bf16: a convolution takes {slowdown:.0f} times as long as in float32 on this "
        f"processor; {key}=float32 is faster here."
    )


def bf16_slowdown() -> float:
    """Return how many times as long as in float32 a convolution takes in bf16 on this CPU.

    Timed, each by the fastest of three; a second or less where it is slow.
    """

    def seconds(dtype: torch.dtype) -> float:
        images, kernel = (
            torch.ones(32, 16, 32, 32, dtype=dtype),
            torch.ones(16, 16, 3, 3, dtype=dtype),
        )
        times = []
        for _ in range(4):  # the first one chooses the kernel
            began = time.perf_counter()
            F.conv2d(images, kernel, padding=1)
            times.append(time.perf_counter() - began)
        return min(times[1:])

    return seconds(torch.bfloat16) / seconds(torch.float32)


@contextmanager
def exactly_float32(device: torch.device) -> Iterator[None]:
    """Allow no autocast inside, and no TF32 or bf16 in convolutions and products of float32.

    cuDNN's convolutions use TF32 unless they are told not to; products of matrices where the
    caller allowed it. The permissions of before come back afterwards.
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


@contextmanager
def products_like_convolutions() -> Iterator[None]:
    """Allow a GPU's products of float32 matrices TF32 where its convolutions may use it."""
    matmul = torch.backends.cuda.matmul
    products = _legacy(lambda: matmul.allow_tf32)
    convolutions = _legacy(lambda: torch.backends.cudnn.allow_tf32)
    if products is None or convolutions is None:  # somebody chose in torch's newer words
        yield
        return
    matmul.allow_tf32 = convolutions
    try:
        yield
    finally:
        matmul.allow_tf32 = products


def _units() -> list[Any]:
    """Return what has a precision of its own in torch 2.9 and later; none in earlier ones."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    names = ("conv", "rnn", "matmul")
    units = [
        torch.backends.cuda.matmul,
        *(getattr(b, n, None) for b in (cudnn, mkldnn) for n in names),
    ]
    return [unit for unit in units if hasattr(unit, "fp32_precision")]


def _legacy(read: Callable[[], T]) -> T | None:
    """Read a setting of the older interface; None where torch refuses, once the newer was used."""
    try:
        return read()
    except RuntimeError:
        return None


def to_channels_last(model: nn.Module) -> nn.Module:
    """Lay out the model's weights for convolutions that compute channel by channel last; return it.

    The images may stay as they are: the first convolution turns them.

    Raises:
        UserError: torch would write beyond a convolution's memory.
    """
    narrow = [module for module in model.modules() if _writes_beyond_its_memory(module)]
    if narrow:
        raise UserError(
            "train.channels_last=true is not safe with this network on this processor: one of its "
            f"convolutions of 1×1 with a stride has {narrow[0].in_channels} input channels, and "
            f"torch needs {_FEWEST} there."
        )
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _writes_beyond_its_memory(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether torch 2.13's oneDNN would, in `channels_last`; seen with AVX2 alone."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels < _FEWEST
        and (module.weight.device.type, module.weight.dtype) == ("cpu", torch.float32)
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
    )
