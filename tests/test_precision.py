"""bf16 and channels_last against the plain path, and what stays float32."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from btrain import models, precision
from btrain.attacks.balls import LinfBall
from btrain.attacks.pgd import early_exit_pgd, prefix_pgd
from btrain.attacks.shadow import InBFloat16, attacked
from btrain.data import Batch, Data
from btrain.defenses import kl_inner_loss
from btrain.errors import UserError
from btrain.methods.make import make_bullettrain, make_defense, probe_factor
from btrain.methods.statistics import StepStats
from btrain.precision import to_channels_last
from btrain.training import train
from btrain.training.setup import make_state
from composing import compose
from steps import memory_of, step_of

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
    memory = memory_of(config, data, CPU)
    memory["robust_fraction"].fill_(0.5)
    labels = torch.arange(len(x)) % 10
    batch = Batch(x, labels, torch.arange(len(x)))
    generator = torch.Generator().manual_seed(0)
    stats = step_of(config, CPU)(model.train(), optimizer, batch, memory, generator)
    after = [parameter.detach() for parameter in model.parameters()]
    return [a.double() - b.double() for a, b in zip(after, before, strict=True)], stats


def settings(defense: str, allocator: str) -> list[str]:
    fewer = ["bt.n_r=1"] if defense != "augmix" and allocator == "bullettrain" else []
    return [f"defense={defense}", f"bt={allocator}", "attack.steps=2", *fewer]


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


@pytest.mark.parametrize(("capability", "safe"), [("AVX2", False), ("AVX512", True)])
def test_channels_last_is_refused_where_torch_would_crash(
    monkeypatch: pytest.MonkeyPatch, capability: str, safe: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    narrow, wide = (
        models.build("preact_resnet18", width=width, depth=None, classes=10, shape=(1, 8, 8))
        for width in (7, 8)
    )
    to_channels_last(wide)
    with contextlib.nullcontext() if safe else pytest.raises(UserError, match="7 input channels"):
        to_channels_last(narrow)


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


@pytest.mark.skipif(
    torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="needs a processor without bf16"
)
def test_a_processor_without_bf16_is_found_out() -> None:
    assert precision.bf16_slowdown() > 2  # some thirty


@pytest.mark.parametrize(("slowdown", "hinted"), [(0.6, False), (15.2, True)])
def test_who_trains_in_bf16_on_such_a_processor_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slowdown: float, hinted: bool
) -> None:
    monkeypatch.setattr(precision, "bf16_slowdown", lambda: slowdown)
    settings = ["dataset=digits", "model=small_cnn", "model.width=2", "train.epochs=1"]
    settings += ["dataset.train_examples=40", "dataset.test_examples=10", "eval.steps=1"]
    for kind in ("bf16", "float32"):
        train(compose([*settings, f"train.precision={kind}", f"run.dir={tmp_path / kind}"]))
        log = (tmp_path / kind / "train.log").read_text()
        sentence = "a convolution takes 15 times as long as in float32 on this processor"
        assert (f"train.precision=bf16: {sentence}" in log) is (hinted and kind == "bf16")
    assert precision.bf16_hint("precision", torch.device("cuda")) is None


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


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_the_shadow_is_the_network_of_the_last_refresh(
    architecture: str, tiles: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = models.build(architecture, width=2, depth=10, classes=10, shape=(3, 32, 32),
                         mean=[0.4], std=[0.2])  # fmt: skip
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.normal_(layer.bias)
    model(tiles)  # statistics
    # In float32, so that nothing but the folding differs.
    monkeypatch.setattr(nn.Module, "bfloat16", lambda module: module)
    short = InBFloat16(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    short.shadow(tiles)
    for _ in range(2):
        nn.functional.cross_entropy(model(tiles), torch.arange(24) % 10).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = short.shadow.network(tiles)
        short.refresh()
        model.eval()
        torch.testing.assert_close(short.shadow.network(tiles), model(tiles), rtol=1e-4, atol=1e-4)
        model.train()
        assert not torch.allclose(before, short.shadow.network(tiles), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "refreshes"),
    [
        (["attack.steps=2", "bt.n_r=1"], 1),
        (["attack.steps=2", "bt.n_r=1", "bt.score=shared"], 1),
        (["bt=uniform", "attack.steps=2", "attack.mode=train"], 0),
        (["defense=augmix"], 0),
    ],
)
def test_weights_are_copied_for_an_attack_alone(
    digits: Data,
    tiles: Tensor,
    settings: list[str],
    refreshes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copied: list[int] = []
    plain = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *a: copied.append(1) or plain(*a))
    one_update(network(), digits, tiles, *settings, "train.precision=bf16")
    assert len(copied) == refreshes


def test_a_shared_clean_forward_moves_the_statistics_of_the_attack_too(tiles: Tensor) -> None:
    model = network().train()
    short = InBFloat16(model)
    config = compose(["attack.steps=2", "bt.n_r=1", "bt.score=shared"])
    method, memory = make_bullettrain(config, CPU), {"robust_fraction": torch.tensor(0.5)}
    batch = Batch(tiles, torch.arange(24) % 10, torch.arange(24))
    next(method.examples(short, batch, memory, torch.Generator().manual_seed(0)))
    (first, *_), (theirs, *_) = (
        [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
        for net in (model, short.shadow)
    )
    assert first.running_mean is not None
    assert theirs.running_mean is not None
    assert first.running_mean.any()
    assert torch.equal(first.running_mean, theirs.running_mean)
    folded = [weight.clone() for weight in short.shadow.parameters()]
    short.refresh()
    assert all(map(torch.equal, folded, short.shadow.parameters()))


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_a_refresh_is_one_copy_of_short_weights(architecture: str) -> None:
    """On a GPU one launch for all tensors, if they are of one kind and laid out alike."""
    model = models.build(architecture, width=8, depth=10, classes=10, shape=(3, 32, 32))
    short = InBFloat16(to_channels_last(model).train())
    copies: list[tuple[list[Tensor], list[Tensor]]] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            assert "copy" not in func.__name__ or func is torch.ops.aten._foreach_copy_.default
            if func is torch.ops.aten._foreach_copy_.default:
                copies.append(args)
            return func(*args, **(kwargs or {}))

    with Copies():
        assert short.refresh().shadow
    ((targets, sources),) = copies
    assert {t.dtype for t in targets} == {torch.bfloat16}
    assert {t.dtype for t in sources} == {torch.float32}
    assert all(a.stride() == b.stride() for a, b in zip(targets, sources, strict=True))
    own = [p for p in short.shadow.parameters() if p.dtype is torch.bfloat16]
    assert {*map(id, targets)} == {*map(id, own)}
    assert all(p.requires_grad for p in model.parameters())


def test_the_attack_has_no_gradients_of_weights_and_no_casts_of_them(tiles: Tensor) -> None:
    short = InBFloat16(network())
    casts: list[int] = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and out.dtype is torch.bfloat16:
                casts.append(out.numel())
            return out

    with attacked(short) as shadow, Casts():
        shadow(tiles)
    assert casts == [tiles.numel()]
    assert not any(parameter.requires_grad for parameter in shadow.parameters())
    assert short.training
    assert not any(module.training for module in shadow.network.modules())


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


# The first gradient of a KL divergence in bf16


def first_signs(model: nn.Module, x: Tensor, at: Tensor) -> Tensor:
    """The signs of the KL divergence's gradient at `at`, the target from x."""
    images = at.clone().requires_grad_()
    with torch.no_grad():
        target = model(x)
    loss = kl_inner_loss(model(images), target, torch.arange(len(x))).sum()
    return torch.autograd.grad(loss, [images])[0].sign()


