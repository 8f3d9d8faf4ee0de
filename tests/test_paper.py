"""The definitions of the paper's tables and figures, and the runner, on real digits."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from btrain import cli
from btrain.errors import UserError
from btrain.evaluation.autoattack import LIBRARIES
from btrain.paper import step
from btrain.paper.job import Job, check, config_of, make_plan, unfinished
from btrain.paper.plan import read_plan
from btrain.paper.sheets import pictures
from btrain.paper.sheets.cost import read_step
from btrain.paper.sheets.sheet import make_sheet
from btrain.paper.target import Sweep, merged, names, read_profile, read_target
from btrain.settings.compose import config_dir
from btrain.settings.names import SparsityName

TARGETS = names("target")


def job(target: str, profile: str, out: Path = Path("runs"), extra: list[str] | None = None) -> Job:
    return Job(read_target(target), read_profile(profile), out, extra or [], [], None)


def test_every_table_and_figure_of_the_experiments_is_there() -> None:
    figures, tables = (f"figure{n}" for n in range(2, 8)), (f"table{n}" for n in range(1, 5))
    cheap = ["cheapest_mnist", "cheapest_table"]
    bounds = ["mixtrain_choice", "mixtrain_front", "mixtrain_table"]
    assert [*cheap, *figures, *bounds, "sparse_augmix", "sparse_table", *tables] == TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_every_run_of_every_profile_can_be_composed(target: str) -> None:
    for profile in ("smoke", "cpu", "gpu"):
        check(job(target, profile))


@pytest.mark.parametrize("target", TARGETS)
def test_claims_and_baselines_are_of_rows_that_exist(target: str) -> None:
    plan = make_plan(job(target, "smoke"))
    rows = {row.name for row in plan.rows}
    assert len(rows) == len(plan.rows)
    wanted = {claim.row for claim in plan.claims} | {plan.baseline}
    wanted |= {claim.than for claim in plan.claims}
    assert wanted <= rows | {None}


@pytest.mark.parametrize("target", TARGETS)
def test_an_experiments_header_names_the_papers_numbers(target: str) -> None:
    for row, paper in read_target(target).paper.items():
        experiment = row.partition("-")[0]
        file = Path(config_dir()) / "experiment" / f"{experiment}.yaml"
        header = "\n".join(line for line in file.read_text().splitlines() if line.startswith("#"))
        assert f"experiment={experiment}" in header
        told = {float(number) for number in re.findall(r"\d*\.?\d+", header)}
        keys = ("clean_acc", "robust_acc", "corruptions", "pgd100x10", "pgd1000x5")
        wanted = {paper[key] for key in keys if key in paper}
        assert wanted <= told


EXPERIMENTS = sorted((Path(config_dir()) / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_an_experiments_header_has_its_command_and_the_time_where_it_was_measured(
    file: Path,
) -> None:
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert any("btrain train" in line and f"experiment={file.stem}" in line for line in header)
    (told,) = [line for line in header if line.startswith("# Training ")]
    seconds = measured_seconds(file.stem)
    if seconds:
        expected = f"took {sum(seconds) / len(seconds):.0f} s, the mean of {len(seconds)} runs of"
        assert expected in told
    else:
        assert told == "# Training time: not measured."


def measured_seconds(experiment: str) -> list[float]:
    """Of the runs in results/cpu: those of the experiment alone, else with all swept values.

    An experiment that is no row of the paper has a file of its own in results/mnist.
    """
    own = Path(config_dir()).parent / "results" / "mnist" / f"{experiment}.jsonl"
    if own.is_file():
        lines = [json.loads(line) for line in own.read_text().splitlines()]
        return [x["train_seconds"] for x in lines if x["run"].startswith(f"{experiment}-seed")]
    found: dict[tuple[str, str], float] = {}
    for path in (Path(config_dir()).parent / "results" / "cpu").glob("*.json"):
        for row in json.loads(path.read_text())["rows"]:
            if row["experiment"] == experiment and "train_seconds" in row["numbers"]:
                seeds = row["numbers"]["train_seconds"]["seeds"]
                found |= {(row["name"], seed): value for seed, value in seeds.items()}
    alone = [value for (name, _), value in found.items() if name == experiment]
    return alone or list(found.values())


def test_a_target_sweeps_groups_and_a_profile_has_seeds_and_rows_of_its_own() -> None:
    of = job("sparse_table", "cpu", extra=["dataset.root=unused"])
    assert (of.seeds, job("table2", "cpu").seeds) == ([*range(10)], [0, 1, 2])
    rows = {row.name: row for row in make_plan(of).rows}
    assert not any("cifar100" in name for name in rows)
    bird = "sparse_cifar10-sparsity_flying_bird-sparsity.density_0.1"
    config = config_of(of, "sparse_cifar10", rows[bird].swept)
    assert (config.sparsity.name, config.sparsity.density) == (SparsityName.flying_bird, 0.1)
    assert rows[bird].label == "Flying Bird, 90 %"
    assert rows[bird].paper == {}
    assert rows[bird.replace("0.1", "0.2")].paper["gap"] == 28.9
    assert rows[bird].attacks == []
    assert rows["sparse_cifar10"].attacks == ["autoattack"]
    assert all(len(sweep.values.get("sparsity", [0])) == 1 for sweep in of.sweeps)


def test_a_sweep_may_have_settings_of_its_own_in_a_profile() -> None:
    of = job("mixtrain_choice", "cpu")
    rows = {row.name: row for row in make_plan(of).rows}
    epochs = {
        k: config_of(of, row.experiment, row.swept).train.epochs
        for k in (1, 5)
        for row in [rows[f"mixtrain_choice_random-attack.epsilon_0.2-defense.per_batch_{k}"]]
    }
    assert epochs == {1: 4, 5: 2} and len(rows) == 16


def test_a_profile_is_smaller_than_the_paper_but_for_its_own() -> None:
    assert read_profile("paper").settings("table2") == []
    cpu = read_profile("cpu")
    assert cpu.settings("figure4") == cpu.settings("figure3") != cpu.settings("table2")
    more = cpu.evaluate_more["table2"]
    assert more["table2_bt_nr2"] == more["table2_trades"] != []
    assert merged(["a=1", "b=2"], ["a=3"]) == ["a=3", "b=2"]


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = make_plan(job("figure6", "cpu"))
    assert read_plan(plan.write(tmp_path)) == plan
    points = {row.swept["bt.gamma"] for row in plan.rows if row.name != plan.baseline}
    assert points == {"0.65", "0.7", "0.75", "0.8", "0.85", "0.9"}


def test_a_plan_whose_runs_lie_elsewhere_is_refused(tmp_path: Path) -> None:
    path = make_plan(job("figure3", "smoke")).write(tmp_path)
    path.write_text(path.read_text().replace('"figure3-seed0"', '"../../figure3-seed0"'))
    with pytest.raises(UserError, match=r"figure3\.json is no plan"):
        read_plan(path)


@pytest.fixture(autouse=True)
def _few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are drawn by most commands here, and looked at in `test_sheet_pictures.py`."""
    monkeypatch.setattr(pictures, "_DPI", 24)


