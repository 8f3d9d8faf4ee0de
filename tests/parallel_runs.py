"""The work of `test_parallel_runs.py`: all that the processes of a run tell each other.

Each leaves FOLDER/<rank>.json, FOLDER/<rank>.threads, and all together the runs.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from btrain import models
from btrain.data import Split, load
from btrain.errors import Interrupted, UserError
from btrain.evaluation import Accuracy, evaluate
from btrain.processes.world import World, joined
from btrain.training import run, train
from btrain.training.safety import inputs as guards
from btrain.training.safety.signals import stop_on_signals
from btrain.training.setup import make_state
from btrain.training.state import TrainState
from btrain.training.timing import probe
from composing import compose

COMMON = [
    "dataset=digits", "model=small_cnn", "model.width=4", "device=cpu", "train.batch_size=48",
    "train.epochs=2", "recipe.lr=0.05", "dataset.train_examples=97", "dataset.val_examples=31",
    "eval.steps=3", "eval.batch_size=10", "eval.epsilon=0.05",
]  # fmt: skip
RUNS = {
    "trades": ["defense=trades"],
    "averaged": ["defense=trades", "recipe.ema=0.9"],
    "augmix": ["defense=augmix"],
    "collapsed": ["defense=pgd", "recipe.early_stop_on_collapse=true", "recipe.ema=0.9"],
    "repaired": ["defense=pgd", "bt=uniform", "recipe.repair_steps=2"],
}
MASKED = [
    "sparsity=flying_bird_plus", "sparsity.switch_from=0", "sparsity.switch_epochs=1",
    "sparsity.interval_unit=iterations", "sparsity.interval=1", "sparsity.probe_examples=20",
]  # fmt: skip
FEW = (1, 2, 5)
"""Examples of evaluations; the processes are three."""


def main(folder: Path) -> None:
    """Do all of it, to the end of an interpreter, which a fork by itself has not."""
    atexit._clear()
    atexit.register(leave_threads, folder)  # the first one here is the last one called
    _main(folder)
    atexit._run_exitfuncs()


def _main(folder: Path) -> None:
    done: dict[str, Any] = {"summaries": {}}
    probe._SHARE = 100.0  # epochs of two batches leave no room within 1 %
    for name, own in RUNS.items():
        if name == "collapsed":
            guards.COLLAPSE = -200.0  # whatever an epoch does from here on is one
        done["summaries"][name] = train(compose([*COMMON, *own, f"run.dir={folder / name}"]))
        if "mistake" not in done:
            done["mistake"] = mistake(folder / "never")
    with joined() as world:
        done["accuracies"] = [asdict(accuracy_of(few, world)) for few in FEW]
        done["masks"] = masks_of(folder / "masked")
        done["stopped"] = stopped_by_one(world)
        (folder / f"{world.rank}.json").write_text(json.dumps(done))


def leave_threads(folder: Path) -> None:
    """Writes the names of this process' threads."""
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    (folder / f"{os.environ['RANK']}.threads").write_text("".join(names))


def mistake(run_dir: Path) -> str:
    """What a run says whose last process has other data."""
    with joined() as world:
        examples = 96 if world.rank == world.size - 1 else 97
    other = f"dataset.train_examples={examples}"
    try:
        train(compose([*COMMON, other, f"run.dir={run_dir}"]))
    except UserError as error:
        return str(error)
    return ""


def accuracy_of(examples: int, world: World | None) -> Accuracy:
    """An untrained network's, on so many digits in batches of two a process."""
    digits = load("digits", Path("unused"), device=torch.device("cpu"))
    torch.manual_seed(0)
    network = models.build("small_cnn", width=4, depth=None, classes=10, shape=(1, 8, 8))
    return evaluate(
        network,
        Split(digits.test.images[:examples], digits.test.labels[:examples]),
        epsilon=0.1,
        step_size=0.05,
        steps=2,
        batch_size=2,
        seed=0,
        processes=world,
    )


def masks_of(run_dir: Path) -> str:
    """A digest of this process' masks and weights at the end of a run that changed them."""
    made: list[TrainState] = []

    def kept(*args: Any) -> TrainState:
        made.append(make_state(*args))
        return made[-1]

    run.make_state = kept
    try:
        train(compose([*COMMON, *MASKED, f"run.dir={run_dir}"]))
    finally:
        run.make_state = make_state
    assert made[0].sparsity is not None
    tensors = [*made[0].sparsity.memory.values(), *made[0].model.state_dict().values()]
    content = b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(content).hexdigest()


def stopped_by_one(world: World) -> list[Any]:
    """A signal to the last process: what all agree on ahead of it and after it."""
    with stop_on_signals(world) as stop:
        before = stop.agreed()
        if world.rank == world.size - 1:
            signal.raise_signal(signal.SIGTERM)
        try:
            stop.together()
        except Interrupted as interrupted:
            return [before, stop.made(), interrupted.number]
    return [before]
