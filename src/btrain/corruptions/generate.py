"""A corrupted test set in the layout of the official CIFAR-10-C files.

Imports no torch but where data are read: every worker process imports this module.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from btrain.corruptions import (
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    SEVERITIES,
    check_images,
    check_name,
    corrupt,
)
from btrain.corruptions.arrays import Images
from btrain.corruptions.frost import photographs
from btrain.corruptions.manifest import CHUNK, MANIFEST, check_owner, describe
from btrain.durable import check_places, make_folder, replacing
from btrain.errors import UserError
from btrain.processes.parent import watch
from btrain.settings.checks import seed_in_range, whole
from btrain.settings.corrupt import CorruptConfig
from btrain.terminal import counted, say

_BYTE_LABELS = 256


def corrupt_dataset(config: CorruptConfig) -> None:
    """Write what `btrain data corrupt` asks for, and say where.

    Raises:
        UserError: data or photographs are missing or damaged, or the folder holds something else.
    """
    import torch

    from btrain.data.splits import load_configured

    settings = config.corrupt
    # An image folder decodes no more than it must.
    data = load_configured(config.dataset, torch.device("cpu"), train_examples=2)
    images = data.test.images.permute(0, 2, 3, 1).contiguous().numpy()
    frost = None
    if settings.frost is not None:
        frost = photographs(Path(settings.frost), *images.shape[1:3])
    written = generate(
        images,
        data.test.labels.numpy(),
        config.out,
        source=config.source,
        classes=len(data.classes),
        corruptions=settings.names,
        seed=settings.seed,
        processes=settings.processes,
        frost=frost,
    )
    there = len(settings.names) - len(written)
    say(
        f"{config.out}: {counted(len(images), 'image')} × {SEVERITIES} severities × "
        f"{counted(len(settings.names), 'corruption')}, regenerated; "
        f"{counted(there, 'was', 'were')} there already."
    )


def generate(
    images: Images,
    labels: npt.NDArray[np.int64],
    out: Path,
    *,
    source: str,
    classes: int,
    corruptions: Sequence[str] = CORRUPTIONS,
    seed: int = 0,
    processes: int | None = None,
    frost: tuple[Images, ...] | None = None,
) -> list[str]:
    """Write `<corruption>.npy`, `labels.npy` and `REGENERATED.json` into a folder.

    The bytes depend on the images, the seed and the versions of the libraries, not on the number of
    processes or the choice of corruptions. Files that are there already are kept; with more than
    one process a script needs the usual `if __name__ == "__main__":`.

    Args:
        images: (n, H, W, C) uint8, C = 1 or 3.
        labels: (n,).
        out: a new folder, or one that the same settings began.
        source: the name of the data set, for the record.
        classes: how many the data set has; labels are bytes up to 256.
        corruptions: of CORRUPTIONS and EXTRA_CORRUPTIONS.
        seed: of all draws, with corruption, severity and chunk.
        processes: how many; None for as many as there are cores.
        frost: photographs in place of the synthesised textures.

    Returns:
        The corruptions that were not there yet.

    Raises:
        UserError: the folder holds something else or cannot be written, the images are none that
            `corrupt` takes, there is not a label for each, or a corruption, the seed or the number
            of processes is none.
    """
    check_images(images)
    out, labels = Path(out), np.asarray(labels)
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"labels must be whole numbers, one for each of {len(images)} images, not "
            f"{labels.dtype} {labels.shape}."
        )
    if ((labels < 0) | (labels >= classes)).any():
        raise UserError(
            f"labels must be from 0 to {classes - 1}, not from {labels.min()} to {labels.max()}."
        )
    seed_in_range("seed", seed)
    whole(1, "processes", processes)
    for name in corruptions:
        check_name(name)
    manifest = describe(images, labels, source=source, classes=classes, seed=seed, frost=frost)
    check_owner(out, manifest)
    wanted = [name for name in corruptions if not (out / f"{name}.npy").is_file()]
    check_places(out / name for name in (MANIFEST, "labels.npy", *(f"{w}.npy" for w in wanted)))
    make_folder(out, "corrupt.out")
    with replacing(out / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=2).encode() + b"\n")
    with replacing(out / "labels.npy") as file:
        kept = labels.astype(np.uint8 if classes <= _BYTE_LABELS else np.int64)
        np.save(file, np.tile(kept, SEVERITIES), allow_pickle=False)
    _write_corruptions(images, out, wanted, seed, processes or _cores(), frost)
    return wanted


def _write_corruptions(
    images: Images,
    out: Path,
    names: Sequence[str],
    seed: int,
    processes: int,
    frost: tuple[Images, ...] | None,
) -> None:
    from tqdm import tqdm

    shape = (SEVERITIES * len(images), *images.shape[1:])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    total = shape[0] * len(names)
    with tqdm(total=total, unit="image", disable=None) as bar, _mapping(processes) as run:
        for name in names:
            bar.set_description(name)
            with replacing(out / f"{name}.npy") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for part in run(_tasks(images, name, seed, frost)):
                    file.write(part.tobytes())
                    bar.update(len(part))


class _Task(NamedTuple):
    images: Images
    name: str
    severity: int
    seed: list[int]
    frost: tuple[Images, ...] | None


def _tasks(
    images: Images, name: str, seed: int, frost: tuple[Images, ...] | None
) -> Iterator[_Task]:
    """Return the chunks of all severities, in the order of the file."""
    index = (CORRUPTIONS + EXTRA_CORRUPTIONS).index(name)
    for severity in range(1, SEVERITIES + 1):
        for chunk, start in enumerate(range(0, len(images), CHUNK)):
            part = images[start : start + CHUNK]
            needed = frost if name == "frost" else None
            yield _Task(part, name, severity, [seed, index, severity, chunk], needed)


def _corrupt_chunk(task: _Task) -> Images:
    rng = np.random.default_rng(task.seed)
    return corrupt(task.images, task.name, task.severity, rng, photographs=task.frost)


@contextmanager
def _mapping(processes: int) -> Iterator[Callable[[Iterable[_Task]], Iterable[Images]]]:
    """Give `map(_corrupt_chunk, …)` over some processes, in order; one is this process itself."""
    if processes == 1:
        yield partial(map, _corrupt_chunk)
        return
    executor = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),  # torch's threads do not survive a fork
        initializer=_begin,
        initargs=(os.getpid(),),
    )
    try:
        yield partial(executor.map, _corrupt_chunk)
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process was ended from outside, perhaps for want of memory; fewer "
            "corrupt.processes need less."
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _begin(parent: int) -> None:
    """Begin a worker: an interrupt is its parent's business, whose end is its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watch(parent)


def _cores() -> int:
    """Return how many cores this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1
