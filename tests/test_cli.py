"""The command line: help, mistakes, real runs on digits, sweeps and the report."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from btrain import __version__
from btrain.cli import main
from btrain.errors import UserError
from btrain.runs.folder import RunFolder
from btrain.settings.compose import compose, to_yaml

Capture = pytest.CaptureFixture[str]

SMALL = [
    "dataset=digits",
    "model=small_cnn",
    "train.epochs=1",
    "dataset.train_examples=200",
    "dataset.test_examples=100",
    "eval.steps=2",
    "device=cpu",
]
METRICS = {
    "epoch", "loss", "lr", "f_b", "f_r", "f_o", "robust_fraction", "attack_steps_mean",
    "theoretical_speedup", "train_seconds", "clean_acc_train", "robust_acc_train",
    "boundary_precision", "boundary_recall", "robust_precision", "robust_recall",
    "score_boundary", "score_robust", "score_outlier", "pgd_acc_train_batch", "units_per_example",
    "flops", "warnings", "speedup_flops", "speedup_official", "speedup_measured",
}  # fmt: skip
SUMMARY = {
    "clean_acc", "robust_acc", "f_b", "f_r", "f_o", "theoretical_speedup", "train_seconds",
    "attack_steps_mean", "units_per_example", "flops", "epochs", "seed", "device", "torch_version",
    "git_commit", "git_dirty", "data_sha256", "parameters", "speedup_flops", "speedup_official",
    "speedup_measured",
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, without the variable that makes Hydra show tracebacks.

    Hydra points the root logger at the standard output of the moment, which is gone afterwards.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield tmp_path
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that a shell would have started."""
    folder = tmp_path_factory.mktemp("finished")
    result = in_a_shell(folder, "train", *SMALL, "run.dir=run")
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.fixture
def run(finished: Path, here: Path) -> Path:
    """A copy of the finished run as `run` in the working directory."""
    return Path(shutil.copytree(finished, here / "run"))


def in_a_shell(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    return subprocess.run(
        [sys.executable, "-m", "btrain", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def contents(folder: Path) -> dict[str, tuple[bytes, int] | None]:
    """Every file below a folder with its bytes and its time; None for a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


# Answers without a run


def test_help_shows_the_commands(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert all(f"\n  {command} " in out for command in ("train", "report"))
    assert err == ""


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"btrain {__version__}\n"


def test_no_command_is_a_mistake(capsys: Capture) -> None:
    assert main([]) == 2
    assert "usage: btrain" in capsys.readouterr().out


def test_an_unknown_command_is_named(capsys: Capture) -> None:
    hints = {"trian": "Did you mean train?", "qqqqq": "btrain --help lists them."}
    for word, hint in hints.items():
        assert main([word]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.splitlines() == [f"btrain: there is no command {word}. {hint}"]


TORCH_FREE = """
import atexit, sys
from btrain.cli import main
atexit.register(lambda: print("torch" in sys.modules, file=sys.stderr))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (
            ["train", "--help"],
            0,
            [
                "bt=bullettrain\n  or early_exit, gaussian, oracle, own, random, uniform",
                "--multirun",
                "bt.gamma=0.8",
            ],
        ),
        (["train", "bt.gama=0.5"], 1, ["There is no setting bt.gama"]),
        (["train", "bt.gamma=2"], 1, ["bt.gamma must be in (0, 1], not 2.0."]),
    ],
)
def test_help_and_mistakes_answer_before_torch_is_imported(
    tmp_path: Path, arguments: list[str], status: int, words: list[str]
) -> None:
    check_torch_free(tmp_path, arguments, status, words)


def test_a_report_of_runs_imports_no_torch(run: Path) -> None:
    check_torch_free(run.parent, ["report", "run"], 0, ["| run ", "(at chance)"])


def check_torch_free(folder: Path, arguments: list[str], status: int, words: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", TORCH_FREE, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == status
    *_, imported = result.stderr.splitlines()
    assert imported == "False"
    assert all(word in result.stdout + result.stderr for word in words)


@pytest.mark.parametrize("name", ["a=b", "jürgen (neu)", "it's", "comma,brace{}", "back\\slash"])
def test_a_path_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SMALL, f"run.dir=runs/{name}"]) == 0
    assert (tmp_path / "runs" / name / "summary.json").is_file()


# Mistakes


def nothing(folder: Path) -> None:
    """No preparation."""


