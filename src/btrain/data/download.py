"""The downloads through torchvision."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from btrain.errors import UserError
from btrain.untrusted.archive import unpack_gzip, unpack_tar

_LARGEST = 256 << 20  # bytes, unpacked; CIFAR has 178 MiB

_kept_alive: list[Any] = []


def download(dataset: str, root: Path) -> None:
    """Fetch CIFAR-10, CIFAR-100 or MNIST into root, checksums verified, progress shown.

    Raises:
        UserError: the download failed; then nothing is left behind.
    """
    try:
        datasets = import_torchvision().datasets
        logging.getLogger("btrain").info("Downloading %s to %s.", dataset, root)
        beside = next(path for path in (root, *root.absolute().parents) if path.is_dir())
        with TemporaryDirectory(prefix=".download-", dir=beside) as unfinished:
            archives, content = Path(unfinished) / "archives", Path(unfinished) / "content"
            content.mkdir()
            if dataset == "mnist":
                _mnist(datasets, archives, content)
            else:
                source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
                _cifar(datasets, source, archives, content)
            shutil.copytree(content, root, copy_function=shutil.move, dirs_exist_ok=True)
    except Exception as error:  # network, disk, checksum, a broken torchvision: one answer to all
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{dataset} could not be downloaded to {root} ({reason}).") from error


def _cifar(datasets: Any, source: Any, archives: Path, content: Path) -> None:
    """Download one of the two and unpack it; torchvision's own way would unpickle it as well."""
    datasets.utils.download_url(source.url, archives, source.filename, source.tgz_md5)
    unpack_tar(archives / source.filename, content, most=_LARGEST)


def _mnist(datasets: Any, archives: Path, content: Path) -> None:
    raw = content / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, checksum in datasets.MNIST.resources:
        _from_a_mirror(datasets, name, archives, checksum)
        unpack_gzip(archives / name, raw / name.removesuffix(".gz"), most=_LARGEST)


def _from_a_mirror(datasets: Any, name: str, archives: Path, checksum: str) -> None:
    *others, last = datasets.MNIST.mirrors
    for mirror in others:
        with contextlib.suppress(OSError, RuntimeError):  # no network; a wrong checksum
            datasets.utils.download_url(f"{mirror}{name}", archives, name, checksum)
            return
    datasets.utils.download_url(f"{last}{name}", archives, name, checksum)


def import_torchvision() -> ModuleType:
    """Return torchvision, also beside a CPU build of torch that its operators do not fit.

    There the first import fails because two operators are unknown; declaring them is enough for
    everything that does not call them.
    """
    import torch

    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept_alive.append(library)
        import torchvision
    module: ModuleType = torchvision
    return module
