"""The fixed set for one data-centre GPU, under eight minutes: `btrain bench gpu`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from btrain.bench import command, output
from btrain.bench.clock import seconds
from btrain.bench.lane import CLASSES
from btrain.bench.plan import Case, make_cases
from btrain.bench.run import measure_cases
from btrain.bench.schema import BenchConfig
from btrain.data import Split
from btrain.errors import UserError
from btrain.evaluation import evaluate
from btrain.exchange.from_run import image_shape
from btrain.precision import to_channels_last
from btrain.schema import DefenseName, Precision
from btrain.training.setup import find_device, make_model

PAIRS = (
    (DefenseName.trades, "wrn_34_10"),
    (DefenseName.trades, "preact_resnet18"),
    (DefenseName.augmix, "wrn_40_2"),
)
FOLDER = Path("results/gpu")
_TRAINING_IMAGES = 50_000


def run_gpu(tell: Callable[[str], None]) -> Path:
    """Measures the set on the first CUDA device; returns the JSON file's path.

    Raises:
        UserError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UserError("bench gpu needs a CUDA device; btrain bench measures the CPU.")
    result = measure_set(tell, device="cuda", batch_sizes=(128, 512), evaluated=10_000)
    return write_results(result, FOLDER, datetime.now(timezone.utc).strftime("%Y-%m-%d"))


def measure_set(
    tell: Callable[[str], None],
    *,
    device: str,
    batch_sizes: Sequence[int],
    evaluated: int,
    repetitions: int = 10,
    settings: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Steps in bf16 and channels_last, and PGD-20 in float32, of every pair.

    Args:
        batch_sizes: m.
        evaluated: how many images PGD-20 attacks.
        settings: further overrides of `btrain train`, by model.

    Returns:
        What `btrain bench` returns, and `epoch_seconds` (50,000 images at the median batch) and
        `evaluation_seconds`.
    """
    bench = replace(
        command.compose(),
        batch_sizes=list(batch_sizes),
        precisions=[Precision.bf16],
        channels_last=[True],
        cuda_graphs=[False, True] if device == "cuda" else [False],
        repetitions=repetitions,
    )
    cases: list[Case] = []
    for defense, model in PAIRS:
        more = [f"device={device}", *(settings or {}).get(model, ())]
        cases += make_cases(_only(bench, defense, model), more)
    result = measure_cases(cases, bench, tell)
    result["epoch_seconds"] = [
        {key: row[key] for key in ("defense", "model", "batch_size", "method", "cuda_graphs")}
        | {"seconds": row["seconds_per_batch"] * math.ceil(_TRAINING_IMAGES / row["batch_size"])}
        for row in result["rows"]
    ]
    result["evaluation_seconds"] = [
        {"model": case.config.model.name, "images": evaluated}
        | {"seconds": _evaluation_seconds(case, evaluated, tell)}
        for case in cases[:: len(batch_sizes)]
    ]
    return result


def _only(bench: BenchConfig, defense: DefenseName, model: str) -> BenchConfig:
    return replace(bench, defenses=[defense], models=[model])


def _evaluation_seconds(case: Case, images: int, tell: Callable[[str], None]) -> float:
    """PGD-20 on random images, after a batch to warm up."""
    config = case.config
    device, shape = find_device(config.device), image_shape(config.dataset)
    tell(f"{config.model.name}: PGD-20 on {images} images")
    model = to_channels_last(make_model(config.model, CLASSES, shape).to(device))
    pixels = torch.randint(256, (images, *shape), dtype=torch.uint8, device=device)
    labels = torch.randint(CLASSES, (images,), device=device)

    def attack(n: int) -> None:
        evaluate(
            model,
            Split(pixels[:n], labels[:n]),
            epsilon=config.eval.epsilon,
            step_size=config.eval.step_size,
            steps=20,
            batch_size=config.eval.batch_size,
            seed=0,
        )

    attack(min(images, config.eval.batch_size))
    return seconds(lambda: attack(images), device)


def write_results(result: Mapping[str, Any], folder: Path, date: str) -> Path:
    """Writes `<device>-<date>.json` and a Markdown table beside it; returns the first."""
    hardware = result["hardware"]
    name = hardware.get("gpu", hardware["processor"])
    stem = f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{date}"
    path = folder / f"{stem}.json"
    output.write_json(path, dict(result))
    output.write(folder / f"{stem}.md", markdown(result, name, date))
    return path


def markdown(result: Mapping[str, Any], name: str, date: str) -> str:
    """The tables for a reader."""
    epochs = [
        f"| {row['defense']} | {row['model']} | {row['batch_size']} | {row['method']}"
        f"{', CUDA graphs' if row['cuda_graphs'] else ''} "
        f"| {row['seconds']:.1f} |"
        for row in result["epoch_seconds"]
    ]
    evaluations = [
        f"| {row['model']} | {row['images']} | {row['seconds']:.1f} |"
        for row in result["evaluation_seconds"]
    ]
    versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
    return "\n".join(
        [
            f"`btrain bench gpu` on {name}, {date} ({versions}):\n",
            output.table(result["rows"], result["details"]),
            "\nAn epoch of 50,000 images at the median batch, without augmentation of the data:\n",
            "| defense | model | batch | method | seconds |",
            "|---|---|---|---|---|",
            *epochs,
            "\nPGD-20 in float32:\n",
            "| model | images | seconds |",
            "|---|---|---|",
            *evaluations,
            "",
        ]
    )
