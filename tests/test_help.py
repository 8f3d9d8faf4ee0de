"""`--help` tells every setting of every option, as it is typed, with its meaning."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from btrain.cli import main
from btrain.errors import UserError
from btrain.settings import compose as configs
from btrain.settings.help import comments, help_text
from btrain.settings.run import LoggerConfig, RecipeConfig

SINGLE: dict[str, type] = {"recipe": RecipeConfig, "logger": LoggerConfig}


def rows(text: str) -> dict[str, str]:
    """Each setting that a help page shows, with the words beside or below it."""
    joined = re.sub(r"\n {30,}", "   ", text)
    found = re.findall(r"^ {0,2}(\w+(?:\.\w+)*)=(\S*)(?: +(.*))?$", joined, re.MULTILINE)
    return {name: words for name, _, words in found}


def schema_of(group: str, option: str) -> type:
    """The dataclass that an option's YAML file names, itself or in those that it is made of."""
    if group in SINGLE:
        return SINGLE[group]
    schemas = {f"{name.name}_schema": kind for name, kind in configs.OPTIONS[group][1].items()}
    text = (Path(configs.config_dir()) / group / f"{option}.yaml").read_text()
    for entry in re.findall(r"^ +- (\w+)", text, re.MULTILINE):
        if entry in schemas:
            return schemas[entry]
        if entry != "_self_" and entry[0] != "_":
            return schema_of(group, entry)
    return schemas[f"{option}_schema"]


@pytest.mark.parametrize("group", [*configs.OPTIONS, *SINGLE])
def test_every_setting_of_every_option_has_a_meaning(group: str) -> None:
    for option in configs.options_of(group):
        told = comments(group, option, None, "train")
        names = {field.name for field in dataclasses.fields(schema_of(group, option))}
        for name in names - {"name", "architecture", "network"}:
            assert told.get(f"{group}.{name}"), (option, name)


def test_values_are_those_that_the_words_come_to() -> None:
    page = help_text(["attack.epsilon=8/255", "model=small_cnn", "model.width=7"])
    assert re.search(r"^  eval\.epsilon=8/255 ", page, re.MULTILINE)
    assert re.search(r"^model=small_cnn$", page, re.MULTILINE)
    assert re.search(r"^  model\.width=7 ", page, re.MULTILINE)
    told = rows(page)
    for name in ("train.epochs", "seed", "device", "run.dir", "recipe.lr", "bt.gamma"):
        assert told[name]


def test_the_help_of_plan_is_of_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("btrain plan [option=value …]\n  tell what that training will take")
    assert "dataset=cifar10" in told


def test_one_group_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help", "rival", "rival=free"]) == 0
    page = capsys.readouterr().out
    assert {"rival=free", "rival=none"} <= {line.strip().split()[0] for line in page.splitlines()
                                           if line.strip()}  # fmt: skip
    assert rows(page)["rival.replays"].startswith("m")
    assert "train.epochs" not in page
    with pytest.raises(UserError, match=r"no group rivals; there are: dataset, model, .*rival"):
        help_text(["rivals"])


def test_a_page_fits_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for task in ("train", "corrupt"):
        assert max(map(len, help_text([], task).splitlines())) <= 81


def test_the_words_of_the_users_own_options(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    text = "# A network of mine.\ndefaults:\n  - own\n\nfactory: nets.py:Net   # a class of mine\n"
    (tmp_path / "model" / "my_net.yaml").write_text(text)
    (tmp_path / "model" / "small_cnn.yaml").write_text(
        "# Mine, smaller:  btrain train model=small_cnn\n# Trained in a minute.\n"
        "defaults:\n  - small_cnn_schema\n"
    )
    page = help_text(["--config-dir", str(tmp_path), "model"])
    assert re.search(r"^  model=my_net +A network of mine$", page, re.MULTILINE)
    assert re.search(r"^  model=small_cnn +Mine, smaller$", page, re.MULTILINE)
