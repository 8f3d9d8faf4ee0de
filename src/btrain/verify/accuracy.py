"""Verified accuracy: how many images no attack within ε can have misclassified."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from btrain.attacks.pgd import check_images
from btrain.errors import UserError
from btrain.settings.checks import number
from btrain.verify import bounds
from btrain.verify.graph import Graph, evaluating, trace

_BATCH = 500
"""Images that are classified, and given to an engine, at once."""
_BY_COST = ("ibp", "crown_ibp", "symbolic", "crown")
"""The engines, the cheapest first."""


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


def verify(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    engines: Sequence[str],
    memory: int = bounds.MEMORY,
    graph: Graph | None = None,
    correct: Tensor | None = None,
) -> list[Verification]:
    """Each engine's verdict on each image, in float32 or the network's own precision.

    An engine is given the images that the network classifies rightly, since a box holds its own
    image. A joined engine, and `any`, is given what none of its own engines earlier in `engines`
    verified, and goes through its members by cost, each for what is still open.

    Args:
        network: put in evaluation mode meanwhile.
        images: (m, C, H, W) in [0, 1], in the network's precision.
        labels: (m,) int64.
        epsilon: L∞, in pixel units, above 0 and at most 1.
        engines: names as `bounds.engines` knows them.
        memory: in bytes, about, see `bounds.margins`.
        graph: of the network, if there is one.
        correct: which images the network classifies rightly, (m,) bool, if that is known.

    Raises:
        UserError: no such engine, images, labels, ε or `correct` that are not that, or a layer that
            cannot be bounded.
    """
    epsilon = number("epsilon", epsilon)
    if not 0 < epsilon <= 1:
        raise UserError(f"ε must be above 0 and at most 1, in pixel units, not {epsilon}.")
    members = {name: bounds.engines(name) for name in engines}
    check_batch(network, images, labels)
    if correct is not None and not (
        isinstance(correct, Tensor)
        and correct.dtype == torch.bool
        and correct.shape == labels.shape
    ):
        raise UserError(f"correct must be bool, one for each of {len(images)} images.")
    with evaluating(network), torch.no_grad():
        if graph is None:
            graph = trace(network, tuple(images.shape[1:]))
        bounds.check_labels(labels, len(images), graph.classes)
        if correct is None:
            parts = [torch.split(tensor, _BATCH) for tensor in (images, labels)]
            correct = torch.cat([right(network, *pair) for pair in zip(*parts, strict=True)])
        verdicts: dict[str, Tensor] = {}
        results = []
        for name in engines:
            began = time.process_time()
            sound = torch.zeros_like(correct)
            for known in verdicts:
                if set(members[known]) <= set(members[name]):
                    sound |= verdicts[known]
            for start in range(0, len(images), _BATCH):
                open_ = (correct & ~sound)[start : start + _BATCH].nonzero().squeeze(1) + start
                sound[open_] = _best(
                    graph, images[open_], labels[open_], members[name], epsilon, memory
                )
            verdicts[name] = sound
            results.append(Verification(name, epsilon, sound, time.process_time() - began))
    return results


def _best(
    graph: Graph, x: Tensor, labels: Tensor, members: Sequence[str], epsilon: float, memory: int
) -> Tensor:
    """Return which images the engines verify by the best of their bounds, margin by margin, (m,).

    The cheapest begin, and the others are given what is still open.
    """
    sound = torch.zeros_like(labels, dtype=torch.bool)
    open_, best = torch.arange(len(x), device=x.device), None
    for engine in sorted(members, key=_BY_COST.index):
        if not len(open_):
            break
        region = bounds.box(x[open_], epsilon)
        upper = bounds.margins(graph, region, labels[open_], engine=engine, memory=memory)
        best = upper if best is None else torch.minimum(best, upper)
        now = bounds.verified(best, labels[open_])
        sound[open_[now]] = True
        open_, best = open_[~now], best[~now]
    return sound


@torch.no_grad()
def right(network: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Return which images a network, as it is, classifies rightly, (m,) bool on their device."""
    found: Tensor = network(x).argmax(dim=1) == labels
    return found


def check_batch(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Raise UserError unless these are images in [0, 1] of the network's precision, and labels."""
    check_images(images)
    if images.dim() != 4 or not len(images):
        raise UserError(f"images must be (m, C, H, W), one at least, not {tuple(images.shape)}.")
    bounds.check_precision(images, network.parameters())
    bounds.check_labels(labels, len(images))
