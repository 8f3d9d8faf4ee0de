"""Every YAML file, every key of the schema, the ranges, the paper's defaults, and run names."""

from __future__ import annotations

import dataclasses
import re
import typing
from enum import Enum
from itertools import permutations
from pathlib import Path
from typing import Any, cast

import hydra
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

import composing
from btrain import models
from btrain.allocation import METRICS
from btrain.cli import main
from btrain.defenses import DEFENSES
from btrain.errors import UserError
from btrain.exchange.from_run import read_config
from btrain.runs.folder import RunFolder, flat
from btrain.settings import (
    AllocatorName,
    Architecture,
    Config,
    DatasetName,
    DefenseName,
    LoggerName,
    Metric,
    OptimizerName,
    RecipeConfig,
    ScheduleName,
)
from btrain.settings.compose import (
    OPTIONS,
    config_dir,
    from_hydra,
    read_yaml,
    register,
    run_name,
    to_dict,
    to_yaml,
    without_replaced,
)
from btrain.settings.compose import compose as compose_anew
from btrain.settings.compose import composed as composed_by_hydra
from composing import compose

CONFIGS = Path(config_dir())
FILES = [
    path.relative_to(CONFIGS).with_suffix("")
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if path.relative_to(CONFIGS).parts[0] != "paper"  # not Hydra's; see test_paper.py
    and not path.name.startswith("_")  # a part of others
]
NEEDS = {
    "dataset=imagefolder": ["dataset.root=photos"],
    "dataset=own": ["dataset.factory=mine.py:load"],
    "model=own": ["model.factory=mine.py:Net"],
    "attack=augmix": ["defense=augmix"],
    "attack=own": ["attack.factory=ball.py:Ball"],
    "defense=own": ["defense.factory=hat.py:Hat"],
    "bt=own": ["bt.factory=half.py:Half"],
    "sparsity=own": ["sparsity.factory=masks.py:Masks"],
    "rival=gradalign": ["defense=pgd"],
    "rival=free": ["defense=pgd"],
    "rival=mma": ["defense=pgd"],
}  # what an option cannot do without


def options(group: str) -> set[str]:
    return {file.name for file in FILES if file.parent.as_posix() == group}


def names(enum: type[Enum]) -> set[str]:
    return {member.name for member in enum}


def leaves(node: type, prefix: str = "") -> list[str]:
    """Every key of the schema that holds a value, with those of all options."""
    found = []
    for name, kind in typing.get_type_hints(node).items():
        if typing.get_origin(kind) is typing.ClassVar:
            continue
        options = OPTIONS[name][1].values() if name in OPTIONS and not prefix else [kind]
        for option in options:
            if dataclasses.is_dataclass(option):
                found += leaves(cast(type, option), f"{prefix}{name}.")
            else:
                found.append(prefix + name)
    return list(dict.fromkeys(found))


LEAVES = leaves(Config)


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    """The defaults as Hydra composes them, for tests that need many variants of them."""
    register()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=config_dir()):
        return hydra.compose("train")


def changed(composed: DictConfig, settings: dict[str, Any]) -> Config:
    """What the command line `key=value …` comes to, without composing anew."""
    cfg = composed.copy()
    with open_dict(cfg):
        for key, value in settings.items():
            OmegaConf.update(cfg, key, value, force_add=True)
    return from_hydra(cfg, [])


# The YAML files


@pytest.mark.parametrize(
    ("words", "task"),
    [
        (["defense=pgd", "dataset=mnist", "attack.steps=7", "hydra/launcher=joblib"], "train"),
        (
            ["bt=own", "+bt.settings.a=1", "bt.factory=x.py:f", "run.dir=x", "hydra.job.name=y"],
            "train",
        ),
        (["bench.out=x.json"], "bench"),
    ],
)
def test_what_the_tests_remember_is_what_hydra_composes(
    words: list[str], task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered = [composed_by_hydra(words, task) for _ in range(2)]
    monkeypatch.setattr(composing.loader, "create_defaults_list", composing.hydras_list)
    choices = "hydra._internal.defaults_list._create_interpolation_map"
    monkeypatch.setattr(choices, composing.hydras_choices)
    anew = composed_by_hydra(words, task)
    assert OmegaConf.to_yaml(anew) == OmegaConf.to_yaml(remembered[0])
    assert remembered == [anew, anew]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_yaml_file_composes(file: Path) -> None:
    group = file.parent.as_posix()
    if group == ".":
        composed_by_hydra((), task=file.name)
        return
    option = f"{group}={file.name}"
    config = compose([option, *NEEDS.get(option, [])])
    section = getattr(config, group, None)
    if section is not None:  # an experiment sets several sections and has none of its own
        name = section.name
        assert (name.name if isinstance(name, Enum) else name) == file.name
    if group == "dataset":
        own = {"mnist": "trades_mnist", "mnist_sample": "trades_mnist", "digits": "trades_digits"}
        assert config.recipe.name == own.get(file.name, "trades")


def test_the_names_in_schema_code_and_yaml_files_agree() -> None:
    assert names(DatasetName) == options("dataset")
    by_bounds = {"mixtrain", "verified", "ibp", "crown_ibp", "mtl_ibp", "sabr"}
    assert names(DefenseName) == {*DEFENSES, *by_bounds, "augmix", "own"} == options("defense")
    assert names(Metric) == set(METRICS)
    assert names(AllocatorName) == options("bt")
    assert names(LoggerName) == options("logger")
    elsewhere = {"torchvision", "timm", "own", "by_name"}
    assert names(Architecture) == {*models.ARCHITECTURES, *elsewhere}
    texts = [(CONFIGS / "model" / f"{model}.yaml").read_text() for model in options("model")]
    built = {yaml.safe_load(text).get("architecture") for text in texts}
    assert built - {None} == names(Architecture)  # None: as the option that it begins from
    for enum in (DatasetName, DefenseName, AllocatorName, LoggerName, Architecture):
        assert all(member.name == member.value for member in enum)


COLOUR: dict[str, Any] = {"batch_size": 128, "lr": 0.1, "crop_padding": 4, "flip": True}
GREY: dict[str, Any] = {"batch_size": 128, "lr": 0.1, "crop_padding": 0, "flip": False}
AUGMIX: dict[str, Any] = {"weight_decay": 5e-4, "nesterov": True, "schedule": ScheduleName.cosine}
TRADES_MNIST = GREY | {
    "epochs": 10,
    "weight_decay": 0.0,
    "milestones": [5.4, 7.4, 8.9],
    "lr_factors": [0.1, 0.01, 0.001],
}
TRADES_DIGITS = GREY | {
    "epochs": 30,
    "lr": 0.05,
    "weight_decay": 2e-4,
    "milestones": [24],
    "lr_factors": [0.1],
}
PGD_MNIST = GREY | {
    "epochs": 10,
    "batch_size": 100,
    "optimizer": OptimizerName.adam,
    "lr": 5e-3,
    "weight_decay": 0.0,
    "schedule": ScheduleName.cyclic,
}
RECIPES = {
    ("trades", "colour"): COLOUR
    | {"epochs": 76, "weight_decay": 2e-4, "milestones": [74], "lr_factors": [0.1]},
    ("mart", "colour"): COLOUR
    | {"epochs": 90, "weight_decay": 7e-4, "milestones": [74, 89], "lr_factors": [0.1, 0.01]},
    ("pgd", "colour"): COLOUR
    | {"epochs": 204, "weight_decay": 2e-4, "milestones": [102, 153], "lr_factors": [0.1, 0.01]},
    ("augmix", "colour"): COLOUR | AUGMIX | {"epochs": 100},
    ("trades", "mnist"): TRADES_MNIST,
    ("mart", "mnist"): TRADES_MNIST,
    ("pgd", "mnist"): PGD_MNIST,
    ("augmix", "mnist"): GREY | AUGMIX | {"epochs": 30},
    ("trades", "digits"): TRADES_DIGITS,
    ("mart", "digits"): TRADES_DIGITS,
    ("pgd", "digits"): PGD_MNIST | {"epochs": 30},
    ("augmix", "digits"): GREY | AUGMIX | {"epochs": 30},
}  # by defense and images; momentum is 0.9, without an average and an early stop, everywhere


@pytest.mark.parametrize("dataset", sorted(names(DatasetName)))
@pytest.mark.parametrize("defense", ["trades", "mart", "pgd", "augmix"])
def test_every_defense_has_its_recipe_on_every_data_set(defense: str, dataset: str) -> None:
    options = [f"defense={defense}", f"dataset={dataset}"]
    found = compose([*options, *NEEDS.get(options[1], [])]).recipe
    whole = dataset.removesuffix("_sample")
    images = whole if whole in ("mnist", "digits") else "colour"
    augmentation = {"crop_padding": 0, "flip": False} if dataset == "own" else {}
    expected = RecipeConfig(name=found.name, **RECIPES[defense, images] | augmentation)
    assert found == expected


def test_a_defense_without_a_recipe_has_that_of_trades() -> None:
    mine = ["defense=own", "defense.factory=hat.py:Hat"]
    for dataset in ("cifar10", "mnist", "digits"):
        theirs = compose([f"dataset={dataset}"]).recipe
        assert compose([*mine, f"dataset={dataset}"]).recipe == theirs


def test_a_recipe_that_is_named_is_taken() -> None:
    assert compose(["dataset=digits", "recipe=trades_mnist"]).recipe.name == "trades_mnist"


# Keys


@pytest.mark.parametrize("key", LEAVES)
def test_a_misspelt_key_is_named_with_what_was_meant(key: str) -> None:
    with pytest.raises(UserError, match=rf"^There is no setting {key}x\. Did you mean {key}\?$"):
        compose([f"{key}x=1"])


def test_a_misspelt_key_of_a_group_and_of_none_is_named_by_the_whole_way() -> None:
    for key in ("bt.gamma", "seed"):
        with pytest.raises(
            UserError, match=rf"^There is no setting {key}x\. Did you mean {key}\?$"
        ):
            compose_anew([f"{key}x=1"])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("+colour=1", "colour"),
        ("++colour=1", "colour"),
        ("+bt.colour=1", "bt.colour"),
        ("++bt.colour=1", "bt.colour"),
        ("+train.colour.red=1", "train.colour"),
    ],
)
def test_no_unknown_key_can_be_added(override: str, key: str) -> None:
    with pytest.raises(UserError, match=rf"There is no setting {key}\."):
        compose_anew([override])


