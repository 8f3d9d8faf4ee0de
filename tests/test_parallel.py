"""One run on several processes: what it learns, what it leaves, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import parallel_steps
from btrain.config import compose
from btrain.errors import UserError
from btrain.training.parallel import World, device_of
from btrain.training.setup import check_shares

TESTS = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--no-python"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def torchrun(processes: int, *command: str, **how: Any) -> subprocess.Popen[str]:
    start = [*TORCHRUN, "--standalone", f"--nproc-per-node={processes}", sys.executable]
    return subprocess.Popen([*start, *command], text=True, env=ENVIRONMENT, **how)


# Steps


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each process of 1, of 2 and of 3 has after the same steps."""
    script, results = [str(TESTS / "parallel_steps.py")], {}
    for processes in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"steps{processes}")
        if processes == 1:
            subprocess.run([sys.executable, *script, folder], env=ENVIRONMENT, check=True)
        else:
            assert torchrun(processes, *script, str(folder)).wait(300) == 0
        results[processes] = [torch.load(folder / f"{rank}.pt") for rank in range(processes)]
    return results


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("case", parallel_steps.CASES)
def test_all_processes_hold_the_same_after_every_step(
    steps: dict[int, list[dict[str, Any]]], case: str, processes: int
) -> None:
    first, *others = steps[processes]
    for other in others:
        for name, tensor in first[case].items():
            if not name.endswith("num_batches_tracked"):
                assert torch.equal(tensor.nan_to_num(), other[case][name].nan_to_num()), name


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize(
    "case", [name for name in parallel_steps.CASES if not name.startswith(("BatchNorm", "bf16"))]
)
def test_several_processes_learn_what_one_learns(
    steps: dict[int, list[dict[str, Any]]], case: str, processes: int
) -> None:
    one, several = steps[1][0][case], steps[processes][0][case]
    assert one.keys() == several.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(several[name], tensor, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("case", ["BatchNorm", "BatchNorm, an empty group", "bf16"])
def test_batch_norm_sees_each_share_by_itself_and_learns_about_the_same(
    steps: dict[int, list[dict[str, Any]]], case: str
) -> None:
    one, two = steps[1][0][case], steps[2][0][case]
    assert not torch.equal(one["model.bn.running_mean"], two["model.bn.running_mean"])
    loss = parallel_steps_loss(one["stats"]), parallel_steps_loss(two["stats"])
    torch.testing.assert_close(loss[1], loss[0], rtol=0.5, atol=0)


def parallel_steps_loss(stats: Tensor) -> Tensor:
    return stats[:, 1] / stats[:, 0]


# Shares


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_make_up_the_batch_and_every_group_is_dealt_evenly(size: int) -> None:
    counts = torch.randint(0, 11, (37,), generator=torch.Generator().manual_seed(0))
    steps = counts.sort(descending=True).values
    active = [int((steps > step).sum()) for step in range(10)]
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    shares = [World(rank, size).dealt(order, active) for rank in range(size)]
    assert sorted(torch.cat([mine for mine, _ in shares]).tolist()) == list(range(37))
    for step, n in enumerate(active):
        dealt = [mine[step] if step < len(mine) else 0 for _, mine in shares]
        assert sum(dealt) == n
        assert max(dealt) - min(dealt) <= 1
    for rank, (mine, _) in enumerate(shares):
        assert torch.equal(mine, order[World(rank, size).share(37)])


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["defense=augmix"], "defense=augmix"),
        (["rival=free", "defense=pgd"], "rival=free"),
        (["rival=mma", "defense=pgd"], "rival=mma"),
        (["rival=gradalign", "defense=pgd"], "rival=gradalign"),
        (["bt=oracle"], "bt=oracle"),
        (["bt.share_clean_forward=true"], "bt.share_clean_forward"),
        (["bt=uniform", "attack.mode=train"], "attack.mode=train"),
        (["train.batch_size=7"], "train.batch_size=7"),
    ],
)
def test_what_needs_one_process_is_named(overrides: list[str], key: str) -> None:
    config = compose(["dataset=digits", "model=small_cnn", *overrides])
    check_shares(config, 1442, World())
    with pytest.raises(UserError, match=key):
        check_shares(config, 1442, World(0, 4))


