"""Downloads through torchvision, the only thing that needs it."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from btrain.errors import UserError

_kept_alive: list[Any] = []


def download(dataset: str, root: Path) -> None:
    """Fetches CIFAR-10, CIFAR-100 or MNIST into root, checksums verified, progress shown.

    Raises:
        UserError: the download failed; then nothing is left behind.
    """
    try:
        datasets = import_torchvision().datasets
        logging.getLogger("btrain").info("Downloading %s to %s.", dataset, root)
        source, folder = {
            "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
            "cifar100": (datasets.CIFAR100, "cifar-100-python"),
            "mnist": (datasets.MNIST, "MNIST"),
        }[dataset]
        beside = next(path for path in (root, *root.absolute().parents) if path.is_dir())
        with TemporaryDirectory(prefix=".download-", dir=beside) as unfinished:
            source(unfinished, download=True)
            shutil.copytree(
                Path(unfinished) / folder,
                root / folder,
                copy_function=shutil.move,
                dirs_exist_ok=True,
            )
    except Exception as error:  # network, disk, checksum, a broken torchvision: one answer to all
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{dataset} could not be downloaded to {root} ({reason}).") from error


def import_torchvision() -> ModuleType:
    """torchvision, also beside a CPU build of torch that its compiled operators do not fit.

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
