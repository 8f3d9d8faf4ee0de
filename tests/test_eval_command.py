"""`btrain eval` on real runs: files, conditions, chains, interruption."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from btrain.cli import main
from btrain.data import Data
from btrain.evaluation import run as runs
from btrain.runs.folder import settings_sha256
from composing import compose
from eval_nets import shorten

Capture = pytest.CaptureFixture[str]

FEW = ["dataset.test_examples=30", "sanity=false"]
KEYS = {
    "attack", "accuracy", "ci95", "n", "per_class", "epsilon", "epsilon_trained", "steps",
    "restarts", "step_size", "loss", "seed", "versions", "seconds", "device", "precision",
    "checkpoint", "checkpoint_sha256", "dataset", "test_examples", "note", "started_from",
    "clean_accuracy",
}  # fmt: skip


def content(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def arrays(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


# Runs


def test_a_run_folder_is_enough(runs_here: Path, capsys: Capture, digits: Data) -> None:
    assert main(["eval", "checkpoint=A"]) == 0
    out, err = capsys.readouterr()
    folder = runs_here / "A" / "eval"
    assert {path.name for path in folder.iterdir()} == {
        "clean.json", "clean.npz", "pgd20.json", "pgd20.npz", "sanity.json",
    }  # fmt: skip
    found = content(folder / "pgd20.json")
    assert set(found) >= KEYS
    summary, config = content(runs_here / "A" / "summary.json"), runs_here / "A" / "config.yaml"
    assert f"step_size: {found['step_size']}" in config.read_text()
    assert (found["epsilon"], found["n"], found["steps"], found["restarts"]) == (0.15, 355, 20, 1)
    assert (found["checkpoint"], found["note"], found["test_examples"]) == (
        "checkpoints/last.pt", None, None,
    )  # fmt: skip
    # The training's own evaluation, less the clean mistakes that the attack mends.
    assert content(folder / "clean.json")["accuracy"] == pytest.approx(summary["clean_acc"])
    assert summary["robust_acc"] - 1 <= found["accuracy"] <= summary["robust_acc"] + 1e-9
    assert found["ci95"][0] < found["accuracy"] < found["ci95"][1]
    each = arrays(folder / "pgd20.npz")
    assert 100 * each["correct"].mean() == pytest.approx(found["accuracy"])
    assert each["labels"].tolist() == digits.test.labels.tolist()
    assert not (each["correct"] & ~arrays(folder / "clean.npz")["correct"]).any()
    sanity = content(folder / "sanity.json")
    for key in ("checkpoint_sha256", "data_sha256", "epsilon", "seed", "dataset", "versions"):
        assert sanity[key] == found[key]
    assert len(sanity["checks"]) == 6
    for number, check in enumerate(sanity["checks"], start=1):
        assert check["verdict"] in ("passed", "suspicious", "skipped")
        assert f"{check['name']}" in out
        told = f"sanity check {number} of 6: {check['name']}: {check['verdict']}"
        assert told in err.splitlines()
    assert "pgd20" in out
    assert f"{found['accuracy']:.2f}" in out


def test_attacks_of_ones_own_and_their_names(runs_here: Path) -> None:
    assert main([
        "eval", "checkpoint=A", *FEW, "attack=pgd20,custom", "attack.steps=3", "attack.loss=cw",
        "attack.step_size=1/20",
    ]) == 0  # fmt: skip
    folder = runs_here / "A" / "eval" / "dataset.test_examples_30"
    names = {path.stem for path in folder.glob("*.json")}
    assert names == {"clean", "pgd3x1-cw-step0.05", "pgd3x1-cw-step0.05-last"}
    found = content(folder / "pgd3x1-cw-step0.05.json")
    assert (found["steps"], found["loss"], found["step_size"]) == (3, "cw", 0.05)
    assert found["counts"] == "any iterate"
    assert (found["n"], found["test_examples"]) == (30, 30)
    assert "not the whole test set" in found["note"]


def test_other_conditions_get_a_folder_of_their_own(
    runs_here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btrain.precision.bf16_slowdown", lambda: 15.2)
    few = ["eval", "checkpoint=A", "sanity=false", "attack=custom", "attack.steps=2"]
    assert main(few) == 0
    before = (runs_here / "A" / "eval" / "pgd2x1-ce.json").read_bytes()
    assert main([*few, "epsilon=8/255", "seed=4", "precision=bf16"]) == 0
    folder = runs_here / "A" / "eval" / "epsilon_0.03137254901960784-seed_4-precision_bf16"
    found = content(folder / "pgd2x1-ce.json")
    assert found["epsilon"] == pytest.approx(8 / 255)
    assert found["step_size"] == pytest.approx(0.8 / 255)  # a tenth, as trained
    assert "not the trained 0.15" in found["note"]
    assert "bf16" in found["note"]
    told = capsys.readouterr().out
    assert "not the trained 0.15" in told
    assert "precision=bf16: a convolution takes 15 times as long as in float32" in told
    assert (runs_here / "A" / "eval" / "pgd2x1-ce.json").read_bytes() == before
    assert main([*few, "epsilon=0.15", "out=elsewhere"]) == 0
    assert (runs_here / "elsewhere" / "pgd2x1-ce.json").is_file()
    capsys.readouterr()
    assert main([*few, "epsilon=0.1", "out=elsewhere"]) == 1
    assert "elsewhere holds results of another ε (pgd2x1-ce.json)" in capsys.readouterr().err


def test_a_run_is_attacked_in_l2(runs_here: Path, capsys: Capture) -> None:
    command = ["eval", "checkpoint=A", "norm=l2", "epsilon=128/255", "attack=pgd20,custom"]
    command += ["attack.steps=3", "attack.restarts=2", "sanity=false"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "Attacked in l2, not in linf as trained." in told
    assert " l2 0.502 " in told
    folder = runs_here / "A" / "eval" / "norm_l2-epsilon_0.5019607843137255"
    found = content(folder / "pgd3x2-ce.json")
    assert (found["norm"], found["epsilon"]) == ("l2", 128 / 255)
    assert found["step_size"] == pytest.approx(12.8 / 255)  # a tenth, as the run's own
    clean, attacked = (content(folder / f"{name}.json") for name in ("clean", "pgd3x2-ce"))
    assert 0 < attacked["accuracy"] < clean["accuracy"]
    assert "norm" not in clean
    assert main([*command, "epsilon=0.1", "attack=clean"]) == 1
    assert main(["eval", "checkpoint=A", "sanity=false", "epsilon=128/255", f"out={folder}"]) == 1
    assert "holds results of another norm" in capsys.readouterr().err


_FEW_STEPS = [
    "train", "dataset=digits", "model=small_cnn", "model.width=4", "train.epochs=2", "bt=uniform",
    "recipe.lr=0.1", "attack.steps=2", "dataset.train_examples=200", "dataset.test_examples=40",
    "device=cpu",
]  # fmt: skip

_OWN_BALL = """
from btrain.attacks.balls import L2Ball, LinfBall
class Cube(LinfBall):
    norm = "own"
