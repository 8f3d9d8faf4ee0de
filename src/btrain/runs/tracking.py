"""The places of a run's numbers besides its folder: none, Weights & Biases, or TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from btrain.errors import UserError, first_line
from btrain.settings import LoggerConfig, LoggerName

log = logging.getLogger("btrain")

FINISH_SECONDS = 120.0
"""The time wandb may upload at the end of a run; what is left then lies in the run folder, for
`wandb sync`.
"""


@dataclass(frozen=True)
class Tracker:
    """A taker of each epoch's metrics, and of the summary at the end."""

    log: Callable[[dict[str, Any], int], None]
    """(metrics, epoch)"""
    summarise: Callable[[dict[str, Any]], None]


@contextmanager
def open_tracker(
    logger: LoggerConfig, run_dir: Path, settings: dict[str, Any], *, resumed: bool = False
) -> Iterator[Tracker]:
    """Open the loggers that the configuration names, and close them at the end.

    Once one has started, whatever it raises becomes one warning and ends it, not the run nor the
    others.

    Args:
        settings: the whole configuration as plain containers, shown beside the run.
        resumed: whether the run has begun already; then a logger that cannot start ends nothing
            either.

    Raises:
        UserError: a package is missing, or a service does not answer.
    """
    openers = {
        LoggerName.wandb: lambda: _wandb(logger, run_dir, settings),
        LoggerName.tensorboard: lambda: _tensorboard(run_dir),
    }
    with ExitStack() as stack:
        trackers = [
            stack.enter_context(_open(openers[name], name.name, resumed=resumed))
            for name in logger.names
            if name in openers
        ]

        def log(metrics: dict[str, Any], epoch: int) -> None:
            for tracker in trackers:
                tracker.log(metrics, epoch)

        def summarise(summary: dict[str, Any]) -> None:
            for tracker in trackers:
                tracker.summarise(summary)

        yield Tracker(log, summarise)


@contextmanager
def _open(
    opener: Callable[[], AbstractContextManager[Tracker]], name: str, *, resumed: bool
) -> Iterator[Tracker]:
    """Open one logger, guarded."""
    opened = opener()
    try:
        tracker = opened.__enter__()
    except UserError as error:
        if not resumed:
            raise
        log.warning("%s The run goes on without it.", error)
        yield Tracker(lambda metrics, epoch: None, lambda summary: None)
        return
    guarded = _Guarded(tracker, name)
    try:
        yield Tracker(guarded.log, guarded.summarise)
    except BaseException as error:
        guarded.attempt(partial(opened.__exit__, type(error), error, error.__traceback__))
        raise
    guarded.attempt(partial(opened.__exit__, None, None, None))


class _Guarded:
    """A tracker that is called until it fails."""

    def __init__(self, tracker: Tracker, name: str) -> None:
        self._tracker, self._name, self._failed = tracker, name, False

    def log(self, metrics: dict[str, Any], epoch: int) -> None:
        self._call(lambda: self._tracker.log(metrics, epoch))

    def summarise(self, summary: dict[str, Any]) -> None:
        self._call(lambda: self._tracker.summarise(summary))

    def _call(self, what: Callable[[], object]) -> None:
        if not self._failed:
            self.attempt(what)

    def attempt(self, what: Callable[[], object]) -> None:
        """Make a call, also to close a tracker that has failed; report only the first failure."""
        try:
            what()
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._failed:
            log.warning(
                "logger=%s failed (%s) and gets nothing more; metrics.jsonl goes on.",
                self._name,
                first_line(error) or type(error).__name__,
            )
        self._failed = True


@contextmanager
def _wandb(logger: LoggerConfig, run_dir: Path, settings: dict[str, Any]) -> Iterator[Tracker]:
    try:
        import wandb

        run = wandb.init(
            project=logger.project,
            name=run_dir.name,
            group=logger.group,
            tags=logger.tags,
            dir=run_dir,
            mode=logger.mode.value,
            config=settings,
            settings=wandb.Settings(finish_timeout=FINISH_SECONDS, finish_timeout_raises=True),
        )
    except Exception as error:  # no account, no network, a broken installation
        raise UserError(
            f"logger=wandb could not start ({first_line(error)}); "
            "logger.mode=offline needs no network."
        ) from error
    status = 1
    try:
        yield Tracker(lambda metrics, epoch: run.log(metrics, step=epoch), run.summary.update)
        status = 0
    finally:
        try:
            run.finish(exit_code=status)  # `with run` would print a traceback
        except Exception:
            with suppress(Exception):  # left to itself, it prints one when the process ends
                wandb.teardown(exit_code=1)
            raise


@contextmanager
def _tensorboard(run_dir: Path) -> Iterator[Tracker]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            'logger=tensorboard needs the extra: pip install "btrain[tensorboard]".'
        ) from error
    writer = SummaryWriter(run_dir / "tensorboard")

    def log(metrics: dict[str, Any], epoch: int) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float):
                writer.add_scalar(name, value, epoch)

    try:
        yield Tracker(
            log,
            lambda summary: log({f"test/{k}": v for k, v in summary.items()}, summary["epochs"]),
        )
    finally:
        writer.close()
