"""Robust Bird: a dense network is trained until its largest weights stay the same, then pruned."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from btrain.controllers.sparsity.controller import Sparsity, Thinned, binary
from btrain.controllers.sparsity.masks import Masks, distance, top, top_of_all
from btrain.controllers.sparsity.scores import magnitude
from btrain.terminal import counted

log = logging.getLogger("btrain")


@dataclass(frozen=True)
class Ticket:
    """The rule by which the search ends, and what it leaves of the network.

    Attributes:
        kept: how many weights stay.
        density: the share of the convolutions' weights in the masks that are compared.
        threshold: the share of entries in which the newest of them may differ from each other one.
        window: how many are compared, of as many epochs.
        epochs: of the search at most.
        rewind: the epoch of the search with whose weights the run begins, 0 for the fresh ones;
            None for those that the ticket was drawn from, as where it comes earlier.
    """

    kept: int
    density: float
    threshold: float
    window: int
    epochs: int
    rewind: int | None


class RobustBird(Sparsity):
    """Masks of ones while a ticket is searched for, and those of the largest weights from then on.

    Attributes:
        searching: whether the ticket is still to be drawn.
        searched: epochs of the search so far.
        recent: the masks that are compared, the newest last, (n,) bool each.
        start: weights and statistics to go back to, where that is wanted and they are known.
    """

    def __init__(self, thinned: Thinned, model: nn.Module, ticket: Ticket) -> None:
        ones: Masks = {name: torch.ones_like(w.detach()) for name, w in thinned.weights.items()}
        super().__init__(thinned, ones)
        self.ticket, self._model = ticket, model
        self.searching, self.searched = True, 0
        self.recent: list[Tensor] = []
        self.start: dict[str, Tensor] | None = self._weights() if ticket.rewind == 0 else None

    def look(self) -> float | None:
        """Compare the largest weights of an epoch with those of the epochs before.

        Return the largest distance, None until there are enough to compare; draw the ticket if it
        is small enough, or the search over.
        """
        self.searched += 1
        if self.searched == self.ticket.rewind:
            self.start = self._weights()
        self.recent = [*self.recent, self._largest()][-self.ticket.window :]
        apart = None
        if len(self.recent) == self.ticket.window:
            *others, newest = self.recent
            apart = max(distance(newest, other) for other in others)
        found = apart is not None and apart <= self.ticket.threshold
        if found or self.searched == self.ticket.epochs:
            self.draw()
        return apart

    def draw(self) -> None:
        """Mask all but the largest weights."""
        masks, self.emptied = top_of_all(magnitude(self.thinned.weights), self.ticket.kept)
        for name, mask in masks.items():
            self.masks[name].copy_(mask)
        if self.start is not None:
            self._model.load_state_dict(self.start)
        elif self.ticket.rewind is not None:
            log.warning(
                "The ticket is there after %s, before epoch %d, whose weights "
                "sparsity.rewind=epoch asks for; the run begins with those it was drawn from.",
                counted(self.searched, "epoch"), self.ticket.rewind,
            )  # fmt: skip
        self.searching, self.recent, self.start = False, [], None
        self.refresh()

    def _largest(self) -> Tensor:
        """Return which weights of convolutions are the largest, (n,) bool."""
        parts = [w.detach().abs().flatten() for w in self._compared]
        flat = torch.cat(parts)
        return top(flat, max(1, round(self.ticket.density * len(flat)))) > 0

    @property
    def _compared(self) -> list[nn.Parameter]:
        weights = [*self.thinned.weights.values()]
        return [w for w in weights if w.dim() > 2] or weights

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._model.state_dict().items()}

    def columns(self) -> dict[str, Any]:
        """Return densities and shares, and how long the search was."""
        return super().columns() | {"search_epochs": self.searched}

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values, those of the search among them."""
        search = {
            "searching": self.searching,
            "searched": self.searched,
            "recent": self.recent,
            "start": self.start,
        }
        return super().state_dict() | {"search": search}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: masks or weights of other shapes, or masks that are not binary.
        """
        super().load_state_dict(saved)
        search, size = saved["search"], sum(w.numel() for w in self._compared)
        recent, start = search["recent"], search["start"]
        if type(search["searching"]) is not bool or type(search["searched"]) is not int:
            raise ValueError("no search")
        if any(mask.shape != (size,) or not binary(mask) for mask in recent):
            raise ValueError("a mask of another shape, or one that is not binary")
        weights = self._model.state_dict()
        if start is not None and {k: v.shape for k, v in start.items()} != {
            k: v.shape for k, v in weights.items()
        }:
            raise ValueError("weights of another network")
        device = self.memory["macs_share"].device
        self.searching, self.searched = search["searching"], search["searched"]
        self.recent = [mask.to(device) for mask in recent]
        self.start = None if start is None else {k: v.to(device) for k, v in start.items()}