def a_file(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def a_folder_of_files(folder: Path) -> None:
    (folder / "thesis").mkdir()
    (folder / "thesis" / "notes.txt").write_text("mine")


def an_empty_image_folder(folder: Path) -> None:
    (folder / "photos").mkdir()


@pytest.mark.parametrize(
    ("overrides", "words", "prepare"),
    [
        (["bt.gama=0.5"], ["bt.gama", "Did you mean bt.gamma?"], nothing),
        (["+bt.gama=0.5"], ["bt.gama", "Did you mean bt.gamma?"], nothing),
        (["defnse=trades"], ["defnse", "Did you mean defense?"], nothing),
        (["attack.steps=ten"], ["attack.steps", "ten"], nothing),
        (["bt=fast"], ["bt=fast", "bullettrain", "uniform"], nothing),
        (["model=resnet"], ["model=resnet", "wrn_34_10", "small_cnn"], nothing),
        (["bt.gamma=1.5"], ["bt.gamma", "(0, 1]", "1.5"], nothing),
        (["attack.steps=-1"], ["attack.steps", "-1"], nothing),
        (["bt.n_o=3"], ["bt.n_o", "bt.n_r", "3"], nothing),
        (["attack.epsilon=0"], ["attack.epsilon", "greater than 0"], nothing),
        (["bt.gamma=0,1"], ["bt.gamma", "--multirun"], nothing),
        (["bt.gamma"], ["bt.gamma", "key=value"], nothing),
        (["bt.gamma="], ["bt.gamma"], nothing),
        (
            ["dataset=mnist", "dataset.download=false"],
            ["data/MNIST/raw/train-images-idx3-ubyte", "dataset.root", "dataset.download"],
            nothing,
        ),
        (["dataset=imagefolder"], ["dataset.root"], nothing),
        (["dataset=imagefolder", "dataset.root=photos"], ["photos/train"], an_empty_image_folder),
        ([*SMALL, "device=cuda:99"], ["device=cuda:99", "auto", "cpu"], nothing),
        ([*SMALL, "device=abacus"], ["device=abacus", "auto", "cpu"], nothing),
        ([*SMALL, "device=meta"], ["device=meta", "auto", "cpu"], nothing),
        ([*SMALL, "dataset.train_examples=2000"], ["dataset.train_examples", "2000"], nothing),
        ([*SMALL, "model=wrn_40_2", "model.depth=35"], ["model.depth", "35"], nothing),
        ([*SMALL, "model.mean=[0,0]", "model.std=[1,1]"], ["model.mean", "channel"], nothing),
        ([*SMALL, "run.dir=notes.txt"], ["run.dir=notes.txt", "file"], a_file),
        ([*SMALL, "run.dir=notes.txt/run"], ["run.dir=notes.txt/run"], a_file),
        ([*SMALL, "run.dir=thesis"], ["run.dir=thesis", "other files"], a_folder_of_files),
    ],
    ids=lambda value: (
        " ".join(v for v in value if v not in SMALL) if isinstance(value, list) else ""
    ),
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    here: Path,
    capsys: Capture,
    overrides: list[str],
    words: list[str],
    prepare: Callable[[Path], None],
) -> None:
    prepare(here)
    before = contents(here)
    assert main(["train", *overrides]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("btrain: ")
    assert len(err.splitlines()) == 1
    assert all(word in err for word in words), err
    assert contents(here) == before


def test_a_mistake_in_a_shell(tmp_path: Path) -> None:
    result = in_a_shell(tmp_path, "train", "bt.gama=0.5")
    assert result.returncode == 1
    assert result.stderr == "btrain: There is no setting bt.gama. Did you mean bt.gamma?\n"
    assert result.stdout == ""
    assert contents(tmp_path) == {}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("override", ["bt.gama=0.5", "bt.gamma=2"])
def test_a_mistake_does_not_change_what_a_second_call_says(capsys: Capture, override: str) -> None:
    environment, arguments = dict(os.environ), sys.argv[:]
    answers = [(main(["train", override]), capsys.readouterr()) for _ in range(2)]
    assert answers[0] == answers[1]
    assert dict(os.environ) == environment
    assert sys.argv == arguments


@pytest.mark.usefixtures("here")
def test_hydras_variable_shows_where_a_mistake_was_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra.errors import ConfigCompositionException

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigCompositionException):
        main(["train", "bt.gama=0.5"])


# Runs


def test_a_run_leaves_its_files_with_the_documented_keys(finished: Path) -> None:
    assert set(contents(finished)) == {
        "config.yaml", "metrics.jsonl", "summary.json", "train.log", "checkpoints",
        "checkpoints/last.pt", "provenance.json",
    }  # fmt: skip
    assert {path.name for path in finished.parent.iterdir()} == {"run"}

    (session,) = json.loads((finished / "provenance.json").read_text())["sessions"]
    assert session["overrides"] == [*SMALL, "run.dir=run"]
    (epoch,) = map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())
    assert set(epoch) == METRICS
    assert epoch["epoch"] == 1
    assert epoch["f_b"] + epoch["f_r"] + epoch["f_o"] == pytest.approx(1)
    assert epoch["attack_steps_mean"] == pytest.approx(10 * epoch["f_b"] + 2 * epoch["f_r"])
    # Eq. 7: ten steps and the update, over what was spent and the update.
    assert epoch["theoretical_speedup"] == pytest.approx(11 / (epoch["attack_steps_mean"] + 1))
    # TRADES-10 costs 27 units, in its published structure 39.
    assert epoch["speedup_flops"] == pytest.approx(27 / epoch["units_per_example"])
    assert epoch["speedup_official"] == pytest.approx(39 / epoch["units_per_example"])
    assert epoch["train_seconds"] > 0

    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary) >= SUMMARY
    assert (summary["epochs"], summary["seed"], summary["device"]) == (1, 0, "cpu")
    of_one_epoch = ("f_b", "f_r", "f_o", "theoretical_speedup", "speedup_flops", "speedup_official")
    for key in of_one_epoch:
        assert summary[key] == pytest.approx(epoch[key])
    assert 0 <= summary["robust_acc"] <= summary["clean_acc"] <= 100
    # Convolutions 1→16 and 16→32 of 4×4, then 2·2·32 → 100 → 10, each with a bias.
    assert summary["parameters"] == 17 * 16 + 257 * 32 + 129 * 100 + 101 * 10

    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["dataset"]["train_examples"] == 200
    assert (config["train"]["epochs"], config["train"]["batch_size"]) == (1, 128)
    assert config["bt"]["n_b"] == 10

    log = (finished / "train.log").read_text()
    assert "200 training images" in log
    assert "epoch 1: " in log


