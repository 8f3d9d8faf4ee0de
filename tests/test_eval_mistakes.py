"""What `btrain eval` says to bad input: one sentence, and nothing is written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from btrain.cli import main
from btrain.exchange.command import parse as parse_export
from btrain.settings.evaluation import parse

Capture = pytest.CaptureFixture[str]


def nothing(folder: Path) -> None:
    """No preparation."""


def truncated(folder: Path) -> None:
    file = folder / "A" / "checkpoints" / "last.pt"
    file.write_bytes(file.read_bytes()[:1000])


def malicious(folder: Path) -> None:
    import pickle

    class Bad:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (folder / "executed",))

    (folder / "bad.pt").write_bytes(pickle.dumps(Bad()))


def evaluated_elsewhere(folder: Path) -> None:
    content = torch.load(folder / "A" / "checkpoints" / "last.pt", weights_only=True)
    content["config"]["eval"]["epsilon"] = 0.3
    torch.save(content, folder / "A" / "checkpoints" / "last.pt")
    config = folder / "A" / "config.yaml"
    head, _, tail = config.read_text().rpartition("epsilon: 0.15")
    config.write_text(f"{head}epsilon: 0.3{tail}")


def edited(before: str, after: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = folder / "A" / "config.yaml"
        text = config.read_text()
        assert before in text
        config.write_text(text.replace(before, after, 1))

    return edit


def without_config(folder: Path) -> None:
    (folder / "A" / "config.yaml").unlink()


def empty(folder: Path) -> None:
    (folder / "empty").mkdir()


def a_file(folder: Path) -> None:
    (folder / "afile").touch()
    (folder / "A" / "eval").touch()


ERRORS: list[tuple[list[str], list[str], Callable[[Path], None]]] = [
    ([], ["checkpoint="], nothing),
    (["checkpoint=A", "attack=pgd21"], ["attack=pgd21", "Did you mean pgd20?"], nothing),
    (["checkpoint=A", "attack=[pgd20,apgd]"], ["attack=apgd", "autoattack"], nothing),
    (["checkpoint=A", "attack=all,pgd20"], ["attack=all"], nothing),
    (["checkpoint=A", "atack=pgd20"], ["atack", "Did you mean attack?"], nothing),
    (["checkpoint=A", "attack.step=3"], ["attack.step", "attack.steps"], nothing),
    (["checkpoint=A", "attack.steps=0"], ["attack.steps", "at least 1"], nothing),
    (["checkpoint=A", "attack.steps=ten"], ["attack.steps", "ten"], nothing),
    (["checkpoint=A", "attack.loss=mse"], ["attack.loss=mse", "ce, kl, cw, dlr"], nothing),
    (
        ["checkpoint=A", "attack=pgd100x10,pgd1000x5", "attack.steps=7", "attack.restarts=2"],
        ["pgd100x10 and pgd1000x5", "the same attack", "attack.steps=7 attack.restarts=2"],
        nothing,
    ),
    (
        ["checkpoint=A", "attack=pgd100x10,custom", "attack.steps=100", "attack.restarts=10"],
        ["pgd100x10 and custom", "the same attack"],
        nothing,
    ),
    (["checkpoint=A", "attack=autoattack", "attack.steps=3"], ["attack.steps"], nothing),
    (["checkpoint=A", "epsilon=8"], ["epsilon", "[0, 1]", "8/255"], nothing),
    (["checkpoint=A", "epsilon=0"], ["epsilon", "greater than 0"], nothing),
    (["checkpoint=A", "epsilon=nan"], ["epsilon", "greater than 0", "not nan"], nothing),
    (
        ["checkpoint=A", "epsilon=8/0"],
        ["epsilon must be a number, like 0.031 or 8/255, not 8/0."],
        nothing,
    ),
    (["checkpoint=A", "norm=l2"], ["norm=l2 needs a radius; please give epsilon="], nothing),
    (
        ["checkpoint=A", "norm=l2", "epsilon=128"],
        ["at most 8 (√(C·H·W), how far apart two images can be), not 128."],
        nothing,
    ),
    (["checkpoint=A", "norm=L1", "epsilon=1"], ["norm=L1 is no option", "linf, l2"], nothing),
    (
        ["checkpoint=A", "attack.step_size=3"],
        ["attack.step_size", "at most 2 (", "not 3.0."],
        nothing,
    ),
    (["checkpoint=A", "trust_code=1"], ["trust_code must be one of true, false, not 1."], nothing),
    (["checkpoint=A", "seed=(1"], ["seed=(1 is not of the form key=value."], nothing),
    (["checkpoint=A", "model.setting.width=3"], ["model.setting.width"], nothing),
    (["checkpoint=A", "attack=pgd20", "attack=all"], ["attack is given twice"], nothing),
    (["checkpoint=A", "precision=fp16"], ["precision=fp16", "bf16"], nothing),
    (["checkpoint=A", "report"], ["report", "key=value"], nothing),
    (["checkpoint=A", "report="], ["report needs a value"], nothing),
    (["checkpoint=A", "sanity=maybe"], ["sanity", "maybe"], nothing),
    (["checkpoint=A", "eval.batch_size=0"], ["eval.batch_size"], nothing),
    (["checkpoint=A", "device=abacus"], ["device=abacus"], nothing),
    (["checkpoint=A", "dataset=mnists"], ["dataset=mnists", "mnist"], nothing),
    (["checkpoint=A", "dataset.test_examples=400"], ["dataset.test_examples", "355"], nothing),
    (["checkpoint=A", "dataset.test_examples=few"], ["dataset.test_examples", "few"], nothing),
    (["checkpoint=A", "attack=corruptions"], ["dataset.corruptions_root"], nothing),
    (["checkpoint=nowhere"], ["checkpoint=nowhere", "does not exist"], nothing),
    (["checkpoint=empty"], ["empty", "last.pt"], empty),
    (["checkpoint=A"], ["last.pt", "not a readable checkpoint"], truncated),
    (["checkpoint=bad.pt"], ["bad.pt", "not a readable checkpoint", "model="], malicious),
    (["checkpoint=A"], ["0.15", "0.3", "epsilon="], evaluated_elsewhere),
    (
        ["checkpoint=A"],
        ["A/config.yaml says attack.epsilon=0.3", "last.pt", "0.15", "restore"],
        edited("  steps: 10\n  epsilon: 0.15", "  steps: 10\n  epsilon: 0.3"),
    ),
    (
        ["checkpoint=A/checkpoints/last.pt"],
        ["A/config.yaml says model.mean=[0.5]", "last.pt", "None"],
        edited("  mean: null\n  std: null", "  mean: [0.5]\n  std: [0.5]"),
    ),
    (
        ["checkpoint=A"],
        ["A/config.yaml says dataset.name=mnist", "digits"],
        edited("  name: digits", "  name: mnist"),
    ),
    (["checkpoint=A"], ["A/config.yaml", "not a readable"], edited("seed", ": [")),
    (["checkpoint=A"], ["no run folder", "config.yaml"], without_config),
    (["checkpoint=A", "dataset=mnist"], ["0.15", "dataset=mnist", "0.3", "epsilon="], nothing),
    (["checkpoint=A/config.yaml", "model=small_cnn"], ["config.yaml", "dataset="], nothing),
    (["checkpoint=A", "out=afile"], ["out=afile", "is a file"], a_file),
    (["checkpoint=A", "out=afile/eval"], ["out=afile/eval", "afile is a file"], a_file),
    (["checkpoint=A"], ["A/eval", "is a file"], a_file),
    (["compare", "A"], ["two folders"], nothing),
    (["compare", "A", "B"], ["A holds no finished evaluation"], nothing),
]


@pytest.mark.parametrize(
    ("arguments", "words", "prepare"), ERRORS, ids=[" ".join(case[0]) for case in ERRORS]
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    runs_here: Path,
    capsys: Capture,
    arguments: list[str],
    words: list[str],
    prepare: Callable[[Path], None],
) -> None:
    prepare(runs_here)
    before = sorted(runs_here.rglob("*"))
    assert main(["eval", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("btrain: ")
    assert len(err.splitlines()) == 1
    assert all(word in err for word in words), err
    assert sorted(runs_here.rglob("*")) == before


def test_another_number_of_classes(runs_here: Path, capsys: Capture) -> None:
    saved = torch.load(runs_here / "A" / "checkpoints" / "last.pt", weights_only=True)
    weights = saved["state"]["model"]
    weights |= {key: weights[key][:7] for key in ("fc2.weight", "fc2.bias")}
    torch.save(weights, runs_here / "seven.pt")
    arguments = ["checkpoint=seven.pt", "dataset=digits", "model=small_cnn", "model.width=4"]
    assert main(["eval", *arguments]) == 1
    err = capsys.readouterr().err
    assert "seven.pt" in err
    assert len(err.splitlines()) == 1
    assert not (runs_here / "eval").exists()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (["model=small_cnn", "model.width=1000000000"], ["model.width=1000000000", "1×8×8"]),
        (["model=small_cnn", "model.width=5"], ["conv1.weight is 4×1×4×4", "5×1×4×4"]),
        (["model=wrn_34_10"], ["lacks block1.layer.0.bn1.weight", "the model has no conv1.bias"]),
        (["model=wrn_34_10", "model.depth=600004"], ["model.depth=600004"]),
    ],
)
def test_another_network_than_the_files(
    runs_here: Path, capsys: Capture, model: list[str], words: list[str]
) -> None:
    saved = torch.load(runs_here / "A" / "checkpoints" / "last.pt", weights_only=True)
    torch.save(saved["state"]["model"], runs_here / "theirs.pt")
    assert main(["eval", "checkpoint=theirs.pt", "dataset=digits", *model]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert all(word in err for word in words), err
    assert not (runs_here / "eval").exists()


def test_settings_are_what_was_typed() -> None:
    settings = parse(["checkpoint=a=b", "attack=[pgd20, autoattack]", "dataset.root=x y", "seed=3"])
    assert settings.checkpoint == "a=b"
    assert settings.attacks == ["pgd20", "autoattack"]
    assert settings.config == {"dataset.root": "x y"}
    assert parse(["checkpoint=A", "attack.steps=7"]).attacks == ["custom"]
    assert parse(["checkpoint=A", "attack.step_size=2/255"]).pgd.step_size == 2 / 255
    assert settings.pgd_attack("pgd20")[0] == "pgd20"
    assert (settings.norm, settings.trust_code, settings.factories) == (None, False, {})
    assert parse(["checkpoint=A", "attack=pgd20, 'autoattack'"]).attacks == settings.attacks


def test_own_code_is_named_by_its_group() -> None:
    words = ["model.factory=~/my nets.py:Net", "dataset.factory=data.py:load", "trust_code=true"]
    words += ["model.settings.width=32", "dataset.settings.deep.er=[1, 2]"]
    settings = parse(["checkpoint=A", *words])
    assert settings.trust_code
    factories = {"model": f"{Path.home()}/my nets.py:Net", "dataset": "data.py:load"}
    assert settings.factories == factories
    assert settings.config == {"model.settings.width": "32", "dataset.settings.deep.er": "[1, 2]"}
    export = parse_export(["checkpoint=A", "format=onnx", "out=a.onnx", *words[:3]])
    assert export.trust_code
    assert export.factories == factories


def test_help_answers_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from btrain.cli import main; status = main(sys.argv[1:]);"
        "print('torch' in sys.modules, 'hydra' in sys.modules, status)"
    )
    for arguments, last in (
        (["--help"], "False False 0"),
        (["checkpoint=A", "x=1"], "False True 1"),  # its grammar reads the words
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, "eval", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.splitlines()[-1] == last
