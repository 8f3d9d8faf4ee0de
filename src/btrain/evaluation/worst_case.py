"""The worst case over several attacks: each is run on what the ones before it left standing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from btrain.evaluation.examples import batches
from btrain.evaluation.partial import Partial

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
    """Which examples no round fools.

    A round takes the standing examples in full batches of `batch_size`, so that later rounds cost
    what is left. After every batch the state is kept in `partial`, from which an interrupted
    evaluation goes on.

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
    for number in range(first, len(rounds)):
        indices = (stands if pending is None else pending).nonzero().flatten()
        pending = torch.zeros_like(stands).index_fill_(0, indices, True)
        with _bar(rounds[number], len(indices), show_progress) as bar:
            for batch in batches(indices, batch_size):
                stands[batch] = ~attack(number, batch).cpu()
                pending[batch] = False
                if partial is not None:
                    partial.save(stands, pending, number)
                bar.set_postfix_str(f"{int(stands.sum())} stand", refresh=False)
                bar.update(len(batch))
        pending = None
    return stands


def _bar(name: str, examples: int, show: bool) -> Any:
    from tqdm import tqdm

    hidden = None if show else True
    return tqdm(total=examples, desc=name, unit="image", leave=False, disable=hidden)
