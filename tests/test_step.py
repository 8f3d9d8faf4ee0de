"""One batch of Algorithm 2: equal to textbook TRADES where it must be, cheaper where it may be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from btrain.allocation import (
    BOUNDARY,
    METRICS,
    OUTLIER,
    ROBUST,
    Allocation,
    EarlyExit,
    Oracle,
    Scored,
    Uniform,
    by_score,
    step_sizes,
)
from btrain.allocation import BulletTrain as Rule
from btrain.attacks.attack import Attack, Start, at_the_image, nearby, within_the_ball
from btrain.attacks.balls import LinfBall
from btrain.attacks.pgd import by_steps, early_exit_pgd, pgd
from btrain.attacks.views import augmix
from btrain.data import Data
from btrain.defenses import DEFENSES, kl_inner_loss
from btrain.methods.augmix import AugMix
from btrain.methods.bullettrain import BulletTrain, forward_prefix, rows_to_forward
from btrain.methods.statistics import StepStats, averages, stacked, step_stats
from btrain.settings import Score
from steps import take

EPSILON = 0.1
STEP_SIZE = 0.03
BETA = 6.0


def rule(n_b: int = 3, n_r: int = 1, n_o: int = 0, kind: Callable[..., Rule] = Rule) -> Rule:
    """BulletTrain's rule, or another one by class, with these budgets."""
    return kind(torch.tensor([n_o, n_r, n_b]), (n_b, n_r, n_o))


def method(allocator: Uniform | Rule) -> BulletTrain:
    """TRADES with this allocation."""
    defense = DEFENSES["trades"](beta=BETA)
    attack = Attack(
        ball=LinfBall(EPSILON),
        inner_loss=defense.inner_loss,
        n_b=allocator.n_b if isinstance(allocator, Uniform) else allocator.steps[0],
        step_size_b=STEP_SIZE,
        start=nearby(0.001),
    )
    return BulletTrain(defense, attack, allocator, METRICS["svar"], gamma=0.8, momentum=0.9)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)


def step(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    chosen: BulletTrain,
    robust_fraction: float = 0.3,
) -> tuple[Tensor, StepStats]:
    model.train()
    generator = torch.Generator().manual_seed(5)
    return take(chosen, model, sgd(model), *batch, torch.tensor(robust_fraction), generator)


