"""What makes training cheaper: clipping, kept starts, shares of the robust, examples left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from btrain.attacks.kept import KNOWN, Kept
from btrain.data import Batch, Data, Split, batches
from btrain.data.augmentation import Moved, random_mirrors, random_shifts, to_unit
from btrain.errors import UserError
from btrain.methods.make import make_method
from btrain.runs import checkpoint
from btrain.training import run, setup, train
from btrain.training.setup import make_state
from btrain.training.update import descend, shorten
from composing import compose
from steps import epoch_of, memory_of
from test_training import CPU, same, tiny, weights

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
    shorten(gradients, 1.0)
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
    return run.load_data(tiny(tmp_path), CPU)


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


def test_the_size_of_the_store_is_told_and_one_too_large_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path, *KEPT, "train.epochs=1")
    with monkeypatch.context() as patched:
        patched.setattr(setup, "free_memory", lambda device: 10_000)
        with pytest.raises(UserError, match=r"keeps 0\.02 MB of starts \(300 images of 1×8×8"):
            train(config)
    train(config)
    assert "attack.start=kept keeps 0.02 MB of starts (300 images" in capsys.readouterr().err


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