@pytest.mark.parametrize("key", LEAVES)
def test_a_misspelt_key_is_named_where_it_was_added(composed: DictConfig, key: str) -> None:
    # What Hydra hands on for +key=1 and ++key=1; composing 114 times would take long.
    with pytest.raises(UserError, match=rf"There is no setting {key}x\. Did you mean {key}\?"):
        changed(composed, {f"{key}x": 1})


def test_a_known_key_can_be_forced() -> None:
    assert compose_anew(["++bt.gamma=0.5"]).bt.gamma == 0.5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("attack.steps=ten", ["attack.steps", "ten", "whole number"]),
        ("attack.steps=2.5", ["attack.steps", "2.5", "whole number"]),
        ("bt.gamma=null", ["bt.gamma"]),
        ("bt.share_clean_forward=perhaps", ["bt.share_clean_forward", "perhaps", "true, false"]),
        ("bt.score=stale", ["bt.score", "stale", "fresh, shared, last"]),
        ("attack.start=zero", ["attack.start", "zero", "normal", "uniform", "clean"]),
        ("logger.mode=never", ["logger.mode", "never", "online", "offline", "disabled"]),
        ("recipe.milestones=3", ["recipe.milestones"]),
        ("model.mean=[a,b,c]", ["model.mean", "a"]),
        ("recipe=trades_svhn", ["recipe=trades_svhn", " trades,", "trades_mnist"]),
        ("bt.gamma=${bt.delta}", ["bt.gamma", "bt.delta"]),
    ],
)
def test_a_wrong_value_is_explained_in_one_sentence(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        compose_anew([override])
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


# Ranges

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("seed", [-1, 2**63]),
        ("dataset.train_examples", [-5, 0, 1]),  # BatchNorm cannot normalise a single example
        ("dataset.test_examples", [-1, 0]),
        ("dataset.val_examples", [-1]),
        ("model.width", [-1, 0]),
        ("attack.steps", [-1, 0]),
        ("attack.epsilon", [-1, 0, NAN, INF]),
        ("attack.step_size", [-0.1, 0, NAN, INF]),
        ("attack.start_std", [-0.1, NAN, INF]),
        ("defense.beta", [-1, NAN, INF]),
        ("bt.n_b", [-1]),
        ("bt.n_r", [-1, 11]),  # more than n_b = 10
        ("bt.n_o", [-1, 3]),  # more than n_r = 2
        ("bt.gamma", [-0.1, 0, 1.5, NAN, INF]),
        ("bt.momentum", [-0.1, 1, NAN]),
        ("bt.step_size_b", [-1, 0, NAN, INF]),
        ("recipe.epochs", [-1, 0]),
        ("recipe.lr", [-0.1, 0, NAN, INF]),
        ("recipe.momentum", [-0.1, 1, NAN]),
        ("recipe.weight_decay", [-0.1, NAN, INF]),
        ("recipe.milestones", [[-1], [74, NAN], [74, 10]]),
        ("recipe.lr_factors", [[0], [NAN], [-1], [], [0.1, 0.01]]),  # of one milestone
        ("recipe.crop_padding", [-1]),
        ("train.epochs", [-1, 0]),
        ("train.batch_size", [-1, 0, 1]),
        ("train.max_seconds", [-1, 0, NAN, INF]),
        ("eval.epsilon", [-1, 0, NAN, INF]),
        ("eval.step_size", [-1, 0, NAN]),
        ("eval.steps", [-1]),
        ("eval.batch_size", [-1, 0]),
        ("eval.every_epochs", [-1, 0]),
    ],
)
def test_values_out_of_range_are_refused_by_key(
    composed: DictConfig, key: str, values: list[Any]
) -> None:
    for value in values:
        with pytest.raises(UserError) as error:
            changed(composed, {key: value})
        assert str(error.value).startswith(f"{key} must be "), value


