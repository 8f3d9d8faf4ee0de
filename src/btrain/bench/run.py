"""The course of a bench: all cases, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from btrain.bench import output
from btrain.bench.measure import Row, measure
from btrain.bench.plan import Case, make_cases, make_lanes
from btrain.build import find_device
from btrain.runs.provenance import git_commit
from btrain.settings.bench import BenchConfig


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
