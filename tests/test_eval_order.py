"""A stronger attack leaves less standing, whatever trained the network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from btrain.data import Data
from btrain.evaluation import robust_accuracy
from btrain.exchange.from_run import load_run
from btrain.training import train
from composing import compose
from eval_nets import shorten

PGD = ("clean", "pgd20", "pgd100x10")


def check_order(
    model: nn.Module,
    digits: Data,
    count: int,
    epsilon: float,
    *,
    attacks: tuple[str, ...],
    norm: str = "linf",
) -> None:
    """(AutoAttack ≤) PGD-100×10 ≤ PGD-20 ≤ clean, each attack on its own."""
    images, labels = digits.test.images[:count], digits.test.labels[:count]
    clean, pgd20, pgd100x10, *others = (
        torch.from_numpy(
            robust_accuracy(
                model, images, labels, epsilon=epsilon, norm=norm, attack=attack
            ).correct
        )
        for attack in attacks
    )
    strongest = [pgd100x10, *others][-1]
    assert not (pgd20 & ~clean).any()
    assert not (pgd100x10 & ~pgd20).any()  # the same start and steps, but more of them
    assert strongest.sum() <= pgd100x10.sum()
    assert not (strongest & ~clean).any()
    assert 0 < strongest.sum() < clean.sum()


@pytest.mark.parametrize(
    ("name", "epsilon", "norm", "attacks"),
    [
        ("robust_net", 0.1, "linf", (*PGD, "autoattack")),
        ("robust_net", 0.5, "l2", PGD),
        ("plain_net", 0.04, "linf", PGD),
        ("plain_net", 0.3, "l2", (*PGD, "autoattack")),
    ],
)
def test_stronger_attacks_leave_less(
    name: str,
    epsilon: float,
    norm: str,
    attacks: tuple[str, ...],
    digits: Data,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shorten(monkeypatch)  # which makes AutoAttack weaker
    network = request.getfixturevalue(name)
    check_order(network, digits, 12, epsilon, attacks=attacks, norm=norm)


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
    check_order(model, digits, 20, 0.05, attacks=PGD)