def test_an_image_folder_has_a_size() -> None:
    for value in (-1, 0):
        with pytest.raises(UserError, match=r"^dataset\.image_size must be at least 1"):
            compose(["dataset=imagefolder", "dataset.root=photos", f"dataset.image_size={value}"])


@pytest.mark.parametrize(
    "override",
    [
        "model.depth=10",
        "+model.depth=10",
        "model.settings.width=3",
        "model.factory=a.py:b",
        "dataset.image_size=32",
        "dataset.root=photos",
    ],
)
def test_what_the_chosen_option_does_not_read_is_refused(override: str) -> None:
    key = override.strip("+").partition("=")[0].replace(".width", "")
    add = "; add model=own.*" if key in ("model.settings", "model.factory") else ""
    sentence = rf"^{key} is no setting with \w+=(small_cnn|digits){add}\.$"
    with pytest.raises(UserError, match=sentence):
        compose_anew(["dataset=digits", "model=small_cnn", override])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("model.factory=a.py:N", "model.factory is no setting with this model; add model=own."),
        ("bt.factory=a.py:N", "bt.factory is no setting with bt=bullettrain; add bt=own."),
        ("sparsity=snip sparsity.factory=a.py:N",
         "sparsity.factory is no setting with this sparsity; add sparsity=own."),
        ("model.settings.width=4",
         "model.settings is no setting with this model; add model=own or torchvision or timm."),
        ("model=own model.factory=a.py:N model.width=4",
         "model.width is no setting with model=own. Did you mean model.settings.width?"),
        ("bt=own bt.factory=a.py:N bt.gama=1",
         "There is no setting bt.gama. Did you mean bt.gamma or bt.settings.gama?"),
        ("defense=own defense.factory=a.py:N defense.temperature=1",
         "There is no setting defense.temperature. Did you mean defense.settings.temperature?"),
    ],
)  # fmt: skip
def test_settings_of_own_parts_are_told_from_those_of_options(words: str, sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        compose(words.split())


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"model.mean": [127.5], "model.std": [0.5]}, r"model.mean must be in \[0, 1\]"),
        ({"model.mean": [0.5]}, "model.std"),
        ({"model.std": [0.5]}, "model.std"),
        ({"model.mean": [0.5], "model.std": [0.0]}, "model.std"),
        ({"model.mean": [0.5], "model.std": [NAN]}, "model.std"),
        ({"model.mean": [NAN], "model.std": [0.5]}, "model.mean"),
    ],
)
def test_a_normalisation_needs_mean_and_positive_std(
    composed: DictConfig, settings: dict[str, Any], key: str
) -> None:
    with pytest.raises(UserError, match=key):
        changed(composed, settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"bt.gamma": 1.0},
        {"bt.gamma": 1e-6},
        {"bt.momentum": 0.0},
        {"bt.n_o": 10, "bt.n_r": 10},
        {"bt.n_b": 0, "bt.n_r": 0},
        {"bt.n_b": 20},
        {"attack.steps": 1, "bt.n_r": 1},
        {"attack.start_std": 0.0, "attack.start": "uniform"},
        {"defense.beta": 0.0},
        {"eval.steps": 0},
        {"eval.batch_size": 1},
        {"recipe.weight_decay": 0.0},
        {"recipe.milestones": [], "recipe.lr_factors": []},
        {"recipe.crop_padding": 0},
        {"train.epochs": 1},
        {"train.batch_size": 2},
        {"train.max_seconds": 0.5},
        {"dataset.train_examples": 2, "dataset.test_examples": 1, "dataset.val_examples": 0},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"model.mean": [0.5, 0.4, 0.3], "model.std": [0.2, 0.2, 0.2]},
    ],
    ids=str,
)
def test_values_at_the_edge_of_the_range_are_right(
    composed: DictConfig, settings: dict[str, Any]
) -> None:
    config = to_dict(changed(composed, settings))
    for key, value in settings.items():
        node = config
        for part in key.split("."):
            node = node[part]
        assert node == value


# Defaults


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 0),
        ("dataset.name", "cifar10"),
        ("dataset.train_examples", None),
        ("dataset.val_examples", 0),
        ("model.name", "wrn_34_10"),
        ("model.architecture", "wide_resnet"),
        ("model.depth", 34),
        ("model.width", 10),
        ("model.mean", None),
        ("defense.name", "trades"),
        ("defense.beta", 6.0),
        ("attack.steps", 10),
        ("attack.epsilon", 0.031),
        ("attack.step_size", 0.007),
        ("attack.start", "normal"),
        ("attack.start_std", 0.001),
        ("bt.name", "bullettrain"),
        ("bt.n_b", 10),
        ("bt.n_r", 2),
        ("bt.n_o", 0),
        ("bt.gamma", 0.8),
        ("bt.step_size_b", 0.007),
        ("bt.forward_unperturbed", False),
        ("bt.score", "fresh"),
        ("recipe.milestones", [74]),
        ("recipe.lr", 0.1),
        ("recipe.lr_factors", [0.1]),
        ("rival.name", "none"),
        ("recipe.weight_decay", 2e-4),
        ("recipe.momentum", 0.9),
        ("recipe.crop_padding", 4),
        ("recipe.flip", True),
        ("train.epochs", 76),
        ("train.batch_size", 128),
        ("train.max_seconds", None),
        ("eval.steps", 20),
        ("eval.step_size", 0.003),
        ("eval.epsilon", 0.031),
        ("logger.name", "jsonl"),
        ("device", "auto"),
    ],
)
def test_the_defaults_are_the_papers(composed: DictConfig, key: str, value: object) -> None:
    node: Any = to_dict(changed(composed, {}))
    for part in key.split("."):
        node = node[part]
    assert node == value


def test_the_experiments_are_the_rows_of_table_2() -> None:
    plain, ours = compose(["experiment=table2_trades"]), compose(["experiment=table2_bt_nr2"])
    defaults = compose()
    assert (plain.bt.name, ours.bt.name) == (AllocatorName.uniform, AllocatorName.bullettrain)
    assert (ours.bt.n_b, ours.bt.n_r, ours.bt.n_o, ours.bt.gamma) == (10, 2, 0, 0.8)
    assert compose(["experiment=table2_bt_nr2", "bt.n_r=0"]).bt.n_r == 0
    for section in ("dataset", "model", "attack", "defense", "recipe", "train", "eval"):
        assert getattr(plain, section) == getattr(ours, section) == getattr(defaults, section)


