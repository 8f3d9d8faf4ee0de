"""Networks and data sets of the user's own: trained, resumed, evaluated, exported, and whom btrain
trusts to name code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import btrain
from btrain import own
from btrain.cli import main
from btrain.errors import UserError
from btrain.exchange.from_run import load_run
from btrain.runs import checkpoint
from btrain.runs.folder import flat
from btrain.runs.lengthening import lengthened
from btrain.settings import compose as configs
from composing import compose
from torchrun import ENVIRONMENT, forked

NETS = """\
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, shape, width=4):
        super().__init__()
        channels, height, wide = shape
        self.head = nn.Linear(width * height * wide, classes)  # not the last that is registered
        self.model = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x):
        return self.head(self.model(x).flatten(1))

def broken(classes):
    raise RuntimeError("no such thing")

class Dropping(Net):  # draws torch's own random numbers
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.2, self.training)
"""
DATA = """\
from sklearn.datasets import load_digits

def load(classes=10):
    digits = load_digits(n_class=classes)
    x, y = digits.images[:, None] / 16, digits.target
    return x[:300], y[:300], x[300:400], y[300:400]
"""
OWN = ["model=own", "model.factory=nets.py:Net", "dataset=own", "dataset.factory=data.py:load"]
RUN = ["train", *OWN, "attack.epsilon=0.1", "attack.steps=2", "bt=bullettrain", "bt.n_b=2",
       "bt.n_r=1", "train.epochs=2", "train.batch_size=50", "recipe.lr=0.05", "eval.steps=2",
       "device=cpu"]  # fmt: skip
NAMED = ["model.factory=nets.py:Net", "dataset.factory=data.py:load"]


def write_files(folder: Path) -> None:
    (folder / "nets.py").write_text(NETS)
    (folder / "data.py").write_text(DATA)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with own files and a finished run of them, with an average and a best epoch."""
    folder = tmp_path_factory.mktemp("own")
    write_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        extra = ["dataset.val_examples=50", "recipe.ema=0.9", "model.mean=[0.5]", "model.std=[0.3]"]
        assert main([*RUN, *extra, "model.settings.width=3", "run.dir=run"]) == 0
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a copy of it, where nothing has been allowed yet."""
    folder = shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(own, "_allowed", set())
    return folder


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def weights(folder: str) -> dict[str, Tensor]:
    state = checkpoint.load(Path(folder) / "checkpoints" / "last.pt")["state"]
    return {**state["model"]}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# What a run leaves, and who reads it


def test_the_run_folder_keeps_path_settings_and_hash(here: Path, trained: Path) -> None:
    (session,) = json.loads((here / "run" / "provenance.json").read_text())["sessions"]
    model = session["own_parts"]["model"]
    assert model["path"] == str(trained / "nets.py")
    assert model["settings"] == {"width": 3}
    assert len(model["sha256"]) == 64
    config = yaml.safe_load((here / "run" / "config.yaml").read_text())
    assert config["model"]["factory"] == "nets.py:Net"
    assert config["recipe"]["name"] == "trades"
    saved = checkpoint.load(here / "run" / "checkpoints" / "best.pt")
    assert (saved["classes"], saved["shape"]) == (10, [1, 8, 8])


def test_evaluation_and_export_of_a_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((here / "run" / "summary.json").read_text())
    quick = ["attack=clean", "sanity=false"]
    assert main(["eval", "checkpoint=run", *NAMED, *quick]) == 0
    clean = json.loads((here / "run" / "eval" / "clean.json").read_text())
    assert clean["accuracy"] == summary["clean_acc"]
    exported = ["export", "checkpoint=run", "model.factory=nets.py:Net"]
    assert main([*exported, "format=state_dict", "out=net.pt"]) == 0
    _, network = load_run(Path("run"), factories={"model": "nets.py:Net"})
    assert same(torch.load("net.pt"), network.state_dict())
    # What was exported is a network to evaluate, with or without btrain's normalisation.
    words = [*OWN, "model.settings.width=3", "model.mean=[0.5]", "model.std=[0.3]", *quick]
    assert main(["eval", "checkpoint=net.pt", *words, "out=again"]) == 0
    assert json.loads(Path("again/clean.json").read_text())["accuracy"] == summary["clean_acc"]
    inside = {key.removeprefix("network."): value for key, value in network.state_dict().items()
              if key.startswith("network.")}  # fmt: skip
    torch.save({"state_dict": inside}, "inside.pt")
    assert main(["eval", "checkpoint=inside.pt", *words, "out=inside"]) == 0
    assert json.loads(Path("inside/clean.json").read_text())["accuracy"] == summary["clean_acc"]
    capsys.readouterr()
    assert main(["report", "run"]) == 0
    assert "run" in capsys.readouterr().out
    assert main(["eval", "checkpoint=run", "dataset=digits", "dataset.test_examples=20",
                 "model.factory=nets.py:Net", "epsilon=0.1", *quick]) == 0  # fmt: skip


@pytest.mark.skipif(find_spec("onnxscript") is None, reason="the extra `export` is not installed")
def test_an_own_network_goes_into_an_onnx_file(here: Path) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    words = ["export", "checkpoint=run", "format=onnx", "out=net.onnx", "trust_code=true"]
    assert main(words) == 0
    _, network = load_run(Path("run"), trust_code=True)
    x = torch.rand(3, 1, 8, 8)
    (logits,) = ReferenceEvaluator(onnx.load("net.onnx")).run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), network(x), rtol=1e-4, atol=1e-5)


def test_the_bench_measures_an_own_network_on_own_data(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "bench.checkpoint=run", "bench.repetitions=1", "bench.batch_sizes=[16]",
             "bench.methods=[lean]"]  # fmt: skip
    assert main(words) == 1
    assert "trust_code=true" in said(capsys)
    assert main([*words, *NAMED]) == 0
    assert main([*words, "trust_code=true"]) == 0
    assert "own" in capsys.readouterr().out


# Whom btrain trusts


def hostile(run: Path, model: str, dataset: str) -> None:
    """Lets a run folder and its checkpoints name other code."""

    def change(settings: dict[str, Any]) -> dict[str, Any]:
        settings["model"]["factory"], settings["dataset"]["factory"] = model, dataset
        return settings

    path = run / "config.yaml"
    path.write_text(yaml.safe_dump(change(yaml.safe_load(path.read_text()))))
    for file in (run / "checkpoints").glob("*.pt"):
        saved = torch.load(file)
        torch.save({**saved, "config": change(saved["config"])}, file)


@pytest.mark.parametrize("factory", ["os:system", "evil.py:Net", "evil:Net", "object:Net", "x"])
def test_no_file_makes_btrain_import_code(
    here: Path, factory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = "open('ran', 'w').close()\nimport builtins\nNet = builtins.print\n"
    (here / "evil.py").write_text(evil)
    monkeypatch.setattr("os.system", lambda *_: Path("ran").touch())
    hostile(here / "run", factory, factory)
    file = "run/checkpoints/last.pt"
    for words in (
        ["eval", "checkpoint=run"],
        ["eval", f"checkpoint={file}"],
        ["eval", "checkpoint=run", "dataset=digits"],
        ["eval", "checkpoint=run", "model.factory=nets.py:Net"],
        ["export", "checkpoint=run", "format=state_dict", "out=o.pt"],
        ["export", f"checkpoint={file}", "format=onnx", "out=o.onnx"],
        ["bench", "bench.checkpoint=run"],
    ):
        assert main(words) == 1, words
        message = said(capsys)
        assert f"factory={factory}" in message
        assert "trust_code=true" in message
    for path in (Path("run"), Path(file)):
        with pytest.raises(UserError, match=r"trust_code=true"):
            load_run(path)
    assert main(["report", "run"]) == 0
    assert not Path("ran").exists()
    assert not list(here.glob("o.*"))


def test_a_run_of_anybodys_gives_its_weights_without_its_code(here: Path) -> None:
    hostile(here / "run", "os:system", "os:system")
    words = [*RUN, "train.epochs=1", "model.settings.width=3", "model.mean=[0.5]",
             "model.std=[0.3]", "dataset.settings.classes=7"]  # fmt: skip
    assert main([*words, "model.weights=run", "run.dir=finer"]) == 0
    log = (here / "finer" / "train.log").read_text()
    assert "but for a new head, network.head: there are 7 classes here and 10 there." in log


def test_a_part_is_named_again_only_where_the_run_has_one(here: Path) -> None:
    words = ["train", "dataset=digits", "model=small_cnn", "model.width=2", "train.epochs=1",
             "dataset.train_examples=20", "eval.steps=0", "run.dir=plain"]  # fmt: skip
    assert main(words) == 0
    with pytest.raises(UserError, match="plain has no model=own"):
        load_run(Path("plain"), factories={"model": "nets.py:Net"})


# Training


def test_an_interrupted_run_goes_on_and_says_that_its_code_has_changed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["model.factory=nets.py:Dropping", "recipe.ema=0.9", "dataset.val_examples=50",
             "recipe.schedule=step", "run.dir=cut"]  # fmt: skip
    last = here / "cut" / "checkpoints" / "last.pt"
    for thousandths in range(5, 100, 5):  # on a loaded machine the first are over before a batch
        assert main([*RUN, *extra, f"train.max_seconds={thousandths / 1000}"]) == 0
        if last.is_file():
            break
    assert checkpoint.load(last)["state"]["epoch"] < 2
    (here / "nets.py").write_text(NETS + "# another line\n")
    assert main([*RUN, *extra]) == 0
    changed = (
        "The code of model.factory=nets.py:Dropping has changed since this run was last trained."
    )
    assert (here / "cut" / "train.log").read_text().count(changed) == 1
    assert main([*RUN, *extra[:-1], "run.dir=whole"]) == 0
    assert same(weights("cut"), weights("whole"))
    (here / "nets.py").write_text(NETS)
    capsys.readouterr()
    assert main([*RUN, *extra]) == 0
    assert f"{changed} Another run.dir" in capsys.readouterr().out


@pytest.mark.parametrize(
    "extra",
    [
        ["train.precision=bf16", "recipe.ema=0.9", "train.on_nonfinite=skip"],
        ["recipe.optimizer=adam", "recipe.lr=0.001", "train.channels_last=true", "bt.pool=2"],
    ],
    ids=["bf16", "adam"],
)
def test_ways_to_train_an_own_network(here: Path, extra: list[str]) -> None:
    settings = [*RUN, *extra, "train.epochs=3", "run.dir=other"]
    assert main(settings) == 0
    first, *_, last = (here / "other" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(last)["loss"] < json.loads(first)["loss"]


def test_on_two_processes(here: Path) -> None:
    said = here / "said"
    run = forked(2, *RUN, "run.dir=two", said=said)
    run.join(200)
    assert run.exitcode == 0, said.read_text()
    (session,) = json.loads((here / "two" / "provenance.json").read_text())["sessions"]
    assert session["processes"] == 2
    assert session["own_parts"].keys() == {"model", "dataset"}


@pytest.mark.skipif(
    find_spec("hydra_plugins.hydra_joblib_launcher") is None,
    reason="the extra `sweep` is not installed",
)
def test_a_sweep_over_an_own_option_in_processes_of_its_own(here: Path) -> None:
    option = here / "mine" / "model" / "my_net.yaml"
    option.parent.mkdir(parents=True)
    option.write_text("defaults:\n  - own\n\nfactory: nets.py:Net\nsettings:\n  width: 9\n")
    words = [word for word in RUN if not word.startswith("model")]
    jobs = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "model=my_net", "--config-dir",
            "mine", "model.settings.width=1,2", "train.epochs=1",
            "run.dir=runs/${model.settings.width}"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "btrain", *words, *jobs, "--multirun"],
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for width in (1, 2):
        assert weights(f"runs/{width}")["model.0.weight"].shape[0] == width


def test_a_mistake_in_own_code_is_one_sentence_and_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, sentence in (
        (["model.factory=nets.py:broken"], "fails in nets.py, line 16: RuntimeError: no such"),
        (["model.factory=nets.py:nn.ReLU"], "nn.ReLU in eval mode must give logits of shape (8, 1"),
        (["model.settings.widht=3"], "model.settings.widht is no setting of nets.py:Net; it takes"),
        (["dataset.factory=nets.py:Net"], "needs classes; please give dataset.settings.classes=…"),
        (["model=small_cnn"], "model.factory is no setting with model=small_cnn"),
    ):
        given = [*RUN, *words, "run.dir=wrong"]
        last = {word.partition("=")[0]: word for word in given[1:]}
        assert main(["train", *last.values()]) == 1
        message = said(capsys)
        assert sentence in message
        assert message.count("\n") == 1
    assert not (here / "wrong").exists()


def test_a_folder_of_options_stands_anywhere_and_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    text = "defaults:\n  - own\n\nfactory: nets.py:Net\n"
    (tmp_path / "mine" / "model" / "my_net.yaml").write_text(text)
    for words in (["--config-dir", "mine", "model=my_net"], ["model=my_net", "--config-dir=mine"]):
        assert main(["train", *words, "--help"]) == 0
        shown = capsys.readouterr().out
        models = shown.split("\nmodel=")[1].split("\n  model.")[0]
        assert {"my_net", "own", "small_cnn"} <= set(re.findall(r"\w+", models))
        assert "model.factory=nets.py:Net" in shown
    assert main(["train", "model=your_net", "-cd", "mine", "dataset=digits"]) == 1
    message = said(capsys)
    assert "model=your_net is no option; there are: " in message
    assert ", my_net, own, " in message
    assert main(["train", "dataset=digits", "--config-dir", "yours"]) == 1
    assert said(capsys) == "btrain: --config-dir yours is no folder.\n"


@pytest.mark.parametrize(
    ("words", "augmentation"),
    [
        (["dataset=own", "dataset.factory=data.py:load"], (0, False)),
        (["dataset=own", "dataset.factory=data.py:load", "recipe=fast", "recipe.flip=true"],
         (0, True)),
        (["dataset=imagefolder", "dataset.root=x", "dataset.image_size=16"], (2, True)),
        (["dataset=imagefolder", "dataset.root=x", "dataset.image_size=64"], (4, True)),
    ],
)  # fmt: skip
def test_the_augmentation_of_a_users_images(
    words: list[str], augmentation: tuple[int, bool]
) -> None:
    recipe = configs.compose(words).recipe
    assert (recipe.crop_padding, recipe.flip) == augmentation


def test_a_run_with_the_augmentation_of_an_earlier_version_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*RUN, "train.epochs=1", "run.dir=older"]
    earlier = ["recipe.crop_padding=4", "recipe.flip=true"]
    assert main([*words, *earlier, "train.max_seconds=1e-9"]) == 0
    capsys.readouterr()
    assert main([*words, "recipe.crop_padding=2"]) == 1
    assert "belongs to a run with recipe.crop_padding=4, not 2" in said(capsys)
    assert main([*words, "recipe.flip=true"]) == 0
    log = (here / "older" / "train.log").read_text()
    assert log.count("random crops (4 pixels), random flips; ε 0.1 (L∞); from the start") == 2
    assert "goes on as it was begun, with recipe.crop_padding=4, the default" in log
    saved = yaml.safe_load((here / "older" / "config.yaml").read_text())["recipe"]
    assert (saved["crop_padding"], saved["flip"]) == (4, True)
    assert main([*words, *earlier, "run.dir=same"]) == 0
    assert same(weights("older"), weights("same"))


def test_an_own_defenses_recipe_is_found_in_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for group, text in (
        ("defense", "- own\n\nfactory: hat.py:Hat"),
        ("recipe", "- mart\n\nlr: 7.5"),
    ):
        (tmp_path / "mine" / group).mkdir(parents=True)
        (tmp_path / "mine" / group / "hat.yaml").write_text(f"defaults:\n  {text}\n")
    for words, shown in ((["--help"], "recipe.lr=7.5 "), (["--cfg", "job"], "\n  lr: 7.5\n"),
                         (["recipe=trades_digits", "--help"], "recipe.lr=0.05 ")):  # fmt: skip
        assert main(["train", "--config-dir", "mine", "defense=hat", "dataset=digits", *words]) == 0
        assert shown in capsys.readouterr().out


# From Python


def test_training_from_python(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factory, load = _from_files()
    words = ["defense=trades", "train.epochs=1", "eval.steps=2", "run.dir=mine", "bt=uniform",
             "dataset.train_examples=64"]  # fmt: skip
    torch.manual_seed(1)
    network = factory(10, (1, 8, 8))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    summary = btrain.train(words, model=network, data=load())
    assert 0 <= summary["robust_acc"] <= summary["clean_acc"] <= 100
    assert same(before, network.state_dict())
    assert btrain.train(words, model=network, data=load()) == summary
    assert "mine is finished already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"model.factory=object:Net.* nothing is imported"):
        load_run(Path("mine"))
    _, again = load_run(Path("mine"), factories={"model": factory})
    assert same(again.state_dict(), weights("mine"))
    assert not same(again.state_dict(), before)
    with pytest.raises(UserError, match="belongs to a run with"):
        btrain.train([*words, "seed=3"], model=network, data=load())
    made = btrain.train([*words, "run.dir=made", "model.settings.width=2"], model=factory,
                        data=load)  # fmt: skip
    assert made["parameters"] < summary["parameters"]
    narrow = factory(10, (1, 8, 8), width=2)  # made as the run's settings have it
    _, again = load_run(Path("made"), factories={"model": narrow})
    assert same(again.state_dict(), weights("made"))


def _from_files() -> tuple[Callable[..., nn.Module], Callable[..., Any]]:
    for factory in (NAMED[0], NAMED[1]):
        own.allow(factory.partition("=")[2])
    return own.load("model", "nets.py:Net"), own.load("dataset", "data.py:load")


# Weights to start from, and longer runs

DIGITS = ["train", "dataset=digits", "model=small_cnn", "model.width=2", "recipe.lr=0.05",
          "dataset.train_examples=100", "train.batch_size=50", "eval.steps=0", "bt=uniform",
          "attack.steps=1", "device=cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs of thirty: the learning rate has not fallen yet."""
    folder = tmp_path_factory.mktemp("short")
    words = [*DIGITS, "recipe.epochs=30", "train.epochs=3", "recipe.milestones=[10,20]",
             "recipe.lr_factors=[0.1,0.01]", f"run.dir={folder / 'run'}"]  # fmt: skip
    assert main(words) == 0
    return folder / "run"


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_run_starts_from_weights(short: Path, tmp_path: Path, ema: float) -> None:
    words = [*DIGITS, "train.epochs=1", "recipe.lr=1e-30", f"recipe.ema={ema}",
             "recipe.weight_decay=0", f"run.dir={tmp_path / 'run'}"]  # fmt: skip
    assert main([*words, f"model.weights={short}"]) == 0
    assert same(weights(str(tmp_path / "run")), weights(str(short)))
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"starts from all weights of {short}/checkpoints/last.pt." in log


