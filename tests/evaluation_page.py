"""Evaluations to draw, and what a browser makes of the page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from btrain.attacks.pgd import evaluation_mode, pgd
from btrain.data import Data, Split
from btrain.defenses import ce_inner_loss
from btrain.evaluation import evaluate

VOID = {"br", "img", "meta"}


class Page(HTMLParser):
    """What a browser makes of a page: its elements, their attributes, and the text of each."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.values: list[list[float]] = []
        self.headings: list[str] = []
        self.absent: list[str] = []
        self.words = ""
        self._absent = False
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
            self.values.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "h2":
            self.headings.append("")
        if tag == "data" and "tr" in self.open:
            self.values[-1].append(float(dict(attrs)["value"] or ""))
        self._absent = ("class", "absent") in attrs
        if self._absent:
            self.absent.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._absent = False

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words += data
        if "h2" in self.open:
            self.headings[-1] += data
        if self._absent:
            self.absent[-1] += data
        if "tr" in self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def numbers(self, first_cell: str) -> list[list[float]]:
        """The full-precision numbers of the rows that begin so."""
        return [
            values
            for row, values in zip(self.rows, self.values, strict=True)
            if row and row[0] == first_cell
        ]


def attack(name: str, accuracy: float, **more: Any) -> dict[str, Any]:
    half = {str(c): {"accuracy": accuracy / (1 + c), "n": 6 + c} for c in range(10)}
    facts = {
        "attack": name,
        "accuracy": accuracy,
        "ci95": [0.9 * accuracy, 0.9 * accuracy + 10],
        "n": 120,
        "per_class": half,
        "epsilon": 8 / 255,
        "steps": 20,
        "restarts": 1,
        "step_size": 0.003,
        "loss": "ce",
        "seed": 7,
        "versions": {"torch": "2.13.0", "btrain": "0.1.0"},
        "seconds": 185.2,
        "device": "cpu",
        "precision": "float32",
        "checkpoint": "runs/one/checkpoints/last.pt",
        "dataset": "digits",
        "note": None,
        "test_examples": None,
    }
    return facts | more


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_evaluation(folder: Path, digits: Data, small_cnn: nn.Module) -> None:
    """A whole evaluation of an untrained network on real digits, in miniature."""
    test = Split(digits.test.images[:120], digits.test.labels[:120])

    def accuracy(epsilon: float, steps: int) -> float:
        return evaluate(
            small_cnn,
            test,
            epsilon=epsilon,
            step_size=epsilon / 4,
            steps=steps,
            batch_size=120,
            seed=0,
        ).robust

    clean = accuracy(0, 1)
    write_json(folder / "clean.json", attack("clean", clean, epsilon=None, steps=None, loss=None))
    for name, steps in (("pgd20", 20), ("pgd100x10", 22), ("pgd1000x5", 24)):
        write_json(folder / f"{name}.json", attack(name, accuracy(8 / 255, steps), steps=steps))
    write_json(folder / "autoattack.json", attack("autoattack", 2 / 3, note="standard"))
    corrupted = {c: [80.5 - 7 * s - i / 3 for s in range(5)] for i, c in enumerate(("fog", "snow"))}
    mean = float(np.mean(list(corrupted.values())))
    write_json(
        folder / "corruptions.json",
        {
            "attack": "corruptions",
            "accuracy": mean,
            "mce": 100 - mean,
            "table": corrupted,
            "extra_table": {"saturate": [33.25] * 5},
            "regenerated": True,
            "n": 120,
        },
    )
    outcomes = (("falls with ε", True), ("reaches zero", False), ("Square is weaker", None))
    write_json(
        folder / "sanity.json",
        {
            "n": 120,
            "checks": [{"name": n, "passed": p, "detail": f"detail of {n}"} for n, p in outcomes],
            "curves": {
                "epsilon": [[k / 255, accuracy(k / 255, 5)] for k in (0, 4, 8, 16, 32)],
                "steps": [[steps, accuracy(8 / 255, steps)] for steps in (1, 2, 10)],
            },
        },
    )
    x, labels = test.images[:6].float() / 255, test.labels[:6]
    with evaluation_mode(small_cnn), torch.no_grad():
        logits = small_cnn(x)
        x_adv = pgd(
            small_cnn,
            x,
            labels,
            logits,
            steps=torch.full((6,), 5),
            step_size=torch.full((6,), 0.01),
            inner_loss=ce_inner_loss,
            epsilon=8 / 255,
            noise=None,
        )
        adversarial_logits = small_cnn(x_adv)
    write_samples(
        folder,
        clean=x.numpy(),
        adversarial=x_adv.numpy(),
        labels=labels.numpy(),
        clean_prediction=logits.argmax(dim=1).numpy(),
        adversarial_prediction=adversarial_logits.argmax(dim=1).numpy(),
        class_names=np.array([str(c) for c in range(10)]),
    )


def write_samples(folder: Path, **arrays: Any) -> None:
    np.savez(folder / "samples.npz", **arrays)


def samples(folder: Path) -> dict[str, Any]:
    with np.load(folder / "samples.npz", allow_pickle=False) as archive:
        return dict(archive)


def change(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    write_json(path, json.loads(path.read_text()) | values)
