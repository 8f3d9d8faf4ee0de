"""The arithmetic of the sheets against tables computed by hand."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from btrain.errors import Interrupted, UserError
from btrain.paper.plan import Claim
from btrain.paper.sheets import files, notes
from btrain.paper.sheets.sheet import make_sheet
from btrain.runs.folder import RunFolder
from btrain.runs.read import read_run
from sheets import begun, cells, evaluated, finished, line, plan, row


def test_numbers_of_other_data_are_not_subtracted(tmp_path: Path) -> None:
    finished(tmp_path / "a-seed0", clean=80.0, robust=50.0)
    sheet = make_sheet(plan([row("a", paper={"clean_acc": 84.92})]), tmp_path)
    found = cells(sheet, "a")
    assert found["clean % | paper"] == "84.92"
    assert "clean % | ours − paper" not in found


def test_means_deviations_and_differences_are_those_by_hand(tmp_path: Path) -> None:
    for seed, (clean, robust) in enumerate([(80.0, 50.0), (82.0, 52.0), (87.0, 57.0)]):
        finished(tmp_path / f"a-seed{seed}", clean=clean, robust=robust)
    told = {"clean_acc": 84.92, "robust_acc": 52.5, "f_b": 1.0, "theoretical_speedup": 2.3}
    sheet = make_sheet(plan([row("a", 3, paper=told, original={"dataset": "mnist"})]), tmp_path)
    found = cells(sheet, "a")
    # The mean is 83; the squared deviations 9, 1 and 16 add up to 26, divided by 2 (n − 1).
    assert found["seeds"] == "3 of 3"
    assert found["clean %"] == "83.00 ± 3.61"
    assert found["clean % | paper"] == "84.92"
    assert found["clean % | ours − paper"] == "−1.92"
    assert found["PGD-20 %"] == "53.00 ± 3.61"
    assert found["PGD-20 % | ours − paper"] == "+0.50"
    assert found["F_B / F_R / F_O"] == "0.28 / 0.54 / 0.18"
    assert found["F_B / F_R / F_O | paper"] == "1.00 / – / –"
    assert found["speedup, eq. 7"] == "2.25 ± 0.00×"
    assert found["speedup, eq. 7 | paper"] == "2.3×"


def test_a_number_that_no_row_has_is_left_out_once_a_run_is_finished(tmp_path: Path) -> None:
    rows = [row("a", paper={"autoattack": 44.0}), row("b")]
    of = plan(rows, attacks=["autoattack", "pgd100x10"])
    every = cells(make_sheet(of, tmp_path), "a")
    finished(tmp_path / "a-seed0", theoretical_speedup=None)
    some = cells(make_sheet(of, tmp_path), "a")
    gone = {"PGD-100×10 %", "speedup, eq. 7"}
    assert gone <= every.keys() and not gone & some.keys()
    assert some["AutoAttack %"] == "–" and some["AutoAttack % | paper"] == "44.00"


def test_speedups_are_paired_by_seed(tmp_path: Path) -> None:
    for seed, (base, ours) in enumerate([(100.0, 50.0), (120.0, 40.0)]):
        finished(tmp_path / f"a-seed{seed}", seconds=base, flops=4e12)
        finished(tmp_path / f"b-seed{seed}", seconds=ours, flops=1e12)
    finished(tmp_path / "a-seed2", seconds=1.0)  # has no partner
    sheet = make_sheet(plan([row("a", 3), row("b", 3)]), tmp_path)
    assert line(sheet, "b").values["speedup_measured"] == {0: 2.0, 1: 3.0}
    assert cells(sheet, "b")["speedup, measured"] == "2.50 ± 0.71×"
    assert cells(sheet, "b")["speedup, FLOPs"] == "4.00 ± 0.00×"
    assert cells(sheet, "b")["seeds"] == "2 of 3"
    assert line(sheet, "b").notes == ["seed 2 missing"]


def test_speedups_are_of_an_epoch_over_the_same_images(tmp_path: Path) -> None:
    finished(tmp_path / "a-seed0", flops=4e12, epochs=10)
    finished(tmp_path / "b-seed0", flops=1e12, epochs=5)
    finished(tmp_path / "c-seed0", config={"dataset.train_examples": 3000})
    for name, root in (("d", "cats"), ("e", "whales")):
        folder = {"dataset.name": "imagefolder", "dataset.root": root}
        finished(tmp_path / f"{name}-seed0", config=folder)
    sheet = make_sheet(plan([row("d"), row("e")]), tmp_path)
    assert cells(sheet, "e")["speedup, measured"] == "other images"
    sheet = make_sheet(plan([row("a"), row("b"), row("c")]), tmp_path)
    assert cells(sheet, "b")["speedup, FLOPs"] == "2.00×"
    assert cells(sheet, "b")["speedup, measured"] == "0.50×"  # 10 s an epoch over 20 s
    assert cells(sheet, "c")["speedup, FLOPs"] == "–"
    assert cells(sheet, "c")["speedup, measured"] == "other images"
    assert "of an epoch over as many images" in files.markdown(sheet)


def test_times_of_other_hardware_are_not_divided(tmp_path: Path) -> None:
    for seed in range(2):
        finished(tmp_path / f"a-seed{seed}", seconds=100)
        finished(tmp_path / f"b-seed{seed}", seconds=1, machine="Processor 2")
        finished(tmp_path / f"c-seed{seed}", seconds=1, machine=None)
        finished(tmp_path / f"d-seed{seed}", seconds=50, machine=f"Processor {1 + seed}")
    sheet = make_sheet(plan([row(name, 2) for name in "abcd"]), tmp_path)
    assert cells(sheet, "b")["speedup, measured"] == "other machine"
    assert cells(sheet, "c")["speedup, measured"] == "machine unknown"
    assert cells(sheet, "d")["speedup, measured"] == "2.00×"
    assert line(sheet, "d").notes == ["times of seed 1 not compared: other machine"]
    assert "100.00×" not in files.markdown(sheet)


def test_times_of_another_load_are_not_divided(tmp_path: Path) -> None:
    for name, jobs in (("a", 2), ("b", 2), ("c", 1), ("d", None)):
        finished(tmp_path / f"{name}-seed0", seconds=100 if name == "a" else 50, jobs=jobs)
    sheet = make_sheet(plan([row(name) for name in "abcd"]), tmp_path)
    shown = [cells(sheet, name)["speedup, measured"] for name in "abcd"]
    assert shown == ["1.00×", "2.00×", "other load", "other load"]
    assert "cpu, torch 2.13.0, Processor 1, 2 cores, 1 thread, 2 at a time (2 runs)" in (
        files.markdown(sheet)
    )


def test_a_row_of_other_data_has_their_own_baseline(tmp_path: Path) -> None:
    rows = [row("a10"), row("b10")]
    rows += [row(name, original={"dataset": "cifar100"}) for name in ("a100", "b100")]
    for name, seconds in (("a10", 10), ("b10", 5), ("a100", 30), ("b100", 10)):
        finished(tmp_path / f"{name}-seed0", seconds=seconds)
    sheet = make_sheet(plan(rows), tmp_path)
    assert [cells(sheet, r.name)["speedup, measured"] for r in rows] == [
        "1.00×", "2.00×", "1.00×", "3.00×",
    ]  # fmt: skip


def test_missing_failed_and_unfinished_seeds_are_told(tmp_path: Path) -> None:
    finished(tmp_path / "a-seed0", robust=50.0)
    begun(tmp_path / "a-seed1", log="failed: The loss is not finite in epoch 5.", epochs=4)
    begun(tmp_path / "a-seed2", log="epoch 4: loss 1.0", epochs=4)
    begun(tmp_path / "a-seed3", log="stopped by SIGTERM; the same command goes on.", epochs=2)
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": "now"}
    begun(tmp_path / "a-seed4", epochs=3)
    (tmp_path / "a-seed4" / "run.lock").write_text(json.dumps(holder))
    finished(tmp_path / "a-seed5", robust=60.0, epochs=7)
    (finished(tmp_path / "a-seed6") / "summary.json").write_text("{")
    sheet = make_sheet(plan([row("a", 8), row("b", 2)]), tmp_path)
    assert line(sheet, "a").notes[:6] == [
        "seed 1 failed: “The loss is not finite in epoch 5.” (a-seed1/train.log)",
        "seed 2 unfinished (epoch 4 of 10)",
        "seed 3 unfinished (epoch 2 of 10)",
        "seed 4 running (epoch 3 of 10)",
        "seed 5 ended after 7 of 10 epochs",
        "seed 6 failed: “summary.json is damaged; delete the folder to start over.” "
        "(a-seed6/train.log)",
    ]
    assert line(sheet, "a").notes[6] == "seed 7 missing"
    assert cells(sheet, "a")["seeds"] == "2 of 8"
    assert cells(sheet, "a")["PGD-20 %"] == "55.00 ± 7.07"
    assert line(sheet, "b").notes == ["missing: no run has begun"]
    assert set(cells(sheet, "b").values()) == {"b", "0 of 2", "–"}


@pytest.mark.parametrize(
    "log",
    [
        "PGD accuracy on a training batch fell from 40 to 3 %; stopped.",
        "logger=wandb failed: no route to host. The run goes on without it.",
        "a warning\nfailed: of two lines",
    ],
)
def test_a_killed_run_that_warned_last_did_not_fail(tmp_path: Path, log: str) -> None:
    begun(tmp_path / "a-seed0", log=log)
    assert read_run(tmp_path / "a-seed0").state == "unfinished"


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (UserError("The disk is full."), "failed", "The disk is full."),
        (RuntimeError("sizes differ\n  at dim 1"), "failed", "RuntimeError: sizes differ at dim 1"),
        (Interrupted(signal.SIGTERM), "unfinished", ""),
    ],
)
def test_what_ended_a_run_is_read_from_its_log(
    tmp_path: Path, error: BaseException, state: str, reason: str
) -> None:
    folder = begun(tmp_path / "a-seed0")
    with pytest.raises(type(error)), RunFolder(folder).log_file():
        logging.getLogger("btrain").info("epoch 1: loss 1.0")
        raise error
    found = read_run(folder)
    assert (found.state, found.reason) == (state, reason)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("dataset.root=/home/ann/data holds nothing.", "dataset.root=… holds nothing."),
        ("OSError: no space: '/home/ann b/x.pt'", "OSError: no space: …"),
        (r"C:\Users\ann\x and ~/y, file:///home/ann/z (/a/b)", "… and …, … (…)"),
        ("{folder}/last.pt is damaged, and/or /x/last.pt", "last.pt is damaged, and/or …"),
        ("see https://example.org/a/b, 3 / 4", "see https://example.org/a/b, 3 / 4"),
    ],
)
def test_a_reason_tells_no_place(tmp_path: Path, message: str, shown: str) -> None:
    folder = tmp_path / "a-seed0"
    begun(folder, log=f"failed: {message.format(folder=folder)}")
    sheet = make_sheet(plan([row("a", 2)]), tmp_path)
    assert line(sheet, "a").notes[0] == f"seed 0 failed: “{shown}” (a-seed0/train.log)"


def test_of_several_evaluations_that_of_the_most_images_counts(tmp_path: Path) -> None:
    folder = finished(tmp_path / "a-seed0")
    for n in (4, 1000, 200):
        correct = [1] * (n // 2) + [0] * (n // 2)
        evaluated(folder, "pgd100x10", correct, inside=f"eval/dataset.test_examples_{n}")
    evaluated(folder, "pgd100x10", [1] * 5000, inside="eval/best")  # of another checkpoint
    found = read_run(folder).evaluation("pgd100x10")
    assert found is not None and found[1]["n"] == 1000
    evaluated(folder, "pgd100x10", [1] * 8)  # the run's own images
    found = read_run(folder).evaluation("pgd100x10")
    assert found is not None and found[1]["n"] == 8


def test_an_evaluation_of_earlier_weights_does_not_count(tmp_path: Path) -> None:
    folder = finished(tmp_path / "a-seed0")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.pt").write_bytes(b"epoch 6")
    evaluated(folder, "autoattack", [1, 0], checkpoint_sha256="of epoch 3")
    evaluated(folder, "pgd20", [1, 0])  # which does not tell
    run = read_run(folder)
    assert (run.evaluated("autoattack"), run.evaluated("pgd20")) == (None, 50)


def test_a_lock_whose_process_ended_runs_no_more(tmp_path: Path) -> None:
    begun(tmp_path / "a", epochs=1)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    holder = {"host": socket.gethostname(), "pid": child.pid, "started": "now"}
    (tmp_path / "a" / "run.lock").write_text(json.dumps(holder))
    assert read_run(tmp_path / "a").state == "unfinished"
    (tmp_path / "a" / "run.lock").write_text(json.dumps(holder | {"host": "elsewhere"}))
    assert read_run(tmp_path / "a").state == "running"
    os.utime(tmp_path / "a" / "run.lock", (0, 0))  # silent for decades
    assert read_run(tmp_path / "a").state == "unfinished"


def test_what_a_user_or_a_profile_changed_is_told_in_words() -> None:
    original = {
        "train.epochs": 10, "train.precision": "float32", "model": "wrn_34_10", "model.width": 10,
        "attack.steps": 10, "recipe.lr": 0.1, "defense.beta": 6.0, "eval.steps": 20,
    }  # fmt: skip
    same = {key: value for key, value in original.items() if key != "model"}
    same |= {"model.name": "wrn_34_10"}
    assert notes.scale(original, same) == []
    changed = {"train.epochs": 20, "train.precision": "bf16", "model.width": 2, "attack.steps": 5,
               "recipe.lr": 0.05, "defense.beta": 1.0, "eval.steps": 5}  # fmt: skip
    assert notes.scale(original, same | changed) == [
        "20 instead of 10 epochs",
        "precision bf16 instead of float32",
        "network width 2 instead of 10",
        "attack steps 5 instead of 10",
        "learning rate 0.05 instead of 0.1",
        "1/λ 1 instead of 6",
        "PGD-5 instead of PGD-20",
    ]


def test_what_all_rows_share_is_said_once(tmp_path: Path) -> None:
    original = {
        "dataset": "cifar10", "model": "wrn_34_10", "model.width": 10, "train.epochs": 76,
        "train.batch_size": 128, "dataset.train_examples": None, "dataset.test_examples": None,
    }  # fmt: skip
    finished(tmp_path / "a-seed0")
    finished(tmp_path / "b-seed0", config={"dataset.name": "imagefolder", "dataset.root": "x/jpeg",
                                           "dataset.test_examples": 1000})  # fmt: skip
    rows = [row(name, original=original) for name in "abc"]
    sheet = make_sheet(plan(rows), tmp_path)
    assert sheet.notes == [
        "small_cnn (width 8) instead of wrn_34_10",
        "10 of 76 epochs",
        "batches of 100 instead of 128",
        "6,000 training images",
    ]
    assert line(sheet, "a").notes == ["MNIST instead of CIFAR-10"]
    assert line(sheet, "b").notes[:2] == [
        "image files (jpeg) instead of CIFAR-10", "1,000 test images",
    ]  # fmt: skip
    assert "All rows:** small_cnn (width 8) instead of wrn_34_10, 10 of" in files.markdown(sheet)


def test_runs_of_the_papers_scale_need_no_note(tmp_path: Path) -> None:
    config = {"dataset.name": "cifar10", "dataset.train_examples": None}
    finished(tmp_path / "a-seed0", config=config)
    sheet = make_sheet(plan([row("a", original={"dataset": "cifar10"})]), tmp_path)
    assert (sheet.notes, line(sheet, "a").notes) == ([], [])


def test_corruptions_are_the_robust_accuracy_of_augmix(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in "ab":
        answers = rng.random((3, 5, 8)) < 0.7
        evaluated(finished(tmp_path / f"{name}-seed0"), "corruptions", answers, regenerated=True)
        if name == "b":
            mean = 100 * answers.mean()
    told = {"corruptions": 88.8}
    sheet = make_sheet(plan([row("a", paper=told), row("b", paper=told)]), tmp_path)
    found = cells(sheet, "b")
    assert found["corruptions %"] == f"{mean:.2f}"
    assert found["corruptions % | paper"] == "88.80"
    assert "PGD-20 %" not in found
    assert line(sheet, "b").test is not None
    assert "corruptions regenerated by btrain, not the official files" in sheet.notes


def test_evaluations_that_lack_or_are_of_fewer_images_are_told(tmp_path: Path) -> None:
    for seed in range(2):
        evaluated(finished(tmp_path / f"a-seed{seed}"), "pgd20", [1] * 8)
    fewer = "eval/dataset.test_examples_4"
    evaluated(tmp_path / "a-seed0", "autoattack", [1, 1, 0, 0], inside=fewer)
    evaluated(finished(tmp_path / "b-seed0"), "autoattack", [1, 1, 0, 0], inside=fewer)
    rows = [row("a", 2, paper={"pgd100x10": 54.3}), row("b", attacks=["pgd20"])]
    sheet = make_sheet(plan(rows, attacks=["pgd20", "autoattack"]), tmp_path)
    assert line(sheet, "a").notes == [
        "autoattack not evaluated on seed 1",
        "autoattack on 4 test images",
        "pgd100x10 not evaluated",
    ]
    assert cells(sheet, "a")["AutoAttack %"] == "50.00"
    assert cells(sheet, "a")["PGD-100×10 % | paper"] == "54.30"
    assert line(sheet, "b").notes == ["pgd20 not evaluated", "autoattack on 4 test images"]


def test_csv_and_json_hold_the_numbers_unrounded(tmp_path: Path) -> None:
    for seed, robust in enumerate([50.0, 53.0]):
        finished(tmp_path / f"a-seed{seed}", robust=robust)
    told = row("a", 3, label='=cmd|"x"', paper={"robust_acc": 52.0},
               original={"dataset": "mnist"})  # fmt: skip
    sheet = make_sheet(plan([told], [Claim("c", "robust_acc", "a", at_least=0)]), tmp_path)
    (found,) = csv.DictReader(io.StringIO(files.as_csv(sheet)))
    assert found["label"] == '\'=cmd|"x"'  # no spreadsheet runs it
    assert (found["robust_acc"], found["robust_acc_n"]) == ("51.5", "2")
    assert float(found["robust_acc_sd"]) == pytest.approx(math.sqrt(4.5), rel=1e-6)
    assert float(found["robust_acc_minus_paper"]) == -0.5
    content = json.loads(files.as_json(sheet))
    assert content["rows"][0]["numbers"]["robust_acc"]["seeds"] == {"0": 50.0, "1": 53.0}
    assert content["rows"][0]["states"] == {"0": "finished", "1": "finished", "2": "missing"}
    assert content["claims"][0]["interval95"] == pytest.approx(
        [51.5 - 12.7062 * 1.5, 51.5 + 12.7062 * 1.5], rel=1e-5
    )


def test_sparse_rows_tell_overfitting_gap_and_three_costs(tmp_path: Path) -> None:
    paper = {"best_robust_acc": 51.1, "robust_acc": 43.6, "overfitting": 7.5, "counted": 0.31}
    rows = [row("dense", 2), row("bird", 2, paper=paper)]
    claim = Claim("half the gap", "gap_share", "bird", None, None, 0.5)
    for seed in range(2):
        finished(tmp_path / f"dense-seed{seed}", robust=40.0 + seed, flops=10.0,
                 best_robust_acc=46.0, train_robust_acc=90.0)  # fmt: skip
        finished(tmp_path / f"bird-seed{seed}", robust=46.0, flops=10.0, best_robust_acc=45.0,
                 train_robust_acc=66.0, density=0.2, macs_share=0.5, flops_counted=5.0,
                 flops_executed=12.0)  # fmt: skip
        config = (tmp_path / f"bird-seed{seed}" / "config.yaml").read_text()
        (tmp_path / f"bird-seed{seed}" / "config.yaml").write_text(
            f"{config}sparsity: {{name: flying_bird}}\n"
        )
    sheet = make_sheet(plan(rows, [claim], kind="sparse"), tmp_path)
    found = cells(sheet, "bird")
    assert found["best %"] == "45.00 ± 0.00"
    assert found["best % | paper"] == "51.10"
    assert found["final, PGD-20 %"] == "46.00 ± 0.00"
    assert found["best − final %"] == "−1.00 ± 0.00"
    assert found["train − test %"] == "20.00 ± 0.00"
    assert (found["density"], found["φ"]) == ("0.200 ± 0.000", "0.500 ± 0.000")
    assert (found["counted work"], found["executed work"]) == ("0.500 ± 0.000", "1.200 ± 0.000")
    assert found["counted work | paper"] == "0.310"
    base = cells(sheet, "dense")
    assert (base["best − final %"], base["φ"]) == ("5.50 ± 0.71", "1.000 ± 0.000")
    (verdict,) = sheet.verdicts
    assert verdict.differences == pytest.approx({0: 20 / 50, 1: 20 / 49})
    assert verdict.verdict == "holds"


def test_sheets_of_cost_tell_units_memory_and_time_over_the_baseline(tmp_path: Path) -> None:
    for name, units in (("plain", 3.0), ("cheap", 4.5)):
        finished(tmp_path / f"{name}-seed0", units_per_example=units, epochs=8)
        step = {"peak_memory_mb": 2 * units, "times_baseline": units / 3, "steps": 200, "epoch": 2}
        (tmp_path / f"{name}-seed0" / "step.json").write_text(json.dumps(step))
    sheet = make_sheet(plan([row("plain"), row("cheap")], kind="cost"), tmp_path)
    shown = cells(sheet, "cheap")
    assert (shown["u an epoch"], shown["u in all"]) == ("4.50", "36.0")
    assert (shown["× baseline's time"], shown["MB in a step"]) == ("1.50", "9.0")
    assert not any("speedup" in head for head in shown)
    assert line(sheet, "cheap").values["time_doublings"] == {0: pytest.approx(0.585, abs=1e-3)}


def test_sheets_of_training_by_bounds_tell_ratios_and_the_best_engine(tmp_path: Path) -> None:
    for name, seconds in (("plain", 10.0), ("mix", 40.0)):
        run = finished(tmp_path / f"{name}-seed0", seconds=seconds)
        evaluated(run, "verified-ibp", [0, 1, 0, 0])
        evaluated(run, "verified-crown_ibp", [0, 1, 1, 1])
        evaluated(run, "interval", [1, 0, 1, 0])
        evaluated(run, "pgd40x1-cw", [1, 1, 1, 0])
    attacks = ["interval", "pgd40x1-cw", "verified-ibp", "verified-crown_ibp"]
    sheet = make_sheet(plan([row("plain"), row("mix")], kind="verified", attacks=attacks), tmp_path)
    values = line(sheet, "mix").values
    assert values["epoch_seconds"] == {0: 4.0}  # of ten epochs
    assert values["times_plain"] == {0: 4.0} and values["time_doublings"] == {0: 2.0}
    assert values["verified_best"] == {0: 75.0} and values["stands_by_interval"] == {0: -25.0}
    shown = cells(sheet, "mix")
    assert shown["verified, crown_ibp %"] == "75.00" and shown["× baseline's time"] == "4.0"
    assert not any("speedup" in head for head in shown)
    step = {"peak_memory_mb": 12.34, "times_baseline": 8.0, "steps": 200, "epoch": 2}
    (tmp_path / "mix-seed0" / "step.json").write_text(json.dumps(step))
    sheet = make_sheet(plan([row("plain"), row("mix")], kind="verified", attacks=attacks), tmp_path)
    assert line(sheet, "mix").values["time_doublings"] == {0: 3.0}  # of steps, not of epochs
    shown = cells(sheet, "mix")
    assert (shown["MB in a step"], shown["× baseline's time"]) == ("12.3", "8.0")
