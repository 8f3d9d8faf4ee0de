"""The fixed set for one data-centre GPU, under eight minutes: `btrain bench gpu`."""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from btrain.bench import command, output
from btrain.bench.measure import measure_case, surroundings
from btrain.bench.plan import Case, make_cases
from btrain.build import find_device, make_model
from btrain.data import Split
from btrain.errors import UserError, first_reason
from btrain.evaluation import evaluate
from btrain.exchange.from_run import image_shape
from btrain.pages import tables
from btrain.precision import to_channels_last
from btrain.settings import DefenseName, Precision
from btrain.settings.bench import BenchConfig
from btrain.terminal import counted
from btrain.training.safety.out_of_memory import ran_out
from btrain.training.timing.clock import seconds
from btrain.training.timing.lane import CLASSES

PAIRS = (
    (DefenseName.trades, "preact_resnet18"),
    (DefenseName.augmix, "wrn_40_2"),
    (DefenseName.trades, "wrn_34_10"),
)
"""The largest network last: the time may end before it."""
FOLDER = Path("results/gpu")
_DEVICE_ERROR: tuple[type[Exception], ...] = (
    (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()
)
_TRAINING_IMAGES = 50_000
_SECONDS = 400.0
"""The time after which nothing is begun; the rest of eight minutes is for what is under way."""

_EVALUATION = ["model", "images", "layout", "seconds", "a batch, plain", "a batch, channels_last"]

Keep = Callable[[Mapping[str, Any]], object]
"""(what has been measured so far) -> ignored"""


def run_gpu(
    tell: Callable[[str], None], *, limit: float | None = None, out: Path | None = None
) -> Path:
    """Measure the set on the first CUDA device; return the JSON file's path.

    The files are written anew after every part, so that an end by force leaves what came before.

    Raises:
        UserError: there is no CUDA device, or the files cannot be written.
    """
    if out is not None and out.suffix != ".json":
        raise UserError(f"bench.out={out} must end in .json; the table comes beside it as .md.")
    if not torch.cuda.is_available():
        raise UserError("bench gpu needs a CUDA device; btrain bench measures the CPU.")
    output.check_places(None if out is None else str(out), None)
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")

    def keep(result: Mapping[str, Any]) -> Path:
        return write_results(result, FOLDER, date, out)

    result = measure_set(
        tell,
        device="cuda",
        batch_sizes=(128, 512),
        evaluated=10_000,
        limit=_SECONDS if limit is None else limit,
        keep=keep,
    )
    return keep(result)


def measure_set(
    tell: Callable[[str], None],
    *,
    device: str,
    batch_sizes: Sequence[int],
    evaluated: int,
    repetitions: int = 10,
    settings: Mapping[str, Sequence[str]] | None = None,
    limit: float = _SECONDS,
    keep: Keep = lambda result: None,
) -> dict[str, Any]:
    """Measure steps in bf16 and channels_last, and PGD-20 in float32, of every pair.

    What fails, or would begin after the time limit, is named in `left_out`; a case that fails with
    CUDA graphs is measured without.

    Args:
        batch_sizes: m.
        evaluated: how many images PGD-20 attacks, or as many as there is time for.
        settings: further overrides of `btrain train`, by model.
        limit: in seconds.
        keep: called after every part.

    Returns:
        What `btrain bench` returns, and `epoch_seconds` (50,000 images at the median batch),
        `evaluation_seconds` and `left_out`.
    """
    ends = time.perf_counter() + limit
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
    result: dict[str, Any] = surroundings(bench, find_device(device))
    result |= {"rows": [], "details": [], "epoch_seconds": [], "evaluation_seconds": []}
    result["left_out"] = []
    parts = [(str(case), partial(_add_steps, case, bench, result, tell)) for case in cases]
    for case in cases[:: len(batch_sizes)]:
        name = f"{case.config.model.name} PGD-20"
        parts.append((name, partial(_add_evaluation, case, evaluated, ends, result, tell)))
    lost = False
    for name, work in parts:
        try:
            if lost:
                raise UserError("the device had failed before")
            if time.perf_counter() > ends:
                raise UserError("no time was left")
            work()
        except Exception as error:  # one part's fault must not cost the others
            result["left_out"].append({"part": name, "why": first_reason(error)})
            # After an error of the device itself every later call fails.
            lost = lost or (isinstance(error, _DEVICE_ERROR) and not ran_out(error))
        keep(result)
    return result


def _add_steps(
    case: Case, bench: BenchConfig, result: dict[str, Any], tell: Callable[[str], None]
) -> None:
    """Add the rows of a case."""
    found = None
    try:
        found = measure_case(case, bench, tell)
    except RuntimeError as error:
        if bench.cuda_graphs == [False]:
            raise
        left_out = {"part": f"{case} with CUDA graphs", "why": first_reason(error)}
        result["left_out"].append(left_out)
    if found is None:  # out of the clause above, which would keep the memory of what failed
        found = measure_case(case, replace(bench, cuda_graphs=[False]), tell)
    tell("")
    rows, details = found
    result["rows"] += rows
    result["details"] += details
    result["epoch_seconds"] += [
        {key: row[key] for key in ("defense", "model", "batch_size", "method", "cuda_graphs")}
        | {"seconds": row["seconds_per_batch"] * math.ceil(_TRAINING_IMAGES / row["batch_size"])}
        for row in rows
    ]


def _only(bench: BenchConfig, defense: DefenseName, model: str) -> BenchConfig:
    return replace(bench, defenses=[defense], models=[model])


def _add_evaluation(
    case: Case, images: int, ends: float, result: dict[str, Any], tell: Callable[[str], None]
) -> None:
    """Time PGD-20 on random images, in the layout that is faster, of as many as there is time for.

    Two batches in each layout come first; the second one's time tells.
    """
    config = case.config
    device, shape = find_device(config.device), image_shape(config.dataset)
    batch = min(images, config.eval.batch_size)
    plain = make_model(config.model, CLASSES, shape).to(device)
    models = {False: plain, True: to_channels_last(copy.deepcopy(plain))}
    pixels = torch.randint(256, (images, *shape), dtype=torch.uint8).to(device)
    labels = torch.randint(CLASSES, (images,)).to(device)

    def taken(n: int, channels_last: bool) -> float:
        layout = " in channels_last" if channels_last else ""
        tell(f"{config.model.name}: PGD-20 on {counted(n, 'image')}{layout}")
        attack = partial(
            evaluate,
            models[channels_last],
            Split(pixels[:n], labels[:n]),
            epsilon=config.eval.epsilon,
            step_size=config.eval.step_size,
            steps=20,
            batch_size=config.eval.batch_size,
            seed=0,
        )
        return seconds(attack, device)

    for layout in models:
        taken(batch, layout)
    a_batch = {layout: taken(batch, layout) for layout in models}
    faster = min(a_batch, key=lambda layout: a_batch[layout])
    fit = int((ends - time.perf_counter()) / a_batch[faster])
    images = max(batch, min(images, fit * batch))
    result["evaluation_seconds"].append(
        {
            "model": config.model.name,
            "images": images,
            "channels_last": faster,
            "seconds": taken(images, faster),
            "batch": batch,
            "batch_seconds": a_batch[False],
            "batch_seconds_channels_last": a_batch[True],
        }
    )


def write_results(
    result: Mapping[str, Any], folder: Path, date: str, out: Path | None = None
) -> Path:
    """Write `<device>-<date>.json` and a Markdown table beside it; return the first."""
    hardware = result["hardware"]
    name = hardware.get("gpu", hardware["processor"])
    stem = f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{date}"
    path = out or folder / f"{stem}.json"
    output.write_json(path, dict(result))
    output.write(path.with_suffix(".md"), markdown(result, name, date))
    return path


def markdown(result: Mapping[str, Any], name: str, date: str) -> str:
    """Return the tables for a reader."""
    epochs = [
        [
            row["defense"],
            row["model"],
            str(row["batch_size"]),
            f"{row['method']}{', CUDA graphs' if row['cuda_graphs'] else ''}",
            f"{row['seconds']:.1f}",
        ]
        for row in result["epoch_seconds"]
    ]
    evaluations = [
        [
            row["model"],
            str(row["images"]),
            "channels_last" if row["channels_last"] else "plain",
            f"{row['seconds']:.1f}",
            f"{row['batch_seconds']:.2f}",
            f"{row['batch_seconds_channels_last']:.2f}",
        ]
        for row in result["evaluation_seconds"]
    ]
    versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
    return "\n".join(
        [
            f"`btrain bench gpu` on {name}, {date} ({versions}):\n",
            output.table(result["rows"], result["details"]),
            "\nAn epoch of 50,000 images at the median batch, without augmentation of the data:\n",
            tables.markdown(["defense", "model", "batch", "method", "seconds"], epochs),
            "\nPGD-20 in float32:\n",
            tables.markdown(_EVALUATION, evaluations),
            *(f"\nLeft out: {one['part']} ({one['why']})." for one in result["left_out"]),
            "",
        ]
    )
