"""Networks and examples that the tests of the evaluation share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from btrain.data import Data
from btrain.evaluation import autoattack
from btrain.evaluation.examples import Examples

CPU = torch.device("cpu")


class Linear(nn.Module):
    """K classes with the logits W·(x − 1/2): what an attack can do to it is known."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T


class Scaled(nn.Module):
    """A network whose softmax is so sure that the cross-entropy's gradient vanishes."""

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.factor * self.network(x)
        return logits


class Quantised(nn.Module):
    """A network behind a rounding of the pixels, which has no gradient."""

    def __init__(self, network: nn.Module, levels: int) -> None:
        super().__init__()
        self.network, self.levels = network, levels

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network((x * self.levels).round() / self.levels)
        return logits


def of_split(images: Tensor, labels: Tensor, classes: int = 10) -> Examples:
    return Examples(images, labels, tuple(str(k) for k in range(classes)), CPU)


def digits_examples(digits: Data, count: int | None = None) -> Examples:
    return of_split(digits.test.images[:count], digits.test.labels[:count])


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let AutoAttack take a few steps of each of its attacks."""
    make = autoattack._Ensemble.__init__

    def shortened(self: autoattack._Ensemble, *arguments: Any) -> None:
        make(self, *arguments)
        attacks = self._library
        attacks.apgd.n_iter = attacks.apgd_targeted.n_iter = attacks.fab.n_iter = 10
        attacks.square.n_queries = 100

    monkeypatch.setattr(autoattack._Ensemble, "__init__", shortened)


def trained_on(
    digits: Data,
    network: nn.Module,
    epsilon: float = 0.0,
    epochs: int = 12,
    *,
    steps: int = 1,
    step_size: float = 1.25,
) -> None:
    """Some epochs on digits; with ε > 0 of adversarial training from a random start.

    By FGSM, or by so many steps of `step_size`·ε.
    """
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    x, labels = digits.train.images.float() / 255, digits.train.labels
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=generator).split(64):
            batch = x[part]
            if epsilon:
                noise = (2 * torch.rand(batch.shape, generator=generator) - 1) * epsilon
                moved = (batch + noise).clamp(0, 1)
                for _ in range(steps):
                    start = moved.detach().requires_grad_()
                    loss = nn.functional.cross_entropy(network(start), labels[part])
                    (gradient,) = torch.autograd.grad(loss, [start])
                    moved = start.detach() + step_size * epsilon * gradient.sign()
                    moved = moved.clamp(batch - epsilon, batch + epsilon).clamp(0, 1)
                batch = moved
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(batch), labels[part]).backward()
            optimizer.step()
    network.eval()
