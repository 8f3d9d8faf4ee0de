"""Resolved configurations, and the results that a report reads."""

from __future__ import annotations

import io
import json
import unicodedata
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import yaml

from btrain.errors import UserError
from btrain.evaluation.result import Evaluation, Result
from btrain.exchange.from_run import read_config
from btrain.paper.plan import read_plan
from btrain.paper.sheets.files import as_csv, as_json, markdown, sheet_page
from btrain.paper.sheets.sheet import make_sheet
from btrain.report import compare
from btrain.runs.folder import RunFolder
from btrain.settings.compose import compose, to_dict, to_yaml
from fuzz.mutations import damaged, number

WORDS = (
    "${oc.env:HOME}", "${seed}", "${", "$",
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/name:os.system", "!!binary aGk=", "!!set {a}", "&a [*a]", "*a", "&a x", "<<: {a: 1}",
    "{_target_: os.system, command: 'touch {canary}'}", "1e999", "-1e999", ".nan", ".inf",
    "9" * 400,
    "9" * 5000, "-1", "0", "1.5", "???", "null", "~", "true", "[]", "{}", "[1, [2, [3]]]",
    "x" * 3000,
    "2020-01-01", "1:30:00", "0x1F", "0o7", "1_000", "'a\\nb'", '"\\0"', '"\\ud800"', "\t", "...",
    "---", "|", ">", "? a", "- a", "%YAML 1.1", "@", "`", "{a: b: c}",
    "[" * 200, "{" * 500 + "}" * 500,
    "../../up", "/", "wide_resnet", "trades", "augmix", "{name: x}", "{1: 2}", "{[1]: 2}",
)  # fmt: skip


