"""Runs read back, and what `btrain export` makes of them."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import BuiltinImporter, FrozenImporter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from btrain.cli import main
from btrain.data import Data
from btrain.errors import UserError
from btrain.exchange.command import parse
from btrain.exchange.from_run import SavedRun, image_shape, load_run, read_config
from btrain.exchange.read import read_weights
from btrain.exchange.write import write
from btrain.report.card import _text
from btrain.runs import checkpoint
from btrain.runs.folder import RunFolder
from btrain.settings import DatasetName, ImageFolderConfig
from btrain.settings.compose import compose, to_dict
from their_wide_resnet import TheirWideResNet

Capture = pytest.CaptureFixture[str]

# Runs

DIGITS = [
    "dataset=digits", "model=small_cnn", "train.epochs=1", "dataset.train_examples=100",
    "dataset.test_examples=50", "dataset.val_examples=50", "eval.steps=1", "device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on digits with a best.pt."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", *DIGITS, f"run.dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, tiles: Tensor, digits: Data) -> Path:
    """A finished run of a WideResNet with AugMix' normalisation on 32×32 colour images."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    images = tiles.mul(255).byte().permute(0, 2, 3, 1).numpy()
    for i, (image, label) in enumerate(zip(images, digits.test.labels[:24] % 2, strict=True)):
        for part in ("train", "test"):
            place = folder / part / str(int(label))
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{i}.png")
    words = ["dataset=imagefolder", f"dataset.root={folder}", "model=wrn_40_2", "model.depth=10",
             "model.width=1", "model.mean=[0.5]", "model.std=[0.5]", "train.epochs=1",
             "recipe.crop_padding=0", "eval.steps=1", "device=cpu"]  # fmt: skip
    assert main(["train", *words, f"run.dir={folder / 'run'}"]) == 0
    return folder / "run"


def test_a_run_comes_back_as_its_configuration_and_network(run: Path, digits: Data) -> None:
    state = torch.random.get_rng_state()
    config, model = load_run(run)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert config == compose([*DIGITS, f"run.dir={run}"])
    assert not model.training
    for which, file in (("last", "last.pt"), ("best", "best.pt")):
        _, model = load_run(run, which)  # type: ignore[arg-type]
        weights = checkpoint.load(run / "checkpoints" / file)["state"]["model"]
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert model(digits.test.images[:3].float() / 255).shape == (3, 10)


def test_a_checkpoint_alone_is_enough(run: Path, tmp_path: Path, digits: Data) -> None:
    shutil.copy(run / "checkpoints" / "last.pt", tmp_path / "mine.pt")
    config, model = load_run(tmp_path / "mine.pt")
    other_config, other = load_run(run)
    assert config == other_config
    x = digits.test.images.float() / 255
    assert torch.equal(model(x), other(x))


def test_every_data_set_has_its_shape(digits: Data) -> None:
    for name in set(DatasetName) - {DatasetName.own}:
        root = ["dataset.root=x"] if name is DatasetName.imagefolder else []
        dataset = compose([f"dataset={name.name}", "model=small_cnn", *root]).dataset
        assert len(image_shape(dataset)) == 3
    assert image_shape(compose(["dataset=digits", "model=small_cnn"]).dataset) == digits.shape