class Round(L2Ball):
    norm = "own"
"""


def test_a_run_trained_in_l2_is_evaluated_in_l2(tmp_path: Path, capsys: Capture) -> None:
    assert main([*_FEW_STEPS, "attack=l2_pgd", f"run.dir={tmp_path / 'A'}"]) == 0
    summary = content(tmp_path / "A" / "summary.json")
    assert main(["eval", f"checkpoint={tmp_path / 'A'}", "sanity=false"]) == 0
    found = content(tmp_path / "A" / "eval" / "pgd20.json")
    assert (found["norm"], found["epsilon"], found["note"]) == (
        "l2", 0.75, "40 test images, class-balanced, not the whole test set.",
    )  # fmt: skip
    # The training's own evaluation, less the clean mistakes that the attack mends.
    mistakes = 100 - summary["clean_acc"]
    assert summary["robust_acc"] - mistakes <= found["accuracy"] <= summary["robust_acc"] + 1e-9
    assert main(["eval", f"checkpoint={tmp_path / 'A'}", "norm=linf"]) == 1
    assert "norm=linf needs a radius; please give epsilon=" in capsys.readouterr().err


def test_a_run_in_a_ball_of_ones_own(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ball.py").write_text(_OWN_BALL)
    own = ["attack=own", "attack.factory=ball.py:Round", "attack.epsilon=0.5"]
    assert main([*_FEW_STEPS, *own, "attack.step_size=0.1", "run.dir=A"]) == 0
    (tmp_path / "again.py").write_text(_OWN_BALL)  # which nobody has named in this process
    config = tmp_path / "A" / "config.yaml"
    for file in (config, tmp_path / "A" / "checkpoints" / "last.pt"):
        assert b"ball.py:Round" in file.read_bytes()
    command = ["eval", "checkpoint=A", "attack=custom", "attack.steps=3"]
    assert main(command) == 1
    refused = capsys.readouterr().err
    assert "last.pt needs code, attack.factory=ball.py:Round, and nothing is imported" in refused
    assert not (tmp_path / "A" / "eval").exists()
    assert main([*command, "attack.factory=again.py:Round"]) == 0
    told = capsys.readouterr().out
    found = content(tmp_path / "A" / "eval" / "pgd3x1-ce.json")
    assert (found["norm"], found["epsilon"]) == ("own", 0.5)
    skipped = "AutoAttack and Square know the norms linf, l2, not own."
    assert f"skipped     a black-box attack is no stronger than PGD  {skipped}" in told
    assert main([*command[:2], "attack=autoattack", "trust_code=true"]) == 1
    assert skipped in capsys.readouterr().err
    # As a ball of btrain's, with its own evaluation beside.
    assert main([*command, "norm=l2", "epsilon=0.5", "sanity=false"]) == 0
    beside = content(tmp_path / "A" / "eval" / "norm_l2" / "pgd3x1-ce.json")
    assert (beside["accuracy"], beside["norm"]) == (found["accuracy"], "l2")


def test_files_that_do_not_tell_their_norm_are_of_linf(runs_here: Path, capsys: Capture) -> None:
    command = ["eval", "checkpoint=A", *FEW]
    path = runs_here / "A" / "eval" / "dataset.test_examples_30" / "pgd20.json"
    assert main(command) == 0
    found = content(path)
    assert found.pop("norm") == "linf"
    path.write_text(json.dumps(found))
    assert main([*command, "out=new"]) == 0
    assert content(runs_here / "new" / "pgd20.json")["norm"] == "linf"
    assert main(["eval", "compare", "new", str(path.parent)]) == 0
    assert main(command) == 0
    assert "pgd20 is there already" in capsys.readouterr().out
    assert content(path) == found


def test_all_is_a_chain(runs_here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)
    monkeypatch.setattr(runs, "CHAIN", ("pgd20", "pgd100x10", "autoattack"))
    few = ["dataset.test_examples=12", "sanity=false"]
    assert main(["eval", "checkpoint=A", "attack=all", *few]) == 0
    out, err = capsys.readouterr()
    assert "Corruptions are left out; dataset.corruptions_root=" in out
    folder = runs_here / "A" / "eval" / "dataset.test_examples_12"
    names = ["clean", "pgd20", "pgd100x10", "autoattack"]
    each = [arrays(folder / f"{name}.npz")["correct"] for name in names]
    for weaker, stronger in itertools.pairwise(each):
        assert not (stronger & ~weaker).any()
    found = [content(folder / f"{name}.json") for name in names]
    left = ["pgd100x10, autoattack", "autoattack"]  # nothing is told behind the last
    told = [line for line in err.splitlines() if "left:" in line]
    assert told == [
        f"{one['attack']}: {one['accuracy']:.2f} %; left: {others}"
        for one, others in zip(found[1:3], left, strict=True)
    ]
    rounds = f"AutoAttack, square: {each[3].sum()} of 12 images are still classified right"
    assert rounds in err.splitlines()
    assert [one.get("started_from") for one in found] == [None, None, "pgd20", "pgd100x10"]
    assert found[2]["started_with"] == each[1].sum()
    assert found[3]["attacks"] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert "pyautoattack" in found[3]["versions"]


def test_what_is_there_is_not_repeated_but_something_else_is(
    runs_here: Path, capsys: Capture
) -> None:
    command = ["eval", "checkpoint=A", *FEW]
    path = runs_here / "A" / "eval" / "dataset.test_examples_30" / "pgd20.json"
    assert main(command) == 0
    before = path.stat().st_mtime_ns
    assert main(command) == 0
    assert path.stat().st_mtime_ns == before
    assert "pgd20 is there already" in capsys.readouterr().out
    for file in ("checkpoints/last.pt", "config.yaml"):
        shutil.copy(runs_here / "B" / file, runs_here / "A" / file)
    assert main(command) == 1  # other weights: no page shall mix the two
    assert "holds results of other weights" in capsys.readouterr().err
    assert path.stat().st_mtime_ns == before
    path.unlink()
    (path.parent / "clean.json").unlink()
    assert main(command) == 0
    assert path.is_file()


def test_an_unfinished_run_says_so_and_its_results_make_room_when_it_has_gone_on(
    tmp_path: Path, capsys: Capture
) -> None:
    train = [*_FEW_STEPS, f"run.dir={tmp_path / 'run'}", "eval.steps=1", "bt.probe_every=0"]
    command = ["eval", f"checkpoint={tmp_path / 'run'}", "attack=clean", "report=true"]
    command.append("dataset.test_examples=40")  # an override that makes nothing foreign
    folder = tmp_path / "run" / "eval"
    assert main([*train, "train.max_seconds=1e-9"]) == 0
    assert main([*command, "sanity=false"]) == 0
    unfinished = "The run was cut: these are its weights before epoch 1 of 2."
    told = capsys.readouterr().out
    assert unfinished in told and "guessing" not in told
    page = (folder / "index.html").read_bytes()
    assert unfinished in page.decode()
    assert main(train) == 0
    capsys.readouterr()
    assert main([*command, "sanity=false"]) == 0
    told = capsys.readouterr().out
    (aside,) = (folder / "earlier").iterdir()
    assert f"The run went on since it was evaluated; the results of before are in {aside}." in told
    assert "was cut" not in told and "was cut" not in (folder / "index.html").read_text()
    assert aside.name.startswith("epoch_0-")
    assert {path.name for path in aside.iterdir()} == {
        "clean.json", "clean.npz", "samples.npz", "index.html",
    }  # fmt: skip
    assert (aside / "index.html").read_bytes() == page
    assert content(folder / "clean.json")["epoch"] == 2
    assert main([*command, "sanity=false"]) == 0
    assert len([*(folder / "earlier").iterdir()]) == 1
    # A folder that somebody named is nobody's to clear.
    elsewhere = tmp_path / "named"
    shutil.copytree(aside, elsewhere)
    (elsewhere / "mine.json").write_text("{}")
    assert main([*command, "sanity=false", f"out={elsewhere}"]) == 1
    assert "holds results of other weights (clean.json)" in capsys.readouterr().err
    assert len([*elsewhere.iterdir()]) == 5


def test_a_setting_that_came_later_leaves_the_hash_of_older_runs() -> None:
    """With another hash a run's own earlier results would count as another run's."""
    words = ["dataset=digits", "model=small_cnn"]
    fast = [*words, "defense=pgd", "rival=fast"]
    before = "917f862984afb0ceff28f033a59a31e576e8c34f9094b24ad074244efd5fd41a"
    assert settings_sha256(compose(words)) == before  # by the version without recipe.repair_steps
    repaired = compose([*fast, "recipe.repair_steps=1"])
    assert settings_sha256(repaired) != settings_sha256(compose(fast))


def test_an_interrupted_command_goes_on(
    runs_here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from btrain.evaluation import pgd

    command = ["eval", "checkpoint=A", "attack=custom", "attack.restarts=4", "sanity=false"]
    command += ["eval.batch_size=50"]
    assert main([*command, "out=whole"]) == 0
    attack, calls = pgd._fooled_on_the_way, 0

    def interrupted(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return attack(*arguments)

    monkeypatch.setattr(pgd, "_fooled_on_the_way", interrupted)
    assert main(command) == 130
    assert "goes on" in capsys.readouterr().err
    folder = runs_here / "A" / "eval"
    assert {path.name for path in folder.iterdir()} == {"pgd20x4-ce.partial.npz"}
    assert main(command) == 0
    whole = arrays(runs_here / "whole" / "pgd20x4-ce.npz")["correct"]
    assert arrays(folder / "pgd20x4-ce.npz")["correct"].tolist() == whole.tolist()
    assert not list(folder.glob("*.partial.npz"))
    assert not list((runs_here / "A").rglob("*.tmp"))


def test_samples_for_the_page(runs_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def write_page(folder: Path) -> Path:
        seen.append(folder)
        return folder / "index.html"

    monkeypatch.setattr("btrain.report.evaluation.write_page", write_page)
    assert main(["eval", "checkpoint=A", *FEW, "report=true"]) == 0
    assert [path.name for path in seen] == ["dataset.test_examples_30"]
    samples = arrays(runs_here / seen[0] / "samples.npz")
    clean, adversarial = samples["clean"], samples["adversarial"]
    assert clean.shape == adversarial.shape == (12, 1, 8, 8)
    assert clean.dtype == adversarial.dtype == np.float32
    assert 0.1 < np.abs(adversarial - clean).max() <= 0.15 + 1e-6
    assert 0 <= adversarial.min() <= adversarial.max() <= 1
    wrong = samples["adversarial_prediction"] != samples["labels"]
    assert wrong.sum() >= (samples["clean_prediction"] != samples["labels"]).sum()
    assert samples["class_names"].tolist() == [str(k) for k in range(10)]


def test_another_projects_file(runs_here: Path) -> None:
    weights = torch.load(runs_here / "A" / "checkpoints" / "last.pt", weights_only=True)
    torch.save({"state_dict": weights["state"]["model"]}, runs_here / "theirs.pt")
    assert main([
        "eval", "checkpoint=theirs.pt", "dataset=digits", "model=small_cnn", "model.width=4",
        "sanity=false",
    ]) == 0  # fmt: skip
    found = content(runs_here / "eval" / "theirs" / "pgd20.json")
    assert main(["eval", "checkpoint=A", "sanity=false"]) == 0
    ours = content(runs_here / "A" / "eval" / "pgd20.json")
    assert (found["accuracy"], found["epsilon"]) == (ours["accuracy"], ours["epsilon"])
    assert found["epsilon_trained"] is None
    assert found["checkpoint"] == "theirs.pt"
    assert "guessing" not in (found["note"] or "")


def test_another_order_of_the_classes_is_suspected(runs_here: Path, capsys: Capture) -> None:
    weights = torch.load(runs_here / "A" / "checkpoints" / "last.pt", weights_only=True)
    theirs = weights["state"]["model"]
    theirs |= {key: theirs[key].roll(1, 0) for key in ("fc2.weight", "fc2.bias")}
    torch.save(theirs, runs_here / "theirs.pt")
    assert main([
        "eval", "checkpoint=theirs.pt", "dataset=digits", "model=small_cnn", "model.width=4",
        "attack=clean", "sanity=false",
    ]) == 0  # fmt: skip
    found = content(runs_here / "eval" / "theirs" / "clean.json")
    assert found["accuracy"] < 15
    assert "another order of the classes?" in found["note"]
    assert found["note"] in capsys.readouterr().out


def test_two_runs_are_compared(runs_here: Path, capsys: Capture) -> None:
    for name in "AB":
        assert main(["eval", f"checkpoint={name}", "sanity=false", "seed=0"]) == 0
    capsys.readouterr()
    other = runs_here / "B" / "eval" / "seed_0"
    assert main(["eval", "compare", "A", str(other)]) == 0
    out = capsys.readouterr().out
    a = arrays(runs_here / "A" / "eval" / "pgd20.npz")["correct"]
    b = arrays(other / "pgd20.npz")["correct"]
    assert f"difference {100 * (b.mean() - a.mean()):+.2f} points" in out
    assert "McNemar" in out
    assert main(["eval", "compare", "A", "B"]) == 1
    said = capsys.readouterr().err
    assert "B holds no finished evaluation pgd20" in said
    assert f"please name one of other conditions: {Path('B', 'eval', 'seed_0')}." in said
    assert main(["eval", "compare", "A", "B", "attack=clean"]) == 1
    assert main(["eval", "compare", "A", "B", "attack=autoattack"]) == 1
    assert "run btrain eval checkpoint=A attack=autoattack" in capsys.readouterr().err
    assert main(["eval", "compare", str(other), "A", "attack=autoattack"]) == 1
    assert f"checkpoint={other}" not in capsys.readouterr().err  # which is no run
    assert main(["eval", "compare", "A", "B", "attack=**"]) == 1  # a name, no pattern
    assert "A holds no finished evaluation **" in capsys.readouterr().err
