"""Tab completion: what a line can go on with, and the scripts in the shells that are there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from btrain.cli import COMMANDS, main
from btrain.completion import candidates, script
from btrain.exchange.command import parse as parse_export
from btrain.report.command import _FLAGS, _OPTIONS


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        (["tra"], ["train"]),
        (["--comp"], ["--completion"]),
        (["--completion", ""], ["bash", "fish", "zsh"]),
        (["trian", ""], []),
        (["data", ""], ["corrupt"]),
        (["train", "model=small"], ["model=small_cnn"]),
        (["train", "bt=uniform", "experiment=table2_y"],
         ["experiment=table2_yopo", "experiment=table2_yopo_beta1"]),
        (["train", "-m", "bt=uniform,ran"], ["bt=uniform,random"]),
        (["train", "logger=[wandb,te"], ["logger=[wandb,tensorboard"]),
        (["train", "bt."], candidates(["bench", "bt."])),
        (["train", "tr"], ["train."]),
        (["train", "train.prec"], ["train.precision="]),
        (["train", "train.precision="], ["train.precision=bf16", "train.precision=float32"]),
        (["train", "train.compile="], ["train.compile=false", "train.compile=true"]),
        (["train", "bt.metric=s"], ["bt.metric=svar"]),
        (["train", "train.epochs="], []),
        (["eval", "attack=pgd20,au"], ["attack=pgd20,autoattack", "attack=pgd20,autoattack_rand"]),
        (["eval", "checkpoint=A/conf"], ["checkpoint=A/config.yaml"]),
        (["eval", "checkpoint="], ["checkpoint=A/"]),
        (["eval", "compare", "A"], ["A/"]),
        (["report", "A/"], ["A/config.yaml", "A/my plots/"]),
        (["report", "--m"], ["--merge-seeds"]),
        (["export", "format=o"], ["format=onnx"]),
        (["paper", "table"], ["table1", "table2", "table3", "table4"]),
        (["paper", "profile=s"], ["profile=smoke"]),
        (["bench", "bench.ch"], ["bench.channels_last=", "bench.checkpoint="]),
        (["data", "corrupt", "dataset=d"], ["dataset=digits"]),
        (["train", "--config-dir", "A/m"], ["A/my plots/"]),
        (["train", "--config-dir", "A/my plots", "model=mi"],
         ["model=mine", *candidates(["train", "model=mi"])]),
        (["train", "-cd", "A/my plots", "model=mine"], ["model=mine"]),
        (["train", "--config-dir", "A", "--config-dir=A/my plots", "model=mine"], ["model=mine"]),
    ],
    ids=lambda value: " ".join(value)[:50],
)  # fmt: skip
def test_a_line_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: list[str], found: list[str]
) -> None:
    (tmp_path / "A" / "my plots" / "model").mkdir(parents=True)
    (tmp_path / "A" / "config.yaml").touch()
    (tmp_path / "A" / "my plots" / "model" / "mine.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert candidates(typed) == sorted(found)


def test_every_command_and_its_words_are_there() -> None:
    assert {word for word in candidates([""]) if not word.startswith("-")} == set(COMMANDS)
    assert {*_FLAGS, *(f"{option}=" for option in _OPTIONS if "." not in option)} < set(
        candidates(["report", "--"]) + candidates(["report", ""])
    )
    words = " ".join(candidates(["export", ""]))
    export = parse_export(["checkpoint=A", "format=onnx", "out=a.onnx"])
    assert all(f"{key}=" in words for key in vars(export) if key != "factories")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes(tmp_path: Path) -> None:
    (tmp_path / "my run").mkdir()
    lines = ["btrain tra", "btrain train model=sm", "btrain eval checkpoint=my", "btrain x y"]
    typed = "\n".join(
        f"COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; _btrain btrain; "
        'printf "<%s>" "${COMPREPLY[@]}"; echo'
        for line in lines
    )
    call = f'btrain() {{ {sys.executable!r} -m btrain "$@"; }}\n'
    done = subprocess.run(
        ["bash", "--norc", "-c", f'{call}eval "$(btrain --completion bash)"\n{typed}'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["<train >", "<small_cnn >", "<my\\ run/>", "<>"]
    assert done.stderr == ""


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
def test_fish_completes(tmp_path: Path) -> None:
    program = tmp_path / "btrain"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m btrain "$@"\n')
    program.chmod(0o755)
    line = "btrain --completion fish | source; complete -C 'btrain train model=sm'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", line],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "model=small_cnn\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_of_its_shell(shell: str) -> None:
    if shutil.which(shell) is not None:
        subprocess.run([shell, "-n"], input=script(shell), text=True, check=True, timeout=60)
    assert "--complete" in script(shell)


@pytest.mark.parametrize("arguments", [["--completion"], ["--completion", "csh"]])
def test_another_shell_is_told(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 1
    assert "btrain: --completion takes bash, zsh or fish, not" in capsys.readouterr().err
    assert main(["train", "--shell-completion", "install=bash"]) == 1
    assert 'eval "$(btrain --completion bash)"' in capsys.readouterr().err
