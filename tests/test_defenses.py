"""The defenses' losses against independently written formulae, and at extreme logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from btrain.defenses import (
    augmix_loss,
    ce_inner_loss,
    kl_inner_loss,
    mart_loss,
    trades_loss,
)


def reference_trades(clean: Tensor, adv: Tensor, labels: Tensor, beta: float) -> Tensor:
    """CE + β/m · Σ p (log p − log q), written out."""
    p, q = (
        clean.exp() / clean.exp().sum(1, keepdim=True),
        adv.exp() / adv.exp().sum(1, keepdim=True),
    )
    cross_entropy = -p[torch.arange(len(labels)), labels].log().mean()
    return cross_entropy + beta * (p * (p.log() - q.log())).sum() / len(labels)


def reference_mart(clean: Tensor, adv: Tensor, labels: Tensor, beta: float) -> Tensor:
    """BCE + β/m · Σ KL·(1 − p_y), example by example."""
    total = torch.zeros(())
    for z, z_adv, y in zip(clean, adv, labels.tolist(), strict=True):
        p, q = z.exp() / z.exp().sum(), z_adv.exp() / z_adv.exp().sum()
        wrong = torch.cat([q[:y], q[y + 1 :]]).max()
        total = total - q[y].log() - (1.0001 - wrong).log()
        total = total + beta * (p * (p / q).log()).sum() * (1 - p[y])
    return total / len(labels)


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


@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_mart_loss_and_both_gradients(logits: tuple[Tensor, Tensor, Tensor], beta: float) -> None:
    clean, adv, labels = logits
    labels = torch.where(torch.arange(7) < 4, adv.argmax(dim=1), labels)  # right and wrong ones
    ours = mart_loss(clean, adv, labels, beta=beta)
    theirs = reference_mart(clean, adv, labels, beta)
    torch.testing.assert_close(ours, theirs)
    inputs = [clean, adv] if beta else [adv]
    for mine, reference in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_augmix_loss_and_its_gradients(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    clean, view1, labels = logits
    view2 = (clean + view1).detach().requires_grad_()
    ours = augmix_loss(clean, view1, view2, labels, jsd_weight=12.0)
    p = [z.exp() / z.exp().sum(1, keepdim=True) for z in (clean, view1, view2)]
    mixture = (p[0] + p[1] + p[2]) / 3
    divergence = sum((q * (q / mixture).log()).sum() for q in p) / 3 / len(labels)
    theirs = -p[0][torch.arange(7), labels].log().mean() + 12 * divergence
    torch.testing.assert_close(ours, theirs)
    for mine, reference in zip(
        torch.autograd.grad(ours, [clean, view1, view2]),
        torch.autograd.grad(theirs, [clean, view1, view2]),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-6)


def test_augmix_examples_without_views_add_nothing_to_the_divergence() -> None:
    clean = torch.randn(5, 10, requires_grad=True)
    labels = torch.arange(5)
    ours = augmix_loss(clean, clean, clean, labels, jsd_weight=12.0)
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(clean, labels))


def test_ce_inner_loss_is_the_cross_entropy_of_each_example(
    logits: tuple[Tensor, Tensor, Tensor],
) -> None:
    clean, adv, labels = logits
    expected = -(adv.exp() / adv.exp().sum(1, keepdim=True)).log()[torch.arange(7), labels]
    torch.testing.assert_close(ce_inner_loss(adv, clean, labels), expected)


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


LOSSES = {
    "trades": trades_loss,
    "mart": mart_loss,
    "augmix": lambda clean, adv, labels, *, beta: augmix_loss(
        clean, adv, clean, labels, jsd_weight=beta
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("gap", [50.0, 104.0, 150.0, 1000.0])
def test_loss_and_gradients_are_finite_at_extreme_logits(name: str, gap: float) -> None:
    clean = torch.zeros(2, 10)
    clean[:, 3] = gap
    adv = -clean.clone()
    clean.requires_grad_()
    adv.requires_grad_()
    loss = LOSSES[name](clean, adv, torch.tensor([3, 0]), beta=6.0)
    gradients = torch.autograd.grad(loss, [clean, adv])
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_losses_are_float32_for_low_precision_logits() -> None:
    clean, adv = torch.randn(2, 4, 10, dtype=torch.bfloat16)
    labels = torch.zeros(4, dtype=torch.int64)
    for loss in LOSSES.values():
        assert loss(clean, adv, labels, beta=6.0).dtype is torch.float32
    assert kl_inner_loss(adv, clean, labels).dtype is torch.float32