def test_a_finished_run_is_not_repeated(run: Path, capsys: Capture) -> None:
    before = contents(run.parent)
    assert main(["train", *SMALL, "run.dir=run"]) == 0
    out, _ = capsys.readouterr()
    assert "finished already" in out
    summary = json.loads((run / "summary.json").read_text())
    assert f"clean {summary['clean_acc']:.2f}" in out
    right = f"{summary['clean_acc']:.1f} % of {summary['test_examples']} test images are classified"
    assert right in out and f"{summary['robust_acc']:.1f} % also under PGD-" in out
    assert out.splitlines()[-2:] == [
        "Next: btrain eval checkpoint=run attack=all report=true",
        "      btrain report run",
    ]
    assert contents(run.parent) == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=1", "run belongs to a run with seed=0"),
        ("bt.gamma=0.7", "run belongs to a run with bt.gamma=0.8"),
        ("train.epochs=2", "run belongs to a run with train.epochs=1 and cannot go on to 2: its"),
        ("dataset.test_examples=50", "run belongs to a run with dataset.test_examples=100"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_left_alone(
    run: Path, capsys: Capture, override: str, words: str
) -> None:
    before = contents(run.parent)
    assert main(["train", *SMALL, "run.dir=run", override]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith(f"btrain: {words}")
    assert contents(run.parent) == before


def test_a_setting_that_an_older_run_did_not_know_counts_as_its_default(
    run: Path, capsys: Capture
) -> None:
    config = run / "config.yaml"
    text = config.read_text()
    older = re.sub(r"^  (pool|compile|tags): .*\n", "", text, flags=re.MULTILINE)
    assert len(older.splitlines()) == len(text.splitlines()) - 3
    config.write_text(older)
    assert main(["train", *SMALL, "run.dir=run"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert main(["train", *SMALL, "run.dir=run", "train.compile=true"]) == 1
    assert "belongs to a run with train.compile=false, not true" in capsys.readouterr().err


def test_what_does_not_change_the_result_may_differ(run: Path, capsys: Capture) -> None:
    before = contents(run.parent)
    others = ["device=auto", "logger=wandb", "train.checkpoint_every=2", "train.max_seconds=9"]
    assert main(["train", *SMALL, "run.dir=run", *others]) == 0
    assert "finished already" in capsys.readouterr().out
    assert contents(run.parent) == before


def test_where_images_lie_and_who_fetched_them_may_differ(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(compose(["dataset=mnist"])))
    folder = RunFolder(tmp_path)
    folder.check_owner(compose(["dataset=mnist", "dataset.download=false", "dataset.root=else"]))
    with pytest.raises(
        UserError, match="belongs to a run with dataset=mnist, not cifar10; "
    ) as told:
        folder.check_owner(compose())
    assert "; attack.epsilon=0.3, not 0.031; " in str(told.value)
    assert re.search(
        r"; \d+ more settings differ; please name another run\.dir\.$", str(told.value)
    )
    with pytest.raises(UserError, match=r"run with bt\.n_r=2, not 1; seed=0, not 3; please name"):
        folder.check_owner(compose(["dataset=mnist", "bt.n_r=1", "seed=3"]))


def test_a_run_without_a_folder_is_named_after_its_settings(here: Path) -> None:
    assert main(["train", *SMALL, "bt.n_r=0", "seed=3"]) == 0
    (folder,) = (here / "runs").iterdir()
    assert folder.name == (
        "digits-small_cnn-trades-bullettrain-bt.n_r_0-dataset.test_examples_100-"
        "dataset.train_examples_200-eval.steps_2-train.epochs_1-seed3"
    )
    assert json.loads((folder / "summary.json").read_text())["seed"] == 3


# Sweeps


def run_folders(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in (folder / "runs").rglob("summary.json"))


def test_a_sweep_makes_one_folder_for_each_value(here: Path, capsys: Capture) -> None:
    assert main(["train", *SMALL, "--multirun", "bt.gamma=0.8,0.5"]) == 0
    folders = run_folders(here)
    *table, _, note, _, report, evaluate = capsys.readouterr().out.splitlines()[-8:]
    assert [line.split()[0] for line in table] == ["setting", "bt.gamma=0.8", "bt.gamma=0.5"]
    assert note.startswith("PGD: ") and report == "Next: btrain report runs"
    assert evaluate == f"      btrain eval checkpoint=runs/{folders[1]} attack=all report=true"
    assert len(folders) == 2
    for folder, gamma in zip(folders, (0.5, 0.8), strict=True):
        assert f"bt.gamma_{gamma}" in folder
        config = yaml.safe_load((here / "runs" / folder / "config.yaml").read_text())
        assert config["bt"]["gamma"] == gamma


@pytest.mark.parametrize("values", ["0.8,2", "2,0.8"])
def test_a_bad_job_of_a_sweep_leaves_the_good_one(here: Path, capsys: Capture, values: str) -> None:
    assert main(["train", "--multirun", *SMALL, f"bt.gamma={values}"]) == 1
    (folder,) = run_folders(here)
    assert "bt.gamma_0.8" in folder
    out, err = capsys.readouterr()
    assert "btrain: bt.gamma must be in (0, 1], not 2.0." in err
    assert "Traceback" not in err and "Error executing job" not in err
    assert "1 of 2 runs did not finish:\nbt.gamma=2: bt.gamma must be in (0, 1], not 2.0." in out
    assert "\nbt.gamma=0.8 " in out


# The report


def cells(table: str) -> list[dict[str, str]]:
    """The rows of a Markdown table by column."""
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    )
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_the_report_measures_against_the_first_run(run: Path, capsys: Capture) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for name, changes in {
        "plain": {"train_seconds": 30.0, "clean_acc": 84.92},
        "fast": {"train_seconds": 12.0, "clean_acc": 84.92},
        "elsewhere": {"train_seconds": 1.0, "device": "another", "clean_acc": 84.92},
        "failed": {"train_seconds": 12.0, "clean_acc": 18.9},
    }.items():
        shutil.copytree(run, run.parent / name)
        (run.parent / name / "summary.json").write_text(json.dumps(summary | changes))
    assert main(["report", "plain", "failed"]) == 0
    out = capsys.readouterr().out
    _, failed = cells(out)
    assert failed["run"] == "failed (at chance)" and failed["times faster than row 1"] == "–"
    assert failed["speedup (FLOPs)"] == "–" and "nothing can be read" in out
    assert main(["report", "plain", "fast", "elsewhere"]) == 0
    out = capsys.readouterr().out
    plain, fast, elsewhere = cells(out)
    assert [row["run"] for row in (plain, fast, elsewhere)] == ["plain", "fast", "elsewhere"]
    assert plain["times faster than row 1"] == "1.00×"
    assert fast["times faster than row 1"] == "2.50×"
    assert "×" not in elsewhere["times faster than row 1"]
    assert plain["clean %"] == "84.92"
    assert f"; speedup (FLOPs) {summary['speedup_flops']:.2f}×" in out  # of all of them


@pytest.mark.parametrize("runs", [["run", "run/"], ["--merge-seeds", "run", "same"]])
def test_the_report_takes_a_run_once(run: Path, capsys: Capture, runs: list[str]) -> None:
    (run.parent / "same").symlink_to(run)
    assert main(["report", *runs]) == 1
    assert capsys.readouterr().err == f"btrain: {runs[-1].rstrip('/')} is given twice.\n"


@pytest.mark.parametrize("name", ["unfinished", "nowhere"])
def test_the_report_names_a_folder_without_a_finished_run(
    run: Path, capsys: Capture, name: str
) -> None:
    (run.parent / "unfinished").mkdir()
    assert main(["report", "run", name]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"btrain: {name} holds no finished run")
    assert len(err.splitlines()) == 1
