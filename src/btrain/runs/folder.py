"""The folder that a run leaves behind, and whom it belongs to."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from btrain.durable import (
    append_line,
    check_places,
    check_within,
    is_left_over,
    make_folder,
    open_in_place,
    write_file,
    written,
)
from btrain.errors import Interrupted, UserError
from btrain.runs.json_fields import Fields, is_number
from btrain.runs.lengthening import LENGTH, lengthened
from btrain.runs.lock import RunLock, locked
from btrain.settings import Config, DatasetName, Resume
from btrain.settings.checks import typed
from btrain.settings.compose import defaults, read_yaml, to_dict, to_yaml
from btrain.settings.older import as_begun, translated
from btrain.settings.run import is_learnt
from btrain.terminal import complain, counted, plural
from btrain.untrusted import open_plain, read_text

_LARGEST_SUMMARY = 1 << 20  # bytes
_LONGEST_LINE = 64 << 20  # bytes of metrics.jsonl

# They may differ, too, when a run is taken up again: attack.epsilon is made of the second one.
_MAY_DIFFER = ("train.max_seconds", "dataset.l2_epsilon")

_LOCK = "run.lock"
_OF_LOGGERS = ("wandb", "tensorboard")
"""The folders that loggers fill in a run folder."""

FAILED = "failed: "
"""The beginning, behind the time, of the last line of a failed run's `train.log`."""

SUMMARY_KEYS = {
    "clean_acc",
    "robust_acc",
    "f_b",
    "f_r",
    "f_o",
    "theoretical_speedup",
    "train_seconds",
    "device",
}
"""The keys of a summary that `btrain report` reads; there are more."""
_NAMED = 5  # settings of another run
_ALSO_NUMBERS = (
    *("density", "macs_share", "flops_counted", "flops_executed", "speedup_counted", "classes"),
    *("train_robust_acc", "best_robust_acc"),
    "attack_steps_mean",
    "flops",
    "speedup_flops",
    "speedup_measured",
    "epochs",
)