@pytest.mark.parametrize(
    ("overrides", "steps", "step_size"),
    [
        ([], 10, 0.007),
        (["attack.steps=3"], 3, 0.007),
        (["bt.n_b=7"], 7, 1.7 * 0.031 / 7),  # another N_B than the plain attack's N
        (["bt.n_b=7", "bt.step_size_b=0.01"], 7, 0.01),
    ],
)
@pytest.mark.parametrize("bt", ["uniform", "bullettrain"])
def test_boundary_examples_step_like_the_plain_defense_or_by_the_paper_s_rule(
    bt: str, overrides: list[str], steps: int, step_size: float
) -> None:
    chosen = compose([f"bt={bt}", *overrides]).bt
    assert chosen.n_b == steps
    assert chosen.step_size_b == pytest.approx(step_size)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_steps_reach_the_ball_s_edge_whatever_its_radius(dataset: str) -> None:
    config = compose([f"dataset={dataset}", "attack.epsilon=0.1"])
    assert config.attack.step_size == pytest.approx(0.007 * 0.1 / 0.031)
    assert config.eval.epsilon == 0.1
    assert config.eval.step_size == pytest.approx(0.003 * 0.1 / 0.031)


# What each allocator reads beyond what all have; `settings` takes any names.
READS = {
    "uniform": set[str](),
    "bullettrain": {"n_r", "n_o", "warmup_epochs"},
    "early_exit": {"n_r", "n_o", "warmup_epochs", "patience"},
    "random": {"n_r", "n_o", "warmup_epochs", "fractions"},
    "oracle": {"n_r", "n_o", "warmup_epochs", "oracle_steps", "oracle_step_size"},
    "gaussian": {"warmup_epochs", "mean_steps"},
    "own": {"warmup_epochs", "factory", "settings"},
}


@pytest.mark.parametrize("name", READS)
def test_an_allocator_refuses_what_it_does_not_read(name: str) -> None:
    option = [f"bt={name}", *NEEDS.get(f"bt={name}", [])]
    cfg = composed_by_hydra(option, "train")
    unread = sorted(set[str]().union(*READS.values()) - READS[name])

    def sentence(key: str) -> str:
        add = "; add bt=own" if key in ("factory", "settings") else ""
        own = rf" Did you mean bt.settings.{key}\?" if name == "own" else ""
        return rf"^bt.{key} is no setting with bt={name}{add}\.{own}$"

    for key in unread:  # as Hydra hands +key=1 on
        with pytest.raises(UserError, match=sentence(key)):
            changed(cfg, {f"bt.{key}": 1})
    with pytest.raises(UserError, match=sentence(unread[0])):
        compose([*option, f"bt.{unread[0]}=1"])


def left_out(cfg: Any, words: list[str]) -> list[str]:
    return without_replaced(cfg, words)[1]


def test_what_an_experiment_gives_a_replaced_option_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = ["experiment=cheap_bullettrain", "bt=uniform"]
    told = [
        "bt=uniform has no bt.n_r, bt.robust_share, bt.guard: left out, though "
        "experiment=cheap_bullettrain gives them."
    ]
    assert left_out(composed_by_hydra(words, "train"), words) == told
    assert compose_anew(words).bt.n_b == 1  # as Python has it
    assert [record.getMessage() for record in caplog.records] == told
    with pytest.raises(UserError, match=r"^bt\.n_r is no setting with bt=uniform\.$"):
        compose([*words, "bt.n_r=1"])
    kept = composed_by_hydra(["experiment=cheap_bullettrain"], "train")
    assert left_out(kept, ["experiment=cheap_bullettrain"]) == []
    words = ["experiment=cheap_kept", "attack=l2_pgd"]
    told = r"experiment=cheap_kept sets attack\.start; attack\.start=…"
    with pytest.raises(UserError, match=told):
        compose(words)
    with pytest.raises(UserError, match=r"\(attack\.store=bf16\)\.$"):
        compose([*words, "attack.start=kept"])


def test_only_what_an_experiment_wrote_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "bt/wrong": "defaults: [uniform, _self_]\nn_r: 1\n",
        "experiment/ours": "# @package _global_\ndefaults: [cheap_bullettrain]\n"
        "bt: {n_b: 3, n_r: 2}\n",
        "experiment/torn": "# @package _global_\nbt: {n_r: 2, n_b: 1}\n",
        "experiment/typo": "# @package _global_\nbt: {nb: 3}\n",
        "experiment/sub/ours": "# @package _global_\nbt: {n_b: 3, n_r: 2}\n",
        "experiment/bare": "bt: {n_r: 2}\n",
        "experiment/bare_too": "defaults: [override /bt: uniform]\n",
        "defense/bare": "beta: 3\n",
    }.items():
        Path("mine", name).parent.mkdir(parents=True, exist_ok=True)
        Path("mine", f"{name}.yaml").write_text(text)
    for words, said in (
        ("experiment=cheap_bullettrain bt=wrong", "bt.n_r is no setting with bt=uniform."),
        ("experiment=typo bt=uniform", "There is no setting bt.nb. Did you mean bt.n_b?"),
        ("experiment=ours bt.n_o=4", "bt.n_o must be at most bt.n_r = 2, not 4. experiment=ours "
         "sets bt.n_r; bt.n_r=… would change that."),
        ("experiment=sub/ours bt.n_o=4", "bt.n_o must be at most bt.n_r = 2, not 4. "
         "experiment=sub/ours sets bt.n_r; bt.n_r=… would change that."),
        *((f"experiment={name}", "An experiment's file begins with the line "
           "`# @package _global_`.") for name in ("bare", "bare_too")),
        ("defense=bare", "defense.beta is set by a file whose `defaults` do not say what it is an "
         "option of; `- trades` as their first line, for example, does."),
    ):  # fmt: skip
        command = ["train", "--config-dir", "mine", "dataset=digits", *words.split()]
        assert main(command) == 1
        assert capsys.readouterr().err == f"btrain: {said}\n"
    assert main(["train", "--config-dir", "mine", "dataset=digits", "experiment=torn"]) == 1
    told = "experiment=torn sets bt.n_r and bt.n_b; bt.n_r=… or bt.n_b=… would change that.\n"
    assert capsys.readouterr().err.endswith(told)


def test_an_allocator_reads_what_is_its_own() -> None:
    for name, own in READS.items():
        option = [f"bt={name}", *NEEDS.get(f"bt={name}", [])]
        found = set(to_dict(compose(option))["bt"])
        assert found & set[str]().union(*READS.values()) == own


@pytest.mark.parametrize(
    ("option", "key", "values"),
    [
        ("early_exit", "patience", [-1]),
        ("gaussian", "mean_steps", [-1, NAN, INF]),
        ("gaussian", "warmup_epochs", [-1]),
        ("oracle", "oracle_steps", [-1, 0]),
        ("oracle", "oracle_step_size", [-1, 0, NAN, INF, 8]),
        ("random", "n_r", [-1, 11]),
    ],
)
def test_an_allocator_s_own_settings_have_ranges(option: str, key: str, values: list[Any]) -> None:
    cfg = composed_by_hydra([f"bt={option}"], "train")
    for value in values:
        with pytest.raises(UserError, match=rf"^bt\.{key} must be "):
            changed(cfg, {f"bt.{key}": value})


def test_uniform_has_one_budget() -> None:
    assert compose(["bt=uniform", "bt.n_b=1"]).bt.n_b == 1
    plain = compose(["experiment=fastest", "bt=uniform", "bt.n_b=10"])  # an experiment's n_b goes
    assert plain.bt.n_b == 10
    assert compose(["experiment=fastest"]).bt.n_r == 2


