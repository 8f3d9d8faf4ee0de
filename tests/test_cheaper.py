"""What makes training cheaper: clipping, kept starts, shares of the robust, examples left out."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from btrain.allocation import BOUNDARY, OUTLIER, ROBUST, Allocation, Guard, thinned
from btrain.attacks.balls import NoisyBall
from btrain.attacks.kept import KNOWN, Kept
from btrain.data import Batch, Data, Split, batches
from btrain.data.augmentation import Moved, random_mirrors, random_shifts, to_unit
from btrain.defenses import DEFENSES, Weights, trades_loss
from btrain.errors import UserError
from btrain.methods.bullettrain import OUTLIERS, SCORES, BulletTrain, Examples
from btrain.methods.make import make_method
from btrain.methods.statistics import StepStats
from btrain.runs import checkpoint
from btrain.settings import older
from btrain.settings.compose import to_dict
from btrain.training import run, setup, train
from btrain.training.epochs import batches_in, fewest_images, stand_ins, weights_of_epoch
from btrain.training.lines import at_chance, many_outliers
from btrain.training.safety.finite import Snapshot
from btrain.training.schedule import make_plan
from btrain.training.setup import doubts, make_state, notes_on_store
from btrain.training.update import clip, descend, train_batch
from composing import compose
from steps import epoch_of, memory_of
from test_training import CPU, metrics, same, tiny, weights

NORMED = ["model=resnet18", "model.width=2"]
KEPT = ["attack.start=kept", "bt.n_b=1", "bt.n_r=1"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Clipping


def test_a_gradient_is_cut_to_a_length_and_keeps_its_direction() -> None:
    model = nn.Linear(2, 1, bias=True)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    x = torch.tensor([[3.0, 4.0]])  # the gradient of the output is (3, 4, 1), √26 long
    for most, length in ((0.5, 0.5), (100.0, 26**0.5)):
        descend(optimizer, model(x).sum(), most)
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        moved = before - after
        torch.testing.assert_close(moved, length / 26**0.5 * torch.tensor([3.0, 4.0, 1.0]))
        before = after


def test_a_gradient_that_is_not_finite_is_left_for_the_log_to_name() -> None:
    gradients = [torch.tensor([1.0, 2.0]), torch.tensor([torch.nan])]
    clip(gradients, gradients, 1.0)
    assert gradients[0].tolist() == [1.0, 2.0]


def test_a_run_takes_the_setting(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe\.clip_norm must be finite and greater than 0"):
        tiny(tmp_path, "recipe.clip_norm=0")
    still = "recipe.clip_norm=1e-12"  # weight decay would move them
    train(tiny(tmp_path, still, "train.epochs=1", "recipe.weight_decay=0"))
    state = make_state(tiny(tmp_path), setup_data(tmp_path), CPU)
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor, state.model.state_dict()[name], rtol=0, atol=1e-9)


def setup_data(tmp_path: Path) -> Data:
    return run.load_configured(tiny(tmp_path).dataset, CPU)


# Kept starts


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_a_perturbation_is_found_again_after_another_crop_and_flip(dtype: torch.dtype) -> None:
    n, m, shape, padding, epsilon = 9, 5, (2, 6, 7), 2, 0.03
    images = torch.randint(0, 256, (n, *shape), generator=generator(), dtype=torch.uint8)
    data = Data(split := Split(images, torch.zeros(n, dtype=torch.int64)), None, split, ("a",))
    kept = Kept(dtype)
    memory = kept.memory(data, CPU)
    assert sum(tensor.nbytes for tensor in memory.values()) == kept.nbytes(data)
    kept_by_hand = torch.zeros(n, *shape)
    for seed in range(4):
        indices = torch.randperm(n, generator=generator(seed))[:m]
        moved = Moved(padding, random_shifts(m, padding, generator(seed)),
                      random_mirrors(m, generator(seed)))  # fmt: skip
        batch = Batch(to_unit(moved.follow(images[indices])), split.labels[:m], indices, moved)
        noise = torch.full_like(batch.x, 0.5)
        start = kept.starts(memory, batch, noise, epsilon)
        shares = 2 * torch.rand(batch.x.shape, generator=generator(seed + 10)) - 1
        rows = torch.randperm(m, generator=generator(seed))
        attacked = torch.arange(m) < 4
        known = memory[KNOWN].clone()
        kept.keep(memory, batch, rows, kept.encoded(epsilon * shares[rows], epsilon), attacked)
        for place, i in enumerate(indices.tolist()):
            for r in range(shape[1]):
                for c in range(shape[2]):
                    row = r + int(moved.shifts[0, place, 0]) - padding
                    column = shape[2] - 1 - c if moved.mirrored[place] else c
                    column += int(moved.shifts[1, place, 0]) - padding
                    inside = 0 <= row < shape[1] and 0 <= column < shape[2]
                    was = kept_by_hand[i, :, row, column] if inside else torch.zeros(shape[0])
                    expected = epsilon * was if known[i] else torch.tensor(0.5)
                    torch.testing.assert_close(
                        start[place, :, r, c],
                        expected.expand(shape[0]),
                        rtol=1e-2,
                        atol=epsilon / 200,
                    )
                    if inside and place in rows[:4]:
                        kept_by_hand[i, :, row, column] = shares[place, :, r, c]


@pytest.mark.parametrize("settings", [[], ["attack.checkpoint_store=false"]])
def test_a_run_with_kept_starts_resumes(tmp_path: Path, digits: Data, settings: list[str]) -> None:
    config = tiny(tmp_path, *KEPT, *settings, "recipe.crop_padding=1", "recipe.flip=true")
    whole, cut, resumed = (make_state(config, digits, CPU) for _ in range(3))
    for state in (whole, cut):
        epoch_of(config, state, digits.train)
        state.end_epoch()
    checkpoint.save(tmp_path / "cut.pt", {"state": cut.state_dict()})
    resumed.load_state_dict(checkpoint.load(tmp_path / "cut.pt")["state"])
    for state in (whole, resumed):
        epoch_of(config, state, digits.train)
    assert same(resumed.model.state_dict(), whole.model.state_dict()) is not bool(settings)
    assert bool(whole.memory[KNOWN].any())


@pytest.mark.parametrize("settings", [[], ["rival=mma", "defense=pgd", "bt=uniform"]])
def test_a_skipped_step_leaves_what_is_remembered_of_examples(
    digits: Data, settings: list[str]
) -> None:
    levers = [*KEPT, "bt.score=last", "train.skip=0.5"]
    config = compose(["dataset=digits", "model=small_cnn", *(settings or levers)])
    few = Data(split := Split(digits.train.images[:37], digits.train.labels[:37]), None, split,
               digits.classes)  # fmt: skip
    state, method = make_state(config, few, CPU), make_method(config, CPU)
    large = {name for name, tensor in state.memory.items() if tensor.shape[:1] == (37,)}
    assert large == method.by_example & state.memory.keys() != set()
    indices = torch.randperm(37, generator=generator())
    for name in large - {"kept", "kept_known"}:
        state.memory[name].fill_(0.5)
    for rows, bad in ((indices[:20], False), (indices[10:30], True)):
        earlier = {name: tensor.clone() for name, tensor in state.memory.items()}
        before = Snapshot(state.model, state.optimizer, state.memory,
                          by_example=method.by_example, indices=rows)  # fmt: skip
        batch = Batch(to_unit(few.train.images[rows]), few.train.labels[rows], rows)
        train_batch(state.model, state.optimizer, method, batch, state.memory, generator())
        assert not same(state.memory, earlier)
        before.undo_where(torch.tensor(bad))
        assert same(state.memory, earlier) is bad


def test_one_step_goes_on_where_the_last_one_ended(digits: Data) -> None:
    """With weights that stand still k epochs of a step are k steps of projected ascent."""
    config = compose(["dataset=digits", "model=small_cnn", "bt=uniform", "bt.n_b=1",
                      "attack.start=kept", "attack.store=bf16"])  # fmt: skip
    assert config.bt.step_size_b == config.attack.epsilon
    few = Data(split := Split(digits.train.images[:8], digits.train.labels[:8]), None, split,
               digits.classes)  # fmt: skip
    method, memory = make_method(config, CPU), memory_of(config, few, CPU)
    torch.manual_seed(0)
    model = make_state(config, digits, CPU).model
    (batch,) = batches(few.train, torch.arange(8), 8, crop_padding=0, flip=False,
                       generator=generator())  # fmt: skip
    (first,) = method.examples(model, batch, memory, generator(1))
    (second,) = method.examples(model, batch, memory, generator(2))
    start = first.x_adv - first.x
    rounded = (start / config.attack.epsilon).bfloat16().float() * config.attack.epsilon
    at = (first.x + rounded).requires_grad_()
    target = F.softmax(model.eval()(first.x), dim=1).detach()
    F.kl_div(F.log_softmax(model(at), dim=1), target, reduction="sum").backward()
    stepped = at.detach() + config.attack.epsilon * at.grad.sign()
    epsilon = config.attack.epsilon
    expected = stepped.clamp(first.x - epsilon, first.x + epsilon).clamp(0, 1)
    assert torch.equal(second.x, first.x)
    torch.testing.assert_close(second.x_adv, expected)


def test_a_ball_of_any_reach_goes_on_where_the_last_attack_ended(digits: Data) -> None:
    config = compose(["dataset=digits", "model=small_cnn", "bt=uniform", "bt.n_b=1",
                      "attack.start=kept", "attack.store=bf16"])  # fmt: skip
    method = make_method(config, CPU)
    assert isinstance(method, BulletTrain)
    method = replace(method, attack=replace(method.attack, ball=NoisyBall(0.1, 1.0)))
    memory = memory_of(config, digits, CPU)
    (batch,) = batches(Split(digits.train.images[:8], digits.train.labels[:8]), torch.arange(8), 8,
                       crop_padding=0, flip=False, generator=generator())  # fmt: skip
    delta = torch.linspace(-0.9, 0.9, 8).view(8, 1, 1, 1).expand_as(batch.x)
    everybody = torch.ones(8, dtype=torch.bool)
    assert method.kept is not None
    method.keep(method.kept, memory, batch, torch.arange(8), delta, everybody)
    start = method.start(batch, memory, generator())
    torch.testing.assert_close(start, delta, rtol=0.01, atol=0.01)


def test_the_size_of_the_store_is_told_and_one_too_large_refused(
    tmp_path: Path,
    digits: Data,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny(tmp_path, *KEPT, "train.max_seconds=1e-9", "eval.steps=0")
    fine = tiny(tmp_path, *KEPT, "attack.store=bf16")
    told = r"needs {} for its store \(300 images of 1×8×8 in {}\), .* has left; {}fewer"
    with monkeypatch.context() as patched:
        patched.setattr(setup, "free_memory", lambda device: 10_000)
        with pytest.raises(UserError, match=told.format("20 kB", "int8", "")):
            train(config)
        smaller = told.format("39 kB", "bf16", r"attack\.store=int8 or ")
        with pytest.raises(UserError, match=smaller):
            train(fine)
    train(config)
    said = capsys.readouterr().err
    assert "The store of kept starts takes 20 kB, also in every checkpoint." in said
    cold = tiny(tmp_path, *KEPT, "attack.checkpoint_store=false")
    state = make_state(cold, digits, CPU)
    (size,) = notes_on_store(cold, digits, state)
    assert size.endswith(", and is in no checkpoint.")
    state.epoch = 1  # as of a checkpoint
    assert notes_on_store(cold, digits, state)[1].startswith("It is empty now")
    assert not notes_on_store(tiny(tmp_path), digits, state)


@pytest.mark.parametrize("start", [["clean"], ["normal", "0"], ["kept", "0"]])
def test_trades_attack_does_not_begin_at_the_image(start: list[str]) -> None:
    words = [f"attack.start={start[0]}", *(f"attack.start_std={std}" for std in start[1:])]
    with pytest.raises(UserError, match=re.escape(words[-1])) as error:
        compose(words)
    assert str(error.value).endswith("at the clean image its KL divergence has no gradient.")
    assert compose([*words, "defense=pgd"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["defense=augmix"], "defense=augmix"),
        (["rival=mma", "defense=pgd", "bt=uniform"], "rival=mma"),
        (["rival=free", "defense=pgd", "bt=uniform", "attack.mode=train"], "rival=free"),
        (["attack=l2_pgd"], "attack.store=bf16"),
        (["bt.pool=2"], "bt.pool=2"),
        (["bt=oracle"], "bt=oracle"),
    ],
)
def test_what_kept_starts_do_not_go_with_is_named(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        compose([*overrides, "attack.start=kept"])
    assert "attack.start=kept" in str(error.value)


def test_another_setting_is_another_run(tmp_path: Path) -> None:
    train(tiny(tmp_path, *KEPT, "train.epochs=1"))
    with pytest.raises(UserError, match=r"belongs to a run with attack\.store=int8"):
        train(tiny(tmp_path, *KEPT, "train.epochs=1", "attack.store=bf16"))


# A share of the robust examples


def test_the_attacked_robust_examples_stand_for_the_spared_ones() -> None:
    classes = torch.tensor([BOUNDARY, ROBUST, OUTLIER, ROBUST, ROBUST])
    before = Allocation(classes, torch.tensor([3, 2, 0, 2, 2]))
    values, draws, total = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0]), 4000, 0.0
    drawn = generator()
    for _ in range(draws):
        after, weight = thinned(before, 0.25, drawn)
        robust = classes == ROBUST
        assert torch.equal(after.steps[~robust], before.steps[~robust])
        assert torch.equal(after.steps[robust], before.steps[robust] * (weight[robust] > 0))
        assert torch.equal(weight[robust], 4.0 * (weight[robust] > 0))
        total += float((weight * values).sum()) / draws
    assert total == pytest.approx(float(values.sum()), rel=0.05)


@pytest.mark.parametrize("name", ["trades", "mart", "pgd"])
def test_an_example_of_weight_n_counts_as_n_examples(name: str) -> None:
    defense = DEFENSES[name](**({} if name == "pgd" else {"beta": 6.0}))
    clean, adv = torch.randn(2, 7, 4, generator=generator()).double()
    labels, often = torch.arange(7) % 4, torch.tensor([1, 0, 2, 3, 1, 0, 1])
    assert defense.takes_weights
    loss = defense.outer_loss(clean, adv, labels, weights=Weights(often, often))
    again = (rows.repeat_interleave(often, 0) for rows in (clean, adv, labels))
    expected = defense.outer_loss(*again) * int(often.sum()) / 7
    torch.testing.assert_close(loss, expected)


def test_trades_counts_the_clean_image_of_a_spared_example() -> None:
    clean, adv = torch.randn(2, 3, 4, generator=generator()).double()
    labels, nobody = torch.arange(3), torch.zeros(3)
    loss = trades_loss(clean, adv, labels, beta=6.0, weights=Weights(nobody + 1, nobody))
    torch.testing.assert_close(loss, F.cross_entropy(clean, labels))


def test_half_of_the_robust_examples_cost_half(digits: Data) -> None:
    settings = ["dataset=digits", "model=small_cnn", "bt.n_b=3", "bt.n_r=2"]
    config = compose([*settings, "bt.robust_share=0.5"])
    method, memory = make_method(config, CPU), memory_of(config, digits, CPU)
    memory["robust_fraction"] += 0.9
    model = make_state(config, digits, CPU).model
    x = to_unit(digits.train.images[:400])
    with torch.no_grad():
        labels = model.eval()(x).argmax(dim=1)  # no outliers
    batch = Batch(x, labels, torch.arange(400))
    (examples,) = method.examples(model.train(), batch, memory, generator())
    loss = method.loss(model, examples, memory, generator())
    robust = examples.allocation.classes == ROBUST
    share = float((examples.allocation.steps[robust] > 0).float().mean())
    assert share == pytest.approx(0.5, abs=0.1)
    assert loss.stats.robust / 400 == pytest.approx(float(robust.float().mean()))
    f_r = float(robust.float().mean())
    expected = 1 + 3 + (2 * 3 + 3) * (1 - f_r) + (2 * 2 + 3) * share * f_r
    assert float(loss.stats.units) / 400 == pytest.approx(expected)
    assert method.expected_units((1 - f_r, f_r, 0)) == pytest.approx(expected, abs=0.5)
    assert not method.eq7


@pytest.mark.parametrize("name", ["pgd", "mart"])
def test_spared_examples_that_count_nothing_take_no_training_pass(digits: Data, name: str) -> None:
    config = compose(["dataset=digits", "model=small_cnn", f"defense={name}", "bt.n_b=3",
                      "bt.n_r=2", "bt.robust_share=0.4"])  # fmt: skip
    method = make_method(config, CPU)
    assert isinstance(method, BulletTrain)
    all_learnt = replace(method, defense=replace(method.defense, weighs_by_adv=False))
    model, m = make_state(config, digits, CPU).model, 50  # which has no BatchNorm
    x = to_unit(digits.train.images[:m])
    with torch.no_grad():
        labels = (model.eval()(x).argmax(dim=1) + (torch.arange(m) % 7 == 0)) % 10
    seen, units = [], []
    for one in (method, all_learnt):
        memory = memory_of(config, digits, CPU)
        memory["robust_fraction"] += 0.6
        batch = Batch(x, labels, torch.arange(m))
        (examples,) = one.examples(model.train(), batch, memory, generator())
        loss = one.loss(model, examples, memory, generator())
        gradients = torch.autograd.grad(loss.value, [*model.parameters()])
        seen.append((loss.value, *gradients, memory["robust_fraction"]))
        assert isinstance(examples, Examples) and examples.weights is not None
        spared, outliers = (
            int(some.sum())
            for some in (examples.weights.adv == 0, examples.allocation.classes == OUTLIER)
        )
        assert 0 < spared < m and outliers > 0
        assert examples.learnt == (m - spared if one is method else m)
        units.append(float(loss.stats.units))
    torch.testing.assert_close(*seen)
    assert units[1] - units[0] == 3 * spared
    fractions = (0.2, 0.5, 0.3)
    saved = 3 * 0.6 * 0.5
    expected = [one.expected_units(fractions) for one in (method, all_learnt)]
    assert expected == pytest.approx([expected[1] - saved, expected[1]])


def test_f_r_is_of_the_examples_that_the_percentile_is_of(digits: Data) -> None:
    """It does not change with how many examples that were left out each stands for."""
    config = compose(["dataset=digits", "model=small_cnn", "train.skip=0.5"])
    method, m = make_method(config, CPU), 50
    model = make_state(config, digits, CPU).model
    x = to_unit(digits.train.images[:m])
    with torch.no_grad():
        labels = (model.eval()(x).argmax(dim=1) + (torch.arange(m) % 3 == 0)) % 10
    found = []
    for weight in (None, torch.where(torch.arange(m) % 3 == 1, 5.0, 1.0)):
        memory = memory_of(config, digits, CPU)
        batch = Batch(x, labels, torch.arange(m), weight=weight)
        (examples,) = method.examples(model.train(), batch, memory, generator())
        loss = method.loss(model, examples, memory, generator())
        found.append((float(memory["robust_fraction"]), float(loss.stats.robust_correct)))
    assert found[0][0] == found[1][0] > 0
    assert found[1][1] > found[0][1] + 10  # while the log's counts stand for all


@pytest.mark.parametrize("defense", ["trades", "pgd"])
def test_a_batch_of_spared_examples_alone_tells_nothing_of_f_r(digits: Data, defense: str) -> None:
    config = compose(["dataset=digits", "model=small_cnn", f"defense={defense}",
                      "bt.robust_share=1e-9"])  # fmt: skip
    method, memory = make_method(config, CPU), memory_of(config, digits, CPU)
    memory["robust_fraction"].fill_(1)  # no boundary examples
    model = make_state(config, digits, CPU).model
    x = to_unit(digits.train.images[:20])
    with torch.no_grad():
        labels = model.eval()(x).argmax(dim=1)  # no outliers
    (examples,) = method.examples(
        model.train(), Batch(x, labels, torch.arange(20)), memory, generator()
    )
    assert not bool(examples.allocation.steps.any())
    loss = method.loss(model, examples, memory, generator())
    assert float(memory["robust_fraction"]) == 1
    assert bool(torch.isfinite(loss.value))


# Examples left out of an epoch


@pytest.mark.parametrize("right", [80, 30])
def test_of_the_far_a_share_is_left_out_and_the_rest_stands_for_it(right: int) -> None:
    score = torch.randperm(100, generator=generator()).float() - 99.5 + right
    total = torch.zeros(100)
    far = (score > 0) & (score > score.median())
    assert int(far.sum()) == min(right, 50)
    for epoch in range(400):
        weight = stand_ins(score, 0.4, 4, 0, epoch)
        assert torch.equal(weight, stand_ins(score, 0.4, 4, 0, epoch))
        assert float(weight.sum()) == pytest.approx(100)
        assert bool((weight[~far] == 1).all())
        assert int((weight[far] == 0).sum()) == 0.4 * min(right, 50)
        total += weight / 400
    torch.testing.assert_close(total, torch.ones(100), rtol=0, atol=0.2)
    for size, used in ((9, 81), (80, 80), (7, 84), (30, 90), (101, 100)):  # whole batches, or all
        weight = stand_ins(torch.arange(1, 101.0), 0.4, size, 0, 1)
        assert int((weight > 0).sum()) == used and float(weight.sum()) == pytest.approx(100)


@pytest.mark.parametrize(
    ("right", "epoch", "epochs", "whole"),
    [(0.27, 1, 4, True), (0.29, 1, 4, False), (0.9, 0, 4, True), (0.9, 2, 4, False),
     (0.9, 3, 4, True), (0.9, 7, 10, False), (0.9, 8, 10, True)],
)  # fmt: skip
def test_nobody_is_left_out_at_the_ends_of_a_run_or_near_a_constant_prediction(
    tmp_path: Path, digits: Data, right: float, epoch: int, epochs: int, whole: bool
) -> None:
    """One class has a fifth of the labels, so that 28 % right are a tenth better than guessing."""
    config = tiny(tmp_path, "train.skip=0.5", f"train.epochs={epochs}")
    state, n = make_state(config, digits, CPU), len(digits.train)
    labels = torch.where(torch.arange(n) < n // 5, 0, 1 + torch.arange(n) % 8)
    state.epoch = epoch
    state.memory["score"].copy_(torch.where(torch.arange(n) < right * n, 1.0, -1.0))
    state.memory["score"] += 0.01 * torch.rand(n, generator=generator())
    weight = weights_of_epoch(state, labels, make_plan(config))
    assert weight is not None and bool((weight == 1).all()) is whole


def test_some_epochs_leave_examples_out_and_the_log_counts_all(tmp_path: Path) -> None:
    settings = ["train.epochs=5", "train.skip=0.5", "train.skip_last=0.2", "bt.gamma=0.7",
                "train.score_every=1"]  # fmt: skip
    summary = train(tiny(tmp_path, *settings))
    lines = metrics(tmp_path)
    state = checkpoint.load(tmp_path / "checkpoints" / "last.pt")["state"]
    total = dict(zip(StepStats._fields, state["total_sums"].tolist(), strict=True))
    assert total["examples"] == 5 * 300  # of which 3 · 75 were left out
    images = total["clean_correct"] * 100 / summary_clean(lines)
    assert images == pytest.approx(5 * 300)
    for line in lines:
        assert line["f_b"] + line["f_r"] + line["f_o"] == pytest.approx(1)
        assert line["theoretical_speedup"] is None
    assert summary["units_per_example"] * 1500 == pytest.approx(total["units"])
    numbers = [scores[0] for line in lines for scores in line["scores"]]
    assert len(numbers) == len(set(numbers)) and numbers == sorted(numbers)
    whole, part = lines[0]["units_per_example"], lines[1]["units_per_example"]
    assert part <= 0.8 * (1 + 3 + 2 * 3 + 3) < 13
    assert whole > 4


@pytest.mark.parametrize("more", [[], ["bt.guard=0.4", "bt.warmup_epochs=2"]])
def test_a_plan_knows_the_epochs_and_how_many_they_leave_out(
    tmp_path: Path, digits: Data, more: list[str]
) -> None:
    config = tiny(tmp_path, "train.skip=0.5", "train.epochs=9", "train.batch_size=16", *more)
    plan, state = make_plan(config), make_state(config, digits, CPU)
    state.memory[SCORES] += torch.rand(len(digits.train), generator=generator())  # all right
    taken = []
    for state.epoch in range(9):
        weight = weights_of_epoch(state, digits.train.labels, plan)
        assert weight is not None
        taken.append(int((weight > 0).sum()))
    assert taken == fewest_images(len(digits.train), plan)
    assert len(set(taken)) == 2
    outliers = fewest_images(len(digits.train), plan, outliers=0.45)
    assert outliers == ([len(digits.train)] * 9 if more else taken)


def test_the_last_share_of_a_run_is_exact() -> None:
    plan = make_plan(compose(["dataset=digits", "train.skip=0.5"]))
    for epochs, twentieths in itertools.product(range(1, 100), range(20)):
        skip_last = float(f"{5 * twentieths}e-2")
        one = replace(plan, epochs=epochs, skip_last=skip_last)
        some = sum(one.may_leave_out(epoch) for epoch in range(epochs))
        # Of the epochs behind the first those of which none of the last share is touched.
        assert some == max(0, epochs - -(-twentieths * epochs // 20) - 1)


def summary_clean(lines: list[dict[str, Any]]) -> float:
    return sum(line["clean_acc_train"] for line in lines) / len(lines)


def test_a_run_that_leaves_examples_out_resumes_bit_for_bit(tmp_path: Path, digits: Data) -> None:
    config = tiny(tmp_path, *KEPT, "train.skip=0.5", "bt.robust_share=0.5", "recipe.ema=0.9",
                  "recipe.crop_padding=1", "recipe.clip_norm=1", "train.epochs=3",
                  "bt.score=last", "bt.guard=0.95", "bt.guard_steps=1")  # fmt: skip
    whole, cut, resumed = (make_state(config, digits, CPU) for _ in range(3))
    nominal = len(digits.train) // 64
    for state, batches_done in ((whole, None), (cut, 5)):
        epoch_of(config, state, digits.train)
        state.end_epoch()
        state.memory["score"].copy_(torch.arange(len(digits.train)) % 50)
        epoch_of(config, state, digits.train, stopped=lambda s=state, n=batches_done: s.batch == n)
    assert whole.batch == batches_in(whole, digits.train, make_plan(config)) < nominal
    checkpoint.save(tmp_path / "cut.pt", {"state": cut.state_dict()})
    resumed.load_state_dict(checkpoint.load(tmp_path / "cut.pt")["state"])
    epoch_of(config, resumed, digits.train)
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    assert same(resumed.memory, whole.memory)
    assert torch.equal(resumed.epoch_sums, whole.epoch_sums)


@pytest.mark.parametrize("defense", ["pgd", "mart"])
@pytest.mark.parametrize("allocator", ["uniform", "early_exit", "gaussian"])
def test_the_levers_go_together_with_every_defense(
    tmp_path: Path, digits: Data, defense: str, allocator: str
) -> None:
    settings = [f"defense={defense}", f"bt={allocator}", "attack.start=kept", "bt.n_b=1",
                "train.skip=0.5", "train.skip_last=0", "recipe.clip_norm=1", "train.epochs=2",
                "train.precision=bf16"]  # fmt: skip
    settings += ["bt.n_r=1", "bt.robust_share=0.5"] if allocator == "early_exit" else []
    config = tiny(tmp_path, *settings)
    state = make_state(config, digits, CPU)
    whole = epoch_of(config, state, digits.train)
    state.end_epoch()
    state.memory["score"].copy_(torch.arange(len(digits.train)))
    part = epoch_of(config, state, digits.train)
    assert whole["left_out"] == 0 and part["left_out"] == pytest.approx(0.25, abs=0.01)
    assert part["units_per_example"] < 9
    assert part["units_per_example"] < whole["units_per_example"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.skip=1"], "train.skip must be in [0, 1)"),
        (["train.skip=-0.1"], "train.skip must be in [0, 1)"),
        (["train.skip_last=0.3"], "train.skip_last has no meaning with train.skip=0"),
        (["attack.store=bf16"], "attack.store has no meaning with attack.start=normal"),
        (["rival=free", "defense=pgd", "bt=uniform", "attack.start_std=0.1"], "with rival=free"),
        (["bt.robust_share=0"], "bt.robust_share must be in (0, 1]"),
        (["bt.robust_share=0.5", "bt.n_r=0"], "bt.robust_share must be 1 where robust"),
        (["train.skip=0.5", "rival=mma", "defense=pgd", "bt=uniform"], "rival=mma"),
        (["train.skip=0.5", "defense=augmix"], "defense=augmix"),
        (["train.skip=0.5", "bt.pool=2"], "bt.pool=2"),
        (["train.skip=0.5", "sparsity=flying_bird"], "sparsity=flying_bird"),
        (["bt.guard=1.1"], "bt.guard must be in [0, 1]"),
        (["bt.guard_steps=1"], "bt.guard_steps has no meaning with bt.guard=1"),
        (["bt.guard=0.5", "bt.guard_steps=3"], "bt.guard_steps must be from bt.n_o = 0 to bt.n_r"),
        (["bt=oracle", "bt.guard=0.5", "bt.guard_steps=99"], "bt.guard_steps must be from bt.n_o"),
        (["bt=oracle", "bt.n_r=0", "bt.robust_share=0.5"], "bt.robust_share must be 1 where"),
        (["bt.share_clean_forward=false", "bt.score=last"], "contradicts bt.score=last"),
        (["bt.guard=0.5", "defense=mixtrain"], "defense=mixtrain"),
        (["bt.guard=0.5", "bt.pool=2"], "bt.guard=0.5 does not go with bt.pool=2"),
        (["bt.score=last", "bt.pool=2"], "bt.score=last does not go with bt.pool=2"),
        (["bt.score=last", "bt=uniform"], "bt=uniform"),
        (["bt.score=last", "train.accumulate=2"], "train.accumulate=2"),
    ],
)
def test_what_leaving_out_does_not_go_with_is_named(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        compose(overrides)


@pytest.mark.parametrize(
    ("overrides", "doubt"),
    [
        ([], None),
        (["train.skip=0.8", "bt.guard=0.5"], None),
        (["bt.guard=0.5"], "bt.guard=0.5 changes nothing here: it lifts bt.robust_share and"),
        (["train.skip=0.1"], "out: it would spare at most 15 images of 300 in an epoch, which is"),
        (["train.skip=0.6", "train.epochs=1"], "no scores precede it, and train.epochs=1."),
        (["train.skip=0.6", "train.skip_last=0.8"], "out: train.skip_last=0.8 keeps every image"),
        (["train.skip=0.6", "bt.guard=0.5", "bt.warmup_epochs=4"], "would be epoch 5 of 4 ("),
        (["attack.epsilon_warmup_epochs=3"], None),
        (["attack.epsilon_warmup_epochs=5"], "is not below train.epochs=4: no epoch attacks at "
         "the whole ε, the last one has 67 % of it."),
        (["bt.score=shared"], None),
        ([*NORMED, "bt.score=shared", "bt=uniform", "attack.mode=train"], None),
        ([*NORMED, "bt.score=shared", "bt=uniform", "defense=mart"], None),
        ([*NORMED, "bt.score=shared", "bt=uniform", "bt.n_b=0"], None),
        ([*NORMED, "bt.score=shared", "bt=uniform"], "bt.score=shared: the attack's target is"),
        ([*NORMED, "bt.score=shared"], "are scored and the attack's target is made by"),
        ([*NORMED, "bt.score=shared", "defense=mart"], "cost two points of robust accuracy"),
        (["defense=verified", "bt=random", "defense.k=3"], None),
        (["defense=verified", "bt=random", "defense.k=2"], "defense.k=2 leaves 1 of 3 batches"),
        (["defense=verified", "bt=random", "defense.k=2", "defense.alpha=0.5"], None),
    ],
)  # fmt: skip
def test_settings_that_do_nothing_or_harm_are_told(
    digits: Data, overrides: list[str], doubt: str | None
) -> None:
    common = ["dataset=digits", "model=small_cnn", "model.width=4", "train.epochs=4"]
    config = compose([*common, "train.batch_size=100", *overrides])
    few = Split(digits.train.images[:300], digits.train.labels[:300])
    data = replace(digits, train=few)
    found = doubts(config, make_state(config, data, CPU), data)
    assert len(found) == (doubt is not None)
    assert doubt is None or doubt in found[0]


# Scores of the last visit


@pytest.mark.parametrize("allocator", ["bullettrain", "random"])
def test_scores_of_the_last_visit_choose_like_fresh_ones_while_weights_stand_still(
    digits: Data, allocator: str
) -> None:
    common = ["dataset=digits", "model=small_cnn", f"bt={allocator}", "bt.n_b=2", "bt.n_r=1"]
    m = 60
    model = make_state(compose(common), digits, CPU).model
    x = to_unit(digits.train.images[:m])
    with torch.no_grad():
        labels = (model.eval()(x).argmax(dim=1) + (torch.arange(m) % 3 == 0)) % 10
    batch, seen = Batch(x, labels, torch.arange(m)), []
    for settings in ([], ["bt.score=last"]):
        config = compose([*common, *settings])
        memory, drawn = memory_of(config, digits, CPU), generator()
        memory["robust_fraction"] += 0.5
        for cold in (True, False):
            method = make_method(config, CPU, cold=cold)
            (examples,) = method.examples(model, batch, memory, drawn)
            loss = method.loss(model, examples, memory, drawn)
            memory["robust_fraction"].fill_(0.5)
        assert isinstance(examples, Examples)
        seen.append((examples, loss))
    (fresh, fresh_loss), (last, last_loss) = seen
    torch.testing.assert_close(last.score, fresh.score)
    assert torch.equal(last.allocation.steps, fresh.allocation.steps)
    torch.testing.assert_close(last.x_adv, fresh.x_adv)
    torch.testing.assert_close(last_loss.value, fresh_loss.value)
    saved = m - int((last.allocation.steps > 0).sum())
    assert 0 < saved == float(fresh_loss.stats.units - last_loss.stats.units)
    told = last_loss.stats._replace(units=fresh_loss.stats.units)
    torch.testing.assert_close(told, fresh_loss.stats, equal_nan=True)


def test_the_older_name_of_shared_scores_goes_on() -> None:
    for value, name in (("true", "shared"), ("false", "fresh")):
        old = to_dict(compose([f"bt.share_clean_forward={value}", "run.dir=r"]))
        new = to_dict(compose([f"bt.score={name}", "run.dir=r"]))
        assert old == new
        saved = {key: item for key, item in new["bt"].items() if key != "score"}
        saved["share_clean_forward"] = value == "true"
        assert older.translated(new | {"bt": saved}) == new


# Outliers


def test_a_guard_spares_nobody_while_most_are_outliers() -> None:
    classes = torch.tensor([BOUNDARY, ROBUST, OUTLIER])
    before, guard = Allocation(classes, torch.tensor([3, 2, 0])), Guard(0.5, 1)
    for f_o, steps, share in ((0.51, [3, 2, 1], 1.0), (0.5, [3, 2, 0], 0.25)):
        after, of_robust = guard(before, torch.tensor(f_o), 0.25)
        assert after.steps.tolist() == steps
        assert float(of_robust) == share


def test_a_guarded_run_attacks_outliers_and_leaves_nobody_out(tmp_path: Path, digits: Data) -> None:
    always = ["bt.guard=0", "bt.guard_steps=1"]
    train(tiny(tmp_path / "guarded", *always, "train.epochs=1"))
    train(tiny(tmp_path / "attacked", "bt.n_o=1", "train.epochs=1"))
    assert same(weights(tmp_path / "guarded"), weights(tmp_path / "attacked"))
    config = tiny(tmp_path / "skips", "train.skip=0.5", "bt.guard=0.4", "train.epochs=3")
    state = make_state(config, digits, CPU)
    state.epoch = 1
    state.memory["score"].copy_(torch.arange(len(digits.train)))
    for f_o, left_out in ((0.41, False), (0.39, True)):
        state.memory[OUTLIERS].fill_(f_o)
        weight = weights_of_epoch(state, digits.train.labels, make_plan(config))
        assert weight is not None and bool((weight == 0).any()) is left_out
    late = tiny(tmp_path / "skips", "train.skip=0.5", "bt.guard=0.4", "bt.warmup_epochs=1",
                "train.epochs=3")  # fmt: skip
    # F_O is 0 in the first epoch behind the warm-up, too.
    weight = weights_of_epoch(state, digits.train.labels, make_plan(late))
    assert weight is not None and bool((weight == 1).all())
    method = make_method(compose([*KEPT, *always, "bt.robust_share=0.5"]), CPU)
    assert method.expected_units((0.1, 0.3, 0.6)) == 1 + 3 + 2 + 3
    assert method.expected_units((0.1, 0.9, 0)) == 1 + 3 + (2 + 3) * (0.1 + 0.45)


def test_half_way_through_a_run_the_log_warns_of_many_outliers() -> None:
    settings = ["dataset=digits", "model=small_cnn", "train.epochs=5"]
    config = compose(settings)
    line = {"epoch": 3, "f_o": 0.7}
    warned = many_outliers(config, line, 10)
    assert warned is not None
    assert "70 % of the examples count as outliers" in warned
    assert "more epochs make them fewer, and bt=uniform attacks everybody" in warned
    told = many_outliers(config, line | {"f_o": 0.85}, 10)
    assert told is not None and "has not begun to learn" in told and "bt=" not in told
    assert many_outliers(config, line | {"f_o": 0.4}, 10) is None
    assert many_outliers(config, line | {"epoch": 4}, 10) is None
    assert many_outliers(compose([*settings, "bt.n_o=1"]), line, 10) is None
    guarded = [*settings, "bt.guard=0.6", "bt.robust_share=0.5"]
    assert many_outliers(compose(guarded), line, 10) is not None
    assert many_outliers(compose([*guarded, "bt.guard_steps=1"]), line, 10) is None
    for name in ("uniform", "random"):  # one has none, the other draws them
        assert many_outliers(compose([*settings, f"bt={name}"]), line, 10) is None
    warm = compose([*settings, "bt.warmup_epochs=3"])
    assert many_outliers(warm, line | {"f_o": 0.0}, 10) is None
    assert many_outliers(warm, line, 10) is None
    assert many_outliers(warm, line | {"epoch": 4}, 10) is not None
    assert (
        many_outliers(compose([*settings, "defense=mixtrain", "bt=bullettrain"]), line, 10) is None
    )


@pytest.mark.parametrize(
    "words",
    [
        *([f"experiment={name}"] for name in ("fastest", "fastest_mnist")),
        *([f"experiment={name}"] for name in ("cheap_bullettrain", "cheapest_mnist")),
        ["experiment=fastest", "bt.score=last"],
    ],
)
def test_what_the_warning_advises_can_be_done(words: list[str]) -> None:
    config = compose(words)
    line = {"epoch": (config.train.epochs + 1) // 2, "f_o": 0.7}
    warned = many_outliers(config, line, 10)
    assert warned is not None
    advised = re.findall(r"\b(?:bt|train|attack|recipe)[\w.]*=\w+", warned)
    followed = compose([*words, *advised])
    assert advised and many_outliers(followed, line, 10) is None


def test_a_network_near_chance_is_told() -> None:
    warned = at_chance(18.9, 10)
    assert warned is not None and "where guessing gives 10.0 %" in warned
    assert at_chance(19.1, 10) is None


def test_in_bf16_a_first_attack_begins_where_a_divergence_has_a_gradient() -> None:
    settings = ["dataset=digits", "model=small_cnn", *KEPT]
    for precision, length in (("float32", 0.001), ("bf16", 0.3 * 0.15)):
        method = make_method(compose([*settings, f"train.precision={precision}"]), CPU)
        assert isinstance(method, BulletTrain)
        noise = method.attack.noise(torch.zeros(50, 1, 8, 8), generator())
        assert float(noise.std()) == pytest.approx(length, rel=0.05)
        assert method.attack.probe is None  # which would move kept starts, too
