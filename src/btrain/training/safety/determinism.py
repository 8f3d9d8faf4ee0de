"""The means to bit-equal runs on one machine, a GPU too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from btrain.errors import UserError


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Make torch choose algorithms that give the same bits each time, and restore its choice.

    To be entered before cuBLAS is used in the process, which reads its variable once.

    Raises:
        UserError: an operation has no such algorithm on this device.
    """
    if not wanted:
        yield
        return
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        with cudnn.flags(
            enabled=cudnn.enabled,
            benchmark=False,
            deterministic=True,
            allow_tf32=cudnn.allow_tf32,
        ):
            yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reason = str(error).split(".")[0].split("\n")[0]
        raise UserError(f"train.deterministic=true cannot be kept here: {reason}.") from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
