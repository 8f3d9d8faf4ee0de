"""The bench: what it forces, what its controls do, what it writes. Nothing here asserts a time."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch import nn

from btrain.allocation import BulletTrain
from btrain.attacks.graphs import ReplayedPGD
from btrain.bench import command, gpu
from btrain.bench import measure as bench_measure
from btrain.bench.measure import Row, _timed_step, run_bench, spread
from btrain.bench.plan import Case, make_cases, make_lanes
from btrain.cli import main
from btrain.data import Batch, Data
from btrain.errors import UserError, first_reason
from btrain.methods.base import Method
from btrain.methods.make import make_bullettrain
from btrain.models.preact_resnet import PreActBlock
from btrain.settings import Config, CudaGraphs, Precision
from btrain.settings.bench import Contender
from btrain.training import train
from btrain.training.timing.forced import class_counts, force, robust_fraction_for
from btrain.training.timing.lane import Lane, Workload
from btrain.training.timing.look import look
from btrain.training.timing.masked import Masked
from btrain.training.timing.official import Official
from btrain.training.update import train_batch
from composing import compose
from steps import step_of
from test_cost import Flops

CPU = torch.device("cpu")
TINY = ["dataset=digits", "model=preact_resnet18", "model.width=4", "device=cpu"]
SMALL_CNN = ["dataset=digits", "model.width=4", "device=cpu"]  # of bench.models=[small_cnn]
FRACTIONS = {"trades": (0.28, 0.54, 0.18), "mart": (0.30, 0.43, 0.27), "augmix": (0.35, 0.65, 0.0)}
COLUMNS = {  # of `rows`, as the output is documented
    "defense": str,
    "model": str,
    "batch_size": int,
    "precision": str,
    "channels_last": bool,
    "compiled": bool,
    "cuda_graphs": bool,
    "method": str,
    "seconds_per_batch": float,
    "seconds_spread": float,
    "units_per_example": float,
    "speedup_vs_lean": float,
    "flop_bound": float,
    "peak_memory_mb": float,
    "selection_share": float,
}


def lanes(defense: str, *overrides: str, m: int = 32, **bench: Any) -> dict[Contender, Lane]:
    """The lanes of one case by method."""
    config = compose([*TINY, f"defense={defense}", f"train.batch_size={m}", *overrides])
    settings = replace(command.compose(), **bench)
    case = Case(config, FRACTIONS[defense])
    return {lane.contender: lane for lane in make_lanes(case, settings, CPU)}


# Forced fractions


@pytest.mark.parametrize("m", [32, 100, 128, 512])
def test_the_percentile_leaves_the_asked_number_of_robust_examples(m: int) -> None:
    scores = torch.rand(m, generator=torch.Generator().manual_seed(m))
    for robust in (1, 2, m // 3, m - 1, m):
        fraction = torch.tensor(robust_fraction_for(robust, m))
        threshold = torch.quantile(scores, 1 - fraction)
        assert int((scores >= threshold).sum()) == robust


@pytest.mark.parametrize("metric", ["svar", "cross_entropy", "grad_norm", "margin"])
@pytest.mark.parametrize("fractions", [(0.28, 0.54, 0.18), (0.0, 0.6, 0.4), (0.9, 0.1, 0.0)])
def test_forced_fractions_come_true_in_the_production_step(
    tiles: torch.Tensor, metric: str, fractions: tuple[float, float, float]
) -> None:
    config = compose([*TINY, "dataset=cifar10", f"bt.metric={metric}", "attack.steps=2"])
    torch.manual_seed(0)
    lane = next(iter(lanes("trades").values()))
    model = copy.deepcopy(lane.model)
    model.conv1 = nn.Conv2d(3, 4, 3, padding=1)
    method, memory = make_bullettrain(config, CPU), {}
    batch = force(model, tiles, method, fractions, memory)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    generator = torch.Generator().manual_seed(0)
    stats = step_of(config, CPU)(model, optimizer, batch, memory, generator)
    expected = class_counts(fractions, len(tiles))
    assert (int(stats.boundary), int(stats.robust), int(stats.outlier)) == expected
    assert expected == (
        round(fractions[0] * 24),
        24 - round(fractions[0] * 24) - round(fractions[2] * 24),
        round(fractions[2] * 24),
    )


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("defense", FRACTIONS)
def test_every_repetition_has_the_forced_fractions(defense: str, precision: Precision) -> None:
    lane = lanes(defense, "model.width=8", precisions=[precision])[Contender.bullettrain]
    for repetition in range(3):
        lane.run(lane.prepare(repetition))
    expected = class_counts(FRACTIONS[defense], 32)
    for stats in lane.stats:
        assert (int(stats.boundary), int(stats.robust), int(stats.outlier)) == expected


def test_without_robust_examples_fractions_are_refused() -> None:
    with pytest.raises(UserError, match="no robust example in a batch of 10"):
        class_counts((0.5, 0.0, 0.5), 10)


# The baseline and the control


SHARED = "bt.score=shared"


@pytest.mark.parametrize(
    ("defense", "settings"),
    [*((defense, []) for defense in FRACTIONS), ("trades", [SHARED]), ("mart", [SHARED])],
)
def test_the_control_does_the_work_of_the_plain_defense(defense: str, settings: list[str]) -> None:
    counted, units = {}, {}
    for contender, lane in lanes(defense, *settings, m=16).items():
        batch = lane.prepare(0)
        with Flops() as flops:
            lane.run(batch)
        counted[contender] = flops.total
        units[contender] = float(lane.stats[0].units)
        assert all(parameter.grad is None for parameter in lane.model.parameters())
    assert counted[Contender.masked] == counted[Contender.lean]
    assert units[Contender.masked] == units[Contender.lean] > 0
    assert counted[Contender.bullettrain] < 0.7 * counted[Contender.lean]
    if defense == "trades" and not settings:
        assert counted[Contender.official] == pytest.approx(39 / 27 * counted[Contender.lean], 0.03)


@pytest.mark.parametrize("defense", FRACTIONS)
def test_a_lane_reports_the_units_that_torch_counts(defense: str) -> None:
    for contender, lane in lanes(defense, m=16).items():
        batch = lane.prepare(0)
        lane.model.eval()
        with Flops() as unit, torch.no_grad():
            lane.model(batch.x)
        lane.model.train()
        with Flops() as flops:
            lane.run(batch)
        expected = flops.total / unit.total
        assert float(lane.stats[0].units) / 16 == pytest.approx(expected, rel=0.05), contender


def updated(
    method: Method, model: nn.Module, batch: Batch, memory: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """The weights after one step of a copy of the model."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_batch(model, optimizer, method, batch, memory, torch.Generator().manual_seed(1))
    return [parameter.detach() for parameter in model.parameters()]


