"""Where a run's numbers go besides its folder: nowhere, Weights & Biases, or TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from btrain.errors import UserError
from btrain.schema import LoggerConfig, LoggerName


class Log(Protocol):
    """Takes one epoch's metrics, or the summary."""

    def __call__(self, metrics: dict[str, Any], *, epoch: int) -> None: ...


@contextmanager
def open_logger(logger: LoggerConfig, run_dir: Path, settings: dict[str, Any]) -> Iterator[Log]:
    """The logger that the configuration names, closed at the end.

    Args:
        settings: the whole configuration as plain containers, shown beside the run.

    Raises:
        UserError: the package is missing, or the service does not answer.
    """
    if logger.name is LoggerName.wandb:
        with _wandb(logger, run_dir, settings) as log:
            yield log
    elif logger.name is LoggerName.tensorboard:
        with _tensorboard(run_dir) as log:
            yield log
    else:
        yield lambda metrics, *, epoch: None


@contextmanager
def _wandb(logger: LoggerConfig, run_dir: Path, settings: dict[str, Any]) -> Iterator[Log]:
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
    with run:
        yield lambda metrics, *, epoch: run.log(metrics, step=epoch)


@contextmanager
def _tensorboard(run_dir: Path) -> Iterator[Log]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            'logger=tensorboard needs the extra: pip install "btrain[tensorboard]".'
        ) from error
    writer = SummaryWriter(run_dir / "tensorboard")

    def log(metrics: dict[str, Any], *, epoch: int) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float):
                writer.add_scalar(name, value, epoch)

    try:
        yield log
    finally:
        writer.close()
