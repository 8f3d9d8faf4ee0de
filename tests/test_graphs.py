"""Groups rounded up, and steps recorded once a size: all but CUDA itself, on the CPU.

Replaying runs the recorded step again here, on the same fixed memory.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from btrain.allocation import Allocation, filled_up, step_sizes
from btrain.attacks.balls import LinfBall
from btrain.attacks.fast_paths import FastPaths, check_fast_paths, make_fast_paths
from btrain.attacks.graphs import ReplayedPGD, group_multiple, repeated, replayed_pgd
from btrain.attacks.pgd import active_counts, by_steps, pgd, prefix_pgd
from btrain.attacks.shadow import InBFloat16, Shadowed, attacked
from btrain.data import Batch, Data
from btrain.defenses import ce_inner_loss, kl_inner_loss
from btrain.errors import UserError
from btrain.methods.bullettrain import BulletTrain, Examples, eval_logits
from btrain.methods.make import make_bullettrain, make_methods
from btrain.settings import Config, CudaGraphs
from btrain.training.setup import make_state
from btrain.training.state import TrainState
from btrain.training.timing.graphs_pay import faster, with_graphs_settled
from btrain.training.update import descend, train_batch
from composing import compose
from steps import step_of

CPU = torch.device("cpu")
TINY = ["dataset=digits", "model=preact_resnet18", "model.width=4", "device=cpu",
        "train.batch_size=24", "attack.steps=4"]  # fmt: skip
F_R = torch.tensor(0.5)


def tiny(*overrides: str) -> Config:
    return compose([*TINY, *overrides])


def method(multiple: int, *overrides: str) -> BulletTrain:
    """With steps recorded and replayed, and groups rounded up to the multiple."""
    paths = FastPaths(lambda network: network, replayed_pgd(CPU, 24), multiple)
    return make_bullettrain(tiny(*overrides), CPU, paths=paths)


def plain(chosen: BulletTrain) -> BulletTrain:
    return replace(chosen, attack=replace(chosen.attack, multiple=1, pgd=prefix_pgd))


def attacked_by(
    how: BulletTrain, model: nn.Module, x: Tensor, labels: Tensor, draws: torch.Generator
) -> Examples:
    """The batch after line 13, with F_R = 0.5."""
    batch = Batch(x, labels, torch.arange(len(x)))
    return next(how.examples(model, batch, {"robust_fraction": F_R}, draws))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def some_right(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The digits, of which the network gets three of four right."""
    predicted = eval_logits(model, batch[0]).argmax(dim=1)
    return batch[0], torch.where(torch.arange(24) % 4 == 0, (predicted + 1) % 10, predicted)


# Groups


def by_hand(steps: list[int], rank: list[int], multiple: int) -> list[int]:
    """The rule in words: for every step, whoever is next in line joins until the size is even.

    `rank` are the examples from the nearest to the furthest; those with more steps go ahead.
    """
    line = sorted(rank, key=lambda i: -steps[i])
    taken = [0] * len(steps)
    for j in range(max(steps, default=0)):
        n = sum(step > j for step in steps)
        while n % multiple and n < len(steps):
            n += 1
        for i in line[:n]:
            taken[i] += 1
    return taken


STEPS = {
    "as usual": [10, 0, 2, 2, 10, 2, 0, 10, 2, 2, 0, 2, 2, 2],
    "no boundary example": [0, 2, 2, 0, 2, 0, 2],
    "no robust example": [10, 0, 10, 10, 0, 0, 0, 0, 0, 0],
    "outliers alone": [0] * 6,
    "more than are left": [10, 10, 10, 10, 10, 2, 0],
    "all alike": [4] * 9,
    "with N_O": [10, 1, 2, 1, 10, 2, 2, 1, 1, 2, 1],
    "smooth": [7, 3, 5, 0, 1, 2, 6, 6, 4, 0, 0, 3],
    "one": [5],
}


