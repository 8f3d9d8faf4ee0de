"""The attack against textbook PGD, and what it must leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from btrain.attacks.balls import LinfBall
from btrain.attacks.pgd import active_counts, by_steps, early_exit_pgd, evaluation_mode, pgd
from btrain.bench.look import look
from btrain.data import Data
from btrain.defenses import ce_inner_loss, kl_inner_loss

Batch = tuple[Tensor, Tensor]


def textbook_pgd(
    model: nn.Module,
    x: Tensor,
    clean_logits: Tensor,
    *,
    steps: int,
    step_size: float,
    epsilon: float,
    noise: Tensor,
) -> Tensor:
    """L∞ PGD on the KL divergence of one batch, as every paper writes it."""
    x_adv = x + noise
    target = F.softmax(clean_logits, dim=1)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = F.kl_div(F.log_softmax(model(x_adv), dim=1), target, reduction="sum")
        loss.backward()
        assert x_adv.grad is not None
        x_adv = x_adv + step_size * x_adv.grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
    model.zero_grad()
    return x_adv.detach()


def ours(model: nn.Module, batch: Batch, steps: Tensor, step_size: Tensor, **kwargs: Any) -> Tensor:
    x, labels = batch
    defaults = {"inner_loss": kl_inner_loss, "epsilon": 0.1, "noise": None}
    with torch.no_grad():
        clean_logits = model(x)
    return pgd(
        model, x, labels, clean_logits, steps=steps, step_size=step_size, **(defaults | kwargs)
    )


def double(model: nn.Module, batch: Batch) -> tuple[nn.Module, Batch]:
    """In float64 no gradient is so near zero that its sign depends on the size of the batch."""
    return model.double().eval(), (batch[0].double(), batch[1])


def test_equal_steps_are_textbook_pgd(preact: nn.Module, batch: Batch) -> None:
    model, (x, labels) = double(preact, batch)
    noise = 0.001 * torch.randn(x.shape, dtype=x.dtype)
    expected = textbook_pgd(
        model, x, model(x).detach(), steps=5, step_size=0.03, epsilon=0.1, noise=noise
    )
    m = len(x)
    x_adv = ours(
        model, (x, labels), torch.full((m,), 5), torch.full((m,), 0.03, dtype=x.dtype), noise=noise
    )
    assert torch.equal(x_adv, expected)


def test_every_example_gets_its_own_steps_and_step_size(preact: nn.Module, batch: Batch) -> None:
    model, (x, labels) = double(preact, batch)
    generator = torch.Generator().manual_seed(1)
    steps = torch.randint(0, 6, (len(x),), generator=generator)
    step_size = 0.01 + 0.04 * torch.rand(len(x), dtype=x.dtype, generator=generator)
    noise = 0.001 * torch.randn(x.shape, dtype=x.dtype, generator=generator)
    x_adv = ours(model, (x, labels), steps, step_size, noise=noise)
    assert len(set(steps.tolist())) == 6
    for i, n in enumerate(steps.tolist()):
        alone = slice(i, i + 1)
        expected = x[alone]
        if n:
            expected = textbook_pgd(
                model,
                x[alone],
                model(x[alone]).detach(),
                steps=n,
                step_size=float(step_size[i]),
                epsilon=0.1,
                noise=noise[alone],
            )
        torch.testing.assert_close(x_adv[alone], expected, rtol=0, atol=1e-12)


def exit_one(
    model: nn.Module, x: Tensor, label: Tensor, noise: Tensor, *, most: int, patience: int | None
) -> tuple[Tensor, int]:
    """One example, attacked until `patience` steps after it is misclassified."""
    x_adv, taken, left = x + noise if most else x, 0, most
    while left > 0:
        x_adv = x_adv.detach().requires_grad_()
        logits = model(x_adv)
        if patience is not None and logits.argmax() != label:
            left = min(left, patience)
            if left == 0:
                break
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, label), [x_adv])
        x_adv = torch.min(torch.max(x_adv + 0.03 * gradient.sign(), x - 0.3), x + 0.3).clamp(0, 1)
        taken, left = taken + 1, left - 1
    return x_adv.detach(), taken


@pytest.mark.parametrize(
    ("patience", "shorter"), [(0, 3), (1, 3), (3, 3), (99, 3), (0, 1), (1, 1), (99, 1)]
)
def test_early_exit_stops_some_time_after_misclassification(
    digits: Data, small_cnn: nn.Module, patience: int, shorter: int
) -> None:
    images, labels = digits.train.images[:40].double() / 255, digits.train.labels[:40]
    model, (x, _) = double(small_cnn, (images, labels))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):  # so that most are right at first, and some fall
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    steps = torch.tensor([9] * 24 + [shorter] * 8 + [0] * 8)
    exits = steps == 9
    noise = 0.001 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    noise = (x + noise).clamp(0, 1) - x
    active = by_steps(steps)[1]()
    clean_logits = model(x).detach()

    def run() -> tuple[Tensor, Tensor, int]:
        return early_exit_pgd(
            model, x, labels, clean_logits, steps=steps, active=active, exits=exits,
            patience=patience, step_size=torch.full((40,), 0.03, dtype=x.dtype),
            inner_loss=ce_inner_loss, ball=LinfBall(0.3), noise=noise,
        )  # fmt: skip

    x_adv, taken, forwarded = run()
    # After steps 2, 4 and 8, and 3 where a shorter budget ends; one that ends at 1 needs none.
    assert look(run, x.device).host_copies <= (4 if shorter == 3 else 3)
    for i, most in enumerate(steps.tolist()):
        one = slice(i, i + 1)
        expected, n = exit_one(
            model, x[one], labels[one], noise[one], most=most,
            patience=patience if exits[i] else None,
        )  # fmt: skip
        assert int(taken[i]) == n
        torch.testing.assert_close(x_adv[one], expected, rtol=0, atol=1e-9)
    assert taken.sum() <= forwarded <= sum(active)
    if patience == 99:
        assert torch.equal(taken, steps)
        assert forwarded == sum(active)
    else:
        assert (taken[exits] < 9).any()
        assert forwarded < sum(active)


@pytest.mark.parametrize("steps", [torch.full((3,), 2), torch.full((24,), 2.0)])
def test_steps_that_are_no_count_for_each_image_are_refused(
    small_cnn: nn.Module, batch: Batch, steps: Tensor
) -> None:
    with pytest.raises(ValueError, match="one for each of 24 images"):
        ours(small_cnn, batch, steps, torch.full((24,), 0.1))


def test_zero_step_examples_come_back_untouched(small_cnn: nn.Module, batch: Batch) -> None:
    steps = torch.arange(len(batch[0])) % 3
    noise = torch.randn_like(batch[0])
    x_adv = ours(small_cnn, batch, steps, torch.full((24,), 0.05), noise=noise)
    unchanged = (x_adv == batch[0]).flatten(1).all(dim=1)
    assert torch.equal(unchanged, steps == 0)


@pytest.mark.parametrize("n", [0, 1])
def test_empty_batches_and_groups(small_cnn: nn.Module, batch: Batch, n: int) -> None:
    few = (batch[0][:n], batch[1][:n])
    assert ours(small_cnn, few, torch.full((n,), 3), torch.full((n,), 0.1)).shape == few[0].shape
    nothing = torch.zeros(24, dtype=torch.int64)
    assert torch.equal(ours(small_cnn, batch, nothing, torch.full((24,), 0.1)), batch[0])


@pytest.mark.parametrize("epsilon", [0.031, 0.3])
def test_the_result_stays_in_the_ball_and_in_the_box(
    small_cnn: nn.Module, batch: Batch, epsilon: float
) -> None:
    noise = 2 * torch.randn_like(batch[0])  # a start far outside
    steps = torch.randint(1, 5, (24,))
    x_adv = ours(small_cnn, batch, steps, torch.full((24,), 1.0), noise=noise, epsilon=epsilon)
    assert (x_adv - batch[0]).abs().max() <= epsilon + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


def test_the_attack_raises_its_loss(small_cnn: nn.Module, batch: Batch) -> None:
    x_adv = ours(small_cnn, batch, torch.full((24,), 10), torch.full((24,), 0.02), epsilon=0.1,
                 noise=0.001 * torch.randn_like(batch[0]))  # fmt: skip
    with torch.no_grad():
        clean, adv = small_cnn(batch[0]), small_cnn(x_adv)
    assert (kl_inner_loss(adv, clean, batch[1]) > 0).all()


class ConvolutionBackwards(TorchDispatchMode):
    """Records which gradients every convolution's backward pass is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[bool]] = []
        self.matrix_products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(args[-1])
        if func is torch.ops.aten.mm.default:
            self.matrix_products += 1
        return func(*args, **(kwargs or {}))