BAD_COMBINATIONS = [
    (["defense=augmix", "bt.n_b=10"], ["defense=augmix", "bt.n_b"]),
    (["defense=augmix", "bt.n_r=1"], ["defense=augmix", "bt.n_r"]),
    (["defense=augmix", "bt=random", "bt.n_r=1", "bt.n_o=1"], ["defense=augmix", "bt.n_r"]),
    (["defense=augmix", "bt=oracle"], ["bt=oracle", "defense=augmix"]),
    (["defense=augmix", "bt=gaussian"], ["bt=gaussian", "defense=augmix"]),
    (["defense=augmix", "defense.jsd=false"], ["defense.jsd=false", "bt=uniform"]),
    (["defense=augmix", "defense.beta=6"], ["defense.beta", "defense=augmix"]),
    (["defense=augmix", "attack=linf_pgd"], ["attack=linf_pgd", "defense=augmix"]),
    (["attack=augmix"], ["attack=augmix", "defense=trades"]),
    (["defense=pgd", "defense.beta=6"], ["defense.beta", "defense=pgd"]),
    (["defense=mart", "defense.beta=null"], ["defense.beta", "defense=mart"]),
    (["defense=pgd", "bt.share_clean_forward=true"], ["bt.score=shared", "defense=pgd"]),
    (["bt=oracle", "bt.score=last"], ["bt.score=last", "bt=oracle"]),
    (["defense=pgd", "bt.forward_unperturbed=true"], ["bt.forward_unperturbed", "defense=pgd"]),
    (["defense=augmix", "rival=fast"], ["defense=augmix", "rival=fast"]),
    (["defense=augmix", "rival=mma"], ["defense=augmix", "rival=mma"]),
    (["defense=augmix", "bt=early_exit"], ["defense=augmix", "bt=early_exit"]),
    (["rival=mma"], ["rival=mma", "defense=trades"]),
    (["rival=free", "defense=mart"], ["rival=free", "defense=mart"]),
    (["rival=free", "defense=pgd", "bt.warmup_epochs=1"], ["bt=uniform", "bt.warmup_epochs"]),
    (["rival=yopo", "bt=bullettrain"], ["rival=yopo", "bt=bullettrain"]),
    (["rival=gradalign"], ["attack.start=clean", "defense=trades"]),
    (["defense=pgd", "rival=free", "attack.mode=eval"], ["attack.mode", "rival=free"]),
    (["defense=pgd", "rival=mma", "attack.mode=train"], ["attack.mode", "rival=mma"]),
    (["defense=pgd", "rival=mma", "bt.n_b=3"], ["bt.n_b", "rival=mma"]),
    (
        ["defense=pgd", "rival=free", "attack.epsilon_warmup_epochs=1"],
        ["attack.epsilon_warmup_epochs", "rival=free"],
    ),
    (
        ["defense=augmix", "attack.epsilon_warmup_epochs=1"],
        ["attack.epsilon_warmup_epochs", "defense=augmix"],
    ),
    (["rival=fast", "bt.warmup_epochs=1"], ["bt=uniform", "bt.warmup_epochs"]),
    (
        ["defense=pgd", "rival=mma", "rival.max_margin=0.001"],
        ["rival.max_margin", "rival.first_margin"],
    ),
    (["rival.replays=4"], ["rival.replays", "rival=none"]),
    (["rival=fast", "rival.bisections=4"], ["rival.bisections", "rival=fast"]),
    (["bt.fractions=[0.2,0.6,0.2]"], ["bt.fractions", "bt=bullettrain"]),
    (["bt=random", "bt.fractions=[0.2,0.6,0.1]"], ["bt.fractions"]),
    (["bt=random", "bt.fractions=[0.2,0.8]"], ["bt.fractions"]),
    (["defense=augmix", "attack.steps=5"], ["defense=augmix", "attack.steps"]),
    (["defense=augmix", "recipe.momentum=0"], ["recipe.nesterov", "momentum"]),
    (["attack.mode=train"], ["attack.mode=train", "bt=bullettrain"]),
    (["rival=fast", "bt=bullettrain"], ["rival=fast", "bt=bullettrain"]),
    (["attack.mode=train", "bt=bullettrain"], ["attack.mode=train", "bt=bullettrain"]),
]


