"""The attack against textbook PGD, and what it must leave alone."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from btrain.attacks.balls import L2Ball, LinfBall
from btrain.attacks.pgd import active_counts, by_steps, early_exit_pgd, evaluation_mode, pgd
from btrain.data import Batch as DataBatch
from btrain.data import Data
from btrain.defenses import DEFENSES, ce_inner_loss, kl_inner_loss
from btrain.errors import UserError
from btrain.methods.base import Reach
from btrain.methods.free import Free
from btrain.methods.make import make_method
from btrain.methods.mma import MMA
from btrain.settings import AllocatorName
from btrain.training.safety.inputs import InputGuard
from btrain.training.timing.look import look
from btrain.training.update import descend
from composing import compose

Batch = tuple[Tensor, Tensor]
CPU = torch.device("cpu")


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
    with pytest.raises(UserError, match="one for each of 24 images"):
        ours(small_cnn, batch, steps, torch.full((24,), 0.1))


def test_one_number_of_steps_and_one_size_are_those_of_all(
    small_cnn: nn.Module, batch: Batch
) -> None:
    x, labels, z = batch[0], batch[1], torch.zeros(len(batch[0]), 10)
    given: dict[str, Any] = {"inner_loss": ce_inner_loss, "noise": None, "epsilon": 0.1}
    each = pgd(small_cnn, x, labels, z, steps=torch.full((24,), 2),
               step_size=torch.full((24,), 0.07), **given)  # fmt: skip
    assert torch.equal(pgd(small_cnn, x, labels, z, steps=2, step_size=0.07, **given), each)


def test_every_image_keeps_its_own_radius(small_cnn: nn.Module, batch: Batch) -> None:
    x, labels, z = batch[0], batch[1], torch.zeros(24, 10)
    radii = torch.linspace(0.01, 0.2, 24, dtype=x.dtype)
    x_adv = pgd(small_cnn, x, labels, z, steps=torch.arange(24) % 5, step_size=0.05,
                inner_loss=ce_inner_loss, noise=None, ball=LinfBall(radii))  # fmt: skip
    far = (x_adv - x).abs().flatten(1).amax(dim=1)
    assert (far <= radii + 1e-6).all() and far[-1] > radii[3]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"epsilon": 8}, r"epsilon must be at least 0 and at most 1 .*, not 8\."),
        ({"steps": 1.5}, "steps must be integers, one for each of 24 images, or one for all"),
        ({"step_size": torch.ones(3)}, "step_size must be numbers, one for each of 24 images"),
        ({"x": lambda x: 255 * x}, r"images must lie in \[0, 1\].* divide \[0, 255\] images"),
        ({"x": lambda x: (255 * x).to(torch.uint8)}, r"floats in \[0, 1\], not torch.uint8"),
        ({"x": lambda x: x * torch.nan}, r"must lie in \[0, 1\]"),
        ({"labels": lambda y: y[:3]}, "labels must be integers, one for each of 24 images"),
        ({"z": lambda z: z[0]}, r"clean_logits must be \(24, K\)"),
        ({"noise": torch.zeros(1, 8, 8)}, "noise must be like the images"),
        ({"x": lambda x: x.clamp(min=1 + 2e-6)}, r"\[0, 1\].* not in \[1\.000002, 1\.0"),
        ({"step_size": math.nan}, "step_size must be at least 0 and at most 1 .*, not nan"),
        ({"step_size": -0.1}, "step_size must be at least 0 .*, not -0.1"),
        ({"step_size": math.inf, "epsilon": None, "ball": L2Ball(1)}, "finite and at least 0"),
        ({"step_size": None}, "step_size must be a number, .* not None"),
        ({"step_size": torch.tensor(math.nan)}, "step_size must be finite and at least 0"),
        ({"steps": -1}, "steps must be 0 or more, not -1"),
        ({"steps": None}, "steps must be integers, .* or one for all, not None"),
        ({"labels": lambda y: y + 10}, "labels must be from 0 to 9, for 10 logits, not from 1"),
        ({"labels": lambda y: y > 3}, "labels must be integers, .*not torch.bool"),
        ({"labels": lambda y: y.tolist()}, "labels must be a tensor, not a list"),
        ({"x": lambda x: x.numpy()}, "images must be a tensor, not a ndarray"),
        ({"z": lambda z: None}, "clean_logits must be a tensor, not a NoneType"),
        ({"noise": [0.1]}, "noise must be a tensor, not a list"),
        ({"epsilon": torch.ones(24)}, r"epsilon must be a number, .* not a tensor \(24,\)"),
        ({"epsilon": None, "ball": LinfBall(torch.ones(3))}, r"one number, or \(24,\), not \(3,"),
    ],
)  # fmt: skip
def test_what_pgd_cannot_take_is_one_sentence(
    small_cnn: nn.Module, batch: Batch, changed: dict[str, Any], sentence: str
) -> None:
    parts = {"x": batch[0], "labels": batch[1], "z": torch.zeros(len(batch[0]), 10)}
    parts |= {key: change(parts[key]) for key, change in changed.items() if key in parts}
    given: dict[str, Any] = {"steps": 1, "step_size": 0.1, "noise": None, "epsilon": 0.1}
    given |= {key: value for key, value in changed.items() if key not in parts}
    with pytest.raises(UserError, match=sentence):
        pgd(small_cnn, *parts.values(), inner_loss=ce_inner_loss, **given)


def test_rounding_fractions_and_short_integers_are_taken(
    small_cnn: nn.Module, batch: Batch
) -> None:
    x, labels, z = batch[0], batch[1], torch.zeros(len(batch[0]), 10)
    given: dict[str, Any] = {"steps": 2, "inner_loss": ce_inner_loss, "noise": None}
    each = pgd(small_cnn, x, labels, z, step_size=1 / 255, epsilon=8 / 255, **given)
    written: dict[str, Any] = {"step_size": "1/255", "epsilon": "8/255"}
    assert torch.equal(pgd(small_cnn, x, labels.int(), z, **written, **given), each)
    exact = pgd(small_cnn.double(), x.double(), labels, z, step_size=0.1, epsilon=0.1, **given)
    size = torch.full((24,), 0.1, dtype=torch.float64)
    wide = pgd(small_cnn, x.double(), labels, z, step_size=size, epsilon=0.1, **given)
    assert torch.equal(exact, wide)
    small_cnn.float()
    off = torch.where(x > 0.5, 1 + 2e-7, -2e-7)
    x_adv = pgd(small_cnn, off, labels, z, step_size=0.1, epsilon=0.1, **given)
    assert 0 <= x_adv.min() <= x_adv.max() <= 1


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


# The L2 ball


def textbook_l2_pgd(
    model: nn.Module,
    x: Tensor,
    clean_logits: Tensor,
    *,
    steps: int,
    step_size: float,
    epsilon: float,
    noise: Tensor,
) -> Tensor:
    """L2 PGD on the KL divergence of one example: a step of a given length, the ball, the box."""
    x_adv = x + noise
    target = F.softmax(clean_logits, dim=1)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = F.kl_div(F.log_softmax(model(x_adv), dim=1), target, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, [x_adv])
        delta = x_adv.detach() + step_size * gradient / gradient.pow(2).sum().sqrt() - x
        delta = delta * min(1.0, epsilon / float(delta.pow(2).sum().sqrt()))
        x_adv = (x + delta).clamp(0, 1)
    return x_adv.detach()


def l2(difference: Tensor) -> Tensor:
    return difference.flatten(1).pow(2).sum(dim=1).sqrt()


def test_in_l2_every_example_gets_textbook_steps_of_its_own(
    preact: nn.Module, batch: Batch
) -> None:
    """Those that it gets alone, so that its neighbours have no part in them."""
    model, (x, labels) = double(preact, batch)
    generator = torch.Generator().manual_seed(1)
    steps = torch.randint(0, 6, (len(x),), generator=generator)
    step_size = 0.05 + 0.2 * torch.rand(len(x), dtype=x.dtype, generator=generator)
    noise = 0.001 * torch.randn(x.shape, dtype=x.dtype, generator=generator)
    x_adv = ours(model, (x, labels), steps, step_size, noise=noise, epsilon=None, ball=L2Ball(0.3))
    assert len(set(steps.tolist())) == 6
    for i, n in enumerate(steps.tolist()):
        alone = slice(i, i + 1)
        expected = x[alone]
        if n:
            expected = textbook_l2_pgd(
                model, x[alone], model(x[alone]).detach(), steps=n, step_size=float(step_size[i]),
                epsilon=0.3, noise=noise[alone],
            )  # fmt: skip
        torch.testing.assert_close(x_adv[alone], expected, rtol=0, atol=1e-10)
    distance = l2(x_adv - x)
    assert 0 < (distance > 0.299).sum() < (steps > 0).sum()  # the ball held some of them


@pytest.mark.parametrize("scale", [1.0, 1e-25])
def test_in_l2_a_linear_network_is_left_by_the_shortest_way(scale: float) -> None:
    """Along ±w however small the gradient; one of zero moves nothing, also of neighbours."""
    torch.manual_seed(0)
    weight, x = torch.randn(64), 0.3 + 0.4 * torch.rand(6, 1, 8, 8)
    dead = torch.arange(6) % 3 == 0

    class Slope(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            height = torch.where(dead, 0.0, images.flatten(1) @ (scale * weight))
            return torch.stack([height, -height], dim=1)

    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    x_adv = pgd(
        Slope(), x, labels, torch.zeros(6, 2), steps=torch.full((6,), 3),
        step_size=torch.full((6,), 0.5), inner_loss=ce_inner_loss, ball=L2Ball(0.7), noise=None,
    )  # fmt: skip
    away = torch.where(labels == 0, -0.7, 0.7)[:, None] * weight / weight.norm()
    expected = torch.where(dead[:, None], 0.0, away).view_as(x)
    torch.testing.assert_close(x_adv - x, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("epsilon", [128 / 255, 3.0])
def test_the_result_stays_in_the_l2_ball_and_in_the_box(
    small_cnn: nn.Module, batch: Batch, epsilon: float
) -> None:
    noise = 2 * torch.randn_like(batch[0])  # a start far outside
    steps, size, ball = torch.randint(1, 5, (24,)), torch.full((24,), 5.0), L2Ball(epsilon)
    x_adv = ours(small_cnn, batch, steps, size, noise=noise, epsilon=None, ball=ball)
    assert l2(x_adv - batch[0]).max() <= epsilon + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@pytest.mark.parametrize("each", [False, True])
def test_an_l2_start_is_uniform_in_the_ball(*, each: bool) -> None:
    """(distance / ε)^d is uniform on [0, 1], and no direction is preferred; the box cuts."""
    x = torch.full((4000, 1, 2, 2), 0.5)
    radius = torch.linspace(0.1, 0.4, 4000) if each else torch.full((4000,), 0.4)
    ball = L2Ball(radius if each else 0.4)
    noise = ball.start(x, torch.Generator().manual_seed(0))
    share = (l2(noise) / radius) ** 4
    assert (share.sort().values - torch.linspace(0, 1, 4000)).abs().max() < 0.03
    assert noise.mean(dim=0).abs().max() < 0.01
    at_zero = ball.start(0 * x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(at_zero, noise.clamp(min=0), rtol=0, atol=1e-7)


def test_pgd_takes_one_radius() -> None:
    x, labels = torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    common: dict[str, Any] = {
        "steps": torch.ones(2, dtype=torch.int64), "step_size": torch.ones(2),
        "inner_loss": ce_inner_loss, "noise": None,
    }  # fmt: skip
    for radii in ({}, {"epsilon": 0.1, "ball": L2Ball(0.1)}):
        with pytest.raises(UserError, match="either epsilon, of an L∞ ball, or a ball"):
            pgd(nn.Flatten(), x, labels, torch.zeros(2, 64), **common, **radii)


CHOICES = [
    *(f"bt={name.name}" for name in AllocatorName if name is not AllocatorName.own),
    "bt.pool=2", "rival=fast", "rival=yopo",
]  # fmt: skip


@pytest.mark.parametrize(("defense", "choice"), [*itertools.product(DEFENSES, CHOICES)])
def test_every_step_goes_with_the_l2_attack(
    digits: Data, small_cnn: nn.Module, defense: str, choice: str
) -> None:
    """Examples within ε of their images and in the box, and the weights learn from them."""
    config = compose(
        ["dataset=digits", "attack=l2_pgd", f"defense={defense}", choice, "train.batch_size=32"]
    )
    epsilon = config.attack.epsilon
    x = digits.train.images[:60].float() / 255
    with torch.no_grad():
        labels = (small_cnn(x).argmax(dim=1) + (torch.arange(60) % 5 == 0)) % 10
    before = [parameter.detach().clone() for parameter in small_cnn.parameters()]
    optimizer = torch.optim.SGD(small_cnn.train().parameters(), lr=0.1)
    memory, generator = {"robust_fraction": torch.tensor(0.4)}, torch.Generator().manual_seed(0)
    method, batch = make_method(config, CPU), DataBatch(x, labels, torch.arange(60))
    assert method.reach == Reach(epsilon, "l2")
    attacked = 0
    for examples in method.examples(small_cnn, batch, memory, generator):
        distance = l2(examples.x_adv - examples.x)
        assert torch.equal(distance > 0, examples.allocation.steps > 0)
        assert 0.9 * epsilon < distance.max() <= epsilon + 1e-6
        assert examples.x_adv.min() >= 0
        assert examples.x_adv.max() <= 1
        loss = method.loss(small_cnn, examples, memory, generator).value
        descend(optimizer, loss)
        attacked += int((distance > 0).sum())
    assert 0 < attacked <= 60
    for old, new in zip(before, small_cnn.parameters(), strict=True):
        assert torch.isfinite(new).all()
        assert not torch.equal(old, new)


@pytest.mark.parametrize("rival", ["free", "mma"])
def test_free_and_mma_stay_within_their_l2_radius(
    digits: Data, plain_net: nn.Module, rival: str
) -> None:
    config = compose(["dataset=digits", "attack=l2_pgd", "defense=pgd", f"rival={rival}"])
    network, method = copy.deepcopy(plain_net).train(), make_method(config, CPU)
    memory, generator = method.memory(digits, CPU), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    radius = method.reach.radius
    assert radius is not None
    furthest = 0.0
    for first in (0, 40):
        rows = torch.arange(first, first + 40)
        batch = DataBatch(digits.train.images[rows] / 255, digits.train.labels[rows], rows)
        for examples in method.examples(network, batch, memory, generator):
            if isinstance(method, Free):
                distance = l2(examples.delta.detach())
            else:
                distance = l2(examples.x_adv - examples.x)
                assert (distance <= examples.margin + 1e-6).all()
            furthest = max(furthest, float(distance.max()))
            loss = method.loss(network, examples, memory, generator).value
            descend(optimizer, loss)
    assert 0.5 * radius < furthest <= radius + 1e-6
    if isinstance(method, MMA):
        assert 0 < memory["margin"].count_nonzero() <= 80


def test_gradalign_is_of_an_linf_ball() -> None:
    sentence = r"rival=gradalign does not go with attack=l2_pgd: it aligns the gradients of an L∞"
    with pytest.raises(UserError, match=sentence):
        compose(["dataset=digits", "defense=pgd", "attack=l2_pgd", "rival=gradalign"])


def test_rounding_is_no_way_out_of_an_l2_ball() -> None:
    """On the sphere of large images, whose distances a product of matrices would not resolve."""
    generator = torch.Generator().manual_seed(0)
    x = 0.2 + 0.6 * torch.rand(64, 3, 32, 32, generator=generator)
    moved = (x + 0.05 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    ball = L2Ball(128 / 255)
    guard = InputGuard(Reach(128 / 255, "l2"))
    network = nn.Flatten()
    for at, found in ((ball.project(moved, *ball.region(x)), 0), (moved, 1)):
        with guard.over(network, x):
            network(at)
        assert len(guard.warnings()) == found