def test_probing_further_off_gives_bf16_the_direction_of_float32(tiles: Tensor) -> None:
    model = network().eval()
    noise = 0.001 * torch.randn(tiles.shape, generator=torch.Generator().manual_seed(0))
    config = compose(["train.precision=bf16"])
    factor = probe_factor(config, make_defense(config.defense))
    assert factor is not None
    assert factor * config.attack.start_std == pytest.approx(0.3 * config.attack.epsilon)
    exact = first_signs(model, tiles, tiles + noise)
    near = first_signs(InBFloat16(model), tiles, tiles + noise)
    far = first_signs(InBFloat16(model), tiles, tiles + factor * noise)
    same = [float((signs == exact).float().mean()) for signs in (near, far)]
    assert same[0] < 0.65  # hardly better than chance
    assert same[1] > same[0] + 0.15


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.precision=bf16", "defense=mart"],
        ["train.precision=bf16", "defense=pgd"],
        ["train.precision=bf16", "attack.start=uniform"],
        ["train.precision=bf16", "defense=pgd", "attack.start=clean"],
        ["train.precision=bf16", "defense=pgd", "attack.start=normal", "attack.start_std=0"],
        ["train.precision=bf16", "attack.start_std=0.02"],
    ],
    ids=str,
)
def test_only_a_kl_divergence_in_bf16_next_to_the_image_is_probed(overrides: list[str]) -> None:
    config = compose(overrides)
    assert probe_factor(config, make_defense(config.defense)) is None


