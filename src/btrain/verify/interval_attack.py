"""The interval attack: a first-order attack whose jumps see a whole region at once.

Wang et al., *MixTrain*. A point's gradient says nothing about what lies behind a flat stretch of
the loss. The coefficients of symbolic bounds on a region around the point do: where the region is
not verified, the image jumps by the sign of the coefficients of the class that may win there, and
a gradient attack goes on from where it lands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from btrain.defenses import ce_inner_loss, cw_loss
from btrain.errors import UserError
from btrain.settings.checks import at_least, number, pixels, positive, whole
from btrain.verify import bounds
from btrain.verify.accuracy import check_batch, right
from btrain.verify.graph import Graph

_GROWTH = 3.0
"""The factor by which a region grows each time it was verified."""

_CONFIDENCE = 50.0
"""The CW loss' margin: so far beyond the right logit the best wrong one is still pushed."""

_RESTARTS_WITH_MORE_JUMPS = 2


def cw(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the best wrong logit minus the right one, cut at 50, (m,)."""
    return cw_loss(logits, logits, labels).clamp(max=_CONFIDENCE)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy, which PGD ascends, (m,)."""
    return ce_inner_loss(logits, logits, labels)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cw": cw, "pgd": cross_entropy}
"""(logits (m, K), labels (m,)) -> what the steps between the jumps ascend (m,)"""


def attack(
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    loss: Literal["cw", "pgd"] = "cw",
    graph: Graph | None,
    steps: int = 40,
    step_size: float | None = None,
    restarts: int = 1,
    jumps: int = 3,
    jump: float = 1.0,
    radius: float = 0.01,
    memory: int = bounds.MEMORY,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return attacked images within ε of x (L∞) and within [0, 1].

    Without a graph it is plain CW or PGD of the same steps and restarts, to compare with.

    Args:
        network: in evaluation mode.
        x: (m, C, H, W) in [0, 1].
        labels: (m,) int64.
        loss: what the steps between the jumps ascend.
        graph: of the network; None for no jumps.
        steps: between two jumps, and after the last.
        step_size: in pixel units; ε/30 unless given, 0.01 at the ε of 0.3 that it was made for.
        restarts: the first begins at x, the others at random in the box. What is misclassified, at
            x or since, is left as it is.
        jumps: in each of the first two restarts; later ones take one.
        jump: length in pixel units. At 1, the default, an image lands on a corner of the box.
        radius: of the first region around a point; it grows threefold while it is verified, up
            to ε/2.
        memory: that the bounds take, in bytes, about.

    Returns:
        Like x: a misclassified image where one was found, else the last one.

    Raises:
        UserError: images, labels or a setting are not that.
    """
    _check(network, x, labels, graph, loss)
    epsilon = pixels("epsilon", epsilon, "linf", least=True)
    for key, least, count in (("steps", 0, steps), ("restarts", 1, restarts), ("jumps", 0, jumps)):
        whole(least, key, count)
    size = epsilon / 30 if step_size is None else number("step_size", step_size)
    jump, radius = number("jump", jump), number("radius", radius)
    at_least(0, "step_size", size)
    at_least(0, "jump", jump)
    positive("radius", radius)
    lower, upper = (x - epsilon).clamp(0, 1), (x + epsilon).clamp(0, 1)
    found = x.clone()
    with torch.no_grad():
        logits = network(x)
    bounds.check_labels(labels, len(x), logits.shape[1])
    left = (logits.argmax(dim=1) == labels).nonzero().squeeze(1)
    if len(left) == 0:
        return found

    def confined(images: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(images, lower[left]), upper[left])

    for restart in range(restarts):
        now = x[left]
        if restart:
            noise = torch.rand(now.shape, generator=generator, dtype=x.dtype, device="cpu")
            now = confined(now + (2 * noise.to(x.device) - 1) * epsilon)
        many = jumps if restart < _RESTARTS_WITH_MORE_JUMPS else min(jumps, 1)
        for turn in range(many + 1 if graph is not None else 1):
            if turn:
                assert graph is not None
                now = confined(
                    now + jump * _directions(graph, now, labels[left], epsilon, radius, memory)
                )
            for _ in range(steps):
                now = confined(now + size * _gradient(network, now, labels[left], loss).sign())
            found[left] = now
            kept = right(network, now, labels[left])
            left, now = left[kept], now[kept]
            if len(left) == 0:
                return found
    return found


def _check(network: nn.Module, x: Tensor, labels: Tensor, graph: Graph | None, loss: str) -> None:
    """Raise UserError for a batch that cannot be attacked, or a loss that there is not."""
    if loss not in LOSSES:
        raise UserError(f"There is no loss {loss}; there are {', '.join(LOSSES)}.")
    check_batch(network, x, labels)
    if graph is not None:
        bounds.check_size(graph, x)


def _directions(
    graph: Graph, x: Tensor, labels: Tensor, epsilon: float, radius: float, memory: int
) -> Tensor:
    """Return the sign of the interval gradient of the class that may win around each image.

    0 for images whose largest region is verified.
    """
    directions = torch.zeros_like(x)
    left = torch.arange(len(x), device=x.device)
    an_image = graph.classes * x[0].numel() * x.element_size()
    at_once = max(1, memory // (4 * an_image))  # of slopes beside the bounds
    while len(left):
        verified = []
        for some in torch.split(left, at_once):
            region = bounds.box(x[some], min(radius, epsilon / 2))
            upper, slopes = bounds.slopes(graph, region, labels[some], memory=memory)
            winner = upper.argmax(dim=1)
            open_ = winner != labels[some]
            directions[some[open_]] = slopes[open_, winner[open_]].sign()
            verified.append(some[~open_])
        if radius >= epsilon / 2:
            break
        left, radius = torch.cat(verified), radius * _GROWTH
    return directions


def _gradient(network: nn.Module, x: Tensor, labels: Tensor, loss: str) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(LOSSES[loss](network(x), labels).sum(), x)[0]
