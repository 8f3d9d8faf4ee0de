"""The worst case over several attacks: each is run on what the ones before it left standing.

What an interrupted one has found is kept in a file, so that the same command goes on from there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from btrain.evaluation.examples import batches
from btrain.evaluation.result import write_arrays
from btrain.terminal import tell
from btrain.untrusted.arrays import read_npz

_KEYS = ("identity", "stands", "pending", "round", "seconds")
_LARGEST = 64 << 20  # bytes

Attack = Callable[[int, Tensor], Tensor]
"""(which attack, indices of examples (m,) in ascending order) -> whether each is fooled (m,)"""


def worst_case(
    attack: Attack,
    stands: Tensor,
    *,
    rounds: Sequence[str],
    batch_size: int,
    partial: Partial | None = None,
    show_progress: bool = False,
) -> Tensor:
    """Return which examples no round fools.

    A round takes the standing examples in full batches of `batch_size`, so that later rounds cost
    what is left. After every batch the state is kept in `partial`, from which an interrupted
    evaluation goes on. Where progress is wanted and no bar can be drawn, each of several rounds is
    told in a line.

    Args:
        attack: called with the number of a round and the examples of a batch.
        stands: which examples to begin with, (n,) bool on the CPU.
        rounds: their names, for the progress bar.

    Returns:
        (n,) bool on the CPU.
    """
    stands = stands.clone()
    first, pending = 0, None
    if partial is not None and (saved := partial.load(len(stands))) is not None:
        stands, pending, first = saved
    pending = stands if pending is None else pending
    later = len(rounds) - first - 1
    with _bar(int(pending.sum()) + later * int(stands.sum()), show_progress) as bar:
        for number in range(first, len(rounds)):
            indices, later = pending.nonzero().flatten(), len(rounds) - number - 1
            pending = torch.zeros_like(stands).index_fill_(0, indices, True)
            bar.set_description(rounds[number])
            for batch in batches(indices, batch_size):
                stands[batch] = ~attack(number, batch).cpu()
                pending[batch] = False
                if partial is not None:
                    partial.save(stands, pending, number)
                fooled = len(batch) - int(stands[batch].sum())
                bar.set_postfix_str(f"{int(stands.sum())} stand", refresh=False)
                bar.total -= later * fooled
                bar.update(len(batch))
            pending = stands
            if show_progress and bar.disable and len(rounds) > 1:
                tell(
                    f"{rounds[number]}: {int(stands.sum())} of {len(stands)} images are still "
                    "classified right"
                )
    return stands


def _bar(attacks: int, show: bool) -> Any:
    """Return a bar of all rounds, of an attack on an image each: it tells what is left of all."""
    from tqdm import tqdm

    hidden = None if show else True
    return tqdm(total=attacks, unit="img", leave=False, disable=hidden)


class Partial:
    """A file `<attack>.partial.npz` that belongs to one setting; others neither see nor keep it."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path = path
        self._identity = json.dumps(identity, sort_keys=True)
        self._since = time.perf_counter()
        self.seconds_before = 0.0  # that the interrupted evaluations took

    def load(self, examples: int) -> tuple[Tensor, Tensor, int] | None:
        """Return which stand (n,), which are pending in a round (n,), and the round, or None.

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
        """Keep a state in place of the one before."""
        write_arrays(
            self._path,
            identity=np.array(self._identity),
            stands=stands.numpy(),
            pending=pending.numpy(),
            round=np.array(number),
            seconds=np.array(self.seconds_before + time.perf_counter() - self._since),
        )

    def remove(self) -> None:
        """Delete the file, once the attack is through."""
        self._path.unlink(missing_ok=True)
