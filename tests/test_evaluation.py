"""The evaluation against a closed form, and its independence of batch size and mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from btrain.data import Data, Split
from btrain.evaluation import Accuracy, evaluate


class Linear(nn.Module):
    """Two classes with the logits ±w·(x − 1/2): the worst case in the ε-ball is known."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        score = (x.flatten(1) - 0.5) @ self.weight
        return torch.stack([-score, score], dim=1)


@pytest.mark.parametrize("epsilon", [0.002, 0.01, 0.03])
def test_pgd_finds_the_worst_case_of_a_linear_model(epsilon: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, generator=generator)
    # Pixels far enough from 0 and 255 that the box does not bind.
    images = torch.randint(40, 215, (400, 3, 4, 4), generator=generator).to(torch.uint8)
    score = (images.flatten(1).float() / 255 - 0.5) @ weight
    labels = (score > 0).long()
    labels[::10] = 1 - labels[::10]
    margin = torch.where(labels == 1, score, -score)
    expected = 100 * (margin > epsilon * weight.abs().sum()).float().mean().item()
    accuracy = evaluate(
        Linear(weight),
        Split(images, labels),
        epsilon=epsilon,
        step_size=epsilon / 5,
        steps=20,
        batch_size=64,
        seed=0,
    )
    assert 5 < expected < 89
    assert accuracy.clean == pytest.approx(90)
    assert accuracy.robust == pytest.approx(expected, abs=0.3)


def score(model: nn.Module, split: Split, **settings: float) -> Accuracy:
    defaults = {"epsilon": 0.1, "step_size": 0.02, "steps": 5, "batch_size": 100, "seed": 0}
    return evaluate(model, split, **(defaults | settings))  # type: ignore[arg-type]


@pytest.fixture
def trained(small_cnn: nn.Module, digits: Data) -> nn.Module:
    """Some epochs of plain training: accurate and not robust."""
    optimizer = torch.optim.SGD(small_cnn.parameters(), lr=0.1, momentum=0.9)
    x, labels = digits.train.images.float() / 255, digits.train.labels
    for _ in range(15):
        for part in torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(small_cnn(x[part]), labels[part]).backward()
            optimizer.step()
    return small_cnn


def test_accuracy_falls_with_epsilon_down_to_nothing(trained: nn.Module, digits: Data) -> None:
    robust = [
        score(trained, digits.test, epsilon=e, step_size=e / 4, steps=10).robust
        for e in (0.01, 0.1, 0.2, 0.5)
    ]
    assert robust == sorted(robust, reverse=True)
    assert score(trained, digits.test).clean > 85
    assert robust[-1] < 5


def test_no_steps_from_the_clean_image_are_the_clean_accuracy(
    trained: nn.Module, digits: Data
) -> None:
    accuracy = score(trained, digits.test, steps=0)
    assert accuracy.robust == accuracy.clean


def test_accuracies_do_not_depend_on_batch_size_or_mode(preact: nn.Module, digits: Data) -> None:
    preact.train()
    with torch.no_grad():
        for _ in range(50):  # BatchNorm statistics worth using
            preact(digits.train.images[:128].float() / 255)
    few = Split(digits.test.images[:24], digits.test.labels[:24])
    results = set()
    for training in (True, False):
        for batch_size in (1, 7, 24, 1000):
            preact.train(training)
            results.add(score(preact, few, batch_size=batch_size, steps=2))
            assert preact.training is training
    assert len(results) == 1


def test_an_evaluation_is_seeded(preact: nn.Module, digits: Data) -> None:
    torch.manual_seed(1)
    first = score(preact, digits.test)
    torch.manual_seed(2)
    assert score(preact, digits.test) == first