@pytest.mark.parametrize("multiple", [1, 2, 4, 8])
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
def test_the_next_in_line_get_the_longer_budget(steps: list[int], multiple: int) -> None:
    m = len(steps)
    distance = torch.rand(m, generator=generator())
    given = Allocation(torch.arange(m) % 3, torch.tensor(steps))
    order, given_counts = by_steps(given.steps, distance)
    active = given_counts()
    filled, counts = filled_up(given, order, active, multiple)
    assert filled.steps.tolist() == by_hand(steps, distance.argsort().tolist(), multiple)
    assert torch.equal(filled.classes, given.classes)
    ordered = filled.steps[order].tolist()
    assert ordered == sorted(ordered, reverse=True)
    assert counts == active_counts(ordered)
    assert len(counts) == len(active)
    assert all(n % multiple == 0 or n == m for n in counts)
    assert all(0 <= after - n < multiple for after, n in zip(counts, active, strict=True))
    if multiple == 1:
        assert torch.equal(filled.steps, given.steps)


def test_the_multiple_bounds_the_number_of_graphs() -> None:
    for m in (2, 32, 128, 256, 257, 512, 1024, 4096):
        multiple = group_multiple(m)
        assert multiple % 8 == 0
        assert -(-m // multiple) <= 32
    assert [group_multiple(m) for m in (128, 512)] == [8, 16]


@pytest.mark.parametrize("multiple", [4, 8])
def test_a_batch_of_bullettrain_promotes_the_nearest(
    preact: nn.Module, batch: tuple[Tensor, Tensor], multiple: int
) -> None:
    x, labels = some_right(preact, batch)
    chosen = method(multiple)
    before = attacked_by(plain(chosen), preact, x, labels, generator())
    after = attacked_by(chosen, preact, x, labels, generator())
    z = eval_logits(preact, x)
    nearest = chosen.metric(z, labels).abs().argsort().tolist()
    original = {tuple(image.flatten().tolist()): i for i, image in enumerate(x)}

    def in_batch_order(steps: Tensor, images: Tensor) -> list[int]:
        found = {original[tuple(image.flatten().tolist())]: int(n) for image, n in
                 zip(images, steps, strict=True)}  # fmt: skip
        return [found[i] for i in range(24)]

    steps = in_batch_order(before.allocation.steps, before.x)
    expected = by_hand(steps, nearest, multiple)
    assert set(steps) == {0, 2, 4}
    assert in_batch_order(after.allocation.steps, after.x) == expected != steps
    # The ledger: a clean forward of all, and two units for every image of every attack step.
    assert after.units == 24 + 2 * sum(expected)
    assert after.perturbed == sum(n > 0 for n in expected)
    # Step sizes follow the budget, and so do the examples, whoever else is attacked with them.
    epsilon = tiny().attack.epsilon
    sizes = step_sizes(
        after.allocation.steps, n_b=chosen.attack.n_b, epsilon=epsilon,
        step_size_b=chosen.attack.step_size_b,
    )  # fmt: skip
    with attacked(preact) as network:
        alone = pgd(
            network, after.x, after.labels, after.z, steps=after.allocation.steps,
            step_size=sizes, inner_loss=kl_inner_loss, epsilon=epsilon,
            noise=_noise_of(after.x, x),
        )  # fmt: skip
    assert (alone - after.x_adv).abs().max() < 1e-5


def _noise_of(ordered: Tensor, x: Tensor) -> Tensor:
    """The start's noise, in the order of the attacked images."""
    noise = torch.zeros_like(x).normal_(0, tiny().attack.start_std, generator=generator())
    rows = [(x == image).flatten(1).all(dim=1).nonzero()[0, 0] for image in ordered]
    return noise[torch.stack(rows)]


# Recorded steps


def noisy(x: Tensor, scale: float = 0.01) -> Tensor:
    return scale * torch.randn(x.shape, generator=generator())


@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize("inner_loss", [kl_inner_loss, ce_inner_loss])
@pytest.mark.parametrize("wrap", [None, Shadowed, InBFloat16])
def test_replayed_steps_are_the_plain_attack_bit_for_bit(
    preact: nn.Module,
    batch: tuple[Tensor, Tensor],
    wrap: Callable[[nn.Module], nn.Module] | None,
    inner_loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    probed: bool,
) -> None:
    model = preact if wrap is None else wrap(preact)
    replayed = replayed_pgd(CPU, 24)
    for m, active in ((24, [20, 20, 7, 7, 7]), (24, [9, 3]), (17, [17]), (5, [])):
        x, labels = batch[0][:m], batch[1][:m]
        z = eval_logits(model, x)
        with attacked(model) as network:
            ours, plainly = (
                attack(
                    network, x, labels, z, active=active, inner_loss=inner_loss, ball=LinfBall(0.1),
                    step_size=torch.linspace(0.02, 0.06, m), noise=noisy(x),
                    probe=noisy(x, 0.05) if probed else None,
                )
                for attack in (replayed, prefix_pgd)
            )  # fmt: skip
        assert torch.equal(ours, plainly)
        assert torch.equal(ours[sum(active[:1]) :], x[sum(active[:1]) :])
    assert replayed.recorded == 5  # 20, 7, 9, 3, 17


@pytest.mark.parametrize(
    "overrides",
    [
        ["defense=trades"],
        ["defense=trades", "train.precision=bf16"],
        ["defense=trades", "bt.n_o=1"],
        ["defense=mart", "bt=gaussian"],
        ["defense=pgd", "bt=oracle"],
        ["defense=trades", "bt=random"],
        ["defense=mart", "bt=uniform"],
    ],
    ids=str,
)
def test_with_a_multiple_of_one_an_update_is_the_plain_one_bit_for_bit(
    preact: nn.Module, batch: tuple[Tensor, Tensor], overrides: list[str]
) -> None:
    x, labels = some_right(preact, batch)
    chosen = method(1, *overrides)
    short = "train.precision=bf16" in overrides
    models = [copy.deepcopy(preact).train() for _ in range(2)]
    results = []
    for model, how in zip(models, (chosen, plain(chosen)), strict=True):
        seen = (InBFloat16 if short else Shadowed)(model) if how is chosen or short else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        draws = generator()
        for _ in range(2):  # the second with moved weights
            refreshed = seen.refresh() if isinstance(seen, Shadowed) else seen
            made = attacked_by(how, refreshed, x, labels, draws)
            loss = how.loss(refreshed, made, {"robust_fraction": F_R}, draws)
            descend(optimizer, loss.value)
        results.append(made)
    assert torch.equal(results[0].x_adv, results[1].x_adv)
    assert results[0].units == results[1].units
    ours, theirs = (model.state_dict() for model in models)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(ours["fc.weight"], preact.state_dict()["fc.weight"])


def test_steps_are_recorded_anew_only_where_they_would_not_hold(
    preact: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, labels = batch
    made: list[int] = []

    def recorder() -> Callable[[Callable[[], None]], Callable[[], None]]:
        made.append(1)
        return repeated

    replayed = ReplayedPGD(recorder, 12)

    def attack(network: nn.Module, m: int, classes: int = 10, size: float = 0.02) -> int:
        z = torch.zeros(m, classes)
        replayed(
            network, x[:m], labels[:m], z, active=[m, 4], step_size=torch.full((m,), size),
            inner_loss=ce_inner_loss, ball=LinfBall(0.1), noise=noisy(x[:m]),
        )  # fmt: skip
        return replayed.recorded

    shadow = Shadowed(preact).shadow
    assert attack(shadow, 8) == 2
    with torch.no_grad():
        preact.fc.weight.add_(1)  # type: ignore[union-attr, operator]
    assert attack(shadow, 8, size=0.05) == 2
    assert attack(shadow, 12) == 3
    assert attack(shadow, 8) == 3
    assert sum(made) == 1
    assert attack(shadow, 20) == 5  # more room
    assert attack(shadow, 8) == 6
    assert attack(shadow, 8, classes=0) == 8  # logits that nobody reads
    assert attack(Shadowed(preact).shadow, 8, classes=0) == 10  # another network
    preact.fc.weight = nn.Parameter(torch.zeros_like(preact.fc.weight))  # type: ignore[union-attr, arg-type]
    assert sum(made) == 4
    moved = Shadowed(preact).shadow
    assert attack(moved, 8) == 12
    moved.network.fc.weight = nn.Parameter(torch.ones(10, 32), requires_grad=False)  # type: ignore[union-attr]
    assert attack(moved, 8) == 14  # weights elsewhere


def test_the_trial_runs_of_a_recorder_do_no_harm(
    preact: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    def trying(step: Callable[[], None]) -> Callable[[], None]:
        for _ in range(3):
            step()
        return step

    x, labels = batch
    z = eval_logits(preact, x)
    replayed = ReplayedPGD(lambda: trying, 24)
    with attacked(preact) as network:
        for active in ([24, 24, 5], [24, 9, 5]):
            ours, plainly = (
                attack(
                    network, x, labels, z, active=active, step_size=torch.full((24,), 0.03),
                    inner_loss=kl_inner_loss, ball=LinfBall(0.1), noise=noisy(x),
                )
                for attack in (replayed, prefix_pgd)
            )  # fmt: skip
            assert torch.equal(ours, plainly)


# The shadow in float32


def test_a_shadow_in_float32_shares_the_weights_and_is_frozen(
    preact: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    preact.train()
    seen = Shadowed(preact)
    optimizer = torch.optim.SGD(preact.parameters(), lr=0.1)
    for _ in range(2):
        nn.functional.cross_entropy(seen(batch[0]), batch[1]).backward()
        optimizer.step()
        shadow = eval_logits(seen, batch[0])
        assert preact.training
        assert torch.equal(shadow, eval_logits(preact, batch[0]))
    theirs = list(seen.shadow.parameters())
    ours = list(preact.parameters())
    assert [p.data_ptr() for p in ours] == [p.data_ptr() for p in theirs]
    assert not any(p.requires_grad for p in theirs)
    assert all(p.requires_grad for p in ours)
    assert [*map(id, seen.parameters())] == [*map(id, ours)]


# A run's choice


def test_all_steps_of_a_run_share_what_is_recorded(
    preact: nn.Module, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("bt.warmup_epochs=1", "attack.epsilon_warmup_epochs=2")
    config = replace(config, train=replace(config.train, cuda_graphs=CudaGraphs.always))
    paths = make_fast_paths(config.train, CPU)
    assert paths.multiple == 8
    assert paths.view(preact) is paths.view(preact)
    recorded: list[ReplayedPGD] = []
    monkeypatch.setattr(
        "btrain.attacks.fast_paths.replayed_pgd",
        lambda device, examples: recorded.append(replayed_pgd(device, examples)) or recorded[-1],
    )
    state, paths = make_state(config, digits, CPU), make_fast_paths(config.train, CPU)
    method_of = make_methods(config, CPU, paths=paths)
    batch = Batch(
        digits.train.images[:24].float() / 255, digits.train.labels[:24], torch.arange(24)
    )
    for epoch in (0, 1, 2, 3):
        network, method = paths.view(state.model), method_of(epoch)
        train_batch(network, state.optimizer, method, batch, state.memory, generator())
    (pgd_of_all,) = recorded
    assert pgd_of_all.recorded <= 3  # 8, 16, 24


def test_auto_keeps_what_takes_less_time_and_leaves_the_run_alone(
    digits: Data, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny("train.cuda_graphs=auto")
    state = make_state(config, digits, CPU)
    before = copy.deepcopy(state.state_dict())
    drawn = torch.get_rng_state()
    assert with_graphs_settled(config, state, digits.train).train.cuda_graphs is CudaGraphs.never
    assert state.graphs is None  # nothing was timed
    took: list[float] = []

    def clock(work: Callable[[], None], device: torch.device) -> float:
        work()
        return took[0] if len(took) == 1 else took.pop(0)

    monkeypatch.setattr("btrain.training.timing.clock.seconds", clock)
    caplog.set_level("INFO", logger="btrain")
    for times, choice in (
        ([9.0, 9.0] * 3 + [2.0, 1.0] * 7, True),
        ([9.0, 1.0] * 3 + [1.0, 1.0] * 7, False),
    ):
        took[:] = times
        assert faster(config, state, digits.train) is choice
    assert [record.getMessage() for record in caplog.records] == [
        "CUDA graphs: used, 1000.00 ms a step with them and 2000.00 without",
        "CUDA graphs: not used, 1000.00 ms a step with them and 1000.00 without",
    ]
    after = state.state_dict()
    assert all(torch.equal(before["model"][name], value) for name, value in after["model"].items())
    assert torch.equal(before["generator"], after["generator"])
    assert torch.equal(drawn, torch.get_rng_state())

    def fails(work: Callable[[], None], device: torch.device) -> float:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr("btrain.training.timing.clock.seconds", fails)
    assert faster(config, state, digits.train) is None
    assert "not used (operation not permitted when stream is capturing)." in caplog.text


@pytest.mark.parametrize("found", [True, False])
def test_a_run_that_goes_on_keeps_to_what_auto_found(
    digits: Data, found: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny("train.cuda_graphs=auto")
    begun, resumed, failed = (make_state(config, digits, CPU) for _ in range(3))
    begun.graphs = found
    resumed.load_state_dict(begun.state_dict())
    times = [found, None]
    monkeypatch.setattr("btrain.training.timing.graphs_pay.faster", lambda *run: times.pop())
    monkeypatch.setattr(TrainState, "device", torch.device("cuda"))
    caplog.set_level("INFO", logger="btrain")
    settled = with_graphs_settled(config, resumed, digits.train).train.cuda_graphs
    assert settled is (CudaGraphs.always if found else CudaGraphs.never)
    assert f"CUDA graphs: {'used' if found else 'not used'}, as when the run began" in caplog.text
    # What could not be timed is no finding: the next session tries again.
    settled = with_graphs_settled(config, failed, digits.train).train.cuda_graphs
    assert settled is CudaGraphs.never
    assert failed.graphs is None
    with_graphs_settled(config, failed, digits.train)
    assert failed.graphs is found


def test_a_step_of_a_run_with_graphs_rounds_its_groups_up(digits: Data) -> None:
    config = tiny("bt.n_r=0")
    graphs = replace(config, train=replace(config.train, cuda_graphs=CudaGraphs.always))
    units = []
    for each in (config, graphs):
        state = make_state(each, digits, CPU)
        x = digits.train.images[:24].float() / 255
        predicted = eval_logits(state.model, x).argmax(dim=1)
        state.memory["robust_fraction"].fill_(0.55)
        stats = step_of(each, CPU)(
            state.model.train(), state.optimizer, Batch(x, predicted, torch.arange(24)),
            state.memory, generator(),
        )  # fmt: skip
        units.append(int(stats.steps))
    boundary, rounded = (steps // 4 for steps in units)
    assert 0 < boundary < 16
    assert boundary % 8
    assert rounded == -(-boundary // 8) * 8


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["defense=pgd", "rival=free"], "rival=free"),
        (["defense=augmix", "attack.steps=2", "bt.n_r=0"], "defense=augmix"),
        (["bt=early_exit"], "bt=early_exit"),
        (["bt.pool=2"], "bt.pool=2"),
        (["bt=uniform", "attack.mode=train"], "attack.mode=train"),
        (["train.compile=true"], "train.compile=true"),
    ],
)
def test_what_graphs_do_not_go_with(settings: list[str], key: str) -> None:
    tiny(*settings)
    for choice in ("always", "auto"):
        words = rf"^train\.cuda_graphs={choice} does not go with {re.escape(key)}: .+\.$"
        with pytest.raises(UserError, match=words):
            tiny(*settings, f"train.cuda_graphs={choice}")


def test_graphs_need_a_cuda_device() -> None:
    check_fast_paths(tiny("train.cuda_graphs=auto").train, CPU)
    with pytest.raises(
        UserError, match=r"^train\.cuda_graphs=always needs a CUDA device; .+cpu\.$"
    ):
        check_fast_paths(tiny("train.cuda_graphs=always").train, CPU)
