"""The comparison of runs against hand-computed numbers."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from btrain.errors import UserError
from btrain.evaluation.result import Result, wilson
from btrain.report import compare
from btrain.report.sweep import next_commands, sweep_table
from btrain.runs.sweep import Job, heard

SAME = ["84.92", "56.61"]


def finished(folder: Path, seconds: float, device: str = "cpu", **changes: float | None) -> Path:
    folder.mkdir(parents=True)
    summary = {
        "clean_acc": 84.916,
        "robust_acc": 56.61,
        "f_b": 0.28,
        "f_r": 0.54,
        "f_o": 0.18,
        "theoretical_speedup": 2.254,
        "speedup_flops": 1.9,
        "speedup_measured": 1.751,
        "epochs": 30,
        "attack_steps_mean": 3.88,
        "flops": 2.5e12,
        "train_seconds": seconds,
        "device": device,
    }
    (folder / "summary.json").write_text(json.dumps(summary | changes))
    return folder


def test_a_sweep_has_a_row_for_what_varies_and_says_what_did_not_finish(tmp_path: Path) -> None:
    common = ["dataset=digits", "logger=wandb"]
    wide = "model.factory=a/long/path/of/a/network/that/does/not/fit.py:Net"
    jobs, clean = [], {0: [80.0, 84.0], 2: [90.0, 91.0]}
    for n_r, seed in ((0, 0), (0, 1), (2, 0), (2, 1), (2, 2)):
        number, name = len(jobs), f"n_r_{n_r}-seed{seed}"
        jobs.append(Job(number, [*common, f"bt.n_r={n_r}", f"seed={seed}", f"run.dir={name}"]))
        jobs[-1].folder, jobs[-1].looked_at = str(tmp_path / "runs" / name), f"verify={name}"
        if seed < 2:
            finished(Path(jobs[-1].folder), 9.0, clean_acc=clean[n_r][seed], robust_acc=50.0)
    summary = Path(str(jobs[3].folder)) / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"cut": "train.max_seconds"}))
    jobs.append(Job(5, [*common, wide, "seed=0"], failed="There is no such file."))
    for job in reversed(jobs):
        job.tell(tmp_path)
    told = heard(tmp_path)
    assert told == jobs
    table, _, missing = sweep_table(told).split("\n\n")
    rows = [line.split() for line in table.splitlines()]
    assert rows[0] == ["setting", "seeds", "clean", "%", "PGD", "%", "speedup", "measured"]
    # The deviations of two numbers are their difference over √2.
    numbers = ["50.00", "±", "0.00", "1.90", "±", "0.00×", "1.75", "±", "0.00×"]
    assert rows[1] == ["bt.n_r=0", "2", "82.00", "±", "2.83", *numbers]
    assert rows[2] == ["bt.n_r=2", "(cut)", "2", "90.50", "±", "0.71", *numbers]
    assert missing.splitlines() == [
        "2 of 6 runs did not finish:",
        "bt.n_r=2 seed=2: it ended without a result",
        f"{wide} seed=0: There is no such file.",
    ]
    report, evaluate = next_commands(told)
    assert report == f"btrain report --merge-seeds {tmp_path}/runs"
    assert evaluate == f"btrain eval checkpoint={jobs[0].folder} {jobs[0].looked_at}"
    jobs[3].overrides[2] = wide
    for line in sweep_table(jobs).split("\n\n")[0].splitlines():
        assert len(line) <= 80
    finished(tmp_path / "runs" / "another", 1.0)
    assert next_commands(told)[0].endswith(" ".join(str(job.folder) for job in jobs[:4]))


def test_times_are_compared_over_one_network_and_one_folder_of_images(tmp_path: Path) -> None:
    """Runs of before `model.shortcut` and those that tell its default are of one network."""
    older = {"name": "preact_resnet18", "width": 8, "depth": None}
    newer = {"name": "preact_resnet18", "width": 8, "shortcut": "activated"}
    cats = {"name": "imagefolder", "root": "cats", "image_size": 32}
    shown = []
    for number, (model, dataset) in enumerate((
        (older, cats), (newer, cats), (newer | {"shortcut": "input"}, cats),
        (newer, cats | {"root": "whales"}), (newer, cats | {"image_size": 64}),
    )):  # fmt: skip
        folder = finished(tmp_path / str(number), 90.0 / (number + 1))
        (folder / "config.yaml").write_text(json.dumps({"model": model, "dataset": dataset}))
        shown.append(folder)
    *_, table = compare(shown).split("\n\n")[0].partition("\n")
    assert [row[-1] for row in cells(table)[1:]] == [
        "1.00×", "2.00×", "other network", "other data", "other data",
    ]  # fmt: skip


def test_the_first_run_is_the_baseline(tmp_path: Path) -> None:
    table = compare([finished(tmp_path / "plain", 90.0), finished(tmp_path / "ours", 40.0)])
    table, shared = table.split("\n\n")
    head, ruler, *rows = cells(table)
    assert head[0] == "run"
    assert set("".join(ruler)) == {"-"}
    assert rows == [
        ["plain", *SAME, "90.0", "1.00×"],
        ["ours", *SAME, "40.0", "2.25×"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1
    assert shared == (
        "The same in all rows: F_B/F_R/F_O 0.28/0.54/0.18; mean steps 3.9; TFLOP 2.5; "
        "speedup (FLOPs) 1.90×; speedup (measured) 1.75×."
    )


def test_robust_accuracies_have_intervals_and_verified_shares_a_column(tmp_path: Path) -> None:
    for seed, robust in enumerate((50.0, 52.0, 57.0)):
        path = finished(tmp_path / f"a-seed{seed}", 9.0, robust_acc=robust, seed=seed)
        summary = json.loads((path / "summary.json").read_text())
        (path / "summary.json").write_text(json.dumps(summary | {"test_examples": 100}))
    labels = np.zeros(100, dtype=np.int64)
    for name, right in (("autoattack", 40), ("verified-crown", 10), ("verified-ibp", 5)):
        result = Result(name, np.arange(100) < right, labels, ("0",), 1.0, {"classes": ["0"]})
        result.write(tmp_path / "a-seed0" / "eval")
    head, _, first, *_ = cells(compare([tmp_path]))
    row = dict(zip(head, first, strict=True))
    # 50 of 100: (1 ± z / √(n + z²)) / 2.
    assert row["PGD 95 %"] == "40.4 to 59.6"
    low, high = wilson(40, 100)
    assert row["AutoAttack 95 %"] == f"{100 * low:.1f} to {100 * high:.1f}"
    assert (row["verified by crown %"], row["verified by ibp %"]) == ("10.00", "5.00")
    head, _, merged = cells(compare([tmp_path], merge_seeds=True).split("\n\n")[0])
    # The mean is 53, its deviation √(13/3), and Student's t with 2 degrees of freedom 4.3027.
    assert dict(zip(head, merged, strict=True))["PGD 95 %"] == "44.0 to 62.0"


def test_results_of_weights_that_a_run_had_before_it_went_on_are_left_out(tmp_path: Path) -> None:
    run, labels = finished(tmp_path / "a", 9.0), np.zeros(10, dtype=np.int64)
    for name, right in (("autoattack", 4), ("verified-ibp", 1)):
        facts = {"classes": ["0"], "checkpoint_sha256": hashlib.sha256(b"epoch 3").hexdigest()}
        Result(name, np.arange(10) < right, labels, ("0",), 1.0, facts).write(run / "eval")
    handed_on = compare([run])  # without its checkpoints
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.pt").write_bytes(b"epoch 3")
    assert compare([run]) == handed_on
    assert "| 40.00" in handed_on and "| 10.00" in handed_on
    (run / "checkpoints" / "last.pt").write_bytes(b"epoch 6")
    table, notes = compare([run]).split("\n\n")
    assert "AutoAttack" not in table and "verified" not in table
    assert "other weights than the run's last: autoattack of a, verified-ibp of a; btrain" in notes


def test_a_run_that_a_collapse_ended_is_marked(tmp_path: Path) -> None:
    runs = [finished(tmp_path / "a", 1.0), finished(tmp_path / "b", 2.0)]
    summary = runs[1] / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"collapse": "epoch 5 of 6"}))
    rows = compare(runs).splitlines()
    assert rows[2].split("|")[1].strip() == "a"
    assert rows[3].split("|")[1].strip() == "b (ended by a collapse)"


def test_times_of_different_devices_are_not_divided(tmp_path: Path) -> None:
    table = compare([finished(tmp_path / "a", 90.0), finished(tmp_path / "b", 4.0, "NVIDIA H200")])
    assert "other device" in table.splitlines()[3]
    assert "22.50" not in table


def test_times_are_compared_on_equal_terms(tmp_path: Path) -> None:
    first = finished(tmp_path / "a", 90.0)
    settings = "dataset: {name: mnist}\nmodel: {name: small_cnn, width: 16}\n"
    (first / "config.yaml").write_text(settings)
    others = []
    for name, changed, epochs in (
        ("data", settings.replace("mnist", "digits"), 30),
        ("network", settings.replace("16", "32"), 30),
        ("epochs", settings, 4),
    ):
        path = finished(tmp_path / name, 9.0, epochs=epochs)
        (path / "config.yaml").write_text(changed)
        others.append(path)
    rows = cells(compare([first, *others]))[2:]
    assert [row[-1] for row in rows] == ["1.00×", "other data", "other network", "other epochs"]


def test_accuracies_under_other_attacks_are_told_apart(tmp_path: Path) -> None:
    runs = []
    for attack, epsilon in (("linf_pgd", 0.03137), ("l2_pgd", 0.5), ("own", 0.2)):
        runs.append(finished(tmp_path / attack, 9.0))
        text = f"attack: {{name: {attack}}}\neval: {{epsilon: {epsilon}, steps: 20}}\n"
        (runs[-1] / "config.yaml").write_text(text)
    head, _, *rows = cells(compare(runs))
    place = head.index("PGD's ball")
    assert [row[place] for row in rows] == [
        "L∞ 0.0314, 20 steps", "L2 0.5, 20 steps", "own ball 0.2, 20 steps",
    ]  # fmt: skip
    assert "PGD's ball" not in compare(runs[:1])


def cells(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_seeds_are_merged_to_mean_and_standard_deviation(tmp_path: Path) -> None:
    for seed, (accuracy, seconds) in enumerate([(50.0, 60.0), (52.0, 70.0), (57.0, 50.0)]):
        finished(tmp_path / f"plain-seed{seed}", seconds, robust_acc=accuracy, seed=seed)
        finished(tmp_path / f"ours-seed{seed}", seconds / 2, speedup_measured=None, seed=seed)
    names = [f"{method}-seed{seed}" for method in ("plain", "ours") for seed in range(3)]
    head, _, plain, ours = cells(compare([tmp_path / name for name in names], merge_seeds=True))
    row = dict(zip(head, plain, strict=True))
    assert (row["run"], row["seeds"]) == ("plain", "3")
    # 53 is the mean; the squared deviations 9, 1, 16 add up to 26, divided by 2.
    assert row["PGD %"] == "53.00 ± 3.61"
    assert row["training s"] == "60.0 ± 10.0"
    row = dict(zip(head, ours, strict=True))
    assert row["times faster than row 1"] == "2.00×"
    assert row["speedup (measured)"] == "–"


def test_runs_of_other_folders_and_of_one_seed_are_not_merged(tmp_path: Path) -> None:
    for folder in ("fast", "free"):
        finished(tmp_path / folder / "trades-seed0", 10.0, seed=0)
    table = cells(compare([tmp_path / "fast", tmp_path / "free"], merge_seeds=True))
    assert [row[1] for row in table[2:]] == ["1", "1"]
    again = finished(tmp_path / "fast" / "trades-seed1", 10.0, seed=0)
    with pytest.raises(UserError, match=str(again)):
        compare([tmp_path / "fast"], merge_seeds=True)


def test_what_an_older_run_does_not_tell_has_no_column(tmp_path: Path) -> None:
    path = finished(tmp_path / "old", 10.0)
    summary = json.loads((path / "summary.json").read_text())
    del summary["flops"]
    (path / "summary.json").write_text(json.dumps(summary))
    assert "TFLOP" not in compare([path])
    assert "TFLOP" in compare([path, finished(tmp_path / "new", 10.0)])


def test_two_seeds_have_no_interval(tmp_path: Path) -> None:
    for seed, robust in enumerate((50.0, 52.0)):
        finished(tmp_path / f"a-seed{seed}", 9.0, robust_acc=robust, seed=seed)
    table = compare([tmp_path], merge_seeds=True)
    assert "95 %" not in table and "Two seeds are too few for an interval over seeds." in table


def test_a_sparse_run_has_its_counted_speedup_beside_the_allocators(tmp_path: Path) -> None:
    sparse = {"density": 0.2, "macs_share": 0.5, "flops_executed": 2.5e12, "flops_counted": 1e12,
              "speedup_counted": 4.75}  # fmt: skip
    runs = [finished(tmp_path / "dense", 9.0), finished(tmp_path / "sparse", 9.0, **sparse)]
    head, _, *rows = cells(compare(runs).split("\n\n")[0])
    assert [row[head.index("speedup (counted)")] for row in rows] == ["1.90×", "4.75×"]


def test_a_folder_of_runs_stands_for_its_runs(tmp_path: Path) -> None:
    paths = [finished(tmp_path / name, 10.0) for name in ("b", "a", "c")]
    for age, path in enumerate(paths):
        os.utime(path / "summary.json", (age, age))
    (tmp_path / "unfinished").mkdir()
    assert [row[0] for row in cells(compare([tmp_path]))[2:]] == ["b", "a", "c"]
    assert compare([tmp_path]) == compare(paths)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_folder_without_a_finished_run_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        compare([tmp_path])
