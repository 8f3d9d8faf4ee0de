"""The device's own clock, and what the machine can do."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from btrain.precision import products_like_convolutions

_PRODUCT = {"cpu": 1024, "cuda": 8192}  # rows of the square matrices


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long `work` takes by CUDA events on a GPU, else by this process' CPU time.

    CPU time does not count what other processes take; garbage collection waits.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        if device.type != "cuda":
            began = time.process_time()
            work()
            return time.process_time() - began
        begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        stream = torch.cuda.current_stream(device)  # an event's own choice would be cuda:0's
        torch.cuda.synchronize(device)
        begin.record(stream)
        work()
        end.record(stream)
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end)) / 1000
    finally:
        if collects:
            gc.enable()


class Product:
    """A product of two square matrices, whose speed stands for the machine's best.

    On a GPU float32 is TF32 where convolutions are allowed it, for it is these that are compared.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        n = _PRODUCT[device.type]
        generator = torch.Generator(device).manual_seed(0)
        self._a, self._b = (
            torch.rand(n, n, generator=generator, device=device).to(dtype) for _ in range(2)
        )
        self.flops = 2 * n**3

    def run(self) -> None:
        """Take one product."""
        with products_like_convolutions():
            torch.mm(self._a, self._b)