@pytest.mark.parametrize("early_exit", [False, True])
def test_a_probe_turns_the_first_step_and_moves_nothing(early_exit: bool) -> None:
    x = torch.full((2, 1, 1, 1), 0.5)
    noise, probe = torch.full_like(x, 0.01), torch.tensor([0.3, -0.3]).view(2, 1, 1, 1)
    seen: list[float] = []

    class Hill(nn.Module):
        """Two logits with a ridge at 0.5, which the first ascends."""

        def forward(self, images: Tensor) -> Tensor:
            seen.append(images[0].item())
            height = -(images.flatten(1) - 0.5).abs()
            return torch.cat([height, -height], dim=1)

    def inner_loss(logits: Tensor, clean: Tensor, labels: Tensor) -> Tensor:
        return logits[:, 0]

    labels, sizes = torch.zeros(2, dtype=torch.int64), torch.full((2,), 0.1)
    if early_exit:
        moved, taken, _ = early_exit_pgd(
            Hill(), x, labels, x.new_empty(2, 0), steps=torch.ones(2, dtype=torch.int64),
            active=[2], exits=torch.ones(2, dtype=torch.bool), patience=0, step_size=sizes,
            inner_loss=inner_loss, ball=LinfBall(0.2), noise=noise, probe=probe,
        )  # fmt: skip
        assert taken.tolist() == [1, 1]  # both are wrong at the probe, which does not count
    else:
        moved = prefix_pgd(
            Hill(), x, labels, x.new_empty(2, 0), active=[2], step_size=sizes,
            inner_loss=inner_loss, ball=LinfBall(0.2), noise=noise, probe=probe,
        )  # fmt: skip
    assert seen == [pytest.approx(0.8)]
    assert moved.flatten().tolist() == pytest.approx([0.51 - 0.1, 0.51 + 0.1])


def _shortened_by_the_older_interface() -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True


def _shortened_by_the_newer_interface() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(
    "shorten",
    [lambda: None, _shortened_by_the_older_interface, _shortened_by_the_newer_interface],
    ids=["default", "older interface", "newer interface"],
)
def test_float32_is_exact_inside_and_as_it_was_outside(
    shorten: Callable[[], None], inner: bool
) -> None:
    units = precision._units()
    untouched = [unit.fp32_precision for unit in units]
    try:
        shorten()
        before = [unit.fp32_precision for unit in units]
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            precision.exactly_float32(CPU),
            precision.exactly_float32(CPU) if inner else contextlib.nullcontext(),
        ):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
            assert {unit.fp32_precision for unit in units} <= {"ieee"}
            assert not torch.is_autocast_enabled("cpu")
        assert [unit.fp32_precision for unit in units] == before
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        for unit, value in zip(units, untouched, strict=True):
            unit.fp32_precision = value
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_products_that_stand_for_the_peak_use_tf32_where_convolutions_may() -> None:
    allowed = torch.backends.cudnn.allow_tf32
    try:
        for may in (True, False):
            torch.backends.cudnn.allow_tf32 = may
            with precision.products_like_convolutions():
                assert torch.backends.cuda.matmul.allow_tf32 == may
            assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
