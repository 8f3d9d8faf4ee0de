"""The code of the README and of docs/ runs, its commands compose, its links lead somewhere."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
import sys
from importlib import import_module
from inspect import get_annotations, isfunction
from pathlib import Path

import pytest
import torch
from torch import nn

from btrain.bench.command import parse as parse_bench
from btrain.bench.plan import make_cases
from btrain.cli import main
from btrain.data import Data
from btrain.exchange import command as export
from btrain.report import command as report
from btrain.settings.compose import compose
from btrain.settings.evaluation import parse, parse_compare

ROOT = Path(__file__).parents[1]
PAGES = {
    page: page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
RUN = ROOT / "docs" / "extending.md"  # all of it, by test_extending.py
LINES = [line for page, text in PAGES.items() if page != RUN for line in text.splitlines()]


def commands(beginning: str) -> list[str]:
    """What follows this beginning on the pages' lines, without remarks."""
    found = [re.fullmatch(rf"{beginning}( [^#]*)?(#.*)?", line) for line in LINES]
    return [(match[1] or "").strip() for match in found if match]


BEGINNINGS = (
    ("train", "btrain train"),
    ("train", "btrain plan"),
    ("train", "torchrun [^#]* -m btrain train"),
    ("corrupt", "btrain data corrupt"),
)
COMMANDS = [
    (task, command)
    for task, beginning in BEGINNINGS
    for command in commands(beginning)
    if not command.startswith("--help")
]
BENCHES = commands("btrain bench")
EVALUATIONS = commands("btrain eval")
EXPORTS = commands("btrain export")
REPORTS = commands("btrain report")
PLANS = [command for command in commands("btrain paper") if not command.startswith("all ")]
GOALS = sorted({*commands("make")})


