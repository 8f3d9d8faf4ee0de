"""bf16 and channels_last against the plain path, and what stays float32."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from btrain import models
from btrain.config import compose
from btrain.data import Batch, Data
from btrain.errors import UserError
from btrain.precision import InBFloat16, to_channels_last
from btrain.training import train
from btrain.training.methods import make_memory, make_step
from btrain.training.setup import make_state
from btrain.training.statistics import StepStats

CPU = torch.device("cpu")
DEFENSES = ["trades", "mart", "pgd", "augmix"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return models.build("preact_resnet18", width=4, depth=None, classes=10, shape=(3, 32, 32))


def one_update(
    model: nn.Module, data: Data, x: Tensor, *overrides: str
) -> tuple[list[Tensor], StepStats]:
    """How far a step of a copy moved each weight, and its statistics, with F_R = 0.5."""
    config = compose(["attack.steps=2", *overrides])
    before, model = [p.detach().clone() for p in model.parameters()], copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = make_memory(config, data, CPU)
    memory["robust_fraction"].fill_(0.5)
    labels = torch.arange(len(x)) % 10
    batch = Batch(x, labels, torch.arange(len(x)))
    generator = torch.Generator().manual_seed(0)
    stats = make_step(config, CPU)(model.train(), optimizer, batch, memory, generator)
    after = [parameter.detach() for parameter in model.parameters()]
    return [a.double() - b.double() for a, b in zip(after, before, strict=True)], stats


def settings(defense: str, allocator: str) -> list[str]:
    extra = ["attack.steps=2"] if defense == "augmix" else ["attack.steps=2", "bt.n_r=1"]
    return [f"defense={defense}", f"bt={allocator}", *extra]


def cosine(one: list[Tensor], other: list[Tensor]) -> float:
    a, b = (torch.cat([tensor.flatten() for tensor in list_]) for list_ in (one, other))
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("allocator", ["uniform", "bullettrain"])
@pytest.mark.parametrize("defense", ["trades", "mart", "pgd"])
def test_channels_last_is_the_plain_update_up_to_rounding(
    digits: Data, tiles: Tensor, defense: str, allocator: str
) -> None:
    model, words = network().double(), settings(defense, allocator)
    plain, _ = one_update(model, digits, tiles.double(), *words)
    turned, _ = one_update(to_channels_last(model), digits, tiles.double(), *words)
    for one, other in zip(plain, turned, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def test_a_run_with_channels_last_has_its_weights_in_that_layout(digits: Data) -> None:
    for turned in (True, False):
        config = compose(
            ["dataset=digits", "model=preact_resnet18", f"train.channels_last={turned}"]
        )
        model = make_state(config, digits, CPU).model
        weight = model.blocks[0].conv2.weight  # type: ignore[union-attr, index]
        assert weight.is_contiguous(memory_format=torch.channels_last) is turned


@pytest.mark.parametrize("allocator", ["uniform", "bullettrain"])
@pytest.mark.parametrize("defense", DEFENSES)
def test_an_update_in_bf16_is_close_to_the_plain_one(
    digits: Data, tiles: Tensor, defense: str, allocator: str
) -> None:
    model, words = network(), settings(defense, allocator)
    plain, stats = one_update(model, digits, tiles, *words)
    short, short_stats = one_update(model, digits, tiles, *words, "train.precision=bf16")
    assert cosine(plain, short) > 0.9
    assert not all(map(torch.equal, plain, short))
    assert float(short_stats.loss) == pytest.approx(float(stats.loss), rel=0.02)
    assert short_stats.loss.dtype == torch.float32


def test_the_network_computes_in_bf16_and_answers_in_float32(tiles: Tensor) -> None:
    model = network()
    seen: list[torch.dtype] = []
    model.blocks.register_forward_hook(  # type: ignore[union-attr]
        lambda module, args, out: seen.append(out.dtype)
    )
    short = InBFloat16(model)
    assert short(tiles).dtype == torch.float32
    assert seen == [torch.bfloat16]
    model(tiles)
    assert seen == [torch.bfloat16, torch.float32]
    assert [*map(id, short.parameters())] == [*map(id, model.parameters())]


def test_a_run_in_bf16_keeps_weights_and_evaluation_in_float32(tmp_path: Path) -> None:
    small = ["dataset=digits", "model=small_cnn", "model.width=4", "train.epochs=2",
             "attack.epsilon=0.1", "dataset.train_examples=400", "eval.steps=2"]  # fmt: skip
    fast = ["train.precision=bf16", "train.channels_last=true"]
    summary = train(compose([*small, *fast, f"run.dir={tmp_path / 'fast'}"]))
    saved = torch.load(tmp_path / "fast" / "checkpoints" / "last.pt", weights_only=True)["state"]
    assert {value.dtype for value in saved["model"].values()} == {torch.float32}
    momenta = [state["momentum_buffer"] for state in saved["optimizer"]["state"].values()]
    assert {value.dtype for value in momenta} == {torch.float32}
    again = train(compose([*small, *fast, f"run.dir={tmp_path / 'again'}"]))
    assert (again["clean_acc"], again["robust_acc"]) == (
        summary["clean_acc"],
        summary["robust_acc"],
    )
    with pytest.raises(UserError, match=r"train\.precision=bf16, not float32"):
        train(compose([*small, "train.channels_last=true", f"run.dir={tmp_path / 'fast'}"]))
