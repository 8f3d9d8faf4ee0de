"""What only a CUDA device can show; left out where there is none."""

from __future__ import annotations

import copy
import dataclasses
import json
import multiprocessing
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from btrain import models
from btrain.attacks.balls import LinfBall
from btrain.attacks.graphs import _TRIALS, GraphRecorder, ReplayedPGD
from btrain.attacks.pgd import by_steps, prefix_pgd
from btrain.attacks.shadow import InBFloat16, Shadowed
from btrain.bench import command
from btrain.bench.measure import measure
from btrain.bench.plan import Case, make_lanes
from btrain.build import as_current_gpu
from btrain.data import Batch, Data, load
from btrain.data.splits import load_configured
from btrain.defenses import kl_inner_loss
from btrain.errors import UserError
from btrain.evaluation import robust_accuracy
from btrain.precision import to_channels_last
from btrain.runs import checkpoint
from btrain.settings import Precision
from btrain.settings.compose import compose
from btrain.training import train
from btrain.training.safety.finite import Snapshot
from btrain.training.safety.out_of_memory import explained_memory
from btrain.training.setup import make_optimizer, make_state
from steps import epoch_of, step_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_run_on_the_gpu_is_as_good_as_on_the_cpu(tmp_path: Path) -> None:
    common = ["dataset=digits", "model=small_cnn", "train.epochs=25", "attack.epsilon=0.1"]
    cpu, gpu = (
        train(compose([*common, f"device={device}", f"run.dir={tmp_path / device}"]))
        for device in ("cpu", "cuda")
    )
    assert gpu["device"] == torch.cuda.get_device_name()
    assert gpu["robust_acc"] == pytest.approx(cpu["robust_acc"], abs=8)


