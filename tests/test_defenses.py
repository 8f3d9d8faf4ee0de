"""TRADES' losses against independently written formulae, and at extreme logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from btrain.defenses import kl_inner_loss, trades_loss


def reference_trades(clean: Tensor, adv: Tensor, labels: Tensor, beta: float) -> Tensor:
    """CE + β/m · Σ p (log p − log q), written out."""
    p, q = (
        clean.exp() / clean.exp().sum(1, keepdim=True),
        adv.exp() / adv.exp().sum(1, keepdim=True),
    )
    cross_entropy = -p[torch.arange(len(labels)), labels].log().mean()
    return cross_entropy + beta * (p * (p.log() - q.log())).sum() / len(labels)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, adv = torch.randn(2, 7, 10, generator=generator)
    labels = torch.randint(10, (7,), generator=generator)
    return clean.requires_grad_(), adv.requires_grad_(), labels


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_trades_loss_and_both_gradients(logits: tuple[Tensor, Tensor, Tensor], beta: float) -> None:
    clean, adv, labels = logits
    ours = trades_loss(clean, adv, labels, beta=beta)
    theirs = reference_trades(clean, adv, labels, beta)
    assert ours.shape == ()
    torch.testing.assert_close(ours, theirs)
    for mine, reference in zip(
        torch.autograd.grad(ours, [clean, adv]),
        torch.autograd.grad(theirs, [clean, adv]),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference)


def test_inner_loss_is_the_kl_of_each_example(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    clean, adv, labels = logits
    loss = kl_inner_loss(adv, clean, labels)
    assert loss.shape == (7,)
    torch.testing.assert_close(
        loss.mean(), reference_trades(clean, adv, labels, 1.0) - reference_trades(
            clean, clean, labels, 0.0
        )
    )  # fmt: skip


def test_equal_logits_have_no_kl_and_no_kl_gradient() -> None:
    clean = torch.randn(5, 10, requires_grad=True)
    loss = kl_inner_loss(clean, clean, torch.zeros(5, dtype=torch.int64)).sum()
    (gradient,) = torch.autograd.grad(loss, [clean])
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("gap", [50.0, 104.0, 150.0, 1000.0])
def test_loss_and_gradients_are_finite_at_extreme_logits(gap: float) -> None:
    clean = torch.zeros(2, 10)
    clean[:, 3] = gap
    adv = -clean.clone()
    clean.requires_grad_()
    adv.requires_grad_()
    loss = trades_loss(clean, adv, torch.tensor([3, 0]), beta=6.0)
    gradients = torch.autograd.grad(loss, [clean, adv])
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_losses_are_float32_for_low_precision_logits() -> None:
    clean, adv = torch.randn(2, 4, 10, dtype=torch.bfloat16)
    labels = torch.zeros(4, dtype=torch.int64)
    assert trades_loss(clean, adv, labels, beta=6.0).dtype is torch.float32
    assert kl_inner_loss(adv, clean, labels).dtype is torch.float32
