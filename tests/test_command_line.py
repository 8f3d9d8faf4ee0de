"""Mistakes on the command line and in own options: one sentence says what was meant."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf

import btrain
from btrain.cli import main
from btrain.errors import UserError
from btrain.settings import hints
from btrain.settings.compose import (
    TASKS,
    arranged,
    check_search,
    check_words,
    is_sweep_asked_for,
    keys_of,
)
from btrain.settings.evaluation import CUSTOM, PRESETS, parse, parse_compare, words_for
from btrain.settings.user_files import FileConfigSource
from composing import compose

Capture = pytest.CaptureFixture[str]
KEYS = {task: keys_of(of.schema) for task, of in TASKS.items()}


def one_sentence(capsys: Capture, *arguments: str) -> str:
    """What a command that must fail says."""
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("btrain: ")
    assert err.count("\n") == 1
    return err.removeprefix("btrain: ").strip()


# What was meant


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "recipe.lr"),
        ("train.lr", "recipe.lr"),
        ("learning_rate", "recipe.lr"),
        ("train.optimizer", "recipe.optimizer"),
        ("bt.beta", "defense.beta"),
        ("beta", "defense.beta"),
        ("defense.gamma", "bt.gamma"),
        ("epochs", "train.epochs"),
        ("epoch", "train.epochs"),
        ("batch_size", "train.batch_size"),
        ("steps", "attack.steps"),
        ("evl.steps", "eval.steps"),
        ("bt.steps", "attack.steps"),
        ("attack.eps", "attack.epsilon"),
        ("experimnt", "experiment"),
        ("schema", None),
        ("colour", None),
    ],
)
def test_what_is_no_key_of_a_run_is_told_with_the_one_that_was_meant(
    key: str, meant: str | None
) -> None:
    assert hints.meant(key, KEYS["train"]) == meant


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--epochs", "3"],
            "--epochs 3 is no option; a setting is written without dashes: train.e",
        ),
        (["--epochs=3"], "train.epochs=3."),
        (["--seed=3"], "--seed=3 is no option; a setting is written without dashes: seed=3."),
        (["--learning-rate", "0.1", "seed=3"], "without dashes: recipe.lr=0.1."),
        (["seed=3", "--bt.gamma=.5"], "without dashes: bt.gamma=.5."),
        (["--abacus"], "There is no option --abacus; `btrain train --help` lists what there is."),
        (["-x"], "There is no option -x"),
        (["-mr", "seed=0,1"], "There is no option -mr"),
        (["seed=1", "--config-dir"], "--config-dir/-cd: a value is missing; see btrain train --h"),
        (["--cfg", "jobs"], "--cfg/-c: invalid choice: 'jobs' (there are: "),
        (
            ["--multirun", "seed=0,", "1,2"],
            "seed=0, 1,2 is 2 words; please leave out the spaces: s",
        ),
        (["seed=0", ",1", "bt=uniform"], "please leave out the spaces: seed=0,1."),
        (["seed", "=", "0"], "seed = 0 is 3 words; please leave out the spaces: seed=0."),
        (["seed=", "0"], "please leave out the spaces: seed=0."),
        (["model.mean=[.5,", ".4,", ".4]"], "the spaces: model.mean=[.5,.4,.4]."),
    ],
)
def test_dashes_and_spaces_are_told_with_what_to_write(arguments: list[str], told: str) -> None:
    with pytest.raises(UserError) as error:
        check_words(arguments, "train")
    assert told in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["seed=3", "bt.gamma=", "model=small_cnn"],
        ["--multi", "seed=0,1", "run.dir=a, b"],
        ["--config-d", "x", "-m", "bt=uniform", "model.mean=[0.5, 0.4]"],
        ["--cfg", "job", "--resolve", "--info", "defaults"],
        ["--experimental-rerun=x", "--version", "~bt"],
    ],
)
def test_what_hydra_takes_passes(arguments: list[str]) -> None:
    check_words(arguments, "train")


@pytest.mark.parametrize("asking", ["-m", "--multi", "--m", "++hydra.mode='MULTIRUN'"])
def test_whatever_asks_for_a_sweep_is_taken_for_it(asking: str) -> None:
    words = ["seed=0,1", asking, "--config-d", "mine", "dataset.root=a, b"]
    assert is_sweep_asked_for(arranged(words))
    assert not is_sweep_asked_for(arranged([*words[:1], *words[2:], "hydra.mode=RUN"]))
    assert {"--config-dir", "mine", "dataset.root='a, b'"} <= set(arranged(words))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["attack.epsilon=8/255"], "Did you mean epsilon?"),
        (["eval.attack=pgd20"], "Did you mean attack?"),
        (["lr=1"], "There is no setting lr. btrain eval --help lists them."),
        (["--seed", "3"], "--seed 3 is no option; a setting is written without dashes: seed=3."),
        (["attack=pgd20,", "clean"], "please leave out the spaces: attack=pgd20,clean."),
        (["attack=" + 1000 * "["], "is not of the form key=value"),
        (["seed=${seed}"], "seed must be a plain value, not one that refers to others: ${seed}."),
        (["out=${nope}"], "out must be a plain value"),
        (["dataset.test_examples=${nope}"], "dataset.test_examples must be a plain"),
        (
            ["eval.batch_size=1000000000000000000000"],
            "eval.batch_size must be below 2^63, not 1000",
        ),
        (["attack=pgd5x1-ce"], "is the name of a result; write attack.steps=5."),
    ],
)
def test_eval_says_what_was_meant(arguments: list[str], told: str) -> None:
    with pytest.raises(UserError) as error:
        parse(["checkpoint=A", *arguments])
    assert told in str(error.value)


def test_eval_of_a_folder_alone_says_the_key() -> None:
    with pytest.raises(UserError, match=r"did you mean checkpoint=runs/a\?"):
        parse(["runs/a"])


@pytest.mark.parametrize(
    "words",
    [
        ["attack.steps=50"],
        ["attack.restarts=5", "attack.loss=cw"],
        ["attack.steps=7", "attack.step_size=0.01"],
        ["attack=custom"],
        ["attack=pgd20", "attack.steps=10"],
    ],
)
def test_the_words_for_a_result_make_one_of_its_name(words: list[str]) -> None:
    settings = parse(["checkpoint=A", *words])
    name, _ = settings.pgd_attack(settings.attacks[0])
    assert words_for(name).split() == words
    assert name not in PRESETS or name == CUSTOM.name


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["A", "B", "attack=custom"], "attack=custom names no result"),
        (["A", "B", "atack=pgd20"], "atack=pgd20 is no folder"),
        (["A", "B", "--attack", "pgd20"], "--attack is no folder"),
    ],
)
def test_compare_takes_two_folders_and_a_name(arguments: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse_compare(arguments)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["bench", "checkpoint=A"],
            "There is no setting checkpoint. Did you mean bench.checkpoint?",
        ),
        (["bench", "--bench.seconds", "3"], "without dashes: bench.seconds=3."),
        (["paper", "table2", "profil=smoke"], "There is no setting profil. Did you mean profile?"),
        (["report", "A", "B", "out=sheets"], "report out= goes with one folder of the plans"),
        (["report", "A", "outt=x"], "Did you mean out?"),
        (["data", "corrupt", "--seed", "3"], "without dashes: corrupt.seed=3."),
        (
            ["train", "hydra/sweeper=optuna"],
            "is not installed; pip install 'btrain[optuna]'",
        ),
        (["train", "bt.n_b=0"], "bt.n_r must be at most bt.n_b = 0, not 2; set both"),
        (["train", "attack.augmix.width=3"], "attack.augmix is null here; attack=augmix has it."),
        (["train", "attack.augmix={width: 3}"], "attack.augmix is null here; attack=augmix has"),
        (
            ["train", "attack=l2_pgd", "attack.epsilon=1e308"],
            "attack.epsilon must be at most 1,000,000 (farther apart than any two images), not 1e",
        ),
        (["train", "~train"], "~train takes away what every run needs."),
        (["train", "~dataset"], "~dataset takes away what every run needs."),
        (["train", "~bt.gamma"], "~bt.gamma takes away what every run needs."),
        (["train", "bt.gamma=" + 2000 * "[" + 2000 * "]"], "bt.gamma is nested too deeply."),
        (["train", "seed=" + 5000 * "1"], "seed has too many digits."),
        (["train", "seed=${oc.env:NO_SUCH}"], "Environment variable 'NO_SUCH' not found."),
        (["train", "seed=${seed}"], "seed=${seed}: Recursive interpolation detected."),
        (["train", "seed=${nope:1}"], "seed=${nope:1}: Unsupported interpolation type nope."),
        (
            ["train", "bt.step_size_b=${scale:1,2}"],
            "scale() missing 1 required positional argument",
        ),
        (
            ["train", "train.epochs=${divided:10,0}"],
            "train.epochs=${divided:10,0}: division by zero.",
        ),
        (["train", "run.dir=${a:"], "run.dir: what stands in ${…} cannot be read."),
        (["train", "train.batch_size=9223372036854775808"], "train.batch_size must be below 2^63"),
        (["train", "bt=bullettrian"], "own, random, uniform. Did you mean bullettrain?"),
        (["train", "hydra/job_logging=nope"], "hydra/job_logging=nope is no option."),
        (["bench", "bench.seconds=${nope}"], "bench.seconds: Interpolation key 'nope' not found."),
        (["data", "corrupt", "corrupt.seed=${x}"], "${x}: Interpolation key 'x' not found."),
        (["train", "--config-name", "nope"], "Cannot find primary config 'nope'"),
        (["train", "train.epochs=1.5"], "train.epochs must be a whole number, not 1.5."),
        (["train", "recipe.lr=big"], "recipe.lr must be a number, not big."),
        (["train", "train.compile=maybe"], "train.compile must be one of true, false, not maybe."),
        (["train", "recipe.milestones=5"], "milestones must be a list, like recipe.milestones=["),
        (["train", "+bt=uniform"], "+bt=uniform would be a second bt; please write bt=uniform."),
        (["train", "", "seed=1"], "'' is not of the form key=value."),
        (["train", "=3", "seed=1"], "=3 is not of the form key=value."),
        (["train", "train=5"], "train is a group of settings; please set its keys one by one."),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_command_says_in_one_sentence_what_is_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in one_sentence(capsys, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sweeper", ["basic", "optuna"])
@pytest.mark.parametrize("held_out", [0, 100])
@pytest.mark.parametrize("mode", [RunMode.RUN, RunMode.MULTIRUN])
def test_a_sweep_that_chooses_needs_held_out_images(
    sweeper: str, held_out: int, mode: RunMode
) -> None:
    config = compose([f"dataset.val_examples={held_out}"])
    hydra = OmegaConf.create({"mode": mode, "runtime": {"choices": {"hydra/sweeper": sweeper}}})
    refused = sweeper == "optuna" and not held_out and mode is RunMode.MULTIRUN
    told = pytest.raises(UserError, match=r"please give dataset\.val_examples=N")
    with told if refused else nullcontext():
        check_search(config, hydra)


def test_from_python_a_text_is_no_list() -> None:
    with pytest.raises(UserError, match=r"a list of words like \['dataset=digits', 'seed=3'\]"):
        btrain.train("dataset=digits seed=3")


# Files of own options

_BASE = "defaults:\n  - small_cnn\n\nname: mine\n"
_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (f"{_BASE}width: [1,\n", ", line 6: expected the node content"),
        (f"{_BASE}width:\n\tx: 3\n", r", line 6: found character '\t'"),
        (f"{_BASE}width: 3\nwidth: 4\n", ", line 6: found duplicate key width."),
        (f"{_BASE}width: !!python/object/apply:os.system [ls]\n", ", line 5: could not determine"),
        (f"{_BASE}width: !foo 3\n", ", line 5: could not determine"),
        (f"{_BASE}? [a, b]\n: 3\n", ", line 5: found unhashable key."),
        (f"{_BOMB}{_BASE}", "comes to more than 10,000 values."),
        (f"a: &a [*a]\n{_BASE}", "nested deeper than 50 levels."),
        (f"{_BASE}width: {200 * '['}{200 * ']'}\n", "nested deeper than 50 levels."),
        (f"{_BASE}#{70_000 * '#'}\n", "it is larger than 65,536 bytes."),
        (f"{_BASE}width: ${{nope\n", "no viable alternative"),
        (f"# @package\n{_BASE}", "Expected header format"),
        ("name: a\0b\n", "special characters are not allowed"),
        (f"{_BASE}# größe\n".encode("latin-1"), "is no text in UTF-8; please save it as such."),
        (bytes(range(256)), "is no text in UTF-8"),
    ],
)
def test_a_damaged_file_of_options_is_named(
    tmp_path: Path, content: str | bytes, told: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        FileConfigSource("command-line", str(tmp_path)).load_config("mine")
    assert str(error.value).startswith(str(file))
    assert told in str(error.value)


def test_a_sound_file_of_options_may_refer_within_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"{_BASE}mean: &m [0.5]\nstd: *m\n")
    found = FileConfigSource("command-line", str(tmp_path)).load_config("mine")
    assert found.config["std"] == [0.5]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"model/mine": f"{_BASE}width: [1,\n"}, "mine.yaml, line 6: expected the node content"),
        ({"model/mine": f"{_BASE}# ö\n".encode("latin-1")}, "mine.yaml is no text in UTF-8"),
        ({"model/mine": f"{_BASE}width: many\n"}, "model.width: In 'model/mine': Value 'many'"),
        ({"model/mine": f"{_BASE}width: ${{oc.env:NO_SUCH}}\n"}, "variable 'NO_SUCH' not found."),
        (
            {"model/mine": "defaults: [other]\n", "model/other": "defaults: [mine]\n"},
            "Options name each other in their defaults, without end.",
        ),
    ],
)
def test_a_run_with_such_a_file_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    files: dict[str, str | bytes],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "model").mkdir(parents=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "own" / f"{name}.yaml").write_bytes(data)
    assert told in one_sentence(capsys, "train", "model=mine", "--config-dir", "own")


# Networks and devices that there cannot be


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.width=9223372036854775807"], "makes a network for 1×8×8 images that no memory"),
        (["model.width=99999999999999999999999"], "model.width must be below 2^63"),
        (
            ["model.width=1000000"],
            "weights, which need 238,425 GiB with their gradients; this mach",
        ),
        (
            ["model=wrn_40_2", "model.depth=9223372036854775804"],
            "model.depth must be at most 10000",
        ),
        (["device=gpu"], "device=gpu is no device; there are: auto, cpu, cuda, cuda:0, cuda:1, …."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_no_machine_has_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    overrides: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    told_so = one_sentence(capsys, "train", "dataset=digits", "model=small_cnn", *overrides)
    assert told in told_so