def synchronisations(step: Callable[[], None]) -> int:
    """How often the host waits for the device in a step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Not the mode's own remark, once a process, that it does not see all synchronizing operations.
    return len([w for w in caught if "called a synchronizing CUDA operation" in str(w.message)])


def test_a_step_waits_for_nothing_but_its_own_counts() -> None:
    device = torch.device("cuda")
    train_step = step_of(compose(["dataset=digits", "model=preact_resnet18"]), device)
    model = models.build("preact_resnet18", width=8, depth=None, classes=10, shape=(1, 8, 8)).to(
        device
    )
    optimizer = make_optimizer(compose(["dataset=digits"]).recipe, model)
    split = load("digits", Path("unused"), device=device).train
    x, labels = split.images[:128].float() / 255, split.labels[:128]
    batch = Batch(x, labels, torch.arange(128, device=device))
    memory = {"robust_fraction": torch.tensor(0.3, device=device)}
    generator = torch.Generator(device).manual_seed(0)

    def step() -> None:
        train_step(model, optimizer, batch, memory, generator)

    step()  # warms up
    assert synchronisations(step) == 0  # for an event, which this mode does not see


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_fused_update_on_the_gpu_is_the_cpu_s_and_can_be_undone(
    optimizer: str, turned: bool
) -> None:
    recipe = compose([f"recipe.optimizer={optimizer}", "recipe.lr=0.05"]).recipe
    torch.manual_seed(0)
    network = models.build("preact_resnet18", width=8, depth=None, classes=10, shape=(1, 8, 8))
    weights = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(network).double().to(device)
        model = to_channels_last(model) if turned else model
        made = make_optimizer(recipe, model)
        for factor in (1.0, torch.nan, 2.0):
            before = Snapshot(model, made, {})
            for number, parameter in enumerate(model.parameters()):
                parameter.grad = torch.full_like(parameter, factor * (number - 20))
            made.step()
            before.undo_where(torch.tensor(factor != factor, device=device))
        weights.append([parameter.detach().cpu() for parameter in model.parameters()])
    for on_cpu, on_gpu in zip(*weights, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-10, atol=1e-12)


def test_a_run_leaves_the_current_device_as_it_was() -> None:
    before = torch.cuda.current_device()
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    with as_current_gpu(last):
        assert torch.empty(1, device="cuda").device == last
    assert torch.cuda.current_device() == before


def test_the_counts_arrive_ahead_of_what_the_device_was_given_after_them() -> None:
    steps = torch.tensor([0, 3, 1, 3], device="cuda")
    order, counts = by_steps(steps)
    torch.cuda._sleep(2_000_000_000)  # a second or more
    slept = torch.cuda.Event()
    slept.record()
    assert counts() == [3, 2, 2]
    assert not slept.query()
    assert order.tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize("attack", ["pgd20", "pgd100x10", "autoattack"])
def test_an_evaluation_on_the_gpu_finds_what_the_cpu_finds(
    robust_net: nn.Module, digits: Data, attack: str
) -> None:
    if attack == "autoattack":
        pytest.importorskip("pyautoattack")
    images, labels = digits.test.images[:60], digits.test.labels[:60]
    network = copy.deepcopy(robust_net)
    cpu, gpu = (
        robust_accuracy(
            network.to(device), images.to(device), labels.to(device), epsilon=0.1, attack=attack
        )
        for device in ("cpu", "cuda")
    )
    assert gpu.settings["device"] == "cuda:0"
    assert (cpu.correct != gpu.correct).sum() <= 2


@pytest.mark.parametrize("defense", ["trades", "mart", "augmix"])
def test_the_bench_sees_kernels_copies_and_memory(defense: str) -> None:
    config = compose(
        ["dataset=digits", "model=preact_resnet18", "model.width=8", "device=cuda",
         "train.batch_size=64", f"defense={defense}"]
    )  # fmt: skip
    bench = dataclasses.replace(
        command.compose(), precisions=[Precision.bf16], channels_last=[True], repetitions=2
    )
    fractions = (0.25, 0.5, 0.25)
    lanes = make_lanes(Case(config, fractions), bench, torch.device("cuda"))
    rows, details = measure(lanes, 2, torch.device("cuda"), lambda line: None)
    for row, detail in zip(rows, details, strict=True):
        assert row["seconds_per_batch"] > 0
        assert row["peak_memory_mb"] > 0
        assert detail["kernels"] > 100
        if row["method"] == "bullettrain":
            assert detail["fractions"] == pytest.approx(fractions, abs=0.05)
            assert detail["host_copies"] == (2 if defense == "augmix" else 1)


def test_bf16_on_the_gpu_learns_what_float32_does(tmp_path: Path) -> None:
    common = ["dataset=digits", "model=preact_resnet18", "model.width=8", "train.epochs=10",
              "attack.epsilon=0.1", "device=cuda", "train.channels_last=true"]  # fmt: skip
    plain, short = (
        train(compose([*common, f"train.precision={p}", f"run.dir={tmp_path / p}"]))
        for p in ("float32", "bf16")
    )
    assert short["robust_acc"] == pytest.approx(plain["robust_acc"], abs=8)


ONE_EPOCH = ["dataset=digits", "dataset.train_examples=256", "model=small_cnn", "train.epochs=1",
             "attack.epsilon=0.1", "eval.steps=2", "device=cuda"]  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        ["defense=mart", "recipe.crop_padding=1", "recipe.flip=true"],
        ["defense=augmix"],
        ["defense=pgd", "bt=random", "bt.metric=grad_norm"],
        ["bt=gaussian", "bt.metric=margin"],
        ["bt=oracle"],
        ["bt=early_exit", "train.precision=bf16"],
        ["bt.pool=2", "recipe.ema=0.9"],
        ["bt.score=shared", "train.precision=bf16"],
        ["train.on_nonfinite=skip", "recipe.optimizer=adam"],
        ["rival=free", "defense=pgd", "bt=uniform"],
        ["rival=mma", "defense=pgd", "bt=uniform"],
        ["rival=gradalign", "defense=pgd", "bt=uniform"],
    ],
    ids=str,
)
def test_every_kind_of_run_ends(tmp_path: Path, settings: list[str]) -> None:
    common = [one for one in ONE_EPOCH if settings[0] != "defense=augmix" or "epsilon" not in one]
    summary = train(compose([*common, *settings, f"run.dir={tmp_path / 'run'}"]))
    assert summary["device"] == torch.cuda.get_device_name()
    assert 0 < summary["clean_acc"] <= 100


@pytest.mark.filterwarnings("default")  # the compiler's own advice
def test_a_compiled_run_ends(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    summary = train(compose([*ONE_EPOCH, "train.compile=true", f"run.dir={tmp_path / 'run'}"]))
    assert 0 < summary["clean_acc"] <= 100


def test_a_checkpoint_brings_everything_back_to_the_gpu(tmp_path: Path) -> None:
    config, device = compose(ONE_EPOCH), torch.device("cuda")
    data = load_configured(config.dataset, device)
    before, after = (make_state(config, data, device) for _ in range(2))
    epoch_of(config, before, data.train)
    checkpoint.save(tmp_path / "last.pt", {"state": before.state_dict()})
    after.load_state_dict(checkpoint.load(tmp_path / "last.pt")["state"])
    for ours, theirs in zip(after.model.parameters(), before.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        momentum = after.optimizer.state[ours]["momentum_buffer"]
        assert momentum.is_cuda
        assert torch.equal(momentum, before.optimizer.state[theirs]["momentum_buffer"])
    assert torch.equal(after.memory["robust_fraction"], before.memory["robust_fraction"])
    drawn = [torch.rand(64, generator=s.generator, device=device) for s in (after, before)]
    assert torch.equal(*drawn)


def test_memory_that_runs_out_is_one_sentence() -> None:
    device = torch.device("cuda")
    with (
        pytest.raises(UserError, match=r"train\.batch_size=9 \(peak .* of .* GiB, .* asked for"),
        explained_memory(device, "train.batch_size=9", "a smaller one may fit"),
    ):
        torch.empty(2**50, dtype=torch.uint8, device=device)


def test_deterministic_runs_are_equal(tmp_path: Path) -> None:
    metrics = []
    for name in ("a", "b"):  # in processes of their own, for cuBLAS reads its variable once
        command = [sys.executable, "-m", "btrain", "train", *ONE_EPOCH,
                   "train.deterministic=true", f"run.dir={tmp_path / name}"]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        line = json.loads((tmp_path / name / "metrics.jsonl").read_text())
        metrics.append(
            {k: v for k, v in line.items() if k not in ("train_seconds", "speedup_measured")}
        )
    assert metrics[0] == metrics[1]


def test_gradients_go_by_nccl_and_words_by_gloo(tmp_path: Path) -> None:
    """One GPU has room for one process: the messages of a group of one."""
    words = """
