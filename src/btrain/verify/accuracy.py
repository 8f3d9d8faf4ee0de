"""Verified accuracy: how many images no attack within ε can have misclassified."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from btrain.errors import UserError
from btrain.terminal import counted
from btrain.verify import bounds
from btrain.verify.graph import Graph, evaluating, trace

_BATCH = 500
"""Images between two reports of progress."""


@dataclass(frozen=True)
class Verification:
    """One engine's verdicts at one ε, image by image."""

    engine: str
    epsilon: float
    verified: Tensor
    """(m,) bool; never true for a misclassified image."""
    seconds: float
    """The seconds of all threads together, on a CPU."""

    @property
    def accuracy(self) -> float:
        """Return the verified images' share of all."""
        return self.verified.double().mean().item()


class VerifiedAndBrokenError(Exception):
    """An image was verified and is misclassified within its box: the bounds are wrong."""

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = tuple(indices)
        shown = ", ".join(map(str, self.indices[:10])) + (", …" if len(indices) > 10 else "")
        count = counted(len(indices), "image is", "images are")
        super().__init__(f"{count} verified and broken by an attack: {shown}.")


def verify(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    engines: Sequence[str],
    memory: int = bounds.MEMORY,
    graph: Graph | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> list[Verification]:
    """Each engine's verdict on each image, in float32 or the network's own precision.

    An engine is given the images that the network classifies rightly, since a box holds its own
    image. "any" and joined engines are given what no engine before them in `engines` verified, so
    that a union costs what its last members cost.

    Args:
        network: put in evaluation mode meanwhile.
        images: (m, C, H, W) in [0, 1].
        labels: (m,) int64.
        epsilon: L∞, in pixel units, above 0 and at most 1.
        engines: names as `bounds.engines` knows them.
        graph: of the network, if there is one.
        progress: told the engine and the number of images that are done.

    Raises:
        UserError: no such engine, an ε out of range, or a layer that cannot be bounded.
    """
    if not 0 < epsilon <= 1:
        raise UserError(f"ε must be above 0 and at most 1, in pixel units, not {epsilon}.")
    members = {name: bounds.engines(name) for name in engines}
    with evaluating(network), torch.no_grad():
        if graph is None:
            graph = trace(network, tuple(images.shape[1:]))
        right = torch.cat([network(some).argmax(dim=1) for some in torch.split(images, _BATCH)])
        right = right == labels
        verdicts: dict[str, Tensor] = {}
        results = []
        for name in engines:
            began = time.process_time()
            sound = torch.zeros_like(right)
            for known in verdicts:
                if set(members[known]) <= set(members[name]):
                    sound |= verdicts[known]
            for start in range(0, len(images), _BATCH):
                open_ = (right & ~sound)[start : start + _BATCH].nonzero().squeeze(1) + start
                region = bounds.box(images[open_], epsilon)
                if len(open_):
                    upper = bounds.margins(graph, region, labels[open_], engine=name, memory=memory)
                    sound[open_] = bounds.verified(upper, labels[open_])
                if progress is not None:
                    progress(name, min(start + _BATCH, len(images)))
            verdicts[name] = sound
            results.append(Verification(name, epsilon, sound, time.process_time() - began))
    return results


def refuse_broken(verified: Tensor, broken: Tensor) -> None:
    """Compare verdicts with what attacks at no larger ε found, image by image.

    Args:
        verified: (m,) bool.
        broken: (m,) bool, true where an image of the box is misclassified, found by any attack or
            by rounding.

    Raises:
        VerifiedAndBrokenError: an image is both.
    """
    both = (verified & broken).nonzero().squeeze(1)
    if len(both):
        raise VerifiedAndBrokenError(both.tolist())
