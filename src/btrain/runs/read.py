"""The run as its folder tells it: where it stands, its numbers, and the machine it ran on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from btrain.errors import UserError
from btrain.evaluation.result import WEIGHTS, agree, weights_in
from btrain.runs.folder import FAILED as FAILED_BECAUSE
from btrain.runs.folder import RunFolder, flat
from btrain.runs.json_fields import is_number, read_object
from btrain.settings.names import Activation, DatasetName, Shortcut
from btrain.settings.run import CLASSES
from btrain.terminal import counted
from btrain.untrusted import read_text

FINISHED, RUNNING, FAILED = "finished", "running", "failed"
UNFINISHED, MISSING = "unfinished", "missing"

_SILENCE_SECONDS = 45  # the holder of a run's lock touches it every ten
_LARGEST = 64 << 20  # bytes
_LONGEST_REASON = 200  # characters
_TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "
_FAILURE = re.compile(_TIME + re.escape(FAILED_BECAUSE) + "(.*)")
_OTHER_CHECKPOINTS = ("best", "previous", "epoch", "damaged")  # have evaluations of their own
# An address of the net, which may stay, a path between quotation marks, or any other path from a
# root, a home or a drive on.
_START = r"(?:file:/|/|~/|[A-Za-z]:[\\/])"
_PATH = re.compile(
    r"(?P<address>(?!file:)\b[A-Za-z][\w+.-]+://\S+)"
    rf"|(?P<mark>['\"])(?={_START})[^'\"]+(?P=mark)"
    rf"|“(?={_START})[^”]+”"
    rf"|(?<![\w./~]){_START}[^\s'\"“”()<>\[\],;]*[^\s'\"“”()<>\[\],;.:]"
)


@dataclass(frozen=True)
class Run:
    """The folder of a run, read.

    Attributes:
        state: finished, running, failed, unfinished (stopped, or killed) or missing.
        reason: of a failure, as the last line of its log has it.
        config: its settings by their dotted keys; empty where it never began.
        summary: what `summary.json` says; empty unless it is finished.
    """

    folder: Path
    state: str
    reason: str
    config: dict[str, Any]
    summary: dict[str, Any]

    def number(self, key: str) -> float | None:
        """Return a number of the summary."""
        return _number(self.summary.get(key))

    def evaluation(self, attack: str) -> tuple[Path, dict[str, Any]] | None:
        """Return folder and content of `<attack>.json`; None without one that holds a percentage.

        The one in `eval` counts; without it, of those in its subfolders, the one of the most
        images. One of other weights than the run's last does not count.
        """
        inside = self.folder / "eval"
        sound = [
            (path.parent, content)
            for path, content in self._evaluations.items()
            if path.name == f"{attack}.json"
            and path.parent.name not in _OTHER_CHECKPOINTS
            and (accuracy := _number(content.get("accuracy"))) is not None
            and 0 <= accuracy <= 100
            and agree(content, self._weights, [WEIGHTS])
        ]
        own = [found for found in sound if found[0] == inside]
        most = max(sound, key=lambda found: _number(found[1].get("n")) or 0.0, default=None)
        return own[0] if own else most

    def evaluated(self, attack: str) -> float | None:
        """Return the accuracy under an attack, percent; of a finished run only."""
        found = self.evaluation(attack) if self.state == FINISHED else None
        return None if found is None else float(found[1]["accuracy"])

    @property
    def classes(self) -> int | None:
        """Return how many classes the data have, where the settings or an evaluation tell."""
        known = {name.value: count for name, count in CLASSES.items()}
        if (name := self.config.get("dataset.name")) in known:
            return known[str(name)]
        for content in self._evaluations.values():
            if isinstance(names := content.get("classes"), list):
                return len(names)
        return None

    def evaluation_seconds(self) -> float:
        """Return the seconds that all evaluations took."""
        return sum(_number(of.get("seconds")) or 0.0 for of in self._evaluations.values())

    @cached_property
    def _evaluations(self) -> dict[Path, dict[str, Any]]:
        """Return the contents of `eval/*.json` and `eval/*/*.json`, read when first asked for."""
        inside = self.folder / "eval"
        paths = [*sorted(inside.glob("*.json")), *sorted(inside.glob("*/*.json"))]
        return {path: read_object(path) for path in paths}

    @cached_property
    def _weights(self) -> dict[str, str]:
        """Return what a result of the run's last weights tells of them."""
        return weights_in(RunFolder(self.folder).last)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`, an epoch each, up to one that is broken."""
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
        """Return how many epochs are done, and how many planned."""
        planned = self.config.get("train.epochs")
        done = int(self.metrics[-1]["epoch"]) if self.metrics else 0
        return done, planned if isinstance(planned, int) else None

    @cached_property
    def jobs(self) -> int | None:
        """Return how many runs shared the machine, at most; None where a session does not tell."""
        sessions = read_object(self.folder / "provenance.json").get("sessions")
        known: list[int] = []
        for session in sessions if isinstance(sessions, list) else []:
            told = session.get("jobs") if isinstance(session, dict) else None
            if type(told) is not int:
                return None
            known.append(told)
        return max(known, default=None)

    @cached_property
    def machine(self) -> tuple[str, ...] | None:
        """Return what its training time depends on, or None where it does not tell.

        Device, torch, processor, cores and threads; of a run that was taken up on another machine
        as many again.
        """
        sessions = read_object(self.folder / "provenance.json").get("sessions")
        found: list[str] = []
        for session in sessions if isinstance(sessions, list) else []:
            try:
                hardware = session["hardware"]
                facts = (
                    str(session["device"]),
                    f"torch {session['versions']['torch']}",
                    str(hardware["processor"]),
                    counted(hardware["cores"], "core"),
                    counted(hardware["threads"], "thread"),
                )
            except (KeyError, TypeError):
                return None
            found += [] if tuple(found[-len(facts) :]) == facts else facts
        return tuple(found) or None


def images_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a run's settings, by dotted keys, that tell its training images."""
    keys = {"name", "factory", "train_examples", "image_size"}
    if settings.get("dataset.name") == DatasetName.imagefolder.name:
        keys.add("root")
    return _of_group("dataset", keys, settings)


def network_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a run's settings, by dotted keys, that tell how large its network is."""
    keys = {"name", "factory", "network", "width", "depth", "shortcut", "activation"}
    older = {"model.shortcut": Shortcut.activated.name, "model.activation": Activation.relu.name}
    return older | _of_group("model", keys, settings)


def _of_group(group: str, keys: set[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    wanted = {f"{group}.{key}" for key in keys}
    return {
        key: value
        for key, value in settings.items()
        if value is not None and (key in wanted or key.startswith(f"{group}.settings."))
    }


def read_run(folder: Path) -> Run:
    """Read a run folder, or one that is not there yet; what is damaged counts as failed."""
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
    if failure := _FAILURE.fullmatch(_last_line(folder / "train.log")):
        return Run(folder, FAILED, _reason(failure[1], folder), config, {})
    return Run(folder, UNFINISHED if config else MISSING, "", config, {})


class Runs:
    """A reader of runs, which reads finished ones again only where something was written since.

    Other targets, the next report and the next look ask for the same folders.
    """

    def __init__(self) -> None:
        self._kept: dict[Path, tuple[tuple[int, ...], Run]] = {}

    def read(self, folder: Path) -> Run:
        """Return a run folder as it is now."""
        changed = _changed(folder)
        kept = self._kept.get(folder)
        if kept is not None and kept[0] == changed:
            return kept[1]
        run = read_run(folder)
        if run.state == FINISHED:
            self._kept[folder] = changed, run
        else:
            self._kept.pop(folder, None)
        return run


def _changed(folder: Path) -> tuple[int, ...]:
    """Return when a run's settings, summary and evaluations were last replaced, in nanoseconds.

    Files are replaced by renaming, which changes the time of their folder.
    """
    inside = folder / "eval"
    places = [folder / "config.yaml", folder / "summary.json", inside, *sorted(inside.glob("*/"))]
    times = []
    for place in places:
        with contextlib.suppress(OSError):
            times.append(place.stat().st_mtime_ns)
    return tuple(times)


def _reason(message: str, folder: Path) -> str:
    """Return a message without the places of files, which are nobody else's business.

    Those in the run's folder are named from there on, of others nothing is left.
    """
    within = message.replace(f"{folder}/", "").replace(str(folder), folder.name)
    return _PATH.sub(lambda found: found["address"] or "…", within)[:_LONGEST_REASON]


def is_held(lock: Path) -> bool:
    """Return whether whoever took a run's folder still lives; never touch the lock itself."""
    try:
        silent = time.time() - lock.stat().st_mtime
    except OSError:
        return False
    holder = read_object(lock)
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


def _last_line(path: Path) -> str:
    try:
        lines = read_text(path, _LARGEST).strip().splitlines()
    except (OSError, ValueError):
        return ""
    return lines[-1] if lines else ""