class ResolvedConfig:
    """A run folder's `config.yaml`, read for an export and for a run that is taken up again."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._canary = folder, str(folder / "canary")
        self._configs = [
            compose(words.split())
            for words in ("dataset=digits", "defense=augmix", "defense=pgd rival=free bt=uniform")
        ]
        self._seeds = [to_yaml(config) for config in self._configs]

    def write(self, rng: Random) -> None:
        self._resumes = rng.random() < 0.3
        text = rng.choice(self._seeds)
        match rng.randrange(6):
            case 0 | 1:
                text = self._with_words(text, rng)
            case 2 | 3:
                text = _with_values(to_dict(rng.choice(self._configs)), rng)
            case 4:
                text = explosion(rng) + (text if rng.random() < 0.5 else "")
            case _:
                pass
        content = text.encode("utf-8", "surrogatepass")
        if rng.random() < 0.3:
            content = damaged(content, rng)
        if rng.random() < 0.01:
            content *= 1 + (1 << 20) // (len(content) + 1)
        (self._folder / "config.yaml").write_bytes(content)

    def _with_words(self, text: str, rng: Random) -> str:
        lines = text.split("\n")
        for _ in range(rng.choice((1, 1, 3))):
            at = rng.randrange(len(lines))
            word = rng.choice(WORDS).replace("{canary}", self._canary)
            match rng.randrange(5):
                case 0:
                    lines[at] = lines[at].partition(":")[0] + ": " + word
                case 1:
                    lines.insert(at, rng.choice(lines))
                case 2:
                    lines[at] = " " * rng.randrange(6) + lines[at].strip()
                case 3:
                    lines.insert(at, word)
                case _:
                    del lines[at]
        return "\n".join(lines)

    def read(self) -> None:
        folder = RunFolder(self._folder)
        if self._resumes:
            folder.check_owner(self._configs[0])
        else:
            read_config(folder.settings(), self._folder / "config.yaml")


def _with_values(settings: dict[str, Any], rng: Random) -> str:
    for _ in range(rng.choice((1, 1, 2, 4))):
        group = rng.choice([*settings])
        node = (
            settings[group]
            if isinstance(settings[group], dict) and rng.random() < 0.9
            else settings
        )
        key = rng.choice([*node]) if node else "name"
        node[key] = rng.choice((
            None, True, -1, 0, 1, 2, number(rng), -number(rng), 10**400, 0.5, 1e300, float("nan"),
            float("inf"), "", "a", "???", "${seed}", "\0", [], [1], ["a", {}], {},
            {"name": "trades"}, [0.5] * 5000, {str(i): i for i in range(50)}, {"a": {"b": {}}},
            rng.choice(["cifar10", "imagefolder", "wide_resnet", "mart", "augmix", "mma", "adam"]),
        ))  # fmt: skip
        if rng.random() < 0.2:
            del node[key]
    return yaml.safe_dump(settings)


def explosion(rng: Random) -> str:
    levels = rng.choice((3, 9, 30))
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, levels)]
    deep = rng.choice((10, 1000, 50_000))
    return rng.choice(
        ("\n".join(lines) + "\n", "a: " + "[" * deep + "]" * deep + "\n", "&a a: *a\n",
         "".join(" " * i + "a:\n" for i in range(min(deep, 300))), "- " * deep + "\n", "? " * deep)
    )  # fmt: skip


class Results:
    """`summary.json`, an evaluation's JSON files and `samples.npz`, an attack's two files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "run").mkdir()
        self._seeds: dict[str, Any] = {
            "summary": {
                "clean_acc": 90.5, "robust_acc": 50, "f_b": 0.3, "f_r": 0.6, "f_o": 0.1,
                "theoretical_speedup": 2.1, "attack_steps_mean": 3.5, "flops": 1e12,
                "train_seconds": 10.5, "device": "cpu",
            },
            "clean": {"attack": "clean", "accuracy": 90, "n": 3, "ci95": [80, 95],
                      "per_class": {"a": {"accuracy": 50, "n": 2}}, "seed": 1,
                      "versions": {"a": "1"}},
            "corruptions": {"accuracy": 50, "mce": None, "n": 3, "regenerated": True,
                            "table": {"fog": [1, 2, 3, 4, 5]}},
            "sanity": {"n": 3, "checks": [{"name": "a", "passed": True, "detail": "b"}],
                       "curves": {"epsilon": [[0, 90], [0.1, 50]], "steps": [[1, 60]]}},
        }  # fmt: skip
        self._attack = Result(
            "pgd20", np.array([True, False]), np.array([0, 1]), ("a", "b"), 1.5, {"steps": 20}
        )
        self._samples = {
            "clean": np.zeros((2, 3, 4, 4)), "adversarial": np.ones((2, 3, 4, 4)),
            "labels": np.array([0, 1]), "clean_prediction": np.array([0, 1]),
            "adversarial_prediction": np.array([1, 0]), "class_names": np.array(["a", "b"]),
        }  # fmt: skip

    def write(self, rng: Random) -> None:
        names = [*self._seeds, "samples"]
        for name in names[1:]:
            self._path(name).unlink(missing_ok=True)
        self._path("summary").write_text(json.dumps(self._seeds["summary"]))
        self._write_attack(rng)
        name = rng.choice(names)
        if name == "samples":
            self._path(name).write_bytes(self._npz(rng))
            return
        content = json.loads(json.dumps(self._seeds[name]))
        if rng.random() < 0.7:
            _spoil(content, rng)
        data = json.dumps(content).encode()
        if rng.random() < 0.05:
            data = rng.choice((b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b"[1e999]"))
        self._path(name).write_bytes(damaged(data, rng) if rng.random() < 0.4 else data)

    def _write_attack(self, rng: Random) -> None:
        self._attack.write(self._folder / "attack")
        path = self._folder / "attack" / rng.choice(("pgd20.json", "pgd20.npz"))
        if rng.random() < 0.3 and path.suffix == ".json":
            content = json.loads(path.read_bytes())
            _spoil(content, rng)
            path.write_text(json.dumps(content))
        elif rng.random() < 0.9:
            path.write_bytes(damaged(path.read_bytes(), rng))

    def _path(self, name: str) -> Path:
        if name == "summary":
            return self._folder / "run" / "summary.json"
        return self._folder / f"{name}.{'npz' if name == 'samples' else 'json'}"

    def _npz(self, rng: Random) -> bytes:
        buffer = io.BytesIO()
        compression = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        with zipfile.ZipFile(buffer, "w", compression) as archive:
            for key, array in self._samples.items():
                member = io.BytesIO()
                np.save(member, array)
                content = member.getvalue()
                if rng.random() < 0.3:
                    content = damaged(content, rng)
                if rng.random() < 0.02:
                    content += bytes(16 << 20)
                if rng.random() < 0.97:
                    archive.writestr(f"{key}.npy", content)
        content = buffer.getvalue()
        return damaged(content, rng) if rng.random() < 0.5 else content

    def read(self) -> None:
        Result.read(self._folder / "attack", "pgd20")  # None where it is damaged
        errors = []
        for read in (
            lambda: compare([self._folder / "run"]),
            lambda: Evaluation.read(self._folder),
        ):
            try:
                read()
            except UserError as error:
                errors.append(error)
        if errors:
            raise errors[0]