@pytest.mark.parametrize(("overrides", "named"), BAD_COMBINATIONS)
def test_bad_combinations_name_both_keys(overrides: list[str], named: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        compose(overrides)
    assert all(word in str(caught.value) for word in named)


def test_the_oracle_may_starve_any_class() -> None:
    bt = compose(["experiment=figure2_no_boundary", "bt.n_r=3", "bt.n_o=5"]).bt
    assert (bt.n_b, bt.n_r, bt.n_o) == (0, 3, 5)
    assert bt.oracle_step_size == pytest.approx(1.7 * 0.3 / 10)  # whatever the budgets


def test_fast_is_one_step_of_a_quarter_more_than_epsilon_from_a_uniform_start() -> None:
    config = compose(["defense=mart", "rival=fast"])
    assert (config.bt.name.name, config.bt.n_b, config.attack.steps) == ("uniform", 1, 10)
    assert config.bt.step_size_b == pytest.approx(1.25 * 0.031)
    assert (config.attack.start.name, config.attack.mode.name) == ("uniform", "train")
    assert compose(["rival=fast", "bt.n_b=5"]).bt.step_size_b == pytest.approx(1.25 * 0.031 / 5)


def test_free_divides_the_epochs_by_its_replays() -> None:
    free = ["defense=pgd", "rival=free", "dataset=mnist", "model=small_cnn"]
    assert compose(free).train.epochs == 2  # ten by eight, rounded up
    assert compose([*free, "rival.replays=5"]).train.epochs == 2
    assert compose([*free, "rival.replays=3", "train.epochs=9"]).train.epochs == 9


def test_defenses_come_with_their_published_settings() -> None:
    mart = compose(["defense=mart"])
    assert (mart.defense.beta, mart.recipe.weight_decay, mart.train.epochs) == (6.0, 7e-4, 90)
    mart = compose(["experiment=mart_resnet18"])
    assert (mart.defense.beta, mart.recipe.weight_decay, mart.recipe.lr) == (5.0, 3.5e-3, 0.01)
    madry = compose(["experiment=pgd_cifar10"])
    assert madry.attack.epsilon == pytest.approx(8 / 255)
    assert madry.bt.step_size_b == pytest.approx(2 / 255)
    mnist = compose(["experiment=figure2_pgd"])
    assert (mnist.attack.epsilon, mnist.bt.n_b, mnist.train.epochs) == (0.3, 7, 10)
    assert mnist.bt.step_size_b == pytest.approx(1.7 * 0.3 / 7)
    augmix = compose(["experiment=table1_cifar10_augmix_bt"])
    assert (augmix.model.mean, augmix.model.std) == ([0.5], [0.5])
    assert (augmix.defense.jsd_weight, augmix.train.epochs, augmix.recipe.nesterov) == (
        12,
        100,
        True,
    )
    assert (augmix.bt.n_b, augmix.bt.n_r, augmix.bt.n_o, augmix.attack.steps) == (1, 0, 0, 2)


@pytest.mark.parametrize(
    ("dataset", "overrides", "epsilon"),
    [
        ("mnist", [], 0.3),
        ("mnist", ["attack.epsilon=0.1"], 0.1),
        ("mnist", ["bt.n_b=5"], 0.3),
        ("digits", [], 0.15),
        ("digits", ["attack.epsilon=0.2", "attack.steps=4"], 0.2),
    ],
)
def test_step_sizes_follow_epsilon_on_grey_images(
    dataset: str, overrides: list[str], epsilon: float
) -> None:
    config = compose([f"dataset={dataset}", *overrides])
    assert config.attack.epsilon == config.eval.epsilon == epsilon
    assert config.attack.step_size == pytest.approx(1.7 * epsilon / config.attack.steps)
    assert config.bt.step_size_b == pytest.approx(1.7 * epsilon / config.bt.n_b)
    assert config.eval.step_size == pytest.approx(epsilon / 10)


def test_another_radius_of_the_evaluation_leaves_the_attack_alone() -> None:
    config = compose(["dataset=mnist", "eval.epsilon=0.2"])
    assert config.attack.epsilon == 0.3
    assert config.attack.step_size == pytest.approx(1.7 * 0.3 / 10)
    assert config.eval.step_size == pytest.approx(0.02)


# Lengths in pixel units

PIXELS = r"\(\[0, 1\] pixel units, like 8/255\), not 8(\.0)?\.$"
MMA = ["defense=pgd", "rival=mma"]


def value_of(config: Config, key: str) -> Any:
    return flat(to_dict(config))[key]


@pytest.mark.parametrize(
    ("key", "options", "most"),
    [
        ("attack.epsilon", [], 1),
        ("dataset.epsilon", [], 1),
        ("eval.epsilon", [], 1),
        ("rival.max_margin", MMA, 1),
        ("attack.step_size", [], 2),
        ("attack.start_std", [], 1),
        ("bt.step_size_b", [], 2),
        ("bt.oracle_step_size", ["bt=oracle"], 2),
        ("eval.step_size", [], 2),
    ],
)
def test_a_length_may_be_a_fraction_and_is_at_most_what_pixels_allow(
    key: str, options: list[str], most: float
) -> None:
    cfg = composed_by_hydra([*options, f"{key}=8/255"], "train")
    assert value_of(changed(cfg, {}), key) == 8 / 255
    least = "at least" if key == "attack.start_std" else "greater than"
    with pytest.raises(UserError, match=f"^{key} must be {least} 0 and at most {most} {PIXELS}"):
        changed(cfg, {key: 8})
    for wrong in ("8/", "8/0", "a/255", "255/8/2", "eight", None):
        with pytest.raises(
            UserError, match=rf"^{key} must be a number, like 0\.031 or 8/255, not "
        ):
            changed(cfg, {key: wrong})


def test_lengths_that_follow_a_fraction_follow_its_value() -> None:
    config = compose(["dataset.epsilon=8/255"])
    assert (config.attack.epsilon, config.eval.epsilon) == (8 / 255, 8 / 255)
    assert config.attack.step_size == pytest.approx(8 / 255 * 7 / 31)
    assert config.eval.step_size == pytest.approx(8 / 255 * 3 / 31)
    config = compose(["attack.epsilon=8/255", "bt.n_b=5"])
    assert config.bt.step_size_b == pytest.approx(1.7 * 8 / 255 / 5)
    config = compose(["attack.step_size=2/255"])
    assert config.bt.step_size_b == 2 / 255  # N_B steps like the plain attack's
    assert compose([*MMA, "attack.epsilon=8/255"]).rival.max_margin == pytest.approx(12 / 255)


@pytest.mark.parametrize("mean", [125.3, 1.01])
def test_a_mean_of_bytes_is_refused(mean: float) -> None:
    with pytest.raises(UserError, match=r"^model\.mean must be in \[0, 1\], in pixel units"):
        compose([f"model.mean=[{mean}]", "model.std=[0.25]"])


@pytest.mark.parametrize("radius", ["1.5", "3/2"])
def test_an_l2_radius_may_be_longer_than_a_pixel(radius: str) -> None:
    l2 = ["attack=l2_pgd", f"attack.epsilon={radius}", "attack.step_size=1.2"]
    config = compose([*l2, "bt.step_size_b=2.5", "eval.step_size=2.5"])
    assert (config.attack.epsilon, config.eval.epsilon) == (1.5, 1.5)
    assert compose(["attack=l2_pgd", *MMA, "rival.max_margin=3/2"]).rival.max_margin == 1.5
    with pytest.raises(UserError, match=r"^attack\.epsilon must be finite and greater than 0"):
        compose(["attack=l2_pgd", "attack.epsilon=-1"])
    with pytest.raises(UserError, match=r"^dataset\.epsilon must be greater than 0 and at most 1"):
        compose(["attack=l2_pgd", "dataset.epsilon=1.5"])


def test_a_sweep_and_a_folder_of_the_user_s_take_fractions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "bytes.yaml").write_text(
        "# @package _global_\n"
        "attack: {step_size: 2/255}\nbt: {step_size_b: 3/255}\neval: {epsilon: 10/255, steps: 1}\n"
    )
    small = [
        "dataset.train_examples=20",
        "dataset.test_examples=10",
        "train.epochs=1",
        "device=cpu",
    ]
    sweep = ["--multirun", "attack.epsilon=4/255,8/255", "experiment=bytes"]
    command = ["train", "--config-dir", "mine", *sweep, "dataset=digits", "model=small_cnn", *small]
    assert main(command) == 0
    runs = [read_yaml(file) for file in sorted(tmp_path.glob("runs/*/config.yaml"))]
    assert {run["attack"]["epsilon"] for run in runs} == {4 / 255, 8 / 255}
    for run in runs:
        assert (run["attack"]["step_size"], run["bt"]["step_size_b"]) == (2 / 255, 3 / 255)
        assert run["eval"]["epsilon"] == 10 / 255


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experiment=table2_bt_nr2", "bt.n_r=0", "++model.depth=16", "seed=3"],
        ["dataset=digits", "model=small_cnn", "bt=own", "bt.factory=a.py:B", "bt.settings.k=1/2"],
        ["attack.epsilon=4/255", "attack=l2_pgd", "attack.epsilon=8/255", "++recipe.lr=0.3"],
    ],
)
def test_the_tests_quick_way_comes_to_the_same(overrides: list[str]) -> None:
    assert compose(overrides) == compose(overrides) == compose_anew(overrides)


# Run names

