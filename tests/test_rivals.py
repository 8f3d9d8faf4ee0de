"""Rivals against the rivals written out."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btrain import models
from btrain.attacks.pgd import pgd
from btrain.data import Batch, Data
from btrain.defenses import kl_inner_loss
from btrain.methods.gradalign import misalignment
from btrain.methods.make import make_attack, make_method
from btrain.methods.mma import MMA, soft_logit_margin
from composing import compose
from steps import memory_of, step_of, take

CPU = torch.device("cpu")


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


def test_nfgsm_steps_from_noise_beyond_the_ball_and_is_not_projected(
    small_cnn: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, labels = batch
    config = compose(["dataset=digits", "defense=pgd", "rival=nfgsm", "attack.epsilon=0.1"])
    attack = make_attack(config, 1.0, None)
    noise = attack.noise(x, torch.Generator().manual_seed(0))
    inside = (x > 0.2) & (x < 0.8)  # there the box cuts no noise off
    assert 0.19 < noise[inside].abs().max() <= 0.2
    assert 0.3 < (noise[inside].abs() > 0.1).float().mean() < 0.7  # half of it
    start = (x + noise).requires_grad_()
    loss = F.cross_entropy(small_cnn(start), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, [start])
    z = torch.zeros(len(x), 10)
    ours = attack.evenly(small_cnn, x, labels, z, attack.sizes(torch.ones(len(x))), [len(x)], noise)
    torch.testing.assert_close(ours, (x + noise + 0.1 * gradient.sign()).clamp(0, 1))
    assert (ours - x).abs().max() > 0.2
    assert make_method(config, torch.device("cpu")).reach.radius is None  # nor is it warned of


def test_misalignment_is_one_minus_the_cosine_of_the_input_gradients(
    preact: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    model, x, labels = preact.double().eval(), batch[0].double(), batch[1]
    noise = 0.1 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))

    def gradient(images: Tensor) -> Tensor:
        images = images.clone().requires_grad_()
        total = -F.log_softmax(model(images), dim=1)[torch.arange(len(x)), labels].sum()
        return torch.autograd.grad(total, [images], create_graph=True)[0].flatten(1)

    a, b = gradient(x).detach(), gradient(x + noise)
    expected = 1 - ((a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))).mean()
    ours = misalignment(model, x, labels, noise)
    torch.testing.assert_close(ours, expected)
    assert 0 < ours < 2
    weights = list(model.parameters())
    theirs = torch.autograd.grad(expected, weights, allow_unused=True)
    mine = torch.autograd.grad(ours, weights, allow_unused=True)
    for a_weight, b_weight in zip(mine, theirs, strict=True):
        assert (a_weight is None) == (b_weight is None)
        if a_weight is not None:
            torch.testing.assert_close(a_weight, b_weight)


def test_examples_without_a_gradient_do_not_count(batch: tuple[Tensor, Tensor]) -> None:
    x, labels = batch
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    dead = torch.arange(len(x)) % 2 == 0

    class Masked(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.where(dead[:, None], 0.0, 1.0) * model(images)

    # A linear network's gradients hardly turn; with half the examples dead the mean is the same.
    alive = misalignment(model, x[~dead], labels[~dead], 0.1 * torch.ones_like(x[~dead]))
    ours = misalignment(Masked(), x, labels, 0.1 * torch.ones_like(x))
    torch.testing.assert_close(ours, alive)
    assert torch.isfinite(torch.autograd.grad(ours, list(model.parameters()))[0]).all()
    flat = nn.Sequential(nn.Flatten(), ZeroLogits())
    assert misalignment(flat, x, labels, torch.zeros_like(x)) == 0


def test_a_confident_example_s_tiny_gradient_counts_in_full() -> None:
    """A linear network's gradient has one direction everywhere, however small it is."""
    x = 0.4 + 0.2 * torch.rand(6, 1, 8, 8)
    for bias in (0.0, 25.0, 60.0):  # 60: a gradient of 1e-26, whose squares underflow
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        with torch.no_grad():
            model[1].bias.copy_(torch.tensor([bias, 0.0]))
        labels = torch.zeros(6, dtype=torch.int64)
        turned = misalignment(model, x, labels, 0.1 * torch.randn_like(x))
        assert turned.item() == pytest.approx(0, abs=1e-5)


