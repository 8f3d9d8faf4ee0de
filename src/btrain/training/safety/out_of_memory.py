"""The one sentence for a run that needs more memory than there is."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from btrain.errors import UserError

_GIB = 2**30

# The CPU's allocator, the driver and the libraries of a GPU have no exception of their own.
_OTHERS = re.compile(r"can't allocate memory|CUDA error: out of memory|_STATUS_ALLOC_FAILED")


@contextmanager
def explained_memory(device: torch.device, what: str, advice: str) -> Iterator[None]:
    """Turn "out of memory" into a sentence.

    Args:
        what: what needs the memory, with its size: `train.batch_size=128`.
        advice: what to change.

    Raises:
        UserError: memory ran out; it names the peak.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        asked = re.search(r"[Tt]ried to allocate (\S+ ?[KMG]?i?B|\d+ bytes)", str(error))
        if not ran_out(error):
            raise
        wanted = f", {asked.group(1)} more were asked for" if asked else ""
        raise UserError(
            f"Memory on {device} ran out with {what} (peak {_peak(device)}{wanted}); {advice}."
        ) from error


def smaller_batch(accumulate: int) -> str:
    """Return the advice where a training batch does not fit that goes in so many parts."""
    more = f"train.accumulate={2 * accumulate}"
    return f"{more} where it goes, a smaller batch or a smaller model may fit"


def ran_out(error: Exception) -> bool:
    """Return whether an error says that there is no memory left."""
    exhausted = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return exhausted or _OTHERS.search(str(error)) is not None


def _peak(device: torch.device) -> str:
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device) / _GIB
        has = torch.cuda.get_device_properties(device).total_memory / _GIB
        return f"{most:.1f} of {has:.1f} GiB"
    try:
        import resource
    except ImportError:  # not on Windows
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 1024  # of bytes, or of KiB
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB:.1f} GiB"
