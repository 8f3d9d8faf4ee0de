"""What an interrupted attack has found, so that the same command goes on from there."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from btrain.evaluation.files import write_arrays
from btrain.untrusted.arrays import read_npz

_KEYS = ("identity", "stands", "pending", "round", "seconds")
_LARGEST = 64 << 20  # bytes


class Partial:
    """A file `<attack>.partial.npz` that belongs to one setting; others neither see nor keep it."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path = path
        self._identity = json.dumps(identity, sort_keys=True)
        self._since = time.perf_counter()
        self.seconds_before = 0.0  # that the interrupted evaluations took

    def load(self, examples: int) -> tuple[Tensor, Tensor, int] | None:
        """Which stand (n,), which are pending in a round (n,), and the round; None: start over.

        A file of another setting or a damaged one counts as none.
        """
        try:
            saved = read_npz(self._path, _KEYS, most=_LARGEST)
            if str(saved["identity"]) != self._identity:
                return None
            stands, pending = torch.tensor(saved["stands"]), torch.tensor(saved["pending"])
            number, seconds = int(saved["round"]), float(saved["seconds"])
        except Exception:  # a damaged archive raises many kinds
            return None
        if not stands.shape == pending.shape == (examples,) or stands.dtype != torch.bool:
            return None
        self.seconds_before = seconds
        return stands, pending, number

    def save(self, stands: Tensor, pending: Tensor, number: int) -> None:
        """Replaces what was kept."""
        write_arrays(
            self._path,
            identity=np.array(self._identity),
            stands=stands.numpy(),
            pending=pending.numpy(),
            round=np.array(number),
            seconds=np.array(self.seconds_before + time.perf_counter() - self._since),
        )

    def remove(self) -> None:
        """Once the attack is through."""
        self._path.unlink(missing_ok=True)
