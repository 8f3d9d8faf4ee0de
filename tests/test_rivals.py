"""Rivals that are settings of our attack, against the rivals written out."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btrain import models
from btrain.attacks import pgd
from btrain.config import compose
from btrain.data import Data
from btrain.defenses import kl_inner_loss


def yopo(
    model: Any,
    x: Tensor,
    target: Tensor,
    eta: Tensor,
    *,
    k: int,
    n: int,
    sigma: float,
    epsilon: float,
) -> Tensor:
    """YOPO-k-n as published: k propagations, after each n updates with the first layer alone."""
    for _ in range(k):
        first: list[Tensor] = []
        hook = model.conv1.register_forward_hook(lambda *args, to=first: to.append(args[2]))
        loss = F.kl_div(F.log_softmax(model(x + eta), dim=1), target, reduction="sum")
        hook.remove()
        costate = -torch.autograd.grad(loss, first)[0].detach()
        for _ in range(n):
            eta = eta.detach().requires_grad_()
            hamiltonian = (model.conv1(model.normalise((x + eta).clamp(0, 1))) * costate).sum()
            (gradient,) = torch.autograd.grad(hamiltonian, [eta])
            eta = (eta - sigma * gradient.sign()).clamp(-epsilon, epsilon)
            eta = (x + eta).clamp(0, 1) - x
    return (x + eta).detach()


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_yopo_is_pgd_with_its_inner_steps_in_one(digits: Data, architecture: str) -> None:
    torch.manual_seed(0)
    depth = 10 if architecture == "wide_resnet" else None
    model = models.build(
        architecture, width=2, depth=depth, classes=10, shape=(1, 8, 8), mean=[0.3], std=[0.4]
    )
    model = model.double().eval()
    x, labels = digits.train.images[:16].double() / 255, digits.train.labels[:16]
    # Away from the box, where YOPO's clamp inside the first layer makes no difference.
    x = 0.2 + 0.6 * x
    logits = model(x).detach()
    config = compose(["dataset=digits", "rival=yopo", "attack.epsilon=0.031"])
    noise = 0.001 * torch.randn(x.shape, dtype=x.dtype)
    theirs = yopo(model, x, F.softmax(logits, dim=1), noise, k=2, n=5, sigma=0.007, epsilon=0.031)
    ours = pgd(
        cast(nn.Module, model),
        x,
        labels,
        logits,
        steps=torch.full((16,), config.bt.n_b),
        step_size=torch.full((16,), config.bt.step_size_b, dtype=x.dtype),
        inner_loss=kl_inner_loss,
        epsilon=0.031,
        noise=noise,
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
