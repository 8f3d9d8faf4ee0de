"""Where a run's numbers go besides its folder: nowhere, Weights & Biases, or TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btrain.errors import UserError
from btrain.schema import LoggerConfig, LoggerName


@dataclass(frozen=True)
class Tracker:
    """Takes each epoch's metrics, and the summary at the end."""

    log: Callable[[dict[str, Any], int], None]
    """(metrics, epoch)"""
    summarise: Callable[[dict[str, Any]], None]


@contextmanager
def open_tracker(
    logger: LoggerConfig, run_dir: Path, settings: dict[str, Any]
) -> Iterator[Tracker]:
    """The logger that the configuration names, closed at the end.

    Args:
        settings: the whole configuration as plain containers, shown beside the run.

    Raises:
        UserError: the package is missing, or the service does not answer.
    """
    if logger.name is LoggerName.wandb:
        with _wandb(logger, run_dir, settings) as tracker:
            yield tracker
    elif logger.name is LoggerName.tensorboard:
        with _tensorboard(run_dir) as tracker:
            yield tracker
    else:
        yield Tracker(lambda metrics, epoch: None, lambda summary: None)


@contextmanager
def _wandb(logger: LoggerConfig, run_dir: Path, settings: dict[str, Any]) -> Iterator[Tracker]:
    try:
        import wandb

        run = wandb.init(
            project=logger.project,
            name=run_dir.name,
            dir=run_dir,
            mode=logger.mode.value,
            config=settings,
        )
    except Exception as error:  # no account, no network, a broken installation
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"logger=wandb could not start ({reason}); logger.mode=offline needs no network."
        ) from error
    try:
        yield Tracker(lambda metrics, epoch: run.log(metrics, step=epoch), run.summary.update)
    except BaseException:
        run.finish(exit_code=1)  # `with run` would print a traceback
        raise
    run.finish()


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
