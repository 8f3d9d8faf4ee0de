"""An average of a network over its training, to be evaluated and kept in its place."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from btrain.controllers.base import Gradients
from btrain.methods.base import Memory
from btrain.methods.statistics import StepStats


class WeightAverage:
    """An exponential moving average of weights and BatchNorm statistics.

    Adversarial training gains robust accuracy from it (Gowal et al. 2020, arXiv 2010.03593, decay
    0.995). The statistics are averaged like the weights that they belong to, as torchvision and
    timm do; copies would be those of other weights. After n steps the decay is at most
    (1 + n)/(10 + n), as in TensorFlow's ExponentialMovingAverage: a short run averages about its
    last tenth instead of remembering how it was initialised.

    Attributes:
        network: the average, in eval mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay
        self.memory: Memory = {}  # its network stays where a step is undone
        ours, theirs = self.network.state_dict().values(), model.state_dict().values()
        pairs = list(zip(ours, theirs, strict=True))
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counts = [pair for pair in pairs if not pair[0].is_floating_point()]

    def of(self, model: nn.Module) -> WeightAverage:
        """Return an average of another network with the same decay, which begins as that is."""
        return WeightAverage(model, self._decay)

    @torch.no_grad()
    def update(self, done: int, skipped: Tensor | None = None) -> None:
        """Move towards the model as it is now.

        Args:
            done: steps of the run before this one, with those that `train.skip` left out.
            skipped: whether that step was undone, () bool; then the average stays, too.
        """
        share: float | Tensor = 1 - min(self._decay, (1 + done) / (10 + done))
        if skipped is not None:
            share = torch.where(skipped, 0.0, share)
        averages = [average for average, _ in self._floats]
        steps = torch._foreach_sub([weight for _, weight in self._floats], averages)
        torch._foreach_mul_(steps, share)
        torch._foreach_add_(averages, steps)
        if self._counts:
            counts, counted = zip(*self._counts, strict=True)
            torch._foreach_copy_(list(counts), list(counted))

    def active(self, gradients: Gradients) -> Gradients:
        """Return the gradients: an average leaves the weights alone."""
        return gradients

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Do nothing: the average moves once a batch."""

    def after_batch(self, done: int, stats: StepStats, skipped: Tensor | None) -> None:
        """Move towards the model as it is now."""
        del stats
        self.update(done, skipped)

    def columns(self) -> dict[str, Any]:
        """Return nothing: it is evaluated like any network."""
        return {}
