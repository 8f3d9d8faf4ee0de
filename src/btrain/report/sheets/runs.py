"""One run as its folder tells it: where it stands, its numbers, and the machine it ran on."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from btrain.errors import UserError
from btrain.report.json_fields import is_number
from btrain.run_folder import RunFolder, flat
from btrain.untrusted import read_text

FINISHED, RUNNING, FAILED = "finished", "running", "failed"
UNFINISHED, MISSING = "unfinished", "missing"

_SILENCE_SECONDS = 45  # the holder of a run's lock touches it every ten
_LARGEST = 64 << 20  # bytes
_LONGEST_REASON = 200  # characters
_TIME = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")
# What the log of a run ends with that was stopped or killed; anything else is why it failed.
_GOES_ON = re.compile(r"epoch \d+: |.*: \d+ training images|stopped by SIG|\s*$")


@dataclass(frozen=True)
class Run:
    """A run's folder.

    Attributes:
        state: finished, running, failed, unfinished (stopped, or killed) or missing.
        reason: of a failure, the last line of its log.
        config: its settings by their dotted keys; empty where it never began.
        summary: what `summary.json` says; empty unless it is finished.
    """

    folder: Path
    state: str
    reason: str
    config: dict[str, Any]
    summary: dict[str, Any]

    def number(self, key: str) -> float | None:
        """A number of the summary."""
        return _number(self.summary.get(key))

    def evaluation(self, attack: str) -> tuple[Path, dict[str, Any]] | None:
        """The folder and content of `<attack>.json`; None without one that holds a percentage.

        In `eval`, or where test images other than the run's were asked for, in a folder of it.
        """
        inside = self.folder / "eval"
        for path in (inside / f"{attack}.json", *sorted(inside.glob(f"*/{attack}.json"))):
            content = _json(path)
            accuracy = _number(content.get("accuracy"))
            if accuracy is not None and 0 <= accuracy <= 100:
                return path.parent, content
        return None

    def evaluated(self, attack: str) -> float | None:
        """The accuracy under an attack, percent; of a finished run only."""
        found = self.evaluation(attack) if self.state == FINISHED else None
        return None if found is None else float(found[1]["accuracy"])

    @property
    def classes(self) -> int | None:
        """How many classes the data have, where the settings or an evaluation tell."""
        known = {"cifar10": 10, "cifar100": 100, "mnist": 10, "digits": 10}
        if (name := self.config.get("dataset.name")) in known:
            return known[str(name)]
        for path in sorted((self.folder / "eval").glob("*.json")):
            if isinstance(names := _json(path).get("classes"), list):
                return len(names)
        return None

    def evaluation_seconds(self) -> float:
        """That all evaluations took."""
        files = sorted((self.folder / "eval").glob("**/*.json"))
        return sum(_number(_json(path).get("seconds")) or 0.0 for path in files)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, an epoch each, up to one that is broken."""
        lines: list[dict[str, Any]] = []
        try:
            for line in read_text(self.folder / "metrics.jsonl", _LARGEST).splitlines():
                content = json.loads(line)
                if not isinstance(content, dict) or not is_number(content.get("epoch")):
                    break
                lines.append(content)
        except (OSError, ValueError, RecursionError):
            pass
        return lines

    @property
    def epochs(self) -> tuple[int, int | None]:
        """Done, and planned."""
        planned = self.config.get("train.epochs")
        done = int(self.metrics[-1]["epoch"]) if self.metrics else 0
        return done, planned if isinstance(planned, int) else None

    @cached_property
    def machine(self) -> tuple[str, ...] | None:
        """What its training time depends on, or None where it does not tell.

        Device, torch, processor, cores and threads; of a run that was taken up on another machine
        as many again.
        """
        sessions = _json(self.folder / "provenance.json").get("sessions")
        found: list[str] = []
        for session in sessions if isinstance(sessions, list) else []:
            try:
                hardware = session["hardware"]
                facts = (
                    str(session["device"]),
                    f"torch {session['versions']['torch']}",
                    str(hardware["processor"]),
                    f"{hardware['cores']} cores",
                    f"{hardware['threads']} thread{'' if hardware['threads'] == 1 else 's'}",
                )
            except (KeyError, TypeError):
                return None
            found += [] if tuple(found[-len(facts) :]) == facts else facts
        return tuple(found) or None


def read_run(folder: Path) -> Run:
    """A run folder, or one that is not there yet. What is damaged counts as failed."""
    run = RunFolder(folder)
    config: dict[str, Any] = {}
    try:
        if (folder / "config.yaml").is_file():
            config = flat(run.settings())
        summary = run.summary()
    except UserError as error:
        return Run(folder, FAILED, _reason(str(error), folder), config, {})
    if summary is not None:
        return Run(folder, FINISHED, "", config, summary)
    if is_held(folder / "run.lock"):
        return Run(folder, RUNNING, "", config, {})
    if last := _last_line(folder / "train.log"):
        reason = _TIME.sub("", last)
        if not _GOES_ON.match(reason):
            return Run(folder, FAILED, _reason(reason, folder), config, {})
    return Run(folder, UNFINISHED if config else MISSING, "", config, {})


def _reason(message: str, folder: Path) -> str:
    """A message without the place of the folder, which is nobody else's business."""
    return message.replace(f"{folder}/", "").replace(str(folder), folder.name)[:_LONGEST_REASON]


def is_held(lock: Path) -> bool:
    """Whether whoever took a run's folder still lives. Never touches the lock itself."""
    try:
        silent = time.time() - lock.stat().st_mtime
    except OSError:
        return False
    holder = _json(lock)
    pid = holder.get("pid")
    if holder.get("host") == socket.gethostname() and isinstance(pid, int) and os.name == "posix":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):
            pass
    return silent < _SILENCE_SECONDS


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none or it cannot be read."""
    try:
        content = json.loads(read_text(path, _LARGEST))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _last_line(path: Path) -> str:
    try:
        lines = read_text(path, _LARGEST).strip().splitlines()
    except (OSError, ValueError):
        return ""
    return lines[-1] if lines else ""
