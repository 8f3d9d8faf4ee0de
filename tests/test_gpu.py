"""What only a CUDA device can show; left out where there is none."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from btrain import models
from btrain.bench import command
from btrain.bench.measure import measure
from btrain.bench.plan import Case, make_lanes
from btrain.config import compose
from btrain.data import Batch, Data, load
from btrain.evaluation import robust_accuracy
from btrain.schema import Precision
from btrain.training import train
from btrain.training.methods import make_step

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


def test_a_step_copies_to_the_host_once() -> None:
    device = torch.device("cuda")
    train_step = make_step(compose(["dataset=digits", "model=preact_resnet18"]), device)
    model = models.build("preact_resnet18", width=8, depth=None, classes=10, shape=(1, 8, 8)).to(
        device
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    split = load("digits", Path("unused"), device=device).train
    x, labels = split.images[:128].float() / 255, split.labels[:128]
    batch = Batch(x, labels, torch.arange(128, device=device))
    memory = {"robust_fraction": torch.tensor(0.3, device=device)}
    generator = torch.Generator(device).manual_seed(0)

    def step() -> None:
        train_step(model, optimizer, batch, memory, generator)

    step()  # warms up
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) == 1


@pytest.mark.parametrize("attack", ["pgd20", "pgd100x10", "autoattack"])
def test_an_evaluation_on_the_gpu_finds_what_the_cpu_finds(
    robust_net: nn.Module, digits: Data, attack: str
) -> None:
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
