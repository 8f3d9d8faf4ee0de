"""All cases of a bench, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from btrain.bench import output
from btrain.bench.measure import Row, measure
from btrain.bench.plan import Case, make_cases, make_lanes
from btrain.bench.schema import BenchConfig
from btrain.training.provenance import git_commit
from btrain.training.setup import find_device


def run_bench(
    bench: BenchConfig, settings: Sequence[str], tell: Callable[[str], None]
) -> dict[str, Any]:
    """Measures all cases and writes `bench.out` and `bench.plot`; returns what `bench.out` holds.

    Args:
        settings: overrides of `btrain train`.
        tell: takes a line about where the bench is.

    Raises:
        UserError: a setting is wrong, or a file cannot be read or written.
    """
    cases = make_cases(bench, settings)
    output.check_places(bench.out, bench.plot)
    result = measure_cases(cases, bench, tell)
    if bench.out is not None:
        output.write_json(Path(bench.out), result)
    if bench.plot is not None:
        output.plot(Path(bench.plot), result["rows"], result["details"])
    return result


def measure_cases(
    cases: Sequence[Case], bench: BenchConfig, tell: Callable[[str], None]
) -> dict[str, Any]:
    """`rows` and `details` of all cases, with the machine and the versions."""
    device = find_device(cases[0].config.device)
    rows: list[Row] = []
    details: list[Row] = []
    for case in cases:
        lanes = make_lanes(case, bench, device)
        more_rows, more_details = measure(
            lanes, bench.repetitions, device, partial(_tell_of, tell, case)
        )
        rows += more_rows
        details += more_details
    tell("")
    return surroundings(bench, device) | {"rows": rows, "details": details}


def surroundings(bench: BenchConfig, device: torch.device) -> dict[str, Any]:
    """The machine and the versions."""
    return {
        "hardware": output.hardware(device),
        "versions": output.versions() | {"git_commit": git_commit()},
        "repetitions": bench.repetitions,
    }


def _tell_of(tell: Callable[[str], None], case: Case, what: str) -> None:
    tell(f"{case}: {what}")