VARIANTS = [
    [],
    ["bt.gamma=0.5"],
    ["bt.gamma=0.65"],
    ["bt.n_r=0"],
    ["bt.n_r=0", "bt.gamma=0.5"],
    ["bt=uniform"],
    ["seed=1"],
    ["model=small_cnn"],
    ["model.width=2"],
    ["dataset=cifar100"],
    ["dataset=digits"],
    ["dataset.train_examples=100"],
    ["attack.epsilon=0.1"],
    ["defense=pgd", "attack.start=clean"],
    ["recipe=trades_mnist"],
    ["recipe.milestones=[1,2]", "recipe.lr_factors=[1,2]"],
    ["recipe.milestones=[12]"],
    ["recipe.flip=false"],
    ["experiment=table2_bt_nr2"],
    ["++attack.steps=4"],
    ["dataset=imagefolder", "dataset.root=photos/pets"],
    ["dataset=imagefolder", "dataset.root=photos/cars and planes"],
]


def name_of(overrides: list[str]) -> str:
    run_dir = compose(overrides).run_dir
    assert run_dir.parent == Path("runs")
    return run_dir.name


def as_hydra_reads(value: str) -> object:
    """The value of key=value on the command line."""
    return OverridesParser.create().parse_override(f"key={value}").value()


def test_different_settings_have_different_names_that_hydra_can_read() -> None:
    seen: dict[str, list[str]] = {}
    for overrides in VARIANTS:
        name = name_of(overrides)
        assert re.fullmatch(r"[\w.-]+", name)
        assert len(name) <= 150
        assert name not in seen, (overrides, seen[name])
        seen[name] = overrides
        assert as_hydra_reads(f"runs/{name}") == f"runs/{name}"
    # The whole way, for the name with most in it.
    assert compose([f"run.dir={max(seen, key=len)}"]).run.dir == max(seen, key=len)


def test_a_name_is_readable() -> None:
    overrides = ["dataset=mnist", "attack.epsilon=0.1", "model=small_cnn"]
    assert name_of(overrides) == "mnist-small_cnn-trades-bullettrain-attack.epsilon_0.1-seed0"


def test_the_order_of_overrides_does_not_matter() -> None:
    overrides = ["bt.n_r=0", "dataset=digits", "bt.gamma=0.5", "model=small_cnn"]
    config = compose(overrides)
    assert len({run_name(config, order) for order in permutations(overrides)}) == 1
    assert name_of(overrides[::-1]) == name_of(overrides)


def test_of_a_repeated_key_only_the_last_value_counts() -> None:
    twice = ["bt.gamma=0.5", "bt.gamma=0.6"]
    assert compose(twice).bt.gamma == 0.6
    assert name_of(twice) != name_of(twice[::-1])


@pytest.mark.parametrize(
    "override",
    [
        "device=cpu",
        "logger=wandb",
        "logger.project=other",
        "dataset.download=false",
    ],
)
def test_what_leaves_the_result_alone_leaves_the_name_alone(override: str) -> None:
    assert name_of([override]) == "cifar10-wrn_34_10-trades-bullettrain-seed0"


def test_an_image_folder_goes_by_its_own_name() -> None:
    assert name_of(["dataset=imagefolder", "dataset.root=photos/pets"]).startswith("pets-wrn_34_10")


NOT_IN_NAME = (
    "run.",
    "logger.",
    "dataset.root",
    "dataset.download",
    "train.max_seconds",
    "train.checkpoint_every",
    "train.score_every",
    "bt.probe_every",
    "defense.memory",
)


def test_long_names_stay_short_and_apart(composed: DictConfig) -> None:
    config = changed(composed, {})
    overrides = [f"{leaf}=12345" for leaf in LEAVES if leaf not in ("seed", "device")]
    assert len(overrides) >= 40
    long = run_name(config, overrides)
    assert len(long) <= 150
    assert re.fullmatch(r"[\w.-]+", long)
    assert run_name(config, overrides[::-1]) == long
    others = {
        run_name(config, [*overrides[:i], overrides[i] + "6", *overrides[i + 1 :]])
        for i, override in enumerate(overrides)
        if not override.startswith(NOT_IN_NAME)
    }
    assert len(others) >= 40
    assert long not in others
    assert as_hydra_reads(f"runs/{long}") == f"runs/{long}"


# config.yaml


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["dataset=digits", "model=small_cnn", "bt=uniform", "attack.start_std=1e-7"],
        ["dataset=imagefolder", "dataset.root='007'", "run.dir='1e3'", "seed=9007199254740993"],
        ["model.mean=[0.5,0.25,1e-5]", "model.std=[1,1,1]", "logger.project='yes: #1'"],
    ],
)
def test_the_yaml_text_holds_every_value_and_no_interpolation(
    tmp_path: Path, overrides: list[str]
) -> None:
    config = compose(overrides)
    text = to_yaml(config)
    assert "${" not in text
    assert yaml.safe_load(text) == to_dict(config)
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert read_yaml(tmp_path / "config.yaml") == to_dict(config)


def test_the_plain_containers_hold_every_key_of_the_schema(composed: DictConfig) -> None:
    def same(plain: dict[str, Any], node: Any) -> None:
        assert plain.keys() == {field.name for field in dataclasses.fields(node)}
        for key, value in plain.items():
            if isinstance(value, dict):
                same(value, getattr(node, key))

    config = changed(composed, {})
    same(to_dict(config), config)
    assert len(to_dict(config)) == len(dataclasses.fields(Config))
    assert {"n_r", "n_o", "gamma"} < to_dict(config)["bt"].keys()


# Run folders of earlier versions