def python_of(page: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", PAGES[ROOT / page], re.DOTALL)
    return code


def test_the_library_example_trains(digits: Data) -> None:
    code = python_of("README.md")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    images, labels = digits.train.images.float() / 255, digits.train.labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    loader = [(images[part], labels[part]) for part in order.split(32)] * 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {"model": model, "loader": loader, "optimizer": optimizer}
    exec(code, names)
    accuracy = (model(images).argmax(dim=1) == labels).float().mean()
    assert accuracy > 0.7
    assert 0.3 < float(names["robust_fraction"]) <= 0.8  # type: ignore[arg-type]


def test_any_module_is_evaluated(digits: Data, capsys: pytest.CaptureFixture[str]) -> None:
    code = python_of("docs/evaluation.md")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    images = digits.test.images.float() / 255
    labels = model(images).argmax(dim=1)  # untrained, it guesses the digits' own
    exec(code, {"model": model, "images": images, "labels": labels})
    assert "a black-box attack is no stronger than PGD" in capsys.readouterr().out


@pytest.mark.parametrize("command", EVALUATIONS)
def test_evaluations_parse(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "compare":
        parse_compare(words[1:])
    else:
        parse(words)


def test_exports_and_reports_parse() -> None:
    for command in EXPORTS:
        assert export.parse(shlex.split(command))
    for command in REPORTS:
        assert report.parse(shlex.split(command))


@pytest.mark.parametrize(("task", "command"), COMMANDS)
def test_commands_compose(task: str, command: str) -> None:
    not_a_run_s = ("--multirun", "hydra/sweeper=", "hydra.sweeper.")  # Optuna's extra
    overrides = [word for word in shlex.split(command) if not word.startswith(not_a_run_s)]
    overrides = [re.sub(r"=.*interval\(([\d.]+),.*", r"=\1", override) for override in overrides]
    compose([re.sub(r"=([^,\[]+),.*", r"=\1", override) for override in overrides], task)


def test_the_readmes_experiments_compose_with_the_images_that_come_with_btrain() -> None:
    named = re.findall(r"experiment=(\w+)", PAGES[ROOT / "README.md"])
    assert len(named) > 3
    for name in sorted(set(named)):
        compose([f"experiment={name}", "dataset=mnist_sample", "model=small_cnn"])


@pytest.mark.parametrize("command", BENCHES)
def test_benches_have_cases(command: str) -> None:
    assert make_cases(*parse_bench(shlex.split(command)))


@pytest.mark.parametrize("command", PLANS)
def test_papers_rows_are_planned(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = [] if "only=" in command else ["only=table2_bt_nr2"]
    assert main(["paper", *shlex.split(command), *few, "plan=true"]) == 0
    assert "FLOP" in capsys.readouterr().out


@pytest.mark.parametrize("command", GOALS)
def test_make_knows_its_goals(command: str) -> None:
    goal, *variables = command.split()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^(PAPER := .*\b{goal}\b|{goal}:)", makefile, re.MULTILINE)
    for name, value in (variable.split("=") for variable in variables):
        assert f"$({name})" in makefile
        assert name != "PROFILE" or (ROOT / "configs/paper/profile" / f"{value}.yaml").is_file()


def test_there_are_commands() -> None:
    assert {task for task, _ in COMMANDS} == {task for task, _ in BEGINNINGS}
    assert all(commands(beginning) for _, beginning in BEGINNINGS)
    assert min(map(len, (BENCHES, EVALUATIONS, EXPORTS, PLANS, GOALS, REPORTS))) >= 2


def test_the_table_of_measurements_is_what_was_measured() -> None:
    """Rows of results/cpu/table2.csv as docs/measurements.md writes them."""
    with (ROOT / "results/cpu/table2.csv").open(encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}

    def spread(row: dict[str, str], key: str, digits: int) -> str:
        return f"{float(row[key]):.{digits}f} ± {float(row[key + '_sd']):.{digits}f}"

    def fraction(row: dict[str, str], key: str) -> str:
        return "1" if float(row[key]) == 1 else f"{float(row[key]):.2f}".removeprefix("0")

    names = ("trades", "trades_fast", "yopo", "bt_nr0", "bt_nr2")
    for row in (rows[f"table2_{name}"] for name in names):
        cells = [spread(row, "clean_acc", 2), spread(row, "pgd20", 2), spread(row, "autoattack", 1)]
        fractions = [fraction(row, f"f_{group}") for group in "bro"]
        cells.append(" / ".join("0" if share == ".00" else share for share in fractions))
        if row["name"] != row["baseline"]:
            cells += [f"{float(row[key]):.2f}" for key in ("theoretical_speedup", "speedup_flops")]
            cells.append(spread(row, "speedup_measured", 2))
        assert f"| {' | '.join(cells)} |" in PAGES[ROOT / "docs" / "measurements.md"].replace(
            "**", ""
        )


def test_functions_on_the_page_of_python_tell_shapes() -> None:
    """A name with members is a module; alone it is a module, or a name in one."""
    page = PAGES[ROOT / "docs" / "api.md"]
    functions = []
    for name, block in re.findall(r"^::: (\S+)\n((?:    .*\n)*)", page, re.MULTILINE):
        try:
            home = import_module(name)
            own = [
                name
                for name, f in vars(home).items()
                if isfunction(f) and f.__module__ == home.__name__
            ]
            names = re.findall(r"\w+", block.partition("members:")[2]) or own
        except ModuleNotFoundError:
            home, names = import_module(name.rpartition(".")[0]), [name.rpartition(".")[2]]
        functions += [getattr(home, name) for name in names if not name.startswith("_")]
    told = [f for f in functions if isfunction(f) and "Tensor" in str(get_annotations(f))]
    assert len(told) > 15
    for function in told:
        assert re.search(r"\(([mn],|m, K|m, C|n, C|3,|\))", function.__doc__ or ""), function


def test_what_the_page_of_python_names_is_there_after_import_btrain() -> None:
    named = re.findall(r"^::: (\S+)", PAGES[ROOT / "docs" / "api.md"], re.MULTILINE)
    named = [name.replace("attacks.pgd.pgd", "attacks.pgd") for name in named]  # the function
    script = (
        "import sys, btrain\n"
        "assert {'train', 'load', 'evaluation', 'verify'} <= set(dir(btrain))\n"
        "assert {'api', 'pgd', 'result', 'robust_accuracy'} <= set(dir(btrain.evaluation))\n"
        "assert 'torch' not in sys.modules\n"
        f"print(*({', '.join(named)}), sep='\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(named) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGES[page]):
        made = target == "all_settings.md"  # by scripts/docs_settings.py
        assert made or (page.parent / target).exists(), target