class RunFolder:
    """The files of one run: `config.yaml`, `metrics.jsonl`, `summary.json`, `checkpoints/`,
    `train.log`, `provenance.json`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = path / "checkpoints" / "last.pt"
        self.previous = path / "checkpoints" / "previous.pt"
        self.damaged = path / "checkpoints" / "damaged.pt"
        self.best = path / "checkpoints" / "best.pt"
        self.epoch_start = path / "checkpoints" / "epoch.pt"
        self.nonfinite = path / "nonfinite.pt"
        self.provenance = path / "provenance.json"
        self._config = path / "config.yaml"
        self._metrics = path / "metrics.jsonl"
        self._summary = path / "summary.json"
        self._log = path / "train.log"

    def check_owner(self, config: Config) -> None:
        """Make sure that the folder is free or holds a run of this configuration.

        Raises:
            UserError: it belongs to another configuration or to something else.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"run.dir={self.path} is a file; please name a folder.")
        if not self._config.is_file():
            if not self._is_empty():
                raise UserError(f"run.dir={self.path} holds other files; please name a new folder.")
            return
        # A setting that btrain did not have when the run began was at its default.
        theirs = flat(defaults(config)) | flat(translated(read_yaml(self._config)))
        ours = flat(to_dict(config))
        differing = [
            key
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key) and not _may_differ(key, config)
        ]
        others = [key for key in differing if key not in LENGTH and key != "recipe.schedule"]
        if not others:  # the same run, but for its length
            try:
                longer = lengthened(theirs, ours)
            except UserError as error:
                raise UserError(f"{self.path} belongs to {error}") from error
            others = [key for key in differing if key not in longer]
        if others:
            # Another option may have other settings: then it is named itself, ahead of them.
            options = [key for key in others if key.endswith(".name")]
            both = [key for key in others if key in theirs and key in ours and key not in options]
            named = [
                f"{key.removesuffix('.name')}={typed(theirs.get(key))}, not {typed(ours.get(key))}"
                for key in ([*options, *both] or others)[:_NAMED]
            ]
            if (left := len(others) - len(named)) > 0:
                differ = plural(left, "differs", "differ")
                named.append(f"{counted(left, 'more setting')} {differ}")
            raise UserError(
                f"{self.path} belongs to a run with {'; '.join(named)}; please name another "
                "run.dir."
            )

    def as_begun(self, config: Config) -> tuple[Config, str | None]:
        """Return a configuration with what the folder's run has had by an older default.

        Returns:
            The configuration, and a sentence for the log where that changes it.

        Raises:
            UserError: the folder's configuration cannot be read.
        """
        if not self._config.is_file():
            return config, None
        return as_begun(config, read_yaml(self._config))

    def _is_empty(self) -> bool:
        """Return whether there is only what a run leaves that was killed before it began."""
        left = {_LOCK, self.last.parent.name}
        checkpoints = self.last.parent
        return self._names() <= left and not (checkpoints.is_dir() and any(checkpoints.iterdir()))

    def _names(self) -> set[str]:
        return {path.name for path in self.path.iterdir() if not is_left_over(path.name)}

    def _remove(self) -> None:
        """Remove a new folder again; somebody else's files stay, and the folder with them."""
        begun = {self._config.name, self.provenance.name, *_OF_LOGGERS}
        with contextlib.suppress(OSError):  # somebody else has deleted it
            if self._names() <= {_LOCK, self.last.parent.name, *begun}:
                shutil.rmtree(self.path)
            else:
                self.last.parent.rmdir()

    def _check_places(self) -> None:
        """Make sure, ahead of the work, that all that a run writes can be written, and here.

        Raises:
            UserError: there is something else of such a name, or a link to another folder.
        """
        for name in (self.last.parent.name, "eval", *_OF_LOGGERS):
            check_within(self.path / name, self.path)
        checkpoints = (self.last, self.previous, self.damaged, self.best, self.epoch_start)
        others = (self._config, self._metrics, self._summary, self.provenance, self.nonfinite)
        check_places([*others, *checkpoints])

    def check_resume(self, resume: Resume) -> None:
        """Make sure that `run.resume` allows what is to be done here.

        Raises:
            UserError: there is a run and none is wanted, or the other way round.
        """
        if resume is Resume.never and self._config.is_file():
            raise UserError(
                f"run.resume=never: {self.path} holds a run already; please name another run.dir."
            )
        if resume is Resume.must and not (self.last.is_file() or self.previous.is_file()):
            raise UserError(f"run.resume=must: {self.path} holds no checkpoint to go on from.")

    @contextmanager
    def taken(self, config: Config) -> Iterator[RunLock]:
        """Hold the folder for this process alone; remove a new one whose run never began.

        Raises:
            UserError: the folder cannot be written, is in use, or is another run's by now.
        """
        fresh = not self._config.exists()
        make_folder(self.path, "run.dir")
        self._check_places()
        make_folder(self.last.parent, within=self.path)
        with locked(self.path / _LOCK) as lock:
            try:
                self.check_owner(config)
                yield lock
            except UserError:
                if fresh and not self._log.exists():
                    self._remove()
                raise

    def begin(self, config: Config, provenance: dict[str, Any]) -> None:
        """Write what is known before training, and take the mark of an earlier end away.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self._summary.unlink(missing_ok=True)  # of a run that gets more time
        except OSError as error:
            raise UserError(f"run.dir={self.path} cannot be written ({error.strerror}).") from error
        _write(self._config, to_yaml(config))
        _write(self.provenance, json.dumps(provenance, indent=2) + "\n")

    def settings(self) -> dict[str, Any]:
        """Return what `config.yaml` says, neither completed nor checked.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        if not self._config.is_file():
            raise UserError(f"{self.path} is no run folder: it holds no config.yaml.")
        return read_yaml(self._config)

    def summary(self) -> dict[str, Any] | None:
        """Return what `write_summary` wrote, or None.

        Raises:
            UserError: the file is damaged.
        """
        try:
            content = json.loads(read_text(self._summary, _LARGEST_SUMMARY))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict) or not content.keys() >= SUMMARY_KEYS:
            raise UserError(f"{self._summary} is damaged; delete the folder to start over.")
        _check_summary(Fields(self._summary, content))
        return content

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`, the mark of a run that came to its end."""
        _write(self._summary, json.dumps(summary, indent=2) + "\n")

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add one line to `metrics.jsonl`.

        Raises:
            UserError: it cannot be written.
        """
        append_line(self._metrics, json.dumps(line))

    def keep_metrics(self, epochs: int) -> None:
        """Drop the lines that a resumed run will write again, and what a crash left of a line."""
        with written(self._metrics) as file:
            for line, content in self._metric_lines():
                if content["epoch"] <= epochs:
                    file.write(line + b"\n")

    def logged(self, key: str) -> list[float]:
        """Return the numbers under a key of `metrics.jsonl`, of the epochs that have one."""
        values = (content.get(key) for _, content in self._metric_lines())
        return [value for value in values if isinstance(value, float) and is_number(value)]

    def _metric_lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """Yield the lines of `metrics.jsonl` and what they hold, up to one that is broken."""
        if not self._metrics.is_file():
            return
        with open_plain(self._metrics) as file:
            while line := file.readline(_LONGEST_LINE):  # of a sparse file, all of it is one
                try:
                    content = json.loads(line)
                except (ValueError, RecursionError):
                    return
                if not isinstance(content, dict) or not is_number(content.get("epoch")):
                    return
                yield line.rstrip(b"\r\n"), content

    @contextmanager
    def log_file(self) -> Iterator[None]:
        """Send btrain's log to the terminal and to `train.log`, which its first line makes.

        What ends the run stands in its last line, with `FAILED` before it unless it is a signal.
        """
        from tqdm.contrib.logging import logging_redirect_tqdm

        logger = logging.getLogger("btrain")
        file = _LogFile(self._log, encoding="utf-8", delay=True)
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        terminal = logging.StreamHandler()
        terminal.setFormatter(logging.Formatter("%(message)s"))
        before = logger.level, logger.propagate
        logger.setLevel(logging.INFO)
        logger.propagate = False
        handlers: list[logging.Handler] = [file, terminal]
        for handler in handlers:
            logger.addHandler(handler)
        try:
            with logging_redirect_tqdm([logger]):
                yield
        except (Exception, Interrupted) as error:
            if self._log.exists():  # the terminal gets it anyway
                file.handle(logging.makeLogRecord({"msg": _ending(error)}))
            raise
        finally:
            for handler in handlers:
                logger.removeHandler(handler)
                handler.close()
            logger.setLevel(before[0])
            logger.propagate = before[1]


def settings_sha256(config: Config) -> str:
    """Return a hash of the settings that a run keeps while it goes on: others are another run's."""
    kept = {
        key: value
        for key, value in flat(to_dict(config)).items()
        if not _may_differ(key, config) and key not in LENGTH
        if (key, value) not in _LATER
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


_LATER = [("recipe.repair_steps", 0)]
"""Settings that runs were evaluated without, as they were then."""


def _may_differ(key: str, config: Config) -> bool:
    """Return whether a setting may be another one when a run is taken up again."""
    if key == "dataset.root":  # the same data in another place
        return config.dataset.name is not DatasetName.imagefolder
    return key in _MAY_DIFFER or not is_learnt(key)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings by their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _check_summary(fields: Fields) -> None:
    """Raise UserError for a value that a number is made of and that is none."""
    for key in (*sorted(SUMMARY_KEYS - {"device"}), *_ALSO_NUMBERS):
        fields.optional_number(key)
    fields.number("train_seconds")
    if not isinstance(fields.values["device"], str):
        raise fields.wrong("device", "a name")


def _ending(error: BaseException) -> str:
    """Return why a run ended, on one line."""
    if isinstance(error, Interrupted):
        return str(error)
    if isinstance(error, UserError):
        return f"{FAILED}{error}"
    words = " ".join(str(error).split())
    return f"{FAILED}{UserError(f'{type(error).__name__}: {words}')}"  # cut, and printable


def _write(path: Path, text: str) -> None:
    write_file(path, text.encode())


class _LogFile(logging.FileHandler):
    """A log file that a full disk costs its lines and no more."""

    _failed = False

    def _open(self) -> io.TextIOWrapper:
        file = open_in_place(self.baseFilename, os.O_WRONLY | os.O_APPEND)
        return os.fdopen(file, "a", encoding=self.encoding)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # it opens the file
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not self._failed:
            self._failed = True
            complain(f"{self.baseFilename} could not be written.")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()