OLDER = {
    "dataset=digits model=small_cnn bt.gamma=0.7": """\
dataset: {name: digits, root: data, download: true, image_size: null,
  train_examples: null, test_examples: null, val_examples: 0,
  epsilon: 0.15, step_size: 0.025500000000000002, eval_step_size: 0.015}
model: {name: small_cnn, architecture: small_cnn, width: 16, depth: null,
  mean: null, std: null}
attack: {name: linf_pgd, steps: 10, epsilon: 0.15, step_size: 0.025500000000000002,
  start: normal, start_std: 0.001, epsilon_warmup_epochs: 0,
  mode: eval, augmix: null}
defense: {name: trades, beta: 6.0, jsd: null, jsd_weight: null}
bt: {name: bullettrain, n_b: 10, n_r: 2, n_o: 0, gamma: 0.7, momentum: 0.9,
  step_size_b: 0.025500000000000002, metric: svar, warmup_epochs: 0,
  patience: 1, mean_steps: 4.0, fractions: null, oracle_steps: 10,
  oracle_step_size: 0.025500000000000002, forward_unperturbed: false,
  share_clean_forward: false, pool: 1, probe_every: 1}
rival: {name: none, grad_align_weight: null, replays: null, max_margin: null,
  first_margin: null, bisections: null, clean_weight: null}
recipe: {name: trades_digits, epochs: 30, batch_size: 128, optimizer: sgd,
  lr: 0.05, momentum: 0.9, nesterov: false, weight_decay: 0.0002,
  schedule: step, milestones: [24.0], lr_factors: [0.1], peak: 0.4,
  crop_padding: 0, flip: false, early_stop_on_collapse: false,
  ema: 0.0}
logger: {name: jsonl, mode: online, project: btrain, group: null, tags: []}
train: {epochs: 30, batch_size: 128, max_seconds: null, checkpoint_every: 1,
  score_every: null, on_nonfinite: stop, deterministic: false,
  precision: float32, channels_last: false, compile: false,
  cuda_graphs: never}
eval: {epsilon: 0.15, step_size: 0.015, steps: 20, batch_size: 500,
  every_epochs: 1}
run: {dir: runs/digits-small_cnn-trades-bullettrain-bt.gamma_0.7-seed0,
  resume: auto}
seed: 0
device: "auto"
""",
    "experiment=table3_mart_fast dataset=cifar100": """\
dataset: {name: cifar100, root: data, download: true, image_size: null,
  train_examples: null, test_examples: null, val_examples: 0,
  epsilon: 0.031, step_size: 0.007, eval_step_size: 0.003}
model: {name: wrn_34_10, architecture: wide_resnet, width: 10, depth: 34,
  mean: null, std: null}
attack: {name: linf_pgd, steps: 10, epsilon: 0.031, step_size: 0.007,
  start: uniform, start_std: 0.001, epsilon_warmup_epochs: 0,
  mode: train, augmix: null}
defense: {name: mart, beta: 6.0, jsd: null, jsd_weight: null}
bt: {name: uniform, n_b: 1, n_r: 2, n_o: 0, gamma: 0.8, momentum: 0.9,
  step_size_b: 0.03875, metric: svar, warmup_epochs: 0, patience: 1,
  mean_steps: 4.0, fractions: null, oracle_steps: 10, oracle_step_size: 0.007,
  forward_unperturbed: false, share_clean_forward: false, pool: 1,
  probe_every: 1}
rival: {name: fast, grad_align_weight: null, replays: null, max_margin: null,
  first_margin: null, bisections: null, clean_weight: null}
recipe: {name: mart_cifar100, epochs: 90, batch_size: 128, optimizer: sgd,
  lr: 0.1, momentum: 0.9, nesterov: false, weight_decay: 0.0007,
  schedule: step, milestones: [74.0, 89.0], lr_factors: [0.1,
    0.01], peak: 0.4, crop_padding: 4, flip: true, early_stop_on_collapse: false,
  ema: 0.0}
logger: {name: jsonl, mode: online, project: btrain, group: null, tags: []}
train: {epochs: 90, batch_size: 128, max_seconds: null, checkpoint_every: 1,
  score_every: null, on_nonfinite: stop, deterministic: false,
  precision: float32, channels_last: false, compile: false,
  cuda_graphs: never}
eval: {epsilon: 0.031, step_size: 0.003, steps: 20, batch_size: 500,
  every_epochs: 1}
run: {dir: runs/cifar100-wrn_34_10-mart-uniform-experiment_table3_mart_fast-seed0,
  resume: auto}
seed: 0
device: "auto"
""",
    "defense=augmix dataset=imagefolder dataset.root=photos bt=random": """\
dataset: {name: imagefolder, root: photos, download: true, image_size: 32,
  train_examples: null, test_examples: null, val_examples: 0,
  epsilon: 0.031, step_size: 0.007, eval_step_size: 0.003}
model: {name: wrn_34_10, architecture: wide_resnet, width: 10, depth: 34,
  mean: [0.5], std: [0.5]}
attack: {name: augmix, steps: 2, epsilon: 0.031, step_size: 0.007, start: normal,
  start_std: 0.001, epsilon_warmup_epochs: 0, mode: eval, augmix: {
    width: 3, depth: -1, severity: 3.0, all_ops: false}}
defense: {name: augmix, beta: null, jsd: true, jsd_weight: 12.0}
bt: {name: random, n_b: 1, n_r: 0, n_o: 0, gamma: 0.8, momentum: 0.9,
  step_size_b: 0.0527, metric: svar, warmup_epochs: 0, patience: 1,
  mean_steps: 4.0, fractions: null, oracle_steps: 10, oracle_step_size: 0.0052699999999999995,
  forward_unperturbed: false, share_clean_forward: false, pool: 1,
  probe_every: 1}
rival: {name: none, grad_align_weight: null, replays: null, max_margin: null,
  first_margin: null, bisections: null, clean_weight: null}
recipe: {name: augmix_imagefolder, epochs: 100, batch_size: 128, optimizer: sgd,
  lr: 0.1, momentum: 0.9, nesterov: true, weight_decay: 0.0005,
  schedule: cosine, milestones: [], lr_factors: [], peak: 0.4,
  crop_padding: 4, flip: true, early_stop_on_collapse: false,
  ema: 0.0}
logger: {name: jsonl, mode: online, project: btrain, group: null, tags: []}
train: {epochs: 100, batch_size: 128, max_seconds: null, checkpoint_every: 1,
  score_every: null, on_nonfinite: stop, deterministic: false,
  precision: float32, channels_last: false, compile: false,
  cuda_graphs: never}
eval: {epsilon: 0.031, step_size: 0.003, steps: 20, batch_size: 500,
  every_epochs: 1}
run: {dir: runs/photos-wrn_34_10-augmix-random-seed0, resume: auto}
seed: 0
device: "auto"
""",
}
"""By a command: the `config.yaml` that commit 47634f9 wrote, where every option had all settings of
its group and each defense had a recipe for each data set; here a section is one flow mapping."""


def as_runs_compare(config: Config) -> dict[str, Any]:
    """Settings by key, without what did not exist and what names the folder."""
    settings = flat(to_dict(config))
    return {k: v for k, v in settings.items() if k not in ("run.dir", "dataset.l2_epsilon")}


@pytest.mark.parametrize("command", OLDER)
def test_a_configuration_of_an_earlier_version_is_read(tmp_path: Path, command: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(OLDER[command])
    today = compose(command.split())
    assert as_runs_compare(read_config(read_yaml(file), file)) == as_runs_compare(today)

    RunFolder(tmp_path).check_owner(today)  # the same command goes on
    key = "bt.gamma" if today.defense.name is not DefenseName.mart else "defense.beta"
    other = compose([*command.split(), f"{key}=0.5"])
    with pytest.raises(UserError, match=f"belongs to a run with {key}="):
        RunFolder(tmp_path).check_owner(other)


@pytest.mark.parametrize(
    ("command", "was", "now", "words"),
    [
        (0, "n_r: 2,", "n_r: 2, colour: 1,", "There is no setting bt.colour"),
        (0, "n_r: 2,", "n_r: 20,", "bt.n_r must be at most bt.n_b = 10, not 20"),
        (1, "beta: 6.0,", "beta: -1.0,", "defense.beta must be at least 0"),
        (1, "name: mart_cifar100", "name: '${seed}'", "plain values"),
        (2, "name: random", "name: dice", "bt.name"),
    ],
)
def test_of_an_earlier_configuration_only_what_was_renamed_or_unread_is_forgiven(
    tmp_path: Path, command: int, was: str, now: str, words: str
) -> None:
    text = list(OLDER.values())[command]
    assert was in text
    file = tmp_path / "config.yaml"
    file.write_text(text.replace(was, now))
    with pytest.raises(UserError) as error:
        read_config(read_yaml(file), file)
    assert str(error.value).startswith(f"{file}")
    assert words in str(error.value)
