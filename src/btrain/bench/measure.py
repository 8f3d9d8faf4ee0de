"""The measurement: all cases of a bench, one after the other, and in each the lanes in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from btrain.allocation import Scored
from btrain.attacks.pgd import by_steps
from btrain.bench import output
from btrain.bench.output import Row
from btrain.bench.plan import Case, make_cases, make_lanes
from btrain.build import find_device
from btrain.data import Batch
from btrain.data.augmentation import batch_slices
from btrain.methods.augmix import AugMix
from btrain.methods.cost import forward_flops
from btrain.methods.pool import Pool, deal, no_attack
from btrain.methods.statistics import averages, stacked
from btrain.processes.world import ALONE
from btrain.runs.provenance import git_commit
from btrain.settings import CudaGraphs, Precision
from btrain.settings.bench import BenchConfig, Contender
from btrain.training.timing.clock import Product, seconds
from btrain.training.timing.forced import deciding_logits
from btrain.training.timing.lane import Lane
from btrain.training.timing.look import MEGABYTE, look

_SELECTIONS = 10
_DTYPES = {Precision.float32: torch.float32, Precision.bf16: torch.bfloat16}


def run_bench(
    bench: BenchConfig,
    settings: Sequence[str],
    tell: Callable[[str], None],
    show: Callable[[dict[str, Any]], None],
) -> None:
    """Measure all cases and write `bench.out` and `bench.plot`.

    `bench.out` is written anew after every case, so that an end by force leaves what came before.

    Args:
        settings: overrides of `btrain train`.
        tell: takes a line about where the bench is.
        show: takes in the end what `bench.out` holds, whatever ends the bench.

    Raises:
        UserError: a setting is wrong, or a file cannot be read or written.
    """
    cases = make_cases(bench, settings)
    output.check_places(bench.out, bench.plot)
    device = find_device(cases[0].config.device)
    result: dict[str, Any] = surroundings(bench, device) | {"rows": [], "details": []}
    try:
        for case in cases:
            rows, details = measure_case(case, bench, tell)
            result["rows"] += rows
            result["details"] += details
            if bench.out is not None:
                output.write_json(Path(bench.out), result)
    finally:
        tell("")
        if result["rows"]:
            show(result)
    if bench.plot is not None:
        output.plot(Path(bench.plot), result["rows"], result["details"])


def measure_case(
    case: Case, bench: BenchConfig, tell: Callable[[str], None]
) -> tuple[list[Row], list[Row]]:
    """Return `rows` and `details` of a case."""
    device = find_device(case.config.device)
    lanes = make_lanes(case, bench, device)
    return measure(lanes, bench.repetitions, device, lambda what: tell(f"{case}: {what}"))


def surroundings(bench: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Return the machine and the versions."""
    return {
        "hardware": output.hardware(device),
        "versions": output.versions() | {"git_commit": git_commit()},
        "repetitions": bench.repetitions,
    }


def measure(
    lanes: Sequence[Lane], repetitions: int, device: torch.device, tell: Callable[[str], None]
) -> tuple[list[Row], list[Row]]:
    """Let every lane take a step in every repetition, in turn; the first is not counted.

    Returns:
        `rows` and `details` of the output, one of each a lane, in the lanes' order.
    """
    dtypes = {_DTYPES[lane.config.train.precision] for lane in lanes}
    products = {dtype: Product(dtype, device) for dtype in dtypes}
    product_times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}
    times: list[list[float]] = [[] for _ in lanes]
    for repetition in range(repetitions + 1):
        tell(f"repetition {repetition}/{repetitions}")
        for lane, taken in zip(lanes, times, strict=True):
            taken.append(_timed_step(lane, repetition, device))
        for dtype, product in products.items():
            product_times[dtype].append(seconds(product.run, device))
    rates = {
        dtype: product.flops / statistics.median(product_times[dtype][1:])
        for dtype, product in products.items()
    }
    counted = [taken[1:] for taken in times]
    results = []
    for lane, taken in zip(lanes, counted, strict=True):
        tell(f"looks into {lane.contender.value}")
        rate = rates[_DTYPES[lane.config.train.precision]]
        results.append(_result(lane, taken, rate, device))
    _compare(lanes, counted, results)
    return [row for row, _ in results], [detail for _, detail in results]


def _timed_step(lane: Lane, repetition: int, device: torch.device) -> float:
    lane.rehearse(repetition)
    batch = lane.prepare(repetition)
    return seconds(lambda: lane.run(batch), device) / lane.config.bt.pool


