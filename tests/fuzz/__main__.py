"""Runs the readers on damaged files, in processes of their own."""

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
from collections.abc import Sequence
from importlib import import_module
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
    "plan": "texts.Plans",
    "links": "folders.Planted",
    "options": "words.OwnOptions",
    "words": "words.CommandLines",
}
_KEPT = 20  # failures a reader
_WARM_UP = 40
_LONGEST = 2001  # characters of an error
_FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None  # many small files

Result = dict[str, Any]


class Reader(Protocol):
    """Sound files in a folder, ways to damage them, and what btrain does with such files.

    One that has an attribute `writes` writes into the folder itself.
    """

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
    names = options.reader or [*READERS]
    if options.inside:
        _inside(names, options.first, options.inputs, options.inside)
        return 0
    results = {}
    for name in names:
        results[name] = _all_inputs(name, options.first, options.inputs)
        print(_line(name, results[name]), flush=True)
        for failure in results[name]["failures"]:
            print(f"  {failure}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return int(any(result["failures"] for result in results.values()))


def _line(name: str, result: Result) -> str:
    seconds, number = result["slowest"]
    return (
        f"{name}: {result['accepted'] + result['refused']:,} inputs, {result['accepted']:,} read, "
        f"{result['refused']:,} refused, {len(result['failures'])} failures; slowest "
        f"{seconds:.2f} s (input {number}), memory + {result['memory'] >> 20} MiB, "
        f"{result['seconds']:.0f} s of CPU"
    )


def _all_inputs(name: str, first: int, inputs: int) -> Result:
    """Reads so many inputs with a reader; where its process dies, a new one goes on behind."""
    total: Result = {"accepted": 0, "refused": 0, "failures": [], "slowest": [0, 0], "memory": 0}
    began, end = _cpu_seconds(), first + inputs
    while first < end and len(total["failures"]) < _KEPT:
        result = run([name], first, end - first)[name]
        for key in ("accepted", "refused", "failures"):
            total[key] += result[key]
        for key in ("slowest", "memory"):
            total[key] = max(total[key], result[key])
        first = result["next"]
    return total | {"seconds": _cpu_seconds() - began}


def _cpu_seconds() -> float:
    """Of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(names: Sequence[str], first: int, inputs: int) -> dict[str, Result]:
    """Inputs `first` and on for each of the readers, in one new process.

    A process that dies is a failure of the input it had; then the rest is missing.
    """
    with tempfile.TemporaryDirectory(dir=_FOLDER) as folder:
        report = Path(folder) / "report.json"
        readers = [word for name in names for word in ("--reader", name)]
        numbers = ["--first", str(first), "--inputs", str(inputs)]
        done = subprocess.run(
            [sys.executable, "-m", "fuzz", *readers, *numbers, "--inside", str(report)],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
        if not report.exists():
            raise RuntimeError(f"The process did not begin: {done.stderr}")
        results: dict[str, Result] = json.loads(report.read_text())
    for result in results.values():
        if result.pop("died", False):
            said = f"ended with {done.returncode} {done.stderr.strip()[-2000:]}"
            result["failures"].append(f"input {result['next']}: {said}")
            result["next"] += 1
    return results


def _inside(names: Sequence[str], first: int, inputs: int, report: Path) -> None:
    """The process that reads."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    readers = {name: _reader(name, report.parent / name) for name in names}
    at_first = {name: _sound(name, reader) for name, reader in readers.items()}
    guard.install()
    results: dict[str, Result] = {}
    for name, reader in readers.items():
        folder = report.parent / name
        _read_inputs(name, reader, folder, range(first, first + inputs), results, report)
        if _sound(name, reader) != at_first[name]:
            results[name]["failures"].append("The inputs changed the reader itself.")
    report.write_text(json.dumps(results))


def _reader(name: str, folder: Path) -> Reader:
    """A reader of a folder of its own."""
    module, _, kind = READERS[name].partition(".")
    folder.mkdir()
    reader: Reader = getattr(import_module(f"fuzz.{module}"), kind)(folder)
    return reader


def _sound(name: str, reader: Reader) -> list[int]:
    """Return which of a few inputs the reader takes, whose modules are imported by that."""
    taken = []
    for number in range(_WARM_UP):
        reader.write(Random(f"{name} warm-up {number}"))
        with contextlib.suppress(Exception):
            reader.read()
            taken.append(number)
    return taken


def _read_inputs(
    name: str,
    reader: Reader,
    folder: Path,
    numbers: range,
    results: dict[str, Result],
    report: Path,
) -> None:
    result = results[name] = {"accepted": 0, "refused": 0, "failures": [], "slowest": (0.0, 0)}
    canary, before = folder / "canary", _peak()
    for number in numbers:
        reader.write(Random(f"{name} {number}"))
        result |= {"next": number, "memory": _peak() - before, "died": True}
        report.write_text(json.dumps(results))
        began = time.process_time()
        failure = _failure(reader, result, folder if hasattr(reader, "writes") else None)
        result["slowest"] = max(result["slowest"], (time.process_time() - began, number))
        if canary.exists():
            failure += " The canary is there: code ran."
            canary.unlink()
        if failure:
            result["failures"].append(f"input {number}: {failure}")
        result |= {"next": number + 1, "memory": _peak() - before, "died": False}
        if len(result["failures"]) >= _KEPT:
            break


def _peak() -> int:
    """The most memory that this process ever had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _failure(reader: Reader, result: Result, writable: Path | None) -> str:
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