def edit(run: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = run / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    change(settings)
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_settings_that_an_older_version_did_not_have_are_filled_in(copied: Path) -> None:
    """From the run's own options; what follows another setting follows the saved one."""

    def older(settings: dict[str, Any]) -> None:
        settings["attack"]["epsilon"] = 0.2
        del settings["eval"]["epsilon"], settings["logger"], settings["bt"]["metric"]
        del settings["dataset"]["val_examples"]

    path = edit(copied, older)
    config = read_config(RunFolder(copied).settings(), path)
    assert config.eval.epsilon == 0.2
    assert config.dataset.val_examples == 0
    assert config.bt.metric.name == "svar"
    assert config.logger.name.name == "jsonl"
    assert config.recipe.name == "trades_digits"
    assert config.train.epochs == 1


BAD_SETTINGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown": (lambda s: s["bt"].update(gama=1), "There is no setting bt.gama. Did you mean"),
    "target": (lambda s: s.update(_target_="os.system"), "There is no setting _target_."),
    "type": (lambda s: s["bt"].update(gamma="much"), "bt.gamma must be a number, not much."),
    "range": (lambda s: s["bt"].update(gamma=2), "bt.gamma must be in (0, 1], not 2.0."),
    "no group": (lambda s: s.update(bt=3), "bt is a group of settings"),
    "null": (lambda s: s["bt"].update(gamma=None), "bt.gamma: Incompatible value 'None'"),
    "data set": (lambda s: s["dataset"].update(name="svhn"), "dataset.name: Invalid value 'svhn'"),
    "no option": (
        lambda s: (s["model"].update(name="mine"), s["model"].pop("width")),
        "model=mine is no option; there are: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_SETTINGS)
def test_a_bad_setting_of_a_run_is_named(copied: Path, bad: str) -> None:
    change, sentence = BAD_SETTINGS[bad]
    path = edit(copied, change)
    with pytest.raises(UserError) as caught:
        load_run(copied)
    assert str(caught.value).startswith(f"{path}: {sentence}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "${scale:1,2,3}", "a ${seed}"])
def test_nothing_in_a_runs_settings_is_looked_up(copied: Path, text: str) -> None:
    edit(copied, lambda settings: settings["dataset"].update(root=text))
    with pytest.raises(UserError, match=r"refers to .*; a run's settings are plain values"):
        load_run(copied)


def test_yaml_with_python_objects_is_refused(copied: Path) -> None:
    proof = copied / "ran"
    text = f"seed: !!python/object/apply:os.system ['touch {proof}']\n"
    (copied / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="is not a readable configuration"):
        load_run(copied)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda settings: settings["model"].update(width=8), "model.width=8"),
        (lambda settings: settings["model"].update(mean=[0.5], std=[0.5]), "model.mean=[0.5]"),
        (lambda settings: settings["attack"].update(epsilon=0.3), "attack.epsilon=0.3"),
    ],
)
def test_a_checkpoint_that_contradicts_its_settings_is_refused(
    copied: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    path = edit(copied, change)
    with pytest.raises(UserError) as caught:
        load_run(copied)
    assert str(caught.value).startswith(f"{path} says {words}, but {copied}")


def test_the_data_of_a_run_may_have_moved(photos: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(photos, tmp_path / "run")
    edit(moved, lambda settings: settings["dataset"].update(root="moved"))
    config, _ = load_run(moved)
    assert isinstance(config.dataset, ImageFolderConfig)
    assert config.dataset.root == "moved"


def test_settings_that_older_versions_wrote_and_nobody_read_are_left_out(run: Path) -> None:
    today = RunFolder(run).settings()
    unread = {"image_size": None, "root": "x", "download": True}
    older = {**today, "model": {**today["model"], "depth": None}}
    older["dataset"] = {**today["dataset"], **unread}
    del older["model"]["weights"]
    assert read_config(older, Path("here")) == read_config(today, Path("here"))
    for group, key in (("model", "depth"), ("dataset", "image_size")):
        wrong = {**today, group: {**today[group], key: 16}}
        with pytest.raises(UserError, match=f"{group}.{key} is no setting with"):
            read_config(wrong, Path("here"))


def test_what_is_no_run_is_refused(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    torch.save(TheirWideResNet().state_dict(), tmp_path / "theirs.pt")
    for path, which, sentence in (
        (tmp_path / "empty", "last", "is no run folder: it holds no config.yaml."),
        (tmp_path / "nowhere", "last", "does not exist."),
        (tmp_path / "theirs.pt", "last", "is no checkpoint of a btrain run: "),
        (
            copied / "config.yaml",
            "last",
            "is not a readable checkpoint: torch.save did not write it.",
        ),
    ):
        with pytest.raises(UserError) as caught:
            load_run(path, which)  # type: ignore[arg-type]
        assert str(caught.value).startswith(f"{path} {sentence}")
    with pytest.raises(UserError, match="which=best goes with a run folder"):
        load_run(copied / "checkpoints" / "last.pt", "best")
    (copied / "checkpoints" / "best.pt").unlink()
    with pytest.raises(UserError, match=r"best\.pt does not exist: the run held no examples out"):
        load_run(copied, "best")


@pytest.mark.parametrize("experiment", ["table1_cifar10_augmix", "table2_yopo", "figure2_pgd"])
def test_the_settings_of_an_experiment_come_back(experiment: str) -> None:
    config = compose([f"experiment={experiment}"])
    read = read_config(to_dict(config), Path("here"))
    assert read == config
    read.train.epochs += 1
    assert read_config(to_dict(config), Path("here")) == config


# The command


def test_a_run_is_exported_from_its_folder_or_its_checkpoint(
    photos: Path, tmp_path: Path, tiles: Tensor, capsys: Capture
) -> None:
    _, model = load_run(photos)
    for source in (photos, photos / "checkpoints" / "last.pt"):
        out = tmp_path / f"{source.name}.pth"
        capsys.readouterr()
        words = [f"checkpoint={source}", "format=robustbench", f"out={out}", "sub_block1=true"]
        assert main(["export", *words]) == 0
        said, complaint = capsys.readouterr()
        size = sum(p.numel() for p in TheirWideResNet(width=1, classes=2).parameters())
        assert said == (
            f"{out}: wrn_40_2 with {size:,} parameters as robustbench, for 3×32×32 images in "
            "[0, 1]\n"
        )
        assert complaint == ""
        network = TheirWideResNet(width=1, classes=2, sub_block1=True, mu_sigma=True).eval()
        network.load_state_dict(torch.load(out, weights_only=True), strict=True)
        torch.testing.assert_close(network(tiles), model(tiles))


def test_the_best_checkpoint_can_be_asked_for(run: Path, tmp_path: Path) -> None:
    words = [f"checkpoint={run}", "format=state_dict", f"out={tmp_path / 'o.pt'}", "which=best"]
    assert main(["export", *words]) == 0
    _, best = load_run(run, "best")
    exported = torch.load(tmp_path / "o.pt", weights_only=True)
    assert all(torch.equal(value, exported[key]) for key, value in best.state_dict().items())


def test_a_file_is_replaced_only_when_told_to(run: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "mine.pt"
    out.write_text("precious")
    words = ["export", f"checkpoint={run}", "format=state_dict", f"out={out}"]
    assert main(words) == 1
    assert capsys.readouterr().err == (
        f"btrain: out={out} is there already; overwrite=true replaces it.\n"
    )
    assert out.read_text() == "precious"
    assert main([*words, "overwrite=true"]) == 0
    assert read_weights(out).keys() == load_run(run)[1].state_dict().keys()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "checkpoint is missing; please give checkpoint=…, see btrain export --help."),
        (["{run}"], "{run} is not of the form key=value; see btrain export --help."),
        (["out="], "out needs a value; see btrain export --help."),
        (["out=(a", "format=(b"], "format=(b is not of the form key=value; see btrain "
         "export --help."),
        (["chekpoint=x"], "There is no setting chekpoint. Did you mean checkpoint?"),
        (["seed=1"], "There is no setting seed. btrain export --help lists them."),
        (["out=a.pt", "out=b.pt"], "out is given twice."),
        (["format=tflite"], "format must be one of robustbench, safetensors, onnx, state_dict, "
         "checkpoint, compact, not tflite."),
        (["which=first"], "which must be one of last, best, not first."),
        (["overwrite=yes"], "overwrite must be one of true, false, not yes."),
        (["checkpoint=x", "format=onnx"], "out is missing; please give out=…, see btrain export "
         "--help."),
        (["checkpoint=x", "format=onnx", "out=o.pt"], "out=o.pt must end in .onnx with "
         "format=onnx."),
        (["checkpoint=x", "format=robustbench", "out=o.onnx"], "out=o.onnx must not end in .onnx "
         "with format=robustbench."),
        (["checkpoint=x", "format=onnx", "out=o.onnx", "sub_block1=true"], "sub_block1=true has no "
         "meaning with format=onnx."),
        (["checkpoint=x", "format=state_dict", "out=o.pt"], "x does not exist."),
        (["checkpoint={run}", "format=robustbench", "out=o.pt"], "format=robustbench is for "
         "WideResNets with ReLU; this network is none."),
        (["checkpoint={run}", "format=state_dict", "out=no/o.pt"], "out=no/o.pt: there is no "
         "folder no."),
        (["checkpoint={run}", "format=state_dict", "out=."], "out=. is there already."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    words: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", *(word.format(run=run) for word in words)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"btrain: {sentence.format(run=run)}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Where only the standard library and what this process has imported can be found."""
    write(load_run(run)[1], tmp_path / "w.pt", format="state_dict", shape=(1, 8, 8))
    shutil.copy(tmp_path / "w.pt", tmp_path / "w.safetensors")
    for package in ("onnx", "onnxscript", "safetensors", "safetensors.torch"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [BuiltinImporter, FrozenImporter])
    with pytest.raises(UserError, match=r"w\.safetensors needs the package safetensors: pip"):
        read_weights(tmp_path / "w.safetensors")
    for format, packages in (("onnx", "onnx and onnxscript"), ("safetensors", "safetensors")):
        words = [f"checkpoint={run}", f"format={format}", f"out={tmp_path / 'o'}.{format}"]
        assert main(["export", *words]) == 1
        assert capsys.readouterr().err == (
            f'btrain: format={format} needs {packages}: pip install "btrain[export]".\n'
        )


def test_help_and_mistakes_answer_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from btrain.cli import main; status = main(sys.argv[1:]);"
        "print(status, 'torch' in sys.modules)"
    )
    for words, status, answer in (
        (["export", "--help"], 0, "btrain export checkpoint=RUN format=FORMAT out=FILE"),
        (["export", "format=onx"], 1, "format must be one of"),
    ):
        result = subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert answer in result.stdout + result.stderr
        assert result.stdout.splitlines()[-1] == f"{status} False"


def test_documented_exports_parse() -> None:
    page = (Path(__file__).parents[1] / "docs/evaluation.md").read_text(encoding="utf-8")
    commands = [line for line in page.splitlines() if line.startswith("btrain export ")]
    assert len(commands) >= 3
    for command in commands:
        parse(command.split("#")[0].split()[2:])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("rival=fast", "made robust with `rival=fast` against changes in an L∞ ball of radius "
         "0.1."),
        ("attack=augmix defense=augmix", "`defense=augmix` and `bt=bullettrain` against common "
         "corruptions."),
        ("model=own model.factory={0}/nets.py:Net", "factory: nets.py:Net"),
    ],
)  # fmt: skip
def test_a_card_names_the_method_and_no_folder(tmp_path: Path, words: str, told: str) -> None:
    folder = tmp_path / f"a {'long ' * 30}name" / "secret"
    given = [word.format(folder) for word in words.split(" ")]
    config = compose(["dataset=digits", "model=small_cnn", "attack.epsilon=0.1", *given,
                      f"run.dir={folder}"])  # fmt: skip
    saved = SavedRun(tmp_path / "last.pt", config, {}, 10, (1, 8, 8))
    saved.path.touch()
    card = _text(saved, "net.pt", "", "checkpoint", 1)
    assert told in card
    assert "secret" not in card and "long" not in card


def test_a_checkpoint_with_its_card_and_hash(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "net.pt"
    words = ["export", f"checkpoint={run}", "format=checkpoint", f"out={out}", "model_card=true"]
    assert main(words) == 0
    config, network = load_run(out)
    before, trained = load_run(run)
    assert config.run.dir != before.run.dir  # which is of this machine
    config.run.dir = before.run.dir
    assert to_dict(config) == to_dict(before)
    for ours, theirs in zip(network.state_dict().values(), trained.state_dict().values(),
                            strict=True):  # fmt: skip
        assert torch.equal(ours, theirs)
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert Path(f"{out}.sha256").read_text() == f"{digest}  net.pt\n"
    card = Path(f"{out}.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    attack = f"PGD, L∞ {config.eval.epsilon:.3g}, 1 step "
    for told in (digest, f"{summary['clean_acc']:.2f}", f"{config.attack.epsilon:.4g}", attack):
        assert told in card
    assert str(run) not in card
    capsys.readouterr()
    assert main(words) == 1
    assert "net.pt is there already; overwrite=true" in capsys.readouterr().err
    other = tmp_path / "other.pt"
    Path(f"{other}.sha256").write_text("mine")
    assert main([*words[:3], f"out={other}"]) == 1
    assert "other.pt.sha256 is there already; overwrite=true" in capsys.readouterr().err
    assert Path(f"{other}.sha256").read_text() == "mine" and not other.exists()
    best = [*words[:3], f"out={tmp_path / 'best.pt'}", "which=best", "model_card=true"]
    assert main(best) == 0
    card = (tmp_path / "best.pt.md").read_text()
    assert f"{summary['best_clean_acc']:.2f}" in card
    assert "- weights: of epoch 1 of 1, the best on held-out images" in card
    assert main([*words[:-1], "overwrite=true"]) == 0  # without a card: no old hash is left
    assert not Path(f"{out}.sha256").exists()
    assert main([*words, "overwrite=true"]) == 0
    content = bytearray(out.read_bytes())
    content[len(content) // 2] ^= 1
    out.write_bytes(content)
    for reader in (load_run, read_weights):
        with pytest.raises(UserError, match=r"net\.pt is not a readable checkpoint"):
            reader(out)
    Path(f"{out}.sha256").write_text("no hash")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_run(out)


def test_an_earlier_checkpoint_has_no_accuracies_of_the_runs_end(
    copied: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder, out = RunFolder(copied), tmp_path / "net.pt"
    words = ["export", "format=checkpoint", f"out={out}", "model_card=true", "overwrite=true"]
    saved = torch.load(folder.last, weights_only=False)
    saved["state"]["epoch"] = 0
    torch.save(saved, folder.previous)
    assert main([*words, f"checkpoint={folder.previous}"]) == 0
    sentence = "These are weights before epoch 1 of 1, not the run's last."
    card = Path(f"{out}.md").read_text()
    assert sentence in capsys.readouterr().out and f"- weights: {sentence}\n" in card
    assert "right %" not in card and "Accuracies" not in card and "AutoAttack" not in card
    digest = hashlib.sha256(folder.previous.read_bytes()).hexdigest()
    facts = {"n": 50, "epsilon": 0.1}
    part = "dataset.test_examples_50"
    for place, attack, weights, accuracy in (
        ("previous", "pgd20", digest, 12.5), (".", "pgd20", "other", 87.5),
        (part, "autoattack", digest, 11.5), (part, "pgd20", "other", 87.5),
    ):  # fmt: skip
        content = {"attack": attack, "accuracy": accuracy, "checkpoint_sha256": weights}
        (copied / "eval" / place).mkdir(parents=True, exist_ok=True)
        (copied / "eval" / place / f"{attack}.json").write_text(json.dumps(content | facts))
    assert main([*words, f"checkpoint={folder.previous}"]) == 0
    card = " ".join(Path(f"{out}.md").read_text().split())
    assert "| pgd20, ε 0.1 (btrain eval) | 12.50 " in card and "87.50" not in card
    assert f"| autoattack, ε 0.1 (btrain eval, {part}) | 11.50 " in card
    assert "AutoAttack was not run" not in card and "- training, all of the run: " in card
    # The last one of a run that was cut, and of one that is not finished.
    folder.previous.replace(folder.last)
    summary = json.loads((copied / "summary.json").read_text())
    cut = "train.max_seconds=1 in epoch 1 of 1, batch 0"
    folder.write_summary(summary | {"cut": cut})
    assert main([*words, f"checkpoint={copied}"]) == 0
    card = Path(f"{out}.md").read_text()
    assert "- weights: The run was cut: these are its weights before epoch 1 of 1.\n" in card
    assert f"- the run was cut by: {cut}\n" in card
    (copied / "summary.json").unlink()
    assert main([*words, f"checkpoint={copied}"]) == 0
    assert "- weights: The run is not finished: these are" in Path(f"{out}.md").read_text()
    assert main([*words, f"checkpoint={copied}", "which=best"]) == 0
    card = Path(f"{out}.md").read_text()
    assert ", the best on held-out images\n" in card and "- training" not in card