def _result(lane: Lane, taken: list[float], rate: float, device: torch.device) -> tuple[Row, Row]:
    """Return what a lane has by itself; the ratios are still to come."""
    config, m = lane.config, len(lane.workload.images(0))
    means = averages(torch.stack([stacked(stats) for stats in lane.stats[1:]]).sum(0))
    units, median = means["units_per_example"], statistics.median(taken)
    assert units is not None
    batch = lane.prepare(0)
    choosing = _selection_seconds(lane, device)
    state = lane.state_bytes
    seen = look(lambda: lane.run(batch), device)
    _, channels, height, width = batch.x.shape
    flops = units * m * forward_flops(lane.model, (channels, height, width), device)
    row = {
        "defense": config.defense.name.value,
        "model": config.model.name,
        "batch_size": m,
        "precision": config.train.precision.value,
        "channels_last": config.train.channels_last,
        "compiled": config.train.compile,
        "cuda_graphs": config.train.cuda_graphs is CudaGraphs.always,
        "method": lane.contender.value,
        "seconds_per_batch": median,
        "seconds_spread": spread(taken),
        "units_per_example": units,
        "peak_memory_mb": (seen.peak_bytes + state) / MEGABYTE,
        "selection_share": choosing / median,
    }
    detail = {
        "fractions": [means["f_b"], means["f_r"], means["f_o"]],
        "host_copies": seen.host_copies / config.bt.pool,
        "kernels": None if seen.kernels is None else seen.kernels / config.bt.pool,
        "flop_utilisation": flops / median / rate,
        "seconds": taken,
    }
    return row, detail


def spread(values: list[float]) -> float:
    """Return the distance between the quartiles; of fewer than two values 0."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def _selection_seconds(lane: Lane, device: torch.device) -> float:
    """Return the seconds of a batch's metric, classes, sort and indexing; 0 where it has none."""
    if lane.contender not in (Contender.bullettrain, Contender.pooled):
        return 0.0
    batch = lane.prepare(0)
    z = deciding_logits(lane.inside, batch.x, lane.chooser)
    taken = [seconds(lambda: _select(lane, batch, z), device) for _ in range(_SELECTIONS + 1)]
    return statistics.median(taken[1:]) / lane.config.bt.pool


def _select(lane: Lane, batch: Batch, z: Tensor) -> None:
    """Do what the step does between the clean logits z (m, K) and the attack, or the views."""
    x, labels = batch.x, batch.labels
    chooser = lane.chooser
    score = chooser.metric(z, labels)
    robust_fraction = lane.memory["robust_fraction"]
    scored = Scored(score, z, labels, robust_fraction, lane.generator, no_attack)
    if isinstance(chooser, AugMix):
        allocation = chooser.allocator(scored)
        order, counts = by_steps(allocation.steps)
        allocation.ordered(order)
        _gathered([x, labels, z], order)
        counts()
        return
    noise = torch.empty_like(x)
    if isinstance(lane.method, Pool):
        slices = batch_slices(len(z), lane.method.batch_size)
        allocation = lane.method.allocate(scored, slices)
        dealt = deal(allocation, slices, ALONE)
        together = dealt.rows[dealt.order]
        x_adv, *_ = _gathered([x, labels, z, noise], together)
        chooser.attack.sizes(allocation.ordered(together).steps)
        _gathered([x_adv], torch.argsort(dealt.order))
        _gathered([x, labels, z, score], dealt.rows)
        return
    allocation = chooser.allocator(scored)
    _, _, allocation, _ = chooser.in_order([x, labels, z, score, noise], None, allocation)
    chooser.attack.sizes(allocation.steps)


def _gathered(parts: list[Tensor], rows: Tensor) -> list[Tensor]:
    return [part[rows] for part in parts]


def _compare(
    lanes: Sequence[Lane], times: Sequence[list[float]], results: Sequence[tuple[Row, Row]]
) -> None:
    """Add the ratios: the median over the repetitions, in each of which both took a step."""
    for lane, taken, (row, detail) in zip(lanes, times, results, strict=True):
        lean = _index(lanes, Contender.lean, lane.config.train)
        eager = replace(lane.config.train, cuda_graphs=CudaGraphs.never)
        official = _index(lanes, Contender.official, eager)
        assert lean is not None
        ratios = _ratios(times[lean], taken)
        row["speedup_vs_lean"] = statistics.median(ratios)
        row["flop_bound"] = results[lean][0]["units_per_example"] / row["units_per_example"]
        detail["speedup_spread"] = spread(ratios)
        detail["speedup_vs_official"] = (
            None if official is None else statistics.median(_ratios(times[official], taken))
        )
        plain = [
            i
            for i, other in enumerate(lanes)
            if other.contender is Contender.official
            and other.config.train.precision is Precision.float32
            and not other.config.train.channels_last
            and not other.config.train.compile
        ]
        detail["speedup_vs_plain_official"] = (
            statistics.median(_ratios(times[plain[0]], taken)) if plain else None
        )


def _index(lanes: Sequence[Lane], contender: Contender, like: Any) -> int | None:
    """Return the lane of that method at `like`'s precision and layout, compiled or not as it is."""
    for i, lane in enumerate(lanes):
        if lane.contender is contender and lane.config.train == like:
            return i
    return None


def _ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    return [a / b for a, b in zip(numerators, denominators, strict=True)]
