"""Free adversarial training (Shafahi et al., "Adversarial Training for Free!")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btrain import precision
from btrain.allocation import BOUNDARY, Allocation
from btrain.methods.bullettrain import descend
from btrain.methods.statistics import StepStats, step_stats


def free_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
    delta: Tensor,
    *,
    replays: int,
    epsilon: float,
) -> tuple[Tensor, StepStats]:
    """Trains `replays` times on one batch; each backward pass gives both gradients.

    The weights descend the cross-entropy of x + δ and δ ascends it by ε·sign, clipped to the ball
    and the box. In the mode the model is in: train, as published.

    Args:
        delta: where δ starts, like x: where it ended for the batch before.

    Returns:
        δ like x, and the statistics of the last replay.
    """
    for _ in range(replays):
        delta = delta.detach().requires_grad_()
        logits = model(x + delta)
        loss = F.cross_entropy(precision.full(logits), labels)
        descend(optimizer, loss)
        assert delta.grad is not None
        moved = (delta.detach() + epsilon * delta.grad.sign()).clamp(-epsilon, epsilon)
        delta = (x + moved).clamp(0, 1) - x
    everyone = torch.full_like(labels, BOUNDARY)
    allocation = Allocation(everyone, torch.full_like(labels, replays))
    unread = x.new_empty(len(x), 0)
    units = 3.0 * replays * len(x)
    stats = step_stats(allocation, loss.detach(), unread, None, unread, logits, labels, units=units)
    return delta, stats
