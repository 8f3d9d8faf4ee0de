"""The cost of a run before it is begun: steps, time, work, memory, disk."""

from __future__ import annotations

import gc
import io
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from btrain.attacks.fast_paths import make_fast_paths
from btrain.build import find_device
from btrain.data.augmentation import batch_slices
from btrain.data.splits import load_or_stand_in
from btrain.methods.cost import PAPER_FRACTIONS, forward_flops
from btrain.methods.make import make_method
from btrain.methods.statistics import EXAMPLES, UNITS
from btrain.settings import Config
from btrain.terminal import counted, plural, sized
from btrain.training.epochs import fewest_images, train_epoch
from btrain.training.safety.out_of_memory import explained_memory, smaller_batch
from btrain.training.schedule import make_plan
from btrain.training.setup import check_radius, known_of, make_state, store_bytes

_SECONDS, _BATCHES = 10.0, 20
_ALL = (1.0, 0.0, 0.0)
_CHECKPOINTS = 3  # of a run, at the most


@dataclass(frozen=True)
class Foreseen:
    """The cost of a run that has not begun.

    Attributes:
        batches: of an epoch.
        timed: batches that were tried.
        seconds: of training, without the evaluations.
        flops: of the whole training.
        memory: the most that was held while steps were tried, bytes: on a GPU by tensors, on a CPU
            by the whole process, Python and the data set with it.
        alone: whether that is of this job; otherwise jobs before it in this process may have held
            the most.
        checkpoint: bytes of one.
        by_paper: whether the paper's shares of boundary, robust and outlier examples were assumed.
        fewest: batches in all, if train.skip leaves out as many images as it may; seconds and flops
            are of so many.
        store: bytes of the kept starts; None where none are kept.
        saved: whether checkpoints hold them.
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
    store: int | None
    saved: bool
    noise_for: str | None = None

    def sentences(self) -> str:
        """Return it for people, a line each."""
        shares = "/".join(f"{share:.2f}" for share in PAPER_FRACTIONS)
        assumed = f", at the paper's boundary/robust/outlier of {shares}" if self.by_paper else ""
        most = self.epochs * self.batches
        in_all = f"{most:,} in all"
        if self.fewest < most:
            in_all = f"{self.fewest:,} to {in_all}, by how many images train.skip leaves out"
            assumed += ", with as many left out as may be"
        lines = [
            f"steps    {counted(self.epochs, 'epoch')} of "
            f"{self.batches:,} {plural(self.batches, 'batch', 'batches')}, {in_all}",
            f"time     {_duration(self.seconds)} of training on {self.device}, by "
            f"{counted(self.timed, 'batch', 'batches')} tried{assumed}; evaluations come on top",
            f"work     {self.flops:.3g} FLOPs",
            f"memory   {sized(self.memory)} at the most, {self._whose_memory()}",
            f"disk     {sized(self.checkpoint)} a checkpoint, {_CHECKPOINTS} at the most",
        ]
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
        f"in all   {counted(len(jobs), 'job')}: {_duration(sum(job.seconds for job in jobs))} of "
        f"training one after another, {sum(job.flops for job in jobs):.3g} FLOPs, {sized(disk)} of "
        "checkpoints at the most"
    )


def foresee(config: Config) -> Foreseen:
    """Try a few batches of a run and return what all of it will take; nothing is written.

    What depends on how many examples are near the boundary is taken at the paper's shares, for
    those of the first batches are no run's.

    Raises:
        UserError: bad data or device, or a batch does not fit the memory.
    """
    device = find_device(config.device)
    alone = _forget_peak(device)
    data, noise = load_or_stand_in(config.dataset, device)
    check_radius(config, data)
    state = make_state(config, data, device)
    plan, known = make_plan(config), known_of(data)
    paths = make_fast_paths(config.train, device)
    method = make_method(config, device, paths=paths, known=known)
    batches = len(batch_slices(len(data.train), plan.batch_size))
    ends = time.perf_counter() + _SECONDS

    def take(enough: Callable[[], bool] = lambda: False) -> tuple[float, float, float]:
        """Train until it is enough; return seconds, units and images so far."""
        train_epoch(
            state, data.train, method, plan, see=paths.view, tick=lambda: None,
            show=lambda means: None, stopped=enough, controllers=(),
        )  # fmt: skip
        sums = state.epoch_sums
        return state.train_seconds, float(sums[UNITS]), float(sums[EXAMPLES])

    def enough() -> bool:
        late = state.batch > 1 and time.perf_counter() > ends
        return late or state.batch >= min(_BATCHES, batches - 1)

    size = f"train.batch_size={config.train.batch_size}"
    with explained_memory(device, size, smaller_batch(config.train.accumulate)):
        if batches > 2:
            warm = take(lambda: state.batch == 1)
            tried, timed = take(enough), state.batch - 1
        else:  # the epoch again and again: a batch of it is to be warm
            warm, timed = take(), 0
            while not timed or (timed < _BATCHES and time.perf_counter() < ends):
                state.batch = 0
                tried, timed = take(), timed + batches
    seconds, units, images = (b - a for a, b in zip(warm, tried, strict=True))
    expected = method.expected_units(PAPER_FRACTIONS)
    each = units / images if expected is None else expected
    fewest = fewest_images(len(data.train), plan)
    total = each * sum(fewest_images(len(data.train), plan, PAPER_FRACTIONS[2]))
    content = io.BytesIO()
    torch.save(state.state_dict(), content)
    return Foreseen(
        epochs=config.train.epochs,
        batches=batches,
        timed=timed,
        seconds=total * seconds / units,
        flops=total * forward_flops(state.model, data.shape, device),
        memory=_memory(device),
        alone=alone,
        checkpoint=content.tell(),
        by_paper=expected is not None and expected != method.expected_units(_ALL),
        device=str(device),
        fewest=sum(len(batch_slices(images, plan.batch_size)) for images in fewest),
        store=store_bytes(config, data),
        saved=config.attack.checkpoint_store,
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


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    whole = f"{seconds:.0f}"
    return f"{whole} {plural(int(whole), 'second')}" if seconds >= 1 else "less than a second"