SMALLER = ["dataset.train_examples=60", "dataset.test_examples=20", "train.epochs=1"]


ONLY_SWEPT = ["paper", "table2", "figure7", "only=table2_bt_nr2", *SMALLER]


@pytest.fixture(scope="module")
def swept_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two targets, of which one row is trained."""
    out = tmp_path_factory.mktemp("swept") / "out"
    assert cli.main([*ONLY_SWEPT, f"out={out}"]) == 0
    return out


def test_runs_lie_where_the_plan_says_and_are_not_repeated(
    swept_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, command = swept_runs, [*ONLY_SWEPT, f"out={swept_runs}"]
    plan = read_plan(out / "figure7.json")
    folders = [
        out / f for r in plan.rows if r.experiment == "table2_bt_nr2" for f in r.runs.values()
    ]
    assert len(folders) == 10  # five values of N_R, two seeds
    assert all((folder / "summary.json").is_file() for folder in folders)
    assert (out / "table2_bt_nr2-seed0" / "eval" / "pgd20.json").is_file()
    made = {folder: (folder / "summary.json").stat().st_mtime_ns for folder in folders}
    capsys.readouterr()
    assert cli.main(command) == 0
    told = capsys.readouterr()
    assert "$ btrain train" not in told.out + told.err  # nor launched
    assert "$ btrain" in told.err  # as what comes behind is
    assert cli.main([*command, "train.batch_size=30"]) == 1
    assert "belongs to a run with train.batch_size=20, not 30" in capsys.readouterr().err
    assert made == {f: (f / "summary.json").stat().st_mtime_ns for f in folders}


def test_only_what_is_left_is_launched(swept_runs: Path, tmp_path: Path) -> None:
    of = job("figure7", "smoke", tmp_path, SMALLER)
    unswept, swept = of.sweeps
    assert unfinished(of, swept) == (swept, [0, 1])
    shutil.copytree(swept_runs, tmp_path, dirs_exist_ok=True)
    assert unfinished(of, swept) is None
    assert unfinished(of, unswept) == (Sweep(["table2_trades", "table2_bt_nr0"], {}), [0, 1])
    assert cli.main(["paper", "figure7", f"out={tmp_path}", *SMALLER]) == 0
    assert unfinished(of, swept) is None and unfinished(of, unswept) is None
    assert (
        unfinished(job("figure7", "smoke", tmp_path, [*SMALLER, "recipe.lr=1"]), swept) is not None
    )
    (tmp_path / "table2_bt_nr2-bt.n_r_3-seed1" / "summary.json").unlink()
    (tmp_path / "table2_bt_nr2-bt.n_r_5-seed1" / "summary.json").unlink()
    values = {"bt.n_r": ["3", "5"]}
    assert unfinished(of, swept) == (Sweep(["table2_bt_nr2"], values), [1])
    longer = job("figure7", "smoke", tmp_path, [*SMALLER, "train.epochs=2"])
    assert unfinished(longer, unswept) == (unswept, [0, 1])


def test_a_run_that_fails_stops_no_other_and_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table2_bt_nr0-seed0").write_text("in the way")
    assert cli.main(["paper", "table2", "only=table2_bt_nr0", f"out={tmp_path}", *SMALLER]) == 1
    assert (tmp_path / "table2_bt_nr0-seed1" / "summary.json").is_file()
    assert "1 of table2" in capsys.readouterr().err


def test_a_defect_in_one_run_and_an_evaluation_that_fails_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class BadNetworkError(Exception):
        pass

    def broken(*_: object, **__: object) -> None:
        raise BadNetworkError("of this test")

    monkeypatch.setattr("btrain.build.models.build", broken)
    command = ["paper", "table2", "only=table2_bt_nr2", f"out={tmp_path}", *SMALLER]
    assert cli.main(command) == 1
    told = capsys.readouterr().err
    assert "BadNetworkError: of this test" in told
    assert "2 of table2" in told
    monkeypatch.undo()
    monkeypatch.setattr("btrain.evaluation.run.evaluate_checkpoint", broken)
    assert cli.main(command) == 1
    assert "2 of table2" in capsys.readouterr().err
    assert (tmp_path / "report" / "table2.md").is_file()


def test_a_report_that_cannot_be_written_is_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report").write_text("in the way")
    assert cli.main(["paper", "table2", "only=table2_bt_nr0", f"out={tmp_path}", *SMALLER]) == 1
    assert (tmp_path / "table2_bt_nr0-seed1" / "summary.json").is_file()
    assert "no report of table2" in capsys.readouterr().err


def test_a_table_of_cost_has_the_time_and_memory_of_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "_SECONDS", 0.1)
    row = "fastest_mnist"  # its own baseline: it takes its own time
    assert cli.main(["paper", "cheapest_mnist", f"only={row}", f"out={tmp_path}", *SMALLER]) == 0
    for seed in (0, 1):
        found = read_step(tmp_path / f"{row}-seed{seed}")
        assert found is not None and found.times_baseline == pytest.approx(1, rel=0.5)


def test_official_corruptions_of_other_data_are_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = "only=table1_cifar10_augmix_bt"
    root = f"corruptions_root={tmp_path}"
    assert cli.main(["paper", "table1", only, f"out={tmp_path / 'o'}", root, *SMALLER]) == 1
    told = capsys.readouterr().err
    assert "corruptions_root= holds no images of dataset=digits" in told
    assert "2 of table1" in told


def test_corrupted_images_are_made_for_table_1(tmp_path: Path) -> None:
    row = "table1_cifar10_augmix_bt"
    assert cli.main(["paper", "table1", f"only={row}", f"out={tmp_path}", *SMALLER]) == 0
    assert (tmp_path / "corrupted" / "digits" / "REGENERATED.json").is_file()
    assert (tmp_path / f"{row}-seed1" / "eval" / "corruptions.json").is_file()


@pytest.fixture(scope="module")
def figure5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs and the picture of figure 5."""
    out = tmp_path_factory.mktemp("figure5") / "out"
    assert cli.main(["paper", "figure5", f"out={out}", *SMALLER]) == 0
    return out


