"""The cost of a run before it is begun: steps, time, work, memory, disk."""

from __future__ import annotations

import gc
import io
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from btrain.attacks.fast_paths import make_fast_paths
from btrain.build import find_device
from btrain.data.augmentation import batch_slices
from btrain.data.splits import load_or_stand_in
from btrain.methods.base import Method
from btrain.methods.cost import PAPER_FRACTIONS, forward_flops
from btrain.methods.make import Known, make_method, make_methods
from btrain.methods.statistics import EXAMPLES, UNITS
from btrain.settings import Config
from btrain.settings.sparsity import RobustBirdConfig
from btrain.terminal import counted, lasting, plural, sized, tell
from btrain.training.epochs import fewest_images, train_epoch
from btrain.training.safety.out_of_memory import explained_memory, smaller_batch
from btrain.training.schedule import make_plan
from btrain.training.search import search_method
from btrain.training.setup import check_radius, known_of, make_state, store_bytes

_SECONDS, _BATCHES = 10.0, 20
_ALL = (1.0, 0.0, 0.0)
_CHECKPOINTS = 3  # of a run, at the most


@dataclass(frozen=True)
class Foreseen:
    """The cost of a run that has not begun.

    Attributes:
        batches: of an epoch.
        timed: batches that were tried and timed.
        seconds: of training, without the evaluations.
        flops: of the whole training.
        memory: the most that was held while steps were tried, bytes: on a GPU by tensors, on a CPU
            by the whole process, Python and the data set with it.
        alone: whether that is of this job; otherwise jobs before it in this process may have held
            the most.
        checkpoint: bytes of one.
        by_paper: whether the paper's shares of boundary, robust and outlier examples were assumed.
        fewest: batches in all, if train.skip leaves out as many images as it may.
        reckoned: batches in all that seconds and flops are of: the fewest, unless a guard keeps all
            images at the share of outliers that is assumed.
        store: bytes of the kept starts; None where none are kept.
        saved: whether checkpoints hold them.
        search: batches ahead of the epochs, of a search, at the most.
        noise_for: the data set that is still to be downloaded, for which noise stood in; or None.
    """

    epochs: int
    batches: int
    timed: int
    seconds: float
    flops: float
    memory: int
    alone: bool
    checkpoint: int
    by_paper: bool
    device: str
    fewest: int
    reckoned: int
    store: int | None
    saved: bool
    search: int = 0
    noise_for: str | None = None

    def sentences(self) -> str:
        """Return it for people, a line each."""
        shares = "/".join(f"{share:.2f}" for share in PAPER_FRACTIONS)
        assumed = f", at the paper's boundary/robust/outlier of {shares}" if self.by_paper else ""
        most = self.epochs * self.batches
        in_all = f"{most:,} in all"
        if self.fewest < most:
            in_all = f"{self.fewest:,} to {in_all}, by how many images train.skip leaves out"
            kept = "none left out, as bt.guard has it at so many outliers"
            assumed += f", with {kept if self.reckoned == most else 'as many left out as may be'}"
        lines = [
            f"steps    {counted(self.epochs, 'epoch')} of "
            f"{self.batches:,} {plural(self.batches, 'batch', 'batches')}, {in_all}",
            f"time     {lasting(self.seconds)} of training on {self.device}, by "
            f"{counted(self.timed, 'batch', 'batches')} tried{assumed}; evaluations come on top",
            f"work     {self.flops:.3g} FLOPs",
            f"memory   {sized(self.memory)} at the most, {self._whose_memory()}",
            f"disk     {sized(self.checkpoint)} a checkpoint, {_CHECKPOINTS} at the most",
        ]
        if self.search:
            searched = counted(self.search, "batch", "batches")
            lines.insert(
                1, f"search   at most {searched} ahead of these; time and work are with all of them"
            )
        if self.store is not None:
            where = f"{self.device}, in {'every' if self.saved else 'no'} checkpoint"
            lines.append(f"starts   {sized(self.store)} of kept starts on {where}")
        if self.noise_for is not None:
            lines.append(
                f"data     noise of {self.noise_for}'s size and shape, which is not here yet: "
                "btrain train downloads it"
            )
        return "\n".join(lines)

    def _whose_memory(self) -> str:
        if self.device.startswith("cuda"):
            return "held by tensors on the GPU"
        since = "" if self.alone else " since it began"
        return f"held by this whole process{since}, with Python, torch and the data set"


def in_all(jobs: Sequence[Foreseen]) -> str:
    """Return the cost of all jobs of a sweep for people, on one line."""
    disk = sum(_CHECKPOINTS * job.checkpoint for job in jobs)
    return (
        f"in all   {counted(len(jobs), 'job')}: {lasting(sum(job.seconds for job in jobs))} of "
        f"training one after another, {sum(job.flops for job in jobs):.3g} FLOPs, {sized(disk)} of "
        "checkpoints at the most"
    )


class Reckoned(NamedTuple):
    """The work of a training by its settings.

    Attributes:
        images: of each epoch.
        units: an example of each epoch; None where only trying can tell.
        search: units of a search ahead of them, at the most.
    """

    images: list[int]
    units: list[float | None]
    search: float = 0.0

    def total(self, tried: float) -> float:
        """Return the units of search and epochs, as tried where nothing else tells them."""
        each = (tried if units is None else units for units in self.units)
        epochs = sum(count * units for count, units in zip(self.images, each, strict=True))
        return self.search + epochs