import sys, torch
import torch.distributed as dist
from btrain.processes.world import World

dist.init_process_group(
    "cpu:gloo,cuda:nccl", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1
)
world, network = World(0, 2), torch.nn.Linear(3, 2).cuda()
world.wrapped(network)(torch.ones(4, 3, device="cuda")).sum().backward()
assert torch.equal(network.weight.grad, torch.full((2, 3), 4.0, device="cuda"))
assert world.sum(torch.ones(2, dtype=torch.float64, device="cuda")).tolist() == [1, 1]
assert world.largest(7) == 7
assert world.told({"a": [1]}) == {"a": [1]}
dist.destroy_process_group()
"""
    command = [sys.executable, "-c", words, str(tmp_path / "group")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# CUDA graphs


def graphed_network(wrap: type[Shadowed]) -> Shadowed:
    torch.manual_seed(0)
    network = models.build("preact_resnet18", width=16, depth=None, classes=10, shape=(3, 32, 32))
    return wrap(to_channels_last(network.cuda()).train())


def attacked_by(
    attack: object, seen: Shadowed, images: Tensor, active: list[int], probed: bool
) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    m = len(images)
    noise = 0.001 * torch.randn(images.shape, generator=generator, device="cuda")
    with torch.no_grad():
        z = seen.shadow(images)
    result: Tensor = attack(  # type: ignore[operator]
        seen.shadow, images, torch.arange(m, device="cuda") % 10, z, active=active,
        step_size=torch.linspace(0.005, 0.02, m, device="cuda"), inner_loss=kl_inner_loss,
        ball=LinfBall(8 / 255), noise=noise, probe=10 * noise if probed else None,
    )  # fmt: skip
    return result


@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize("wrap", [Shadowed, InBFloat16])
def test_graphs_make_the_eager_examples_and_are_recorded_once(
    wrap: type[Shadowed], probed: bool
) -> None:
    seen = graphed_network(wrap)
    optimizer = torch.optim.SGD(seen.parameters(), lr=0.05, momentum=0.9)
    recorders: list[GraphRecorder] = []

    def recorder() -> GraphRecorder:
        recorders.append(GraphRecorder(torch.device("cuda")))
        return recorders[-1]

    replayed = ReplayedPGD(recorder, 128)
    images = torch.rand(128, 3, 32, 32, device="cuda")
    sizes = ([104, 104, 40, 40, 40], [112, 112, 32, 32], [104, 104, 32], [128] * 3, [])
    for _ in range(3):
        for active in sizes:
            ours, eager = (
                attacked_by(attack, seen.refresh(), images, active, probed)
                for attack in (replayed, prefix_pgd)
            )
            # A gradient that rounds to the other side of zero moves a pixel the other way.
            same = ((ours - eager).abs() < 1e-5).float().mean()
            assert same > (0.98 if wrap is Shadowed else 0.9)
            assert (ours - images).abs().max() <= 8 / 255 + 1e-6
            assert torch.equal(ours[sum(active[:1]) :], images[sum(active[:1]) :])
        assert replayed.recorded == 5  # 128, 112, 104, 40, 32; none after the first turn
        nn.functional.cross_entropy(seen(images), torch.arange(128, device="cuda") % 10).backward()
        optimizer.step()  # in place: the next turn is of other weights
        optimizer.zero_grad()
    (recorder_of_all,) = recorders
    assert len({graph.pool() for graph in recorder_of_all.graphs}) == 1


def test_what_cannot_be_recorded_leaves_the_stream_as_it_was() -> None:
    """In a process of its own, for some versions of torch do not quite get over it."""
    process = multiprocessing.get_context("spawn").Process(target=record_what_cannot_be)
    process.start()
    process.join(120)
    assert process.exitcode == 0


def record_what_cannot_be() -> None:
    device, before = torch.device("cuda"), torch.cuda.current_stream()
    number = torch.ones((), device=device)
    trials: list[float] = []

    def step() -> None:
        trials.append(number.item())  # a copy to the host, which no graph holds

    with pytest.raises(RuntimeError):
        GraphRecorder(device)(step)
    assert trials
    assert torch.cuda.current_stream() == before
    # And what comes next works: numbers are drawn, steps are recorded.
    torch.rand(8, device=device)
    recorder = GraphRecorder(device)
    recorder(lambda: number.add_(1))()
    assert number.item() == 1 + _TRIALS + 1


def test_graphs_add_no_copy_to_the_host() -> None:
    device = torch.device("cuda")
    config = compose(
        ["dataset=digits", "model=preact_resnet18", "model.width=8", "device=cuda",
         "train.cuda_graphs=always", "train.batch_size=64"]
    )  # fmt: skip
    step_of_run = step_of(config, device)
    model = models.build("preact_resnet18", width=8, depth=None, classes=10, shape=(1, 8, 8))
    model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.rand(64, 1, 8, 8, device=device)
    with torch.no_grad():
        labels = model.eval()(x).argmax(dim=1)
    batch = Batch(x, labels, torch.arange(64, device=device))

    def step() -> None:
        # F_R = 0: every example is a boundary or an outlier; the sizes stay those of one group.
        memory = {"robust_fraction": torch.zeros((), device=device)}
        step_of_run(model.eval(), optimizer, batch, memory, torch.Generator(device).manual_seed(0))

    step()  # records
    assert synchronisations(step) == 0


@pytest.mark.parametrize("choice", ["always", "auto"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_run_with_graphs_learns_what_one_without_does(
    tmp_path: Path, precision: str, choice: str
) -> None:
    common = ["dataset=digits", "model=preact_resnet18", "model.width=8", "train.epochs=10",
              "attack.epsilon=0.1", "device=cuda", "train.channels_last=true",
              f"train.precision={precision}"]  # fmt: skip
    plain, graphs = (
        train(compose([*common, f"train.cuda_graphs={c}", f"run.dir={tmp_path / c}"]))
        for c in ("never", choice)
    )
    assert graphs["robust_acc"] == pytest.approx(plain["robust_acc"], abs=8)
    assert ("CUDA graphs:" in (tmp_path / choice / "train.log").read_text()) == (choice == "auto")


def test_the_bench_measures_with_and_without_graphs() -> None:
    config = compose(["dataset=digits", "model=preact_resnet18", "model.width=8", "device=cuda",
                      "train.batch_size=64"])  # fmt: skip
    bench = dataclasses.replace(command.compose(), cuda_graphs=[False, True], repetitions=2)
    device = torch.device("cuda")
    lanes = make_lanes(Case(config, (0.25, 0.5, 0.25)), bench, device)
    rows, details = measure(lanes, 2, device, lambda line: None)
    graphs = {row["method"]: d for row, d in zip(rows, details, strict=True) if row["cuda_graphs"]}
    plain = {row["method"]: d for row, d in zip(rows, details, strict=True)
             if not row["cuda_graphs"]}  # fmt: skip
    assert set(graphs) == {"lean", "bullettrain"}
    for method, detail in graphs.items():
        assert detail["host_copies"] == plain[method]["host_copies"]
        assert detail["kernels"] < plain[method]["kernels"]