def test_figure_5_tells_of_each_example_of_a_batch(figure5: Path) -> None:
    content = json.loads((figure5 / "figure3-seed0" / "allocation.json").read_text())
    outcomes, steps = content["outcome"], content["steps"]
    assert len(outcomes) == len(steps) == len(content["svar"]) == 20
    assert set(outcomes) <= {"boundary", "robust", "outlier"}
    # What is misclassified is an outlier, truly and by prediction, and gets no step.
    assert [o == "outlier" for o in outcomes] == [svar < 0 for svar in content["svar"]]
    assert all(s == 0 for s, o in zip(steps, outcomes, strict=True) if o == "outlier")


def test_a_log_that_is_damaged_costs_figure_5_one_run(
    figure5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(figure5, tmp_path, dirs_exist_ok=True)
    made = tmp_path / "figure3-seed1" / "allocation.json"
    made.unlink()
    (tmp_path / "figure3-seed0" / "metrics.jsonl").write_text('{"epoch": 1}\n')
    capsys.readouterr()
    assert cli.main(["paper", "figure5", f"out={tmp_path}", *SMALLER]) == 1
    told = capsys.readouterr().err
    assert "metrics.jsonl cannot be read" in told and "1 of figure5" in told
    assert made.is_file()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["table9"], ["table9", "table1"]),
        (["table2", "profile=huge"], ["huge", "smoke"]),
        (["profile=smoke"], ["target"]),
        (["table2", "only=table3_mart"], ["only=table3_mart", "table2_trades"]),
        (["table2", "seed=5"], ["seed", "table2"]),
        (["figure6", "bt.gamma=0.5"], ["bt.gamma", "figure6"]),
        (["table2", "--watch"], ["--watch"]),
        (["table2", "only="], ["only"]),
        (["table2", "plan=maybe"], ["plan", "maybe"]),
        (["table2", "table3.only=table3_mart"], ["table3.only", "table3"]),
        (["table2", "table2.trian.epochs=1"], ["trian", "train"]),
        (["table2", "trian.epochs=1"], ["trian", "train"]),
        (["table2", "table9.dataset.root=x"], ["no target table9"]),
        (["table1", "corruptions_root=nowhere"], ["corruptions_root=nowhere is no folder"]),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["paper", *arguments, f"out={tmp_path / 'out'}"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("btrain:")]
    assert all(name in line for name in named)


def test_a_missing_library_is_told_ahead_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)
    out = tmp_path / "out"
    assert cli.main(["paper", "table2", f"out={out}"]) == 1
    assert "AutoAttack is not installed" in capsys.readouterr().err
    assert not out.exists()
    assert cli.main(["paper", "table2", f"out={out}", "plan=true"]) == 0


def test_the_users_own_settings_are_told(tmp_path: Path) -> None:
    told = [
        "dataset.root=x",
        "device=cpu",
        "train.epochs=1",
        "model.width=4",
        "hydra/launcher=joblib",
    ]
    plan = make_plan(job("table2", "smoke", tmp_path, [*told, "bt.gamma=0.7", "model.mean=[0.5]"]))
    assert plan.chosen == ["bt.gamma=0.7", "model.mean=[0.5]"]
    assert make_sheet(plan, tmp_path).notes == plan.chosen