def test_no_weight_gradient_is_computed_and_none_is_touched(
    preact: nn.Module, batch: Batch
) -> None:
    preact.eval()
    marks = [torch.randn_like(parameter) for parameter in preact.parameters()]
    for parameter, mark in zip(preact.parameters(), marks, strict=True):
        parameter.grad = mark.clone()
    with ConvolutionBackwards() as ops:
        ours(preact, batch, torch.full((24,), 2), torch.full((24,), 0.02))
    assert len(ops.masks) == 2 * 20  # 17 3×3 convolutions and 3 shortcuts, two steps
    assert all(mask == [True, False, False] for mask in ops.masks)
    assert ops.matrix_products == 2  # of the linear layer: towards its input only
    for parameter, mark in zip(preact.parameters(), marks, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, mark)


def test_work_is_skipped(small_cnn: nn.Module, batch: Batch) -> None:
    sizes: list[int] = []
    handle = small_cnn.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    steps = torch.tensor([0] * 4 + [2] * 12 + [5] * 8)
    with torch.no_grad():
        clean_logits = small_cnn(batch[0])
    sizes.clear()
    pgd(small_cnn, *batch, clean_logits, steps=steps, step_size=torch.full((24,), 0.02),
        inner_loss=kl_inner_loss, epsilon=0.1, noise=None)  # fmt: skip
    handle.remove()
    assert sizes == [20, 20, 8, 8, 8]


@pytest.mark.parametrize("steps", [[], [0, 0], [3], [5, 5, 2, 2, 2, 0], [4, 3, 2, 1]])
def test_active_counts(steps: list[int]) -> None:
    longest = max(steps, default=0)
    assert active_counts(steps) == [sum(n > j for n in steps) for j in range(longest)]


def test_evaluation_mode_restores_each_module(preact: nn.Module) -> None:
    preact.train()
    frozen = next(module for module in preact.modules() if isinstance(module, nn.BatchNorm2d))
    frozen.eval()
    with pytest.raises(RuntimeError, match="inside"), evaluation_mode(preact):
        assert not any(module.training for module in preact.modules())
        raise RuntimeError("inside")
    assert not frozen.training
    assert all(module.training for module in preact.modules() if module is not frozen)
