"""The things that the process that writes leaves in the run folder while training goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from btrain.data import Data
from btrain.errors import UserError
from btrain.runs import checkpoint
from btrain.runs.folder import RunFolder
from btrain.runs.lock import RunLock
from btrain.runs.tracking import Tracker
from btrain.settings import Config
from btrain.settings.compose import to_dict
from btrain.training.lines import epoch_line, many_outliers
from btrain.training.safety.finite import NotFiniteError
from btrain.training.state import TrainState

log = logging.getLogger("btrain")


@dataclass(frozen=True)
class Record:
    """The folder, its lock, and the logger of a run."""

    config: Config
    state: TrainState
    data: Data
    folder: RunFolder
    tracker: Tracker
    lock: RunLock

    def save(self) -> None:
        """Write the checkpoint of now."""
        self.lock.check()
        content = {
            "state": self.state.state_dict(),
            "config": to_dict(self.config),
            **checkpoint.of_images(self.data),
        }
        checkpoint.save(self.folder.last, content, previous=self.folder.previous)

    def save_epoch_start(self) -> None:
        """Write what a collapse within the epoch goes back to, where the recipe stops at one."""
        if self.config.recipe.early_stop_on_collapse and self.state.batch == 0:
            checkpoint.save(self.folder.epoch_start, {"state": self.state.state_dict()})

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Write an epoch's line, or that of its part."""
        for warning in metrics["warnings"]:
            log.warning("epoch %d: %s.", metrics["epoch"], warning)
        self.lock.check()
        self.folder.append_metrics(metrics)
        of_epoch = {key: value for key, value in metrics.items() if key != "scores"}
        self.tracker.log(of_epoch, metrics["epoch"])
        log.info(epoch_line(self.config, metrics))
        warning = many_outliers(self.config, metrics, len(self.data.classes))
        if warning is not None:
            log.warning("%s", warning)

    def end(self, summary: dict[str, Any]) -> None:
        """Write the summary of a run that came to its end."""
        self.lock.check()
        self.folder.write_summary(summary)
        self.tracker.summarise(summary)

    @contextmanager
    def offending_batch_kept(self) -> Iterator[None]:
        """Keep a batch that ended the run beside it."""
        try:
            yield
        except NotFiniteError as error:
            with suppress(UserError):  # the first sentence is the one that matters
                checkpoint.save(self.folder.nonfinite, {"state": error.batch})
            raise
