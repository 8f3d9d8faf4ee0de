"""Downloads through torchvision, the only thing that needs it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from btrain.errors import UserError

_kept_alive: list[Any] = []


def download(dataset: str, root: Path) -> None:
    """Fetches CIFAR-10, CIFAR-100 or MNIST into root, checksums verified, progress shown.

    Raises:
        UserError: the download failed; nothing new is left behind but complete files.
    """
    fresh = not root.exists()
    try:
        datasets = import_torchvision().datasets
        logging.getLogger("btrain").info("Downloading %s to %s.", dataset, root)
        classes = {
            "cifar10": datasets.CIFAR10,
            "cifar100": datasets.CIFAR100,
            "mnist": datasets.MNIST,
        }
        classes[dataset](str(root), download=True)
    except Exception as error:  # network, disk, checksum, a broken torchvision: one answer to all
        if fresh:
            _remove_empty(root)
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{dataset} could not be downloaded to {root} ({reason}).") from error


def _remove_empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


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
