"""The protocol of a method: what is done with one batch, and what it remembers for the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from btrain.data import Batch, Data
from btrain.methods.statistics import StepStats

Memory = dict[str, Tensor]
"""The tensors that a method remembers between batches, by name; its phases change them."""


class Loss(NamedTuple):
    """The end of a method's second phase.

    Attributes:
        value: what the weights descend, (), with its graph.
        stats: sums over the examples for the log; None for one of several updates of a batch that
            the log does not show.
        share: of the whole batch, where several processes share it.
        last: whether the update follows; False for a part of a batch whose gradients are added to
            those of the parts to come.
    """

    value: Tensor
    stats: StepStats | None
    share: float = 1.0
    last: bool = True


class Reach(NamedTuple):
    """The distance that a method's training images may have from the clean ones.

    Attributes:
        radius: in this norm, in pixel units; None for any distance.
        slack: by which they may leave the pixel box.
    """

    radius: float | None
    norm: str = "linf"
    slack: float = 0.0


class Method(Protocol):
    """The work on a batch, in two phases around which others can stand.

    A method is made for an epoch (see `make.make_methods`); it holds settings and no state. All
    that lasts from one batch to the next is in the memory, which a checkpoint keeps.

    Attributes:
        in_units: whether its units an example compare with the plain defense's.
        by_example: names of what its memory may hold a row of for each training example. A batch
            changes the rows of its own examples alone.
    """

    in_units: ClassVar[bool]
    by_example: ClassVar[frozenset[str]]

    @property
    def eq7(self) -> bool:
        """Return whether eq. 7 describes what it costs."""
        ...

    @property
    def reach(self) -> Reach:
        """Return how far from the clean images it trains."""
        ...

    def memory(self, data: Data, device: torch.device) -> Memory:
        """Return what is remembered before the first batch."""
        ...

    def examples(
        self, network: nn.Module, batch: Batch, memory: Memory, generator: torch.Generator
    ) -> Iterator[Any]:
        """Yield what the weights are to learn from; each is one update, made before the next.

        Or one of the parts of an update: see `Loss.last`.
        """
        ...

    def loss(
        self, network: nn.Module, examples: Any, memory: Memory, generator: torch.Generator
    ) -> Loss:
        """Return the loss of what `examples` yielded, and the statistics of the batch."""
        ...

    def expected_units(self, fractions: tuple[float, float, float]) -> float | None:
        """Return units an example of a batch with these F_B, F_R, F_O; None if they do not tell.

        If all batches have fractions of their own, whatever the scores, it is by those. A log with
        these fractions will have it as `units_per_example`, but for batches whose single perturbed
        example takes another one along, and epochs that leave examples out.
        """
        ...
