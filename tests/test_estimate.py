"""What a table will cost, told ahead of it: against what runs have logged."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from btrain import cli
from btrain.methods.make import make_method
from btrain.paper.estimate import cost, listing
from btrain.paper.job import Job, config_of, make_plan
from btrain.paper.target import read_profile, read_target
from btrain.settings.compose import config_dir
from btrain.training import train
from btrain.training.foresee import foresee
from composing import compose
from test_training import tiny

CPU = torch.device("cpu")
SMALLER = ["dataset.train_examples=60", "dataset.test_examples=20", "train.epochs=1"]


def job(target: str, profile: str, *extra: str) -> Job:
    return Job(read_target(target), read_profile(profile), Path("runs"), list(extra), [], None)


@pytest.mark.parametrize(
    "settings",
    [
        ["bt=uniform"],
        ["bt.n_r=1"],
        ["bt.n_r=0"],
        ["defense=mart"],
        ["defense=pgd", "bt=oracle", "bt.n_o=1"],
        ["bt.score=shared"],
        ["bt.forward_unperturbed=true"],
        ["rival=fast", "bt.n_b=2"],
        ["defense=mart", "rival=yopo"],
        ["defense=augmix", "attack.steps=2"],
    ],
    ids=str,
)
def test_the_units_of_a_step_are_those_of_the_log(tmp_path: Path, settings: list[str]) -> None:
    config = tiny(tmp_path, "train.epochs=2", "train.batch_size=100", *settings)
    summary = train(config)
    units = make_method(config, CPU).expected_units(
        (summary["f_b"], summary["f_r"], summary["f_o"])
    )
    assert units == pytest.approx(summary["units_per_example"], rel=0.02)


def test_fixed_fractions_go_by_their_own_and_early_exit_tells_nothing() -> None:
    words = ["dataset=digits", "model=small_cnn", "bt.n_r=3", "bt.robust_share=0.5", "bt.n_b=9",
             "bt.guard=0.3"]  # fmt: skip
    by_score, by_chance, early = (
        make_method(compose([*words, f"bt={name}", *more]), CPU)
        for name, more in (
            ("bullettrain", []),
            ("random", ["bt.fractions=[0.2,0.4,0.4]"]),
            ("early_exit", []),
        )
    )
    fixed = (0.2, 0.4, 0.4)
    assert by_chance.expected_units((0.28, 0.54, 0.18)) == by_score.expected_units(fixed)
    assert by_chance.expected_units(fixed) != by_score.expected_units((0.28, 0.54, 0.18))
    assert early.expected_units(fixed) is None


@pytest.mark.parametrize("rival", ["free", "mma"])
def test_of_a_rival_of_another_kind_nothing_is_told(tmp_path: Path, rival: str) -> None:
    config = tiny(tmp_path, "defense=pgd", f"rival={rival}")
    assert make_method(config, CPU).expected_units((1, 0, 0)) is None


def test_the_flops_of_a_row_are_those_that_its_run_counts(tmp_path: Path) -> None:
    command = ["paper", "table4", "only=table2_trades", f"out={tmp_path}", *SMALLER]
    assert cli.main(command) == 0
    summary = json.loads((tmp_path / "table2_trades-seed1" / "summary.json").read_text())
    of = job("table4", "smoke", *SMALLER)
    row = next(row for row in make_plan(of).rows if row.name == "table2_trades")
    found = cost(of, row)
    assert found.training == pytest.approx(summary["flops"])
    assert "1 epoch of 60 images, batches of 20" in found.settings
    unit = summary["flops"] / (27 * 60)
    # The run's own PGD-20 on 20 test images and after its epoch on a batch of 20; PGD-20.
    own, twenty = 42 * (20 + 20), 42 * 20
    assert found.evaluation == pytest.approx((own + twenty) * unit)


@pytest.mark.parametrize("target", ["table1", "table2", "table3", "table4", "figure6", "figure7"])
def test_on_a_gpu_a_table_takes_the_half_hour_that_the_profile_tells(target: str) -> None:
    of = job(target, "gpu")
    minutes = int(re.findall(r"; (\d+) min at 100 TFLOP/s", listing([(of, make_plan(of))]))[0])
    assert minutes <= 30
    header = (Path(config_dir()) / "paper" / "profile" / "gpu.yaml").read_text()
    name, number = target[:-1].capitalize(), target[-1]
    assert f"{name} {number} {minutes}" in header.replace(" min", "")


def test_a_plan_is_told_and_nothing_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "table1",
        "table3",
        "table1.dataset=imagefolder",
        f"table1.dataset.root={tmp_path}/their images, 3",
    ]
    arguments += ["table3.train.epochs=9", "only=table3_mart", "table1.only=table1_cifar10_augmix"]
    out = tmp_path / "out"
    assert cli.main(["paper", *arguments, "plan=true", f"out={out}"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert not out.exists()
    assert [line.split(":")[0].strip() for line in told] == [
        "table1, profile smoke", "table1_cifar10_augmix", "all",
        "table3, profile smoke", "table3_mart", "all",
    ]  # fmt: skip
    assert (
        "4 epochs of ? images" in told[1] and "seeds of unknown to train" in told[1]
    )  # another folder's images
    assert "9 epochs of 400 images" in told[4]
    assert told[2].startswith(
        f"  all: unknown: There is no folder {tmp_path}/their images, 3/train;"
    )
    assert re.search(r"\d GFLOP to train, \d\S* GFLOP to evaluate", told[4])


def test_rows_that_leave_images_out_have_a_cost() -> None:
    of = job("cheapest_table", "smoke", "dataset.train_examples=400")
    rows = {row.name: row for row in make_plan(of).rows}
    name = "cheap_bullettrain"
    some, all_of_them = (cost(of, rows[name + end]) for end in ("", "-train.skip_0.0"))
    assert some.training is not None and all_of_them.training is not None
    assert 0.7 < some.training / all_of_them.training < 1
    assert "epochs of 280 to 400 images" in some.settings
    warm = replace(of, extra=[*of.extra, "bt.warmup_epochs=1"])
    assert cost(warm, rows[name + "-train.skip_0.0"]).training > 1.05 * all_of_them.training


def test_a_folder_of_images_is_looked_into(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (8, 8), (i, 9 * i, 0)).save(tmp_path / name / f"{i}.png")
    fewer = ["dataset.train_examples=20", "dataset.test_examples=4", "model.width=2"]
    target = read_target("cheapest_table")
    target = replace(target, sweeps=[
        one for one in target.sweeps
        if one.experiments in (["cheap_free"], ["cheapest"]) and not one.values
    ])  # fmt: skip
    profile, root = read_profile("cpu"), f"dataset.root={tmp_path}"
    of = Job(target, profile, tmp_path, [root, *fewer], [], None)
    plan = make_plan(of)
    *_, free, total = listing([(of, plan)]).splitlines()
    assert "of unknown to train" in free and re.search(r"\d GFLOP to evaluate", free)
    why = "only trying tells what cheap_free takes, by btrain plan with its settings"
    assert f" without 1 row of unknown cost ({why}); " in total
    row = next(row for row in plan.rows if row.name == "cheapest")
    config = config_of(of, row.experiment, row.swept)
    assert cost(of, row).training == foresee(config).flops
    too_many = replace(of, extra=[root], only=["cheapest"])
    *_, total = listing([(too_many, plan)]).splitlines()
    assert total == "  all: unknown: dataset.train_examples must be at most 24, not 8000"