def double(
    small_cnn: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> tuple[nn.Module, Batch]:
    """Network and digits in float64, where rounding turns no sign of a gradient."""
    x, labels = batch
    return small_cnn.double(), Batch(x.double(), labels, torch.arange(len(x)))


def test_the_official_structure_makes_the_plain_update(
    small_cnn: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    config = compose(["dataset=digits", "bt=uniform", "attack.steps=4"])
    model, data = double(small_cnn, batch)
    method = make_bullettrain(config, CPU)
    official = updated(Official(method, beta=6.0), model, data, {})
    plain = updated(method, model, data, {"robust_fraction": torch.tensor(0.0)})
    for ours, theirs in zip(plain, official, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert not all(map(torch.equal, plain, model.parameters()))


@pytest.mark.parametrize("defense", ["trades", "mart"])
def test_the_control_makes_bullettrain_s_update(
    small_cnn: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], defense: str
) -> None:
    config = compose(["dataset=digits", f"defense={defense}", "attack.steps=4"])
    model, data = double(small_cnn, batch)
    method, memory = make_bullettrain(config, CPU), {}
    data = force(model, data.x, method, (0.25, 0.5, 0.25), memory)
    ours = updated(method, model, data, dict(memory))
    n_b, n_r, n_o = class_counts((0.25, 0.5, 0.25), 24)
    score = method.metric(model(data.x).detach(), data.labels)
    order = score.argsort(descending=True)
    memory["classes"] = torch.zeros(24, dtype=torch.int64)
    memory["classes"][order[: n_r + n_b]] = 2
    memory["classes"][order[:n_r]] = 1
    assert int((memory["classes"] == 0).sum()) == n_o
    assert isinstance(method.allocator, BulletTrain)
    control = updated(Masked(method, method.allocator.budget), model, data, memory)
    for one, other in zip(ours, control, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# Looking into a step


def test_memory_and_copies_of_known_work() -> None:
    kept = torch.zeros(1000)

    def work() -> None:
        a = torch.ones(5000)  # 20 kB
        b = a + 1
        del a
        c = b * 2  # beside b as much as a was
        c += 1
        kept.add_(c[:1000])
        kept.sum().item()
        kept[:2].tolist()
        kept[kept > 0]  # all of it, and a byte each for the mask

    seen = look(work, CPU)
    assert seen.peak_bytes == 2 * 20_000 + 4_000 + 1_000
    assert seen.host_copies == 3
    assert seen.kernels is None


@pytest.mark.parametrize(("defense", "copies"), [("trades", 1), ("mart", 1), ("augmix", 2)])
def test_a_step_of_bullettrain_copies_to_the_host_once(defense: str, copies: int) -> None:
    # AugMix' views need to know how many images drew each operation.
    lane = lanes(defense, m=16)[Contender.bullettrain]
    batch = lane.prepare(0)
    seen = look(lambda: lane.run(batch), CPU)
    assert seen.host_copies == copies
    assert seen.peak_bytes > 0


def test_a_pool_has_the_units_of_its_batches() -> None:
    methods = [Contender.lean, Contender.bullettrain, Contender.pooled]
    by_method = lanes("trades", "bt.pool=3", methods=methods)
    assert [lane.config.bt.pool for lane in by_method.values()] == [1, 1, 3]
    units = []
    for contender in (Contender.bullettrain, Contender.pooled):
        lane = by_method[contender]
        lane.run(lane.prepare(0))
        units.append(float(lane.stats[0].units / lane.stats[0].examples))
    assert units[0] == pytest.approx(units[1])
    assert int(by_method[Contender.pooled].stats[0].examples) == 3 * 32


def test_the_method_pooled_needs_a_pool() -> None:
    with pytest.raises(UserError, match=r"pooled of bench\.methods needs a bt\.pool above 1\."):
        lanes("trades", methods=[Contender.lean, Contender.pooled])


def test_the_spread_is_between_the_quartiles() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
    assert spread([1.0]) == 0.0


class Seen(NamedTuple):
    method: Contender
    compiled: bool
    graphs: bool


@pytest.mark.parametrize("defense", FRACTIONS)
def test_compiled_and_graphed_lanes_are_those_that_exist(
    defense: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btrain.bench.plan.check_fast_paths", lambda train, device: None)
    config = compose([*TINY, f"defense={defense}", "train.batch_size=24"])
    bench = replace(command.compose(), compiled=[False, True], cuda_graphs=[False, True])
    made = make_lanes(Case(config, FRACTIONS[defense]), bench, CPU)
    seen = [
        Seen(lane.contender, lane.config.train.compile,
             lane.config.train.cuda_graphs is CudaGraphs.always)
        for lane in made
    ]  # fmt: skip
    methods = {Contender.lean, Contender.bullettrain, Contender.masked}
    methods |= {Contender.official} if defense == "trades" else set()
    replayed = {Contender.lean, Contender.bullettrain} if defense != "augmix" else set()
    assert {s.method for s in seen if not s.compiled and not s.graphs} == methods
    assert {s.method for s in seen if s.compiled} == (methods if replayed else set())
    assert {s.method for s in seen if s.graphs} == replayed
    assert not any(s.compiled and s.graphs for s in seen)


def test_a_lane_with_recorded_steps_measures_its_rounded_groups() -> None:
    # On the CPU, where replaying runs the step again.
    config = compose([*TINY, "train.batch_size=32"])
    train = replace(config.train, cuda_graphs=CudaGraphs.always)
    plain = lanes("trades")[Contender.bullettrain]
    lane = Lane(replace(plain.config, train=train), Contender.bullettrain, plain.workload, CPU)
    for each in (plain, lane):
        each.run(each.prepare(0))
    n_b, n_r, _ = class_counts(FRACTIONS["trades"], 32)
    ahead = -(-n_b // 8) * 8, min(-(-(n_b + n_r) // 8) * 8, 32)
    assert int(plain.stats[0].steps) == 2 * (n_b + n_r) + 8 * n_b
    assert int(lane.stats[0].steps) == 2 * ahead[1] + 8 * ahead[0]
    assert float(lane.stats[0].units) == 32 + 2 * int(lane.stats[0].steps) + 3 * (32 + ahead[1])
    assert int(lane.stats[0].boundary) == n_b  # by the rule, as before


def test_a_lane_s_memory_counts_a_short_copy_and_what_recorded_steps_keep() -> None:
    plain = lanes("trades")[Contender.bullettrain]
    config = replace(plain.config.train, batch_size=32)
    bytes_of = {}
    for name, settings in {
        "plain": config,
        "bf16": replace(config, precision=Precision.bf16),
        "graphs": replace(config, cuda_graphs=CudaGraphs.always),
    }.items():
        changed = replace(plain.config, train=settings)
        lane = Lane(changed, Contender.bullettrain, plain.workload, CPU)
        lane.run(lane.prepare(0))
        bytes_of[name] = lane.state_bytes
    model = plain.model
    weights = sum(p.nbytes for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    assert bytes_of["plain"] == weights + buffers + weights  # the last are momenta
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    folded = sum(m.bn2.bias.numel() for m in model.modules() if isinstance(m, PreActBlock))
    short = sum(p.numel() for layer in layers for p in layer.parameters())
    assert bytes_of["bf16"] == bytes_of["plain"] + 2 * (short + folded)
    pixels = plain.workload.images(0)[0].numel()
    a_row = 4 * (4 * pixels + 1 + 10) + 8  # images, at, two bounds; step size, clean logits; label
    assert bytes_of["graphs"] == bytes_of["plain"] + 33 * a_row


def test_nothing_is_recorded_while_a_batch_is_timed(
    digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As trained: other groups in every repetition.
    plain = lanes("trades", "attack.steps=3")[Contender.bullettrain]
    config = replace(plain.config, train=replace(plain.config.train, cuda_graphs=CudaGraphs.always))
    network = copy.deepcopy(plain.model).eval()
    images = [digits.train.images[32 * r :][:32].float() / 255 for r in range(4)]
    labels = []
    for r, x in enumerate(images):
        predicted = network(x).argmax(dim=1)
        wrong = torch.arange(32) < 9 * r  # so many outliers
        labels.append(torch.where(wrong, (predicted + 1) % 10, predicted))
    workload = Workload(network, images.__getitem__, labels.__getitem__, None, 0.0)
    lane = Lane(config, Contender.bullettrain, workload, CPU)
    recorded: list[int] = []

    def clock(work: Callable[[], None], device: torch.device) -> float:
        pgd = lane._paths.pgd
        assert isinstance(pgd, ReplayedPGD)
        before = pgd.recorded
        work()
        assert pgd.recorded == before
        recorded.append(before)
        return 1.0

    monkeypatch.setattr("btrain.bench.measure.seconds", clock)
    for repetition in range(4):
        assert _timed_step(lane, repetition, CPU) == 1
    assert recorded[-1] > recorded[0]
    assert len(lane.stats) == 4


def test_a_lane_clips_as_the_run_does() -> None:
    for clip, most in (([], 1.0), (["recipe.clip_norm=1e-6"], 1e-6)):
        lane = lanes("trades", "recipe.weight_decay=0", *clip)[Contender.lean]
        lane.run(lane.prepare(0))
        momenta = [state["momentum_buffer"] for state in lane.optimizer.state.values()]
        length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(momenta)))
        assert (length <= 1.001 * most) == bool(clip)  # of one step they are the gradient


@pytest.mark.parametrize(
    "setting", ["train.skip=0.5", "attack.start=kept", "bt.score=last", "bt.guard=0.5"]
)
def test_what_lives_on_earlier_visits_is_refused(setting: str) -> None:
    settings = [*TINY[:1], setting, *(["bt.guard_steps=1"] if "guard" in setting else [])]
    with pytest.raises(UserError, match=re.escape(setting)) as error:
        make_cases(command.compose(["bench.defenses=[trades]"]), settings)
    assert str(error.value).startswith("btrain bench visits every batch once, so that")


def test_who_times_a_rival_is_told() -> None:
    with pytest.raises(UserError, match=r"not rival=fast; btrain paper times the runs"):
        make_cases(command.compose(["bench.defenses=[trades]"]), [*TINY[:1], "rival=fast"])


# The command

QUICK = ["bench.repetitions=1", "bench.batch_sizes=[16,24]", "bench.models=[small_cnn]"]


def test_the_output_has_the_documented_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "new, à b" / "bench.json", tmp_path / "à b.svg"
    arguments = [*SMALL_CNN, *QUICK, "bench.precisions=[float32,bf16]", f"bench.out={out}"]
    assert main(["bench", *arguments, f"bench.plot={plot}"]) == 0
    printed = capsys.readouterr().out
    content = json.loads(out.read_text())
    assert {"hardware", "versions", "repetitions", "rows", "details"} == set(content)
    assert content["hardware"]["device"] == "cpu"
    assert content["versions"]["torch"] == torch.__version__
    assert len(content["rows"]) == len(content["details"]) == 2 * 2 * (4 + 3 + 3)
    assert printed.count("\n") == len(content["rows"]) + 2
    for row, detail in zip(content["rows"], content["details"], strict=True):
        assert set(row) == set(COLUMNS)
        for key, kind in COLUMNS.items():
            assert isinstance(row[key], kind), key
            if kind is float:
                assert math.isfinite(row[key])
                assert row[key] >= 0
        assert len(detail["seconds"]) == 1
        assert sum(detail["fractions"]) == pytest.approx(1)
        if row["method"] == "lean":
            assert row["speedup_vs_lean"] == row["flop_bound"] == 1
        if row["method"] == "masked":
            assert row["flop_bound"] == 1
        if row["method"] == "bullettrain":
            assert row["flop_bound"] > 1.6
            assert row["selection_share"] > 0
            assert detail["host_copies"] <= 2
    assert "<svg" in plot.read_text()


def test_a_list_of_boundary_fractions_shares_the_rest() -> None:
    bench = command.compose(["bench.boundary_fractions=[0.1,0.5]", "bench.defenses=[trades]"])
    low, high = make_cases(bench, SMALL_CNN)
    assert low.fractions == pytest.approx((0.1, 0.9 * 0.75, 0.9 * 0.25))
    assert high.fractions == pytest.approx((0.5, 0.5 * 0.75, 0.5 * 0.25))


def test_as_trained_draws_batches_of_all_classes_from_an_image_folder(tmp_path: Path) -> None:
    """A folder's images come class by class; training shuffles them and so does the bench."""
    for part in ("train", "test"):
        for c in range(2):
            for i in range(16):
                file = tmp_path / "photos" / part / str(c) / f"{i:02}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (16 * c + i,) * 3).save(file)
    run = tmp_path / "run"
    train(compose(["dataset=imagefolder", f"dataset.root={tmp_path / 'photos'}", "device=cpu",
                   "dataset.image_size=8", "model=small_cnn", "model.width=1", "train.epochs=1",
                   "train.batch_size=8", "attack.steps=3", "eval.steps=1",
                   f"run.dir={run}"]))  # fmt: skip
    bench = command.compose([f"bench.checkpoint={run}", "bench.batch_sizes=[8]"])
    (case,) = make_cases(bench, [])
    work = make_lanes(case, bench, torch.device("cpu"))[0].workload
    assert work.labels is not None
    epochs = []
    for epoch in range(2):
        seen = []
        for repetition in range(4 * epoch, 4 * epoch + 4):
            levels = (255 * work.images(repetition)[:, 0, 0, 0]).round().long()
            assert torch.equal(levels // 16, work.labels(repetition))
            assert work.labels(repetition).unique().tolist() == [0, 1]
            seen += levels.tolist()
        assert sorted(seen) == [*range(32)]  # each image once an epoch
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_as_trained_takes_network_images_and_robust_fraction_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "bench.json"
    train(compose([*SMALL_CNN, "model=small_cnn", "train.epochs=2", "eval.steps=1",
                   "train.skip=0.3", "bt.guard=0.9", f"run.dir={run}"]))  # fmt: skip
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    words = [f"bench.checkpoint={run}", "bench.repetitions=2", "bench.batch_sizes=[200]"]
    assert main(["bench", *words, f"bench.out={out}"]) == 0
    left_out = f"times {run} without train.skip=0.3 and bt.guard=0.9."
    assert left_out in capsys.readouterr().err
    content = json.loads(out.read_text())
    detail = {row["method"]: d for row, d in zip(content["rows"], content["details"], strict=True)}
    assert detail["bullettrain"]["fractions"] == pytest.approx(
        [line["f_b"], line["f_r"], line["f_o"]], abs=0.15
    )
    assert main(["bench", *words, "attack.steps=3"]) == 1
    assert "the settings are the run's" in capsys.readouterr().err
    assert main(["bench", *words, "bench.batch_sizes=[2000]"]) == 1
    assert "fewer than 2000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench.batch_size=[8]"], ["bench.batch_size", "bench.batch_sizes"]),
        (["bench.batch_sizes=[2]"], ["bench.batch_sizes", "at least 4"]),
        (["bench.batch_sizes=[many]"], ["bench.batch_sizes", "many"]),
        (["bench.precisions=[fp8]"], ["bench.precisions", "fp8"]),
        (["bench.methods=[masked]"], ["bench.methods", "lean"]),
        (["bench.defenses=[]"], ["bench.defenses", "at least one"]),
        (["bench.compiled=[true]"], ["bench.compiled", "false"]),
        (["bench.cuda_graphs=[]"], ["bench.cuda_graphs", "at least one"]),
        (["train.compile=true"], ["train.compile", "bench.compiled"]),
        (
            ["device=cpu", "model.width=1", "bench.cuda_graphs=[false,true]"],
            ["train.cuda_graphs=always", "CUDA device"],
        ),
        (["bench.repetitions=0"], ["bench.repetitions", "0"]),
        (["bench.fractions.trades=[0.5,0.1,0.1]"], ["bench.fractions.trades", "add up to 1"]),
        (["bench.boundary_fractions=[1.0]"], ["bench.boundary_fractions"]),
        (["bench.boundary_fractions=[]"], ["bench.boundary_fractions", "at least one"]),
        (["+bench.colour=1"], ["+bench.colour=1"]),
        (["defense=mart"], ["defense", "bench.defenses"]),
        (["train.precision=bf16"], ["train.precision", "bench.precisions"]),
        (["attack.stepz=1"], ["attack.stepz", "attack.steps"]),
        (["bench.models=[vgg]"], ["vgg", "preact_resnet18"]),
        (["bench.checkpoint=nowhere"], ["nowhere"]),
        (["bench.checkpoint="], ["bench.checkpoint is empty"]),
        (["bench.checkpoint=A", "bench.models=[b]"], ["bench.models=[b]", "bench.checkpoint"]),
        (["bench.methods=[lean]", "bench.plot=a.png"], ["bench.plot", "bullettrain"]),
        (
            ["bench.batch_sizes=[16,4]", "bench.fractions.trades=[0.5,0.1,0.4]"],
            ["bench.fractions.trades", "batch of 4"],
        ),
        (
            ["bench.batch_sizes=[4]", "bench.boundary_fractions=[0.9]"],
            ["bench.boundary_fractions", "batch of 4"],
        ),
        (["faster"], ["faster", "key=value"]),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("bench.out=file/bench.json", ["bench.out", "file"]),
        ("bench.out=folder", ["bench.out", "is a folder"]),
        ("bench.plot=bench.json", ["bench.plot", ".png"]),
        ("bench.plot=folder/file/bench.png", ["bench.plot", "file"]),
        ("bench.out=missing/", ["bench.out", "folder"]),
        ("bench.out=pipe", ["bench.out", "no ordinary file"]),
        ("bench.out=a.png bench.plot=./a.png", ["bench.out", "bench.plot", "same file"]),
    ],
)
def test_a_place_that_cannot_be_written_is_told_ahead_of_the_measurement(
    place: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for file in (Path("file"), Path("folder/file")):
        file.touch()
    os.mkfifo("pipe")
    bench, settings = command.parse([*SMALL_CNN, *QUICK, *place.split()])
    measured: list[Any] = []
    with pytest.raises(UserError) as error:
        run_bench(bench, settings, measured.append, measured.append)
    assert all(word in str(error.value) for word in words), error.value
    assert not measured


def test_what_was_measured_is_kept_whatever_comes_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(case: Case, *more: Any) -> tuple[list[Row], list[Row]]:
        if case.config.train.batch_size == 24:
            raise KeyboardInterrupt
        return whole(case, *more)

    whole = bench_measure.measure_case
    monkeypatch.setattr(bench_measure, "measure_case", interrupted)
    (tmp_path / "there.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("there.json")
    quick = [*SMALL_CNN, *QUICK, "bench.defenses=[trades]", "bench.methods=[lean]"]
    assert main(["bench", *quick, f"bench.out={tmp_path / 'link.json'}"]) == 130
    shown = capsys.readouterr()
    assert shown.err == "btrain: interrupted.\n"
    assert "| trades | small_cnn | 16 |" in re.sub(" +", " ", shown.out)
    assert [
        row["batch_size"] for row in json.loads((tmp_path / "there.json").read_text())["rows"]
    ] == [16]
    assert (tmp_path / "link.json").is_symlink()


def test_help_shows_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {key}:" in shown for key in ("defenses", "fractions", "out", "repetitions"))


# The fixed set for a GPU, in miniature

MINIATURE = {
    "wrn_34_10": ["dataset=digits", "model.depth=10", "model.width=1"],
    "preact_resnet18": ["dataset=digits", "model.width=8"],
    "wrn_40_2": ["dataset=digits", "model.depth=10", "model.width=1"],
}


def test_the_gpu_s_set_in_miniature_on_the_cpu(tmp_path: Path) -> None:
    result = gpu.measure_set(
        lambda line: None,
        device="cpu",
        batch_sizes=(8,),
        evaluated=6,
        repetitions=1,
        settings=MINIATURE,
    )
    assert {(row["defense"], row["model"]) for row in result["rows"]} == {
        ("trades", "wrn_34_10"),
        ("trades", "preact_resnet18"),
        ("augmix", "wrn_40_2"),
    }
    assert all(row["precision"] == "bf16" and row["channels_last"] for row in result["rows"])
    models = ["preact_resnet18", "wrn_40_2", "wrn_34_10"]
    assert [row["model"] for row in result["evaluation_seconds"]] == models
    assert all(row["seconds"] > 0 for row in result["evaluation_seconds"])
    assert all(row["images"] == 6 for row in result["evaluation_seconds"])
    for row in result["evaluation_seconds"]:
        a_batch = (row["batch_seconds"], row["batch_seconds_channels_last"])
        assert a_batch[row["channels_last"]] == min(a_batch) > 0
    assert result["left_out"] == []
    for row, epoch in zip(result["rows"], result["epoch_seconds"], strict=True):
        assert epoch["seconds"] == row["seconds_per_batch"] * 6250  # 50,000 / 8
    result["hardware"]["gpu"] = "NVIDIA H200"
    path = gpu.write_results(result, tmp_path, "2030-01-02")
    assert path.name == "nvidia-h200-2030-01-02.json"
    assert json.loads(path.read_text())["rows"] == result["rows"]
    assert path.with_suffix(".md").read_text().count("bullettrain") == 2 * 3


def test_what_fails_of_the_gpu_s_set_or_comes_too_late_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gpu.measure_case

    def short_of_memory(case: Case, *more: Any) -> tuple[list[Row], list[Row]]:
        if case.config.model.name == "preact_resnet18":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore.")
        return whole(case, *more)

    monkeypatch.setattr(gpu, "measure_case", short_of_memory)
    kept: list[int] = []
    result = gpu.measure_set(
        lambda line: None, device="cpu", batch_sizes=(8,), evaluated=6, repetitions=1,
        settings=MINIATURE, keep=lambda found: kept.append(len(found["rows"])),
    )  # fmt: skip
    assert {row["model"] for row in result["rows"]} == {"wrn_34_10", "wrn_40_2"}
    assert kept == [0, 3, 7, 7, 7, 7]
    (left_out,) = result["left_out"]
    assert left_out["part"] == "trades preact_resnet18 batch 8"
    path = gpu.write_results(result, tmp_path, "2030-01-02")
    assert "9 GiB).\n" in path.with_suffix(".md").read_text()

    late = gpu.measure_set(
        lambda line: None, device="cpu", batch_sizes=(8,), evaluated=6, settings=MINIATURE, limit=0
    )
    assert late["rows"] == late["evaluation_seconds"] == []
    assert [one["why"] for one in late["left_out"]] == ["no time was left"] * 6


def test_the_first_reason_is_the_one_to_tell_unless_it_has_been_explained() -> None:
    with pytest.raises(RuntimeError) as recording:
        try:
            raise RuntimeError("operation not permitted.\nMore.")
        finally:  # the end of a recording
            raise RuntimeError("the recording was invalid")
    assert first_reason(recording.value) == "operation not permitted"
    with pytest.raises(UserError) as explained:
        try:
            raise KeyError("k")
        except KeyError as error:
            raise UserError("There is no setting k.") from error
    assert first_reason(explained.value) == "There is no setting k"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_its_set_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpu", "bench.seconds=240", "bench.out=gpu.json"]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err
    assert main(["bench", "gpu", "bench.out=gpu.md"]) == 1  # its table would take the place
    assert "bench.out=gpu.md must end in .json" in capsys.readouterr().err
    assert main(["bench", "gpu", "model.width=2"]) == 1
    assert "bench gpu takes bench.seconds and bench.out alone" in capsys.readouterr().err


def test_settings_of_a_lane_follow_its_method() -> None:
    made = lanes("trades", "bt.n_b=3", m=16)
    config: Config = made[Contender.bullettrain].config
    assert (config.bt.n_b, made[Contender.lean].config.bt.n_b) == (3, 10)
    assert made[Contender.lean].config.bt.step_size_b == config.attack.step_size
