"""The place from which an interrupted run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from btrain.errors import UserError
from btrain.processes.world import World
from btrain.runs import checkpoint
from btrain.runs.folder import RunFolder
from btrain.runs.json_fields import is_count, is_percentage
from btrain.training.state import TrainState


def load_newest(folder: RunFolder) -> tuple[dict[str, Any] | None, str | None]:
    """Return the newest readable checkpoint, if any, and a warning if it is not the last one.

    Raises:
        UserError: there are checkpoints and none can be read.
    """
    if not folder.last.is_file() and not folder.previous.is_file():
        return None, None
    try:
        if folder.last.is_file():
            return _load(folder.last), None
        why = f"{folder.last} is missing."
    except UserError as error:
        if not folder.previous.is_file():
            raise
        why = str(error).split(";")[0].rstrip(".") + "."
    return _load(folder.previous), f"{why} The run goes on from {folder.previous}."


def _load(path: Path) -> dict[str, Any]:
    content = checkpoint.load(path)
    if not checkpoint.is_resumable(content["state"]):
        raise UserError(f"{path} is damaged: it does not say how far its run came.")
    return content


def check_batch(state: TrainState, batches: int, folder: RunFolder) -> None:
    """Make sure that a run that goes on within an epoch does so at one of its batches.

    Raises:
        UserError: the epoch has fewer.
    """
    if state.batch > batches:
        raise UserError(
            f"{folder.last} is damaged: it is of batch {state.batch:,} of an epoch, which has "
            f"{batches:,}."
        )


def check_same_folder(world: World, folder: RunFolder, state: TrainState) -> None:
    """Make sure that all processes go on from the same checkpoints.

    Raises:
        UserError: they do not; every process raises it.
    """
    found = world.heard([state.epoch, state.batch, state.best_epoch])
    if any(theirs != found[0] for theirs in found):
        raise UserError(f"run.dir={folder.path} must be one folder for all machines; it is not.")


def set_damaged_aside(folder: RunFolder) -> None:
    """Keep a damaged last checkpoint from taking the place of the good one before it."""
    if folder.last.is_file():
        folder.last.replace(folder.damaged)


def adopt_best(state: TrainState, folder: RunFolder) -> None:
    """Take the best epoch from `best.pt`, which may be newer than the checkpoint resumed from.

    Otherwise the summary could name one epoch and show another's accuracy.

    Raises:
        UserError: it is damaged, or of another network.
    """
    if not folder.best.is_file():
        state.best_epoch = state.best_val_acc = None
        return
    best = checkpoint.load(folder.best)["state"]
    fits = is_count(best.get("epoch", 0)) and is_percentage(best.get("val_acc", 0))
    if not fits or not state.fits(best.get("model")):
        raise UserError(f"{folder.best} does not hold the best epoch of a run like this.")
    if "val_acc" in best:
        state.best_epoch, state.best_val_acc = best["epoch"], best["val_acc"]
