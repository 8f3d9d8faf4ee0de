"""Runs the readers on damaged files, each reader in processes of its own."""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any, Protocol

from fuzz import guard

READERS = {
    "checkpoint": "checkpoints.Checkpoint",
    "cifar": "data.Cifar",
    "idx": "data.Idx",
    "npy": "data.CorruptedSet",
    "imagefolder": "images.ImageFolder",
    "config": "texts.ResolvedConfig",
    "archive": "data.Archive",
    "results": "texts.Results",
}
_KEPT = 20  # failures a reader
_WARM_UP = 40
_FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None  # many small files
_LONGEST = 2001  # characters of an error


class Reader(Protocol):
    """Sound files in a folder, ways to damage them, and what btrain does with such files."""

    def __init__(self, folder: Path) -> None: ...

    def write(self, rng: Random) -> None:
        """Puts the next input into the folder."""

    def read(self) -> None:
        """Raises UserError for what is not right, and no other error."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--reader", choices=READERS, action="append", help="default: all")
    parser.add_argument("--inputs", type=int, default=20_000, help="for each reader")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        _inside(options.reader[0], options.first, options.inputs, options.inside)
        return 0
    results = {}
    for name in options.reader or READERS:
        results[name] = run(name, first=options.first, inputs=options.inputs)
        print(_line(name, results[name]), flush=True)
        for failure in results[name]["failures"]:
            number, _, reason = failure.partition(": ")
            print(f"  {number}: {reason.strip()[-300:]}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return int(any(result["failures"] for result in results.values()))


def _line(name: str, result: dict[str, Any]) -> str:
    return (
        f"{name}: {result['inputs']:,} inputs, {result['accepted']:,} read, "
        f"{result['refused']:,} refused, {len(result['failures'])} failures; slowest "
        f"{result['slowest'][0]:.2f} s (input {result['slowest'][1]}), memory "
        f"+ {result['memory'] >> 20} MiB, {result['seconds']:.0f} s"
    )


def run(name: str, *, first: int, inputs: int) -> dict[str, Any]:
    """Reads inputs first to first + inputs - 1; a process that dies is a failure of its input."""
    total: Counter[str] = Counter()
    failures: list[str] = []
    slowest, memory = [0.0, first], 0
    start, end, began = first, first + inputs, time.monotonic()
    while start < end:
        with tempfile.TemporaryDirectory(dir=_FOLDER) as folder:
            report = Path(folder) / "report.json"
            done = subprocess.run(
                [sys.executable, "-m", "fuzz", "--reader", name, "--first", str(start),
                 "--inputs", str(end - start), "--inside", str(report)],
                cwd=Path(__file__).parents[1], capture_output=True, text=True,
            )  # fmt: skip
            result = json.loads(report.read_text()) if report.exists() else {}
        if "next" not in result or "died" in result:
            number = result.get("next", start)
            said = done.stderr.strip()[-2000:]
            result = {"failures": [], **result, "next": number + 1}
            result["failures"].append(f"input {number}: ended with {done.returncode} {said}")
        total.update({key: result.get(key, 0) for key in ("accepted", "refused")})
        failures += result["failures"]
        slowest = max(slowest, result.get("slowest", slowest))
        memory = max(memory, result.get("memory", 0))
        start = result["next"]
        if len(failures) >= _KEPT:
            break
    return {
        "inputs": start - first, **total, "failures": failures, "slowest": slowest,
        "memory": memory, "seconds": time.monotonic() - began,
    }  # fmt: skip


def _inside(name: str, first: int, inputs: int, report: Path) -> None:
    """The process that reads."""
    from importlib import import_module

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    module, _, kind = READERS[name].partition(".")
    folder = report.parent / "inputs"
    folder.mkdir()
    reader: Reader = getattr(import_module(f"fuzz.{module}"), kind)(folder)
    canary = folder / "canary"
    for number in range(_WARM_UP):  # modules are imported, buffers made
        reader.write(Random(f"{name} warm-up {number}"))
        with contextlib.suppress(Exception):
            reader.read()
    guard.install()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result: dict[str, Any] = {"accepted": 0, "refused": 0, "failures": [], "slowest": (0.0, first)}
    for number in range(first, first + inputs):
        reader.write(Random(f"{name} {number}"))
        report.write_text(json.dumps(result | {"next": number, "died": True}))
        began = time.monotonic()
        failure = _failure(reader, result, folder if hasattr(reader, "writes") else None)
        result["slowest"] = max(result["slowest"], (time.monotonic() - began, number))
        if canary.exists():
            failure += " The canary is there: code ran."
            canary.unlink()
        if failure:
            result["failures"].append(f"input {number}: {failure}")
        if len(result["failures"]) >= _KEPT:
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result |= {"memory": 1024 * (peak - before), "next": number + 1}
    report.write_text(json.dumps(result))


def _failure(reader: Reader, result: dict[str, Any], writable: Path | None) -> str:
    """Reads an input and says what should not have happened, if anything."""
    from btrain.errors import UserError

    try:
        with guard.watched(writable):
            reader.read()
        result["accepted"] += 1
    except UserError as error:
        result["refused"] += 1
        if guard.wanted_too_much(error):
            return f"it wanted too much memory: {error}"
        if not str(error).isprintable() or len(str(error)) > _LONGEST:
            return f"no sentence: {error!r}"
    except (Exception, guard.Violation):
        return traceback.format_exc(limit=-6)
    return ""


if __name__ == "__main__":
    sys.exit(main())