def reckon(
    config: Config,
    methods: Callable[[int], Method],
    examples: int,
    fractions: tuple[float, float, float],
    known: Known,
) -> Reckoned:
    """Return the work of a training where examples of an epoch have these F_B, F_R, F_O.

    Epochs leave out as many images as they may.

    Args:
        methods: of each epoch.
        examples: of the training set.
        known: of the data, for the user's own parts.
    """
    own: tuple[float, float, float] | None = getattr(config.bt, "fractions", None)
    *_, outliers = own or fractions
    return Reckoned(
        fewest_images(examples, make_plan(config), outliers),
        [methods(epoch).expected_units(fractions) for epoch in range(config.train.epochs)],
        _search_units(config, known) * examples,
    )


def _search_units(config: Config, known: Known) -> float:
    """Return the units an example of the longest search of Robust Bird, 0 without one."""
    wanted = config.sparsity
    if not isinstance(wanted, RobustBirdConfig):
        return 0.0
    method = make_method(search_method(config, wanted.search), torch.device("cpu"), known=known)
    units = method.expected_units(_ALL)
    assert units is not None
    return wanted.search_epochs * units


def foresee(config: Config) -> Foreseen:
    """Try a few batches of a run and return what all of it will take; nothing is written.

    The shares of boundary, robust and outlier examples are the paper's, for those of the first
    batches are no run's; where these shares do not tell the work, as of early exit, it is that of
    the batches tried.

    Raises:
        UserError: bad data or device, or a batch does not fit the memory.
    """
    device = find_device(config.device)
    alone = _forget_peak(device)
    data, noise = load_or_stand_in(config.dataset, device)
    check_radius(config, data)
    state = make_state(config, data, device)
    plan, known = replace(make_plan(config), max_seconds=None), known_of(data)
    paths = make_fast_paths(config.train, device)
    methods = make_methods(config, device, paths=paths, known=known)
    reckoned, if_all_near = (
        reckon(config, methods, len(data.train), fractions, known)
        for fractions in (PAPER_FRACTIONS, _ALL)
    )
    batches = len(batch_slices(len(data.train), plan.batch_size))
    earlier = 0  # batches, in the epochs before the one under way

    def tried() -> int:
        return earlier + state.batch

    def take(method: Method, enough: Callable[[], bool]) -> tuple[float, float, float]:
        """Train until it is enough, the epoch again and again.

        Returns:
            The seconds, units and images so far.
        """
        nonlocal earlier
        while not enough():
            if state.batch == batches:
                earlier, state.batch = earlier + batches, 0
            train_epoch(
                state, data.train, method, plan, see=paths.view, tick=lambda: None,
                show=lambda means: None, stopped=enough, controllers=(),
            )  # fmt: skip
        sums = state.epoch_sums
        return state.train_seconds, float(sums[UNITS]), float(sums[EXAMPLES])

    # One batch is to be warm; one in which everybody takes all steps holds the most memory.
    untimed = 2 if 0 < config.bt.plain_epochs < config.train.epochs else 1
    most = untimed + _BATCHES
    tell(
        f"Trying {untimed + 1} to {most} batches of {min(plan.batch_size, len(data.train))} images "
        f"on {device}, until {_SECONDS:g} seconds are over."
    )
    ends = time.perf_counter() + _SECONDS

    def late() -> bool:
        return tried() >= most or (tried() > untimed and time.perf_counter() > ends)

    size = f"train.batch_size={config.train.batch_size}"
    with explained_memory(device, size, smaller_batch(config.train.accumulate)):
        take(methods(0), lambda: tried() == untimed - 1)
        method = methods(config.train.epochs - 1)
        warm = take(method, lambda: tried() == untimed)
        timed = take(method, late)
    seconds, units, images = (b - a for a, b in zip(warm, timed, strict=True))
    total = reckoned.total(units / images)
    fewest, taken = (
        sum(len(batch_slices(count, plan.batch_size)) for count in counts)
        for counts in (fewest_images(len(data.train), plan), reckoned.images)
    )
    search, share, sparsity = 0, 1.0, state.sparsity
    if isinstance(config.sparsity, RobustBirdConfig):
        an_epoch = len(batch_slices(len(data.train), config.train.batch_size))
        search = config.sparsity.search_epochs * an_epoch
    if sparsity is not None and sparsity.shrinks:
        share = float(sparsity.memory["macs_share"])
    content = io.BytesIO()
    torch.save(state.state_dict(), content)
    return Foreseen(
        epochs=config.train.epochs,
        batches=batches,
        timed=tried() - untimed,
        seconds=total * seconds / units,
        flops=total * share * forward_flops(state.model, data.shape, device),
        memory=_memory(device),
        alone=alone,
        checkpoint=content.tell(),
        by_paper=reckoned != if_all_near,
        device=str(device),
        fewest=fewest,
        reckoned=taken,
        store=store_bytes(config, data),
        saved=config.attack.checkpoint_store,
        search=search,
        noise_for=config.dataset.title if noise else None,
    )


def _forget_peak(device: torch.device) -> bool:
    """Begin anew with the most that is held; return whether `_memory` then is of what follows."""
    gc.collect()  # what an earlier job of a sweep has left
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux' order to forget it
    except OSError:
        return False
    return True


def _memory(device: torch.device) -> int:
    """Return the most bytes that were held: of a GPU by its tensors, else by this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError):  # Linux': what began this process does not count, as below it does
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        if peak := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.M):
            return 1024 * int(peak[1])
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