def test_every_process_takes_its_own_gpu() -> None:
    assert device_of(World(1, 2), "cpu") == "cpu"
    assert device_of(World(), "cuda:1") == "cuda:1"
    with pytest.raises(UserError, match="device=cuda:1"):
        device_of(World(1, 2), "cuda:1")


# Runs

RUN = [
    "-m", "btrain", "train", "dataset=digits", "model=small_cnn", "model.width=4", "eval.steps=2",
    "train.batch_size=64", "recipe.lr=0.01", "device=cpu",
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(folder: str) -> list[dict[str, Any]]:
    text = Path(folder, "metrics.jsonl").read_text()
    timed = ("train_seconds",)
    return [
        {k: v for k, v in json.loads(line).items() if k not in timed} for line in text.splitlines()
    ]


def test_a_run_on_two_processes_is_resumed_by_one_and_again_by_two(here: Path) -> None:
    settings = [*RUN, "train.epochs=3", "dataset.train_examples=640", "dataset.val_examples=64"]
    subprocess.run([sys.executable, *settings, "run.dir=one"], env=ENVIRONMENT, check=True)
    mixed = [*settings, "run.dir=mixed"]
    assert torchrun(2, *mixed, "train.max_seconds=0.01").wait(120) == 0
    assert len(lines("mixed")) == 1
    assert 0 < saved("mixed")["batch"] < 10
    subprocess.run([sys.executable, *mixed, "train.max_seconds=0.5"], env=ENVIRONMENT, check=True)
    before = saved("mixed")
    assert torchrun(2, *mixed).wait(120) == 0
    assert (before["epoch"], before["batch"]) < (3, 0)
    for one, several in zip(lines("one"), lines("mixed"), strict=True):
        assert one.keys() == several.keys()
        for key in ("epoch", "f_b", "f_r", "f_o", "attack_steps_mean", "loss", "robust_fraction"):
            assert several[key] == pytest.approx(one[key], rel=0.02, abs=0.005), key
    sessions = json.loads(Path("mixed/provenance.json").read_text())["sessions"]
    assert [session["processes"] for session in sessions] == [2, 1, 2]
    assert not Path("mixed/run.lock").exists()


def saved(folder: str) -> dict[str, Any]:
    path = Path(folder, "checkpoints/last.pt")
    return dict(torch.load(path, weights_only=True)["state"])


def test_a_signal_to_all_ends_the_run_with_a_checkpoint_and_one_sentence(here: Path) -> None:
    run = started_run()
    os.kill(run.pid, signal.SIGTERM)  # torchrun hands it on
    _, said = run.communicate(timeout=90)
    assert run.returncode != 0
    assert said.count("btrain: stopped by SIGTERM") == 1
    assert Path("run/train.log").read_text().count("stopped by SIGTERM") == 1
    assert saved("run")["epoch"] >= 1


def test_a_signal_to_one_process_ends_all(here: Path) -> None:
    run = started_run()
    os.kill(json.loads(Path("run/run.lock").read_text())["pid"], signal.SIGTERM)
    _, said = run.communicate(timeout=90)
    assert run.returncode != 0
    assert said.count("btrain: stopped by SIGTERM") == 1


def test_a_killed_process_ends_the_others(here: Path) -> None:
    run = started_run()
    first = json.loads(Path("run/run.lock").read_text())["pid"]
    (other,) = [process for process in children(run.pid) if process != first]
    os.kill(other, signal.SIGKILL)
    _, said = run.communicate(timeout=90)
    assert run.returncode != 0
    assert "btrain: another process of the run is gone" in said or "SIGTERM" in said
    assert not Path(f"/proc/{first}").exists()
    assert saved("run")["epoch"] >= 1


def test_a_mistake_is_said_once_and_ends_all(here: Path) -> None:
    run = torchrun(2, *RUN, "run.dir=run", "defense=augmix", stderr=subprocess.PIPE)
    _, said = run.communicate(timeout=90)
    assert run.returncode == 1
    assert said.count("btrain: defense=augmix needs one process") == 1
    assert not Path("run").exists()


def started_run() -> subprocess.Popen[str]:
    """A run on two processes that has left a checkpoint and goes on."""
    run = torchrun(2, *RUN, "run.dir=run", "train.epochs=2000", stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not Path("run/checkpoints/last.pt").exists():
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    return run


def children(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(number) for number in path.read_text().split()]
