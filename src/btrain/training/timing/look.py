"""The things one step does beside taking time: memory, copies to the host, kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

MEGABYTE = 2**20


class Look(NamedTuple):
    """The findings of one step: the most memory beyond what was there before, and counts.

    Attributes:
        kernels: launched on the GPU; None on the CPU.
    """

    peak_bytes: int
    host_copies: int
    kernels: int | None


def look(work: Callable[[], None], device: torch.device) -> Look:
    """Run `work` once or twice more, watched and therefore slower."""
    if device.type == "cuda":
        return _look_cuda(work, device)
    reads, watch = _HostReads(), _Watch()
    with reads, watch:
        work()
    return Look(watch.peak, reads.count + watch.scalars, None)


def _look_cuda(work: Callable[[], None], device: torch.device) -> Look:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as profiler:  # torch 2.11 warns without
        work()
        torch.cuda.synchronize(device)
    names = [event.name for event in profiler.events()]
    copies = sum(name.startswith("Memcpy DtoH") for name in names)
    launches = sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for name in names)
    return Look(peak, copies, launches)


class _HostReads(TorchFunctionMode):
    """A counter of the reads of a whole tensor that would be copies if it lay on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += getattr(func, "__name__", "") in ("tolist", "numpy")
        return func(*args, **(kwargs or {}))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A counter of reads of single numbers and of masks' sizes, and a sum of the storages alive.

    Memory that an operation allocates and frees by itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scalars = self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._overloadpacket.__name__
        masked = name.startswith("index") and any(map(_is_mask, _tensors(args[1:2])))
        self.scalars += masked or name in ("_local_scalar_dense", "nonzero")
        kwargs = kwargs or {}
        inputs = {id(t.untyped_storage()) for t in _tensors((*args, *kwargs.values()))}
        result = func(*args, **kwargs)
        for tensor in _tensors((result,)):
            storage = tensor.untyped_storage()
            if id(storage) not in inputs and id(storage) not in self._alive:
                self._born(storage)
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self._alive.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Return the tensors among an operation's arguments or results, and in their lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _is_mask(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bool, torch.uint8)
