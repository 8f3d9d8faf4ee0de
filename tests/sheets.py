"""Plans and run folders written by hand, as a runner and its runs would leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from btrain.evaluation.result import Result
from btrain.paper.plan import Claim, Plan, Row
from btrain.paper.sheets.sheet import Line, Sheet
from btrain.paper.sheets.table import head_and_rows

MACHINE = "Processor 1"


def finished(
    folder: Path,
    *,
    clean: float = 90.0,
    robust: float = 50.0,
    seconds: float = 100.0,
    flops: float = 2e12,
    machine: str | None = MACHINE,
    jobs: int | None = None,
    config: dict[str, Any] | None = None,
    **summary: Any,
) -> Path:
    """A run that came to its end."""
    begun(folder, machine=machine, jobs=jobs, config=config)
    content = {
        "clean_acc": clean,
        "robust_acc": robust,
        "f_b": 0.28,
        "f_r": 0.54,
        "f_o": 0.18,
        "theoretical_speedup": 2.254,
        "speedup_flops": 1.9,
        "flops": flops,
        "train_seconds": seconds,
        "epochs": 10,
        "test_examples": 8,
        "device": "cpu",
    }
    (folder / "summary.json").write_text(json.dumps(content | summary))
    return folder


def begun(
    folder: Path,
    *,
    machine: str | None = MACHINE,
    jobs: int | None = None,
    config: dict[str, Any] | None = None,
    log: str | None = None,
    epochs: int = 0,
) -> Path:
    """A run that began; `log` is the last line of its train.log."""
    folder.mkdir(parents=True)
    settings = {
        "dataset": {"name": "mnist", "root": "data", "train_examples": 6000, "test_examples": None},
        "model": {"name": "small_cnn", "width": 8},
        "train": {"epochs": 10, "batch_size": 100},
        "eval": {"steps": 20},
    }
    for key, value in (config or {}).items():
        group, _, leaf = key.partition(".")
        settings[group][leaf] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    if machine is not None:
        session = {
            "device": "cpu",
            "hardware": {"processor": machine, "cores": 2, "threads": 1},
            "versions": {"torch": "2.13.0"},
        }
        session |= {} if jobs is None else {"jobs": jobs}
        (folder / "provenance.json").write_text(json.dumps({"sessions": [session]}))
    lines = [
        {"epoch": e + 1, "f_b": 0.3, "f_r": 0.1 * e, "f_o": 0.7 - 0.1 * e, "score_boundary": 0.01,
         "score_robust": 0.05, "score_outlier": -0.01 * e, "robust_acc_train": 40.0 + 5 * e,
         **({"val_robust_acc": 40.0 + e} if e % 2 else {})}
        for e in range(epochs)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if log is not None:
        (folder / "train.log").write_text(f"2026-01-01 10:00:00,000 {log}\n")
    return folder


def evaluated(
    folder: Path,
    attack: str,
    correct: list[int] | np.ndarray,
    *,
    inside: str = "eval",
    **facts: Any,
) -> None:
    """An attack's files; `correct` is (n,), or (corruptions, severities, n)."""
    answers = np.array(correct, dtype=bool)
    labels = np.arange(answers.shape[-1], dtype=np.int64) % 2
    settings = {"classes": ["a", "b"], "data_sha256": "same", **facts}
    Result(attack, answers, labels, ("a", "b"), 5.0, settings).write(folder / inside)


def row(name: str, seeds: int = 1, **fields: Any) -> Row:
    """A row whose runs are `<name>-seed<n>`."""
    of = {
        "label": name,
        "experiment": name,
        "swept": {},
        "paper": {},
        "original": {"dataset": "cifar10"},
        "runs": {seed: f"{name}-seed{seed}" for seed in range(seeds)},
    }
    return Row(name=name, **(of | fields))


def plan(rows: list[Row], claims: list[Claim] | None = None, **fields: Any) -> Plan:
    """A table named `table9` of these rows, the first the baseline."""
    of: dict[str, Any] = {
        "target": "table9",
        "kind": "table",
        "title": "Table 9",
        "note": "",
        "profile": "cpu",
        "baseline": rows[0].name,
        "attacks": [],
        "axis": None,
    }
    return Plan(**(of | fields), rows=rows, claims=claims or [])


def cells(sheet: Sheet, name: str) -> dict[str, str]:
    """A row's cells by their heads; the paper's and the difference behind the metric's name."""
    head, rows = head_and_rows(sheet)
    named: list[str] = []
    for title in head:
        behind = title in ("paper", "ours − paper")
        named.append(f"{named[-1].split(' | ')[0]} | {title}" if behind else title)
    index = [line.row.name for line in sheet.lines].index(name)
    return dict(zip(named, rows[index], strict=True))


def line(sheet: Sheet, name: str) -> Line:
    return next(line for line in sheet.lines if line.row.name == name)