def test_weights_that_do_not_fit_are_refused_and_nothing_is_left(
    short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [f"run.dir={tmp_path / 'run'}", "train.epochs=1"]
    for words, sentence in (
        (["model.width=3", f"model.weights={short}"], "does not fit the model: conv1.weight is 2×"),
        ([f"model.weights={tmp_path / 'none.pt'}"], "none.pt does not exist"),
        ([f"model.weights={tmp_path}"], "last.pt does not exist"),
    ):
        last = {word.partition("=")[0]: word for word in [*DIGITS[1:], *run, *words]}
        assert main(["train", *last.values()]) == 1
        assert sentence in said(capsys)
    assert not (tmp_path / "run").exists()


def test_weights_of_a_network_that_normalises_need_the_same_here(
    short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({**weights(str(short)), "mu": torch.tensor([0.5]), "sigma": torch.tensor([0.3])},
               tmp_path / "w.pt")  # fmt: skip
    words = [*DIGITS, "train.epochs=1", f"model.weights={tmp_path / 'w.pt'}"]
    assert main([*words, f"run.dir={tmp_path / 'run'}"]) == 1
    assert "please give model.mean=[…] and model.std=[…]" in said(capsys)
    there = ["model.mean=[0.5]", "model.std=[0.3]"]
    assert main([*words, *there, f"run.dir={tmp_path / 'run'}"]) == 0


def test_a_longer_run_is_the_one_that_was_long_from_the_start(short: Path, tmp_path: Path) -> None:
    longer = shutil.copytree(short, tmp_path / "longer")
    settings = [*DIGITS, "recipe.lr_factors=[0.1,0.01]", "train.epochs=6", "recipe.epochs=60",
                "recipe.milestones=[10,20]"]  # fmt: skip
    for name in ("longer", "whole"):
        assert main([*settings, f"run.dir={tmp_path / name}"]) == 0
    assert same(weights(str(longer)), weights(str(tmp_path / "whole")))
    lines = [
        [{k: v for k, v in json.loads(line).items() if "seconds" not in k and "measured" not in k}
         for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("longer", "whole")
    ]  # fmt: skip
    assert lines[0] == lines[1]
    assert len(lines[0]) == 6


def test_a_run_that_left_images_out_is_not_lengthened() -> None:
    begun = {"train.epochs": 6, "recipe.epochs": 6, "recipe.schedule": "step",
             "recipe.milestones": [], "recipe.lr_factors": [], "train.skip": 0.5}  # fmt: skip
    longer = begun | {"train.epochs": 12, "recipe.epochs": 12}
    with pytest.raises(UserError, match=r"cannot go on to 12: train\.skip would have left images"):
        lengthened(begun, longer)
    whole = {"train.skip": 0.0}
    assert "train.epochs" in lengthened(begun | whole, longer | whole)


FIXED = ["dataset=digits", "model=small_cnn", "model.width=2", "dataset.train_examples=100",
         "train.batch_size=50", "eval.steps=0", "device=cpu", "recipe.schedule=step",
         "recipe.milestones=[]", "recipe.lr_factors=[]"]  # fmt: skip
EVEN = ["defense.ramp=0", "defense.weight_last=2", "defense.weight_first=2"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["defense=ibp"], "defense.ramp=0.375 is reckoned by the length of the run"),
        (["defense=mixtrain", "defense.ramp=0"], "defense.weight_until=0.6 is reckoned"),
        (
            ["defense=mixtrain", *EVEN, "defense.k=20", "defense.per_batch=null"],
            "defense.k=20 is reckoned",
        ),
        (
            ["defense=mixtrain", EVEN[0], "defense.dynamic=feedback", "dataset.val_examples=10"],
            "defense.dynamic=feedback is reckoned",
        ),
        (["bt=uniform", "sparsity=flying_bird"], "sparsity=flying_bird is reckoned"),
        (["sparsity=channel_flying_bird"], "sparsity=channel_flying_bird is reckoned"),
        (
            ["recipe.repair_steps=20", "bt=uniform"],
            "recipe.repair_steps would have looked at its last epoch",
        ),
        (["sparsity=channel_static"], None),
        (["defense=mixtrain", *EVEN], None),
        (["defense=ibp", "defense.ramp=0"], None),
    ],
)
def test_what_is_reckoned_by_the_length_of_a_run_is_not_lengthened(
    words: list[str], sentence: str | None
) -> None:
    begun = flat(configs.to_dict(compose([*FIXED, *words, "train.epochs=2"])))
    longer = begun | {"train.epochs": 4}
    if sentence is None:
        assert "train.epochs" in lengthened(begun, longer)
    else:
        with pytest.raises(UserError, match=re.escape(f"cannot go on to 4: {sentence}")):
            lengthened(begun, longer)


def test_a_longer_training_by_bounds_is_the_one_that_was_long_from_the_start(
    tmp_path: Path,
) -> None:
    words = ["defense=mixtrain", "defense.engine=ibp", *EVEN]
    for name, *epochs in (("longer", 1, 2), ("whole", 2)):
        for number in epochs:
            given = [f"train.epochs={number}", f"run.dir={tmp_path / name}"]
            assert main(["train", *FIXED, *words, *given]) == 0
    assert same(weights(str(tmp_path / "longer")), weights(str(tmp_path / "whole")))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["recipe.schedule=cyclic"], "recipe.schedule=cyclic falls until the end of the run."),
        (
            ["recipe.epochs=30"],
            "its learning rate fell after epoch 1, 2, and with these settings would have fallen "
            "otherwise; please give recipe.epochs=60.",
        ),
        (
            ["recipe.milestones=[10,30]"],
            "fell after epoch 1, 2, and with these settings would",
        ),
        (
            ["recipe.lr_factors=[0.1,0.1]"],
            "fell after epoch 1, 2, and with these settings would",
        ),
        (["recipe.lr=0.01"], "belongs to a run with recipe.lr=0.05, not 0.01"),
    ],
)
def test_a_run_that_cannot_be_longer_says_why(
    short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    run = shutil.copytree(short, tmp_path / "run")
    last = [*DIGITS[1:], "recipe.epochs=60", "train.epochs=6", "recipe.milestones=[10,20]",
            "recipe.lr_factors=[0.1,0.01]", *words]  # fmt: skip
    given = {word.partition("=")[0]: word for word in last}
    assert main(["train", *given.values(), f"run.dir={run}"]) == 1
    assert sentence in said(capsys)
    assert (run / "summary.json").is_file()