def test_gradalign_adds_its_penalty_to_the_loss(
    preact: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, labels = batch
    common = ["dataset=digits", "defense=pgd", "rival=gradalign", "model=preact_resnet18"]

    def update(weight: float) -> list[Tensor]:
        model = copy.deepcopy(preact).train()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        config = compose([*common, f"rival.grad_align_weight={weight}"])
        memory = {"robust_fraction": torch.zeros(())}
        step, generator = step_of(config, CPU), torch.Generator().manual_seed(0)
        step(model, optimizer, Batch(x, labels, torch.arange(len(x))), memory, generator)
        return [old - new.detach() for old, new in zip(before, model.parameters(), strict=True)]

    epsilon = compose(common).attack.epsilon
    generator = torch.Generator().manual_seed(0)  # the start has drawn nothing from it
    noise = torch.empty_like(x).uniform_(-epsilon, epsilon, generator=generator)
    model = copy.deepcopy(preact).train()
    penalty = torch.autograd.grad(
        misalignment(model, x, labels, noise), list(model.parameters()), allow_unused=True
    )
    for with_it, without, part in zip(update(0.5), update(0.0), penalty, strict=True):
        expected = without if part is None else without + 0.5 * part
        torch.testing.assert_close(with_it, expected, rtol=1e-3, atol=1e-5)


def lengths(rows: Tensor) -> Tensor:
    """Euclidean, (m, C, H, W) -> (m, 1, 1, 1)"""
    return rows.pow(2).sum(dim=(1, 2, 3), keepdim=True).sqrt()


class ZeroLogits(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows[:, :10] * 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_free_training_is_its_loop_written_out(preact: nn.Module, digits: Data, norm: str) -> None:
    config = compose(
        ["dataset=digits", "defense=pgd", "rival=free", "rival.replays=3", "train.batch_size=16",
         f"attack={norm}_pgd"]
    )  # fmt: skip
    preact.double()  # in float32 rounding grows to 1e-3 of an L2 step
    x, labels = digits.train.images[:40].double() / 255, digits.train.labels[:40]
    theirs, epsilon = copy.deepcopy(preact).train(), config.attack.epsilon
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    delta = torch.zeros(16, 1, 8, 8, dtype=x.dtype)
    for part in (slice(0, 16), slice(16, 32), slice(32, 40)):  # the last batch is a short one
        images, m = x[part], len(x[part])
        for _ in range(3):
            perturbation = delta[:m].clone().requires_grad_()
            loss = F.cross_entropy(theirs(images + perturbation), labels[part])
            gradients = torch.autograd.grad(loss, [perturbation, *theirs.parameters()])
            for weight, gradient in zip(theirs.parameters(), gradients[1:], strict=True):
                weight.grad = gradient
            optimizer.step()
            if norm == "linf":
                moved = delta[:m] + epsilon * gradients[0].sign()
                moved = moved.clamp(-epsilon, epsilon)
            else:
                moved = delta[:m] + epsilon * gradients[0] / lengths(gradients[0])
                moved = moved * (epsilon / lengths(moved)).clamp(max=1)
            delta[:m] = torch.max(torch.min(moved, 1 - images), -images)

    ours, memory = preact.train(), memory_of(config, digits, CPU)
    memory["delta"] = memory["delta"].double()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    step = step_of(config, CPU)
    for part in (slice(0, 16), slice(16, 32), slice(32, 40)):
        batch = Batch(x[part], labels[part], torch.arange(40)[part])
        step(ours, optimizer, batch, memory, torch.Generator())
    torch.testing.assert_close(memory["delta"][:16], delta)
    if norm == "l2":
        assert lengths(delta).max() <= epsilon + 1e-6
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


METHOD = MMA(
    norm="linf", max_margin=0.3, first_margin=0.05, steps=10, bisections=30, clean_weight=1 / 3
)


def linear_model(classes: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).double()


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_the_margin_found_is_that_of_a_linear_classifier(norm: str, dual: int) -> None:
    """|f_1 − f_0| / ‖w_1 − w_0‖ in the dual norm, L1 of L∞ and L2 of L2.

    Bisection reaches it from too small and too large radii.
    """
    model = linear_model()
    x = 0.4 + 0.2 * torch.rand(50, 1, 8, 8, dtype=torch.float64)
    logits = model(x).detach()
    labels = logits.argmax(dim=1)
    weight = model[1].weight.detach()  # type: ignore[union-attr, index, operator]
    exact = (logits[:, 1] - logits[:, 0]).abs() / (weight[1] - weight[0]).norm(p=dual)
    method = replace(METHOD, norm=norm, max_margin=0.3 if norm == "linf" else 2.0)
    assert exact.max() < method.max_margin
    radius = exact * torch.linspace(0.3, 3, 50, dtype=torch.float64)
    x_adv, margin = method.shortest_attack(
        model, x, labels, radius, torch.Generator().manual_seed(0)
    )
    moved = (x_adv - x).flatten(1)
    if norm == "linf":
        torch.testing.assert_close(margin, exact, rtol=1e-6, atol=1e-8)
        assert moved.abs().amax(dim=1) == pytest.approx(margin, abs=1e-9)
    else:  # ten steps turn the random start towards the shortest way, not quite all of it
        normal = (weight[1] - weight[0]) / (weight[1] - weight[0]).norm()
        torch.testing.assert_close((moved @ normal).abs(), exact, rtol=1e-6, atol=1e-8)
        assert ((exact <= margin + 1e-8) & (margin < 1.05 * exact)).all()
        assert moved.norm(dim=1) == pytest.approx(margin, abs=1e-9)


def test_a_margin_beyond_the_search_ends_there() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double()
    with torch.no_grad():
        model[1].weight.mul_(1e-6)  # type: ignore[operator]
        model[1].bias.copy_(torch.tensor([9.0, 0.0]))  # type: ignore[operator]
    x = torch.full((3, 1, 8, 8), 0.5, dtype=torch.float64)
    radius = torch.full((3,), 0.05, dtype=torch.float64)
    _, margin = METHOD.shortest_attack(
        model, x, torch.zeros(3, dtype=torch.int64), radius, torch.Generator()
    )
    assert margin == pytest.approx(1.05 * 0.3, abs=1e-6)


def test_mma_trains_each_example_at_its_margin_and_remembers_it(digits: Data) -> None:
    config = compose(
        ["dataset=digits", "defense=pgd", "rival=mma", "rival.max_margin=0.02",
         "rival.first_margin=0.001", "rival.bisections=30"]
    )  # fmt: skip
    x, labels = digits.train.images[:60].double() / 255, digits.train.labels[:60]
    x = 0.2 + 0.6 * x  # away from the box
    model = linear_model(10)
    fit(model, x, labels)
    before = copy.deepcopy(model)
    memory = memory_of(config, digits, CPU)
    memory["margin"] = memory["margin"].double()
    chosen = torch.randperm(200)[:60]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    stats = step_of(config, CPU)(
        model, optimizer, Batch(x, labels, chosen), memory, torch.Generator().manual_seed(0)
    )
    logits = before(x)
    slm = torch.stack([
        torch.logsumexp(torch.cat([row[:y], row[y + 1 :]]), 0) - row[y]
        for row, y in zip(logits, labels.tolist(), strict=True)
    ])  # fmt: skip
    correct, margin = slm < 0, memory["margin"][chosen]
    assert 5 < correct.sum() < 55
    assert (margin[~correct] == 0).all()
    assert (margin[correct] > 0).all()
    assert memory["margin"].count_nonzero() == correct.sum()
    assert stats.outlier == (~correct).sum()
    assert stats.boundary == (correct & (margin < 0.02)).sum() > 0
    assert stats.robust == (correct & (margin >= 0.02)).sum() > 0
    assert stats.steps == 10 * correct.sum()

    first = torch.full((int(correct.sum()),), 0.001, dtype=x.dtype)
    method = replace(METHOD, max_margin=0.02, first_margin=0.001)
    x_adv, _ = method.shortest_attack(
        before, x[correct], labels[correct], first, torch.Generator().manual_seed(0)
    )
    near = F.cross_entropy(before(x_adv), labels[correct], reduction="none")
    near = (near * (margin[correct] < 0.02)).sum()
    wrong = F.cross_entropy(before(x[~correct]), labels[~correct], reduction="sum")
    loss = F.cross_entropy(logits, labels) / 3 + 2 / 3 * (near + wrong) / len(x)
    assert float(stats.loss) / len(x) == pytest.approx(loss.item())
    gradients = torch.autograd.grad(loss, list(before.parameters()))
    for ours, old, gradient in zip(model.parameters(), before.parameters(), gradients, strict=True):
        torch.testing.assert_close(ours, old - gradient)


def fit(model: nn.Module, x: Tensor, labels: Tensor) -> None:
    """Half trained: some examples are right, some wrong."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()


def test_mma_attacks_in_eval_mode(preact: nn.Module, digits: Data) -> None:
    """BatchNorm's statistics move in the two training passes and in none of the search."""
    x, labels = digits.train.images[:40].float() / 255, digits.train.labels[:40]
    fit(preact.train(), x, labels)
    before = {int(v) for k, v in preact.state_dict().items() if k.endswith("num_batches_tracked")}
    margin, optimizer = torch.zeros(40), torch.optim.SGD(preact.parameters(), lr=0.1)
    _, stats = take(
        replace(METHOD, bisections=4), preact, optimizer, x, labels, torch.zeros(()),
        torch.Generator().manual_seed(0), margin=margin,
    )  # fmt: skip
    after = {int(v) for k, v in preact.state_dict().items() if k.endswith("num_batches_tracked")}
    assert margin.count_nonzero() > 5
    assert after == {count + 2 for count in before}
    assert torch.isnan(stats.robust_correct)


def test_soft_logit_margin_in_extreme_logits() -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0], [1.0, 1.0, 1.0]])
    labels = torch.tensor([0, 0, 0])
    expected = [math.log(2) - 200, 200.0, math.log(2)]
    assert soft_logit_margin(logits, labels).tolist() == pytest.approx(expected)
