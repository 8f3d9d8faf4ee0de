"""What the processes of a run tell each other, and one run after another."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import parallel_runs
from btrain.build import make_model
from btrain.cli import main
from btrain.data.splits import load_configured
from btrain.evaluation import Accuracy, evaluate
from btrain.processes import launched as by_torchrun
from composing import compose
from parallel_runs import COMMON, FEW, RUNS, accuracy_of
from torchrun import in_a_fork, launched

CPU, PROCESSES = torch.device("cpu"), 3


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what three processes have left."""
    folder = tmp_path_factory.mktemp("runs")
    said = folder / "said"
    run = in_a_fork(launched, PROCESSES, parallel_runs.main, folder, said=said)
    run.join(300)
    assert run.exitcode == 0, said.read_text()
    return folder


def said(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("run", RUNS)
def test_a_second_training_follows_and_accuracies_are_those_of_one_process(
    done: Path, run: str
) -> None:
    config = compose([*COMMON, *RUNS[run]])
    data = load_configured(config.dataset, CPU)
    network = make_model(config.model, len(data.classes), data.shape)

    def accuracy(file: str, *, test: bool) -> Accuracy:
        content = torch.load(done / run / "checkpoints" / file, weights_only=True)
        network.load_state_dict(content["state"]["model"])
        return evaluate(
            network,
            data.test if test else data.val or data.test,
            epsilon=config.eval.epsilon,
            step_size=config.eval.step_size,
            steps=config.eval.steps,
            batch_size=500,
            seed=config.seed,
        )

    first, *others = [each["summaries"][run] for each in said(done)]
    assert others == [first] * 2
    assert first["speedup_measured"] > 0
    last, best = accuracy("last.pt", test=True), accuracy("best.pt", test=True)
    assert (first["clean_acc"], first["robust_acc"]) == (last.clean, last.robust)
    assert (first["best_clean_acc"], first["best_robust_acc"]) == (best.clean, best.robust)
    lines = [json.loads(line) for line in (done / run / "metrics.jsonl").read_text().splitlines()]
    kept = lines[first["epochs"] - 1]  # of two epochs, or of one and one that was thrown away
    held_out = accuracy("last.pt", test=False)
    assert (kept["val_clean_acc"], kept["val_robust_acc"]) == (held_out.clean, held_out.robust)
    assert (first["epochs"], len(lines)) == (1 if run == "collapsed" else 2, 2)
    if run == "repaired":
        assert [line["attack_steps_mean"] for line in lines] == [7, 9]


def test_no_thread_of_the_group_outlives_it(done: Path) -> None:
    """One that did would now and then abort a process that has done all its work."""
    for rank in range(PROCESSES):
        assert "gloo" not in (done / f"{rank}.threads").read_text()


def test_an_evaluation_may_have_fewer_examples_than_processes(done: Path) -> None:
    alone = [accuracy_of(few, None) for few in FEW]
    for each in said(done):
        together = [Accuracy(**found) for found in each["accuracies"]]
        assert together == alone
        losses = [found.robust_loss for found in together]  # whose sum has another order
        assert losses == pytest.approx([found.robust_loss for found in alone], rel=1e-6)


def test_other_data_are_refused_by_all_in_one_sentence(done: Path) -> None:
    first, *others = [each["mistake"] for each in said(done)]
    assert first.startswith("Process 2 on ")
    assert "has other data than process 0 on" in first
    for rank, other in enumerate(others, start=1):
        assert other == f"process {rank} of {PROCESSES}: {first}"
    assert not (done / "never").exists()


def test_a_signal_to_one_process_is_one_to_all(done: Path) -> None:
    for each in said(done):
        assert each["stopped"] == [False, True, signal.SIGTERM]


# What is not for several processes


@pytest.fixture
def of_two(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The variables that torchrun gives the first of two processes."""
    here = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", **here}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--multirun", "seed=0,1"],
        ["train", "hydra.mode=MULTIRUN", "seed=0,1"],
        ["eval", "checkpoint=runs/A"],
        ["paper", "table1"],
        ["report", "runs/A"],
    ],
)
def test_what_several_processes_do_not_share_is_refused(
    command: list[str],
    of_two: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    of_two.chdir(tmp_path)
    assert main([*command]) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "needs one process, and torchrun started 2" in told[0]
    of_two.setenv("RANK", "1")
    of_two.setattr(by_torchrun, "GRACE_SECONDS", 0)
    assert main([*command]) == 1
    assert capsys.readouterr().err == ""


def test_masks_that_change_are_the_same_in_all_processes(done: Path) -> None:
    assert len({each["masks"] for each in said(done)}) == 1
    line = json.loads((done / "masked" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["mask_updates"] > 1
