"""The origin of a result: source, versions and data."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch

from btrain import __version__
from btrain.data import Data
from btrain.errors import UserError
from btrain.processes.world import World
from btrain.untrusted import read_text

_LARGEST = 16 << 20  # bytes of the file
_CHUNK = 4096  # images
_CPU_FACTS = {"family": "cpu family", "model": "model"}


@cache  # a process goes on with the code that it began with
def git_commit() -> str | None:
    """Return the commit of btrain's own source, or None where it is not a checkout."""
    return None if not _is_checkout() else _git("rev-parse", "HEAD")


@cache
def git_dirty() -> bool | None:
    """Return whether btrain's own source differs from its commit; None where it is no checkout."""
    changes = _git("status", "--porcelain", "--", ".") if _is_checkout() else None
    return None if changes is None else bool(changes)


def _is_checkout() -> bool:
    return _git("ls-files", "--error-unmatch", "runs/provenance.py") is not None


def _git(*arguments: str) -> str | None:
    source = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(source), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def data_hash(data: Data) -> str:
    """Return SHA-256 of a run's images and labels, in their order, and of the classes' names."""
    digest = hashlib.sha256(json.dumps(data.classes).encode())
    for split in (data.train, data.val, data.test):
        if split is None:
            digest.update(b"none")
            continue
        digest.update(repr(tuple(split.images.shape)).encode())
        for images in torch.split(split.images, _CHUNK):
            digest.update(images.cpu().contiguous().numpy().data)
        digest.update(split.labels.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def check_same_data(world: World, data_sha256: str) -> None:
    """Make sure that all processes hold the same data.

    Raises:
        UserError: one does not; every process raises it.
    """
    (host, digest), *others = world.heard((platform.node(), data_sha256))
    for rank, (their_host, theirs) in enumerate(others, start=1):
        if theirs != digest:
            raise UserError(
                f"Process {rank} on {their_host} has other data than process 0 on {host}: their "
                f"hash is {theirs[:12]}…, not {digest[:12]}…; please bring the same everywhere."
            )


def extended(
    path: Path,
    data_sha256: str,
    device: torch.device,
    epoch: int,
    processes: int,
    started: Mapping[str, Any],
    own_parts: Mapping[str, Any],
) -> dict[str, Any]:
    """Return `provenance.json` of a run now: its data's hash, and who trained from where.

    Args:
        path: of the file as earlier sessions left it.
        data_sha256: of the data now.
        epoch: epochs completed when the run began or went on.
        processes: how many train together.
        started: how the session was: `jobs`, the runs that share the machine, and `overrides`, the
            settings as they were typed; None for what nobody tells.
        own_parts: `own.facts` of the user's own parts, by their group.

    Raises:
        UserError: the data are not those that the run was begun with.
    """
    try:
        before = json.loads(read_text(path, _LARGEST))
        known, sessions = str(before["data_sha256"]), list(before["sessions"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        known, sessions = None, []
    if known not in (None, data_sha256):
        raise UserError(
            f"{path.parent} was begun with other data: their hash is {data_sha256[:12]}…, not "
            f"{known[:12]}…; please bring the old data back or name another run.dir."
        )
    session = {
        "from_epoch": epoch + 1,
        "git_commit": git_commit(),
        "git_dirty": git_dirty(),
        "device": device_name(device),
        "processes": processes,
        **started,
        "hardware": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "btrain": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": numpy.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        },
    }
    if own_parts:
        session["own_parts"] = dict(own_parts)
    return {"data_sha256": data_sha256, "sessions": [*sessions, session]}


def changed_code(path: Path, own_parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each own part whose code is another than in the last session.

    Args:
        path: of a `provenance.json`, which need not be there.
        own_parts: `own.facts` of today, by group.
    """
    try:
        before = json.loads(read_text(path, _LARGEST))["sessions"][-1]["own_parts"]
        known = {group: facts["sha256"] for group, facts in before.items()}
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return []
    return [
        f"The code of {group}.factory={facts['factory']} has changed since this run was last "
        "trained."
        for group, facts in own_parts.items()
        if known.get(group, facts["sha256"]) != facts["sha256"]
    ]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def processor() -> str:
    """Return the CPU's name, or what the system tells of it, and what else its speed depends on.

    A virtual machine's name may be that of many processors: family and model tell them apart. The
    instructions are those that torch uses.
    """
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    facts: dict[str, str] = {}
    for key, _, value in (line.partition(":") for line in lines):
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    more = [f"{key} {facts[fact]}" for key, fact in _CPU_FACTS.items() if facts.get(fact)]
    return f"{name} ({', '.join([*more, torch.backends.cpu.get_cpu_capability()])})"