class Plans:
    """A plan of a table or figure, read for a report of runs that are not there yet."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "table9.json"

    def write(self, rng: Random) -> None:
        content = plan_content()
        if rng.random() < 0.8:
            _spoil(content, rng)
        data = json.dumps(content).encode()
        self._path.write_bytes(damaged(data, rng) if rng.random() < 0.3 else data)

    def read(self) -> None:
        sheet = make_sheet(read_plan(self._path), self._path.parent)
        for text in (markdown(sheet), as_csv(sheet), as_json(sheet), sheet_page(sheet, None, "")):
            if wrong := unshowable(text):
                raise AssertionError(f"{wrong!r} is shown")


def plan_content() -> dict[str, Any]:
    """Return a plan with a value of every kind."""
    row = {
        "name": "a", "label": "A", "experiment": "trades", "swept": {"bt.gamma": "0.7"},
        "paper": {"clean_acc": 80.5, "pgd20": 50}, "runs": {"0": "a-seed0", "1": "a-seed1"},
        "original": {"dataset": "cifar10", "train.epochs": 76, "model.width": None},
        "attacks": ["pgd100x10"],
    }  # fmt: skip
    claim = {"text": "a", "metric": "clean_acc", "row": "a", "than": "b", "at_least": -1,
             "at_most": None}  # fmt: skip
    return {
        "target": "table9", "kind": "tradeoff", "title": "Table 9", "note": "b", "profile": "cpu",
        "baseline": "b", "attacks": ["pgd100x10"], "axis": "bt.gamma",
        "rows": [row, row | {"name": "b", "attacks": None}], "claims": [claim],
        "chosen": ["bt.gamma=0.7"],
    }  # fmt: skip


def unshowable(text: str) -> str:
    """Return what of a text of lines would move a cursor or turn the direction of writing."""
    return "".join(c for c in text if c != "\n" and unicodedata.category(c) in _UNSHOWN)


_UNSHOWN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def _spoil(node: Any, rng: Random) -> None:
    while isinstance(node, dict | list) and node:
        key = rng.choice([*node]) if isinstance(node, dict) else rng.randrange(len(node))
        if not isinstance(node[key], dict | list) or rng.random() < 0.3:
            node[key] = rng.choice((
                None, True, -1, 0, 1.5, 1e308, 10**400, number(rng), float("nan"), float("inf"), "",
                "<script>", "\ud800", "\x1b[31m", "\u202eb", "a\n| b |",
                [], {}, [1], [[]], {"a": 1}, [None] * 5, ["a", 1],
            ))  # fmt: skip
            return
        node = node[key]