def textbook_trades_step(
    model: nn.Module, x: Tensor, labels: Tensor, noise: Tensor, n: int
) -> None:
    """TRADES as published, with its clean forward in every attack step."""
    optimizer = sgd(model)
    model.eval()
    x_adv = x + noise
    for _ in range(n):
        x_adv = x_adv.detach().requires_grad_()
        target = F.softmax(model(x), dim=1).detach()
        kl = F.kl_div(F.log_softmax(model(x_adv), dim=1), target, reduction="sum")
        (gradient,) = torch.autograd.grad(kl, [x_adv])
        x_adv = x_adv + STEP_SIZE * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPSILON), x + EPSILON).clamp(0, 1)
    model.train()
    optimizer.zero_grad()
    clean, adv = model(x), model(x_adv.detach())
    kl = F.kl_div(F.log_softmax(adv, dim=1), F.softmax(clean, dim=1), reduction="batchmean")
    (F.cross_entropy(clean, labels) + BETA * kl).backward()
    optimizer.step()


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_uniform_step_is_textbook_trades(
    preact: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    ours, (x, labels) = preact.double(), (batch[0].double(), batch[1])
    theirs = copy.deepcopy(ours)
    chosen = method(Uniform(3))
    noise = chosen.attack.noise(x, torch.Generator().manual_seed(5))
    step(ours, (x, labels), chosen)
    textbook_trades_step(theirs, x, labels, noise, n=3)
    for mine, reference in zip(
        ours.state_dict().values(), theirs.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-7)


def test_equal_budgets_are_the_plain_defense_bit_for_bit(
    preact: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    plain = copy.deepcopy(preact)
    step(preact, batch, method(rule(3, 3, 3)))
    step(plain, batch, method(Uniform(3)))
    assert same_weights(preact, plain)


def test_other_budgets_are_not_the_plain_defense(
    preact: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    plain = copy.deepcopy(preact)
    step(preact, batch, method(rule(3, 1, 0)))
    step(plain, batch, method(Uniform(3)))
    assert not same_weights(preact, plain)


def forward_sizes(model: nn.Module, batch: tuple[Tensor, Tensor], chosen: BulletTrain) -> list[int]:
    """How many images each forward pass of a step sees."""
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    step(model, batch, chosen)
    handle.remove()
    return sizes


def test_a_step_forwards_what_the_budgets_say(
    preact: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    m = len(batch[0])
    preact.eval()
    predicted = preact(batch[0]).argmax(dim=1)
    outlier = torch.arange(m) % 4 == 0
    batch = (batch[0], torch.where(outlier, (predicted + 1) % 10, predicted))
    _, stats = step(copy.deepcopy(preact), batch, method(rule(n_b=5, n_r=2, n_o=0)))
    n_b, n_r = int(stats.boundary), int(stats.robust)
    assert n_b > 0
    assert n_r > 0
    assert stats.outlier == m - n_b - n_r > 0
    assert stats.steps == 5 * n_b + 2 * n_r
    attack = [n_b + n_r] * 2 + [n_b] * 3
    chosen = method(rule(n_b=5, n_r=2, n_o=0))
    assert forward_sizes(copy.deepcopy(preact), batch, chosen) == [m, *attack, m, n_b + n_r]
    everything = replace(chosen, forward_unperturbed=True)
    assert forward_sizes(copy.deepcopy(preact), batch, everything) == [m, *attack, m, m]


class Reads(TorchFunctionMode):
    """Whole images gathered by an order, and reads of a tensor by the host, as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        gathers = name == "__getitem__" and args[0].dim() == 4 and isinstance(args[1], Tensor)
        if gathers or name == "tolist":
            self.calls.append("gather" if gathers else "read")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("allocator", [rule(3, 1, 0), Uniform(3)], ids=["bullettrain", "uniform"])
def test_the_host_reads_the_counts_once_the_batch_is_put_in_order(
    preact: nn.Module, batch: tuple[Tensor, Tensor], allocator: Uniform | Rule
) -> None:
    with Reads() as reads:
        step(preact, batch, method(allocator))
    assert reads.calls == ["gather", "gather", "read"]  # the images and the noise


def test_a_shared_clean_forward_saves_one(preact: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    m = len(batch[0])
    shared = replace(method(Uniform(3)), scoring=Score.shared)
    assert forward_sizes(preact, batch, shared) == [m] * (1 + 3 + 1)
    # The clean logits of the loss carry their gradient although they decided the classes.
    before = copy.deepcopy(preact)
    _, stats = step(preact, batch, replace(shared, defense=DEFENSES["trades"](beta=0.0)))
    assert torch.isfinite(stats.loss)
    assert not same_weights(before, preact)


def test_the_attack_sees_eval_mode_and_leaves_the_statistics_alone(
    preact: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    step(preact, batch, method(Uniform(3)))
    # One clean and one adversarial pass in train mode, whatever the attack did.
    counts = {int(v) for k, v in preact.state_dict().items() if k.endswith("num_batches_tracked")}
    assert counts == {2}


@pytest.mark.parametrize("n_o", [0, 3])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_tiny_batches_train(
    small_cnn: nn.Module, batch: tuple[Tensor, Tensor], m: int, n_o: int
) -> None:
    few = (batch[0][:m], batch[1][:m])
    robust_fraction, stats = step(small_cnn, few, method(rule(3, 3 if n_o else 0, n_o)))
    assert torch.isfinite(stats.loss)
    assert 0 <= robust_fraction <= 1


def test_a_group_of_one_survives_batch_norm(
    preact: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    # 8×8 digits leave one pixel in the last stage: BatchNorm refuses a single example there.
    preact.train()
    clean_logits = preact(batch[0])
    with pytest.raises(ValueError, match="more than 1 value"):
        preact(batch[0][:1])
    logits = forward_prefix(preact, batch[0], rows_to_forward(1, len(batch[0])), clean_logits)
    assert logits.shape == clean_logits.shape
    assert torch.equal(logits[2:], clean_logits[2:])
    assert forward_prefix(preact, batch[0], 0, clean_logits) is clean_logits


def test_an_unperturbed_outlier_counts_as_not_robust(
    small_cnn: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, labels = batch
    wrong = (labels + 1) % 10
    with torch.no_grad():
        small_cnn.fc2.bias.copy_(100 * F.one_hot(labels[0], 10))  # always predicts one class
    everyone = torch.full_like(labels, int(labels[0]))
    fraction, _ = step(copy.deepcopy(small_cnn), (x, everyone), method(rule()))
    assert fraction.item() == pytest.approx(0.9 * 0.3 + 0.1 * 0.8)
    fraction, stats = step(
        small_cnn, (x, torch.where(wrong == labels[0], 5, wrong)), method(rule())
    )
    assert stats.outlier == len(x)
    assert fraction.item() == pytest.approx(0.9 * 0.3)


@pytest.mark.parametrize(
    ("start", "low", "high"), [(nearby(0.001), 0.0005, 0.006), (within_the_ball, 0.08, EPSILON)]
)
def test_starts(start: Start, low: float, high: float) -> None:
    x = torch.rand(8, 1, 8, 8)
    x = 0.2 + 0.6 * x
    attack = replace(method(rule()).attack, start=start)
    noise = attack.noise(x, torch.Generator().manual_seed(0))
    assert low < noise.abs().max() <= high
    assert noise.min() < 0 < noise.max()
    assert not replace(attack, start=at_the_image).noise(x, torch.Generator()).any()


def augmix_method(allocator: Uniform | Rule, **changes: object) -> AugMix:
    chosen = AugMix(
        make_views=lambda images, generator, rows: augmix(images, generator=generator, rows=rows),
        allocator=allocator,
        metric=METRICS["svar"],
        jsd=True,
        jsd_weight=12.0,
        gamma=0.8,
        momentum=0.9,
    )
    return replace(chosen, **changes)  # type: ignore[arg-type]


def augmix_forwards(
    model: nn.Module, batch: tuple[Tensor, Tensor], chosen: AugMix
) -> tuple[list[int], StepStats]:
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    model.train()
    fraction, generator = torch.tensor(0.4), torch.Generator().manual_seed(0)
    _, stats = take(chosen, model, sgd(model), *batch, fraction, generator)
    handle.remove()
    return sizes, stats


def test_augmix_makes_and_forwards_views_of_boundary_examples_only(
    preact: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, m = batch[0], len(batch[0])
    preact.train()
    with torch.no_grad():
        predicted = copy.deepcopy(preact)(x).argmax(dim=1)
    made: list[int] = []

    def make_views(images: Tensor, generator: torch.Generator, rows: Tensor | None) -> Tensor:
        made.append(len(images))
        return augmix(images, generator=generator, rows=rows)

    chosen = augmix_method(rule(1, 0, 0), make_views=make_views)
    sizes, stats = augmix_forwards(preact, (x, predicted), chosen)
    n = int(stats.boundary)
    # 3m + 2·3n passes of one example, forward and backward: 9 → 5.1 units at F_B = 0.35.
    assert 0 < n < m
    assert made == [2 * n]
    assert sizes == [m, 2 * n]
    assert stats.steps == 2 * n


def test_plain_augmix_shares_batch_norm_statistics_over_all_views(
    preact: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    m = len(batch[0])
    assert augmix_forwards(preact, batch, augmix_method(Uniform(1)))[0] == [3 * m]
    assert augmix_forwards(preact, batch, augmix_method(Uniform(1), jsd=False))[0] == [m]


def test_augmix_without_boundary_examples_is_plain_training(
    preact: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x = batch[0]
    preact.train()
    with torch.no_grad():
        wrong = (copy.deepcopy(preact)(x).argmax(dim=1) + 1) % 10  # outliers all
    plain = copy.deepcopy(preact)
    sizes, stats = augmix_forwards(preact, (x, wrong), augmix_method(rule(1, 0, 0)))
    assert sizes == [len(x)]
    assert stats.outlier == len(x)
    optimizer = sgd(plain)
    F.cross_entropy(plain(x), wrong).backward()
    optimizer.step()
    for mine, reference in zip(preact.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, reference)


def test_a_uniform_start_stays_in_the_box() -> None:
    x = torch.tensor([0.0, 0.02, 0.5, 1.0]).expand(500, 4)
    uniform = replace(method(rule()).attack, start=within_the_ball)
    start = x + uniform.noise(x, torch.Generator().manual_seed(0))
    assert start.min() == 0
    assert start.max() == 1
    assert (start - x).abs().max() == pytest.approx(EPSILON, abs=1e-3)


def modes_of_forwards(
    model: nn.Module, batch: tuple[Tensor, Tensor], chosen: BulletTrain
) -> list[bool]:
    """Whether each forward pass of a step is in train mode."""
    modes: list[bool] = []
    handle = model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    step(model, batch, chosen)
    handle.remove()
    return modes


def test_an_attack_in_train_mode_has_its_target_in_train_mode(
    preact: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    plain = method(Uniform(1))
    fast = replace(plain, attack=replace(plain.attack, train_mode=True))
    assert modes_of_forwards(preact, batch, plain) == [
        False, False, True, True,
    ]  # fmt: skip
    # One clean forward for the target and the loss, one attack step, one adversarial forward.
    assert modes_of_forwards(preact, batch, fast) == [True, True, True]


def test_the_oracle_finds_the_true_classes(digits: Data, small_cnn: nn.Module) -> None:
    x, labels = digits.train.images[:400].float() / 255, digits.train.labels[:400]
    for _ in range(120):  # some training, so that an attack fools some
        loss = F.cross_entropy(small_cnn(x), labels)
        for parameter, gradient in zip(
            small_cnn.parameters(),
            torch.autograd.grad(loss, list(small_cnn.parameters())),
            strict=True,
        ):
            parameter.data -= 0.3 * gradient
    oracle = partial(Oracle, oracle_steps=4, oracle_step_size=STEP_SIZE)
    chosen = method(rule(3, 1, 0, oracle))
    with torch.no_grad():
        logits = small_cnn(x)
    generator = torch.Generator().manual_seed(5)
    noise = chosen.attack.noise(x, generator)
    attacked = partial(chosen.attacked_logits, small_cnn, x, labels, logits, noise)
    score = METRICS["svar"](logits, labels)
    allocation = chosen.allocator(
        Scored(score, logits, labels, torch.tensor(0.3), generator, attacked)
    )
    m = len(x)
    x_adv = pgd(
        small_cnn, x, labels, logits, steps=torch.full((m,), 4),
        step_size=torch.full((m,), STEP_SIZE), inner_loss=kl_inner_loss, epsilon=EPSILON,
        noise=noise,
    )  # fmt: skip
    with torch.no_grad():
        fooled = small_cnn(x_adv).argmax(dim=1) != labels
    wrong = logits.argmax(dim=1) != labels
    expected = torch.where(wrong, OUTLIER, torch.where(fooled, BOUNDARY, ROBUST))
    assert min((expected == label).sum() for label in (OUTLIER, ROBUST, BOUNDARY)) > 5
    assert torch.equal(allocation.classes, expected)
    assert allocation.overhead == 4


@pytest.mark.parametrize("patience", [0, 2])
def test_boundary_examples_exit_early(small_cnn: nn.Module, digits: Data, patience: int) -> None:
    """The step's steps are those of the attack with this patience, of boundary examples alone."""
    x, labels = digits.train.images[:60].float() / 255, digits.train.labels[:60]
    optimizer = torch.optim.Adam(small_cnn.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(small_cnn(x), labels).backward()
        optimizer.step()
    early_exit = rule(7, 3, 0, partial(EarlyExit, patience=patience))
    chosen = method(early_exit)
    chosen = replace(chosen, attack=replace(chosen.attack, ball=LinfBall(0.3)))
    _, stats = step(copy.deepcopy(small_cnn), (x, labels), chosen)
    z = small_cnn(x).detach()
    allocation = by_score(METRICS["svar"](z, labels), torch.tensor(0.3), early_exit.budget)
    order, counts = by_steps(allocation.steps)
    sizes = step_sizes(allocation.steps, n_b=7, epsilon=0.3, step_size_b=STEP_SIZE)
    noise = chosen.attack.noise(x, torch.Generator().manual_seed(5))
    _, taken, _ = early_exit_pgd(
        small_cnn, x[order], labels[order], z[order], steps=allocation.steps[order],
        active=counts(), exits=(allocation.classes == BOUNDARY)[order], patience=patience,
        step_size=sizes[order], inner_loss=kl_inner_loss, ball=LinfBall(0.3), noise=noise[order],
    )  # fmt: skip
    assert stats.steps == taken.sum() < allocation.steps.sum()


def test_statistics_of_a_hand_made_batch() -> None:
    right, wrong = [2.0, 0.0], [0.0, 2.0]
    labels = torch.zeros(6, dtype=torch.int64)
    z = torch.tensor([right] * 5 + [wrong])
    adv = torch.tensor([wrong, wrong, right, right, wrong, wrong])
    classes = torch.tensor([BOUNDARY, BOUNDARY, BOUNDARY, ROBUST, ROBUST, OUTLIER])
    allocation = Allocation(classes, torch.tensor([5, 5, 5, 2, 2, 0]))
    score = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, -0.6])
    stats = step_stats(allocation, torch.tensor(1.5), z, score, z, adv, labels, units=60.0)
    means = averages(stacked(stats))
    assert means == pytest.approx(
        {
            "loss": 1.5,
            "f_b": 3 / 6,
            "f_r": 2 / 6,
            "f_o": 1 / 6,
            "attack_steps_mean": 19 / 6,
            "units_per_example": 10.0,
            "clean_acc_train": 100 * 5 / 6,
            "robust_acc_train": 100 * 2 / 6,
            "boundary_precision": 2 / 3,  # two of three fell
            "boundary_recall": 2 / 3,  # of the three that fell
            "robust_precision": 1 / 2,
            "robust_recall": 1 / 2,
            "score_boundary": (0.1 + 0.2 + 0.5) / 3,
            "score_robust": (0.3 + 0.4) / 2,
            "score_outlier": -0.6,
        }
    )


def test_nothing_is_claimed_where_nothing_is_known() -> None:
    labels = torch.zeros(4, dtype=torch.int64)
    adv = torch.tensor([[2.0, 0.0], [0.0, 2.0]] * 2)
    classes = torch.tensor([BOUNDARY, BOUNDARY, ROBUST, ROBUST])
    allocation = Allocation(classes, torch.tensor([5, 5, 0, 0]))  # N_R = 0
    unread = torch.empty(4, 0)
    stats = step_stats(allocation, torch.tensor(1.0), unread, None, unread, adv, labels, units=1.0)
    means = averages(stacked(stats))
    assert means["boundary_precision"] == 0.5
    for name in ("boundary_recall", "robust_precision", "robust_recall", "clean_acc_train",
                 "score_boundary", "score_robust", "score_outlier"):  # fmt: skip
        assert means[name] is None
