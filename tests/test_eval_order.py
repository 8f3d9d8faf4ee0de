"""A stronger attack leaves less standing, whatever trained the network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from btrain.data import Data
from btrain.evaluation import robust_accuracy
from btrain.exchange.from_run import load_run
from btrain.settings.compose import compose
from btrain.training import train


def check_order(
    model: nn.Module, digits: Data, count: int, epsilon: float, norm: str = "linf"
) -> None:
    """AutoAttack ≤ PGD-100×10 ≤ PGD-20 ≤ clean, each attack on its own."""
    images, labels = digits.test.images[:count], digits.test.labels[:count]
    clean, pgd20, pgd100x10, strongest = (
        torch.from_numpy(
            robust_accuracy(
                model, images, labels, epsilon=epsilon, norm=norm, attack=attack
            ).correct
        )
        for attack in ("clean", "pgd20", "pgd100x10", "autoattack")
    )
    assert not (pgd20 & ~clean).any()
    assert not (pgd100x10 & ~pgd20).any()  # the same start and steps, but more of them
    assert strongest.sum() <= pgd100x10.sum()
    assert not (strongest & ~clean).any()
    assert 0 < strongest.sum() < clean.sum()


@pytest.mark.parametrize(
    ("name", "epsilon", "norm"),
    [("robust_net", 0.1, "linf"), ("plain_net", 0.04, "linf"), ("robust_net", 0.5, "l2")],
)
def test_stronger_attacks_leave_less(
    name: str, epsilon: float, norm: str, digits: Data, request: pytest.FixtureRequest
) -> None:
    check_order(request.getfixturevalue(name), digits, 20, epsilon, norm)


@pytest.mark.parametrize("defense", ["trades", "mart", "pgd", "augmix"])
def test_stronger_attacks_leave_less_of_what_every_defense_trains(
    defense: str, digits: Data, tmp_path: Path
) -> None:
    train(
        compose([
            "dataset=digits", "model=small_cnn", "model.width=4", "train.epochs=4",
            f"defense={defense}", "recipe.lr=0.1", "bt=bullettrain", "device=cpu",
            "attack.epsilon=0.05", "eval.steps=1", f"run.dir={tmp_path / defense}",
        ])
    )  # fmt: skip
    _, model = load_run(tmp_path / defense)
    check_order(model, digits, 12, 0.05)
