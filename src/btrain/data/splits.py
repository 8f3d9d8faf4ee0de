"""The way from a data set's name to its training, held-out and test parts on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from btrain.data import cifar, digits, given, imagefolder, mnist
from btrain.data import download as downloads
from btrain.data.source import Labels, Source
from btrain.errors import UserError
from btrain.settings import (
    DatasetConfig,
    DatasetName,
    FilesConfig,
    ImageFolderConfig,
    OwnDatasetConfig,
)
from btrain.settings.run import CLASSES, IMAGES, SHAPES

# Subsets are the same for every run's seed, so that runs with different seeds share their data.
_SUBSET_SEED = 0


@dataclass(frozen=True)
class Split:
    """The images and labels on one device.

    Attributes:
        images: (n, C, H, W) uint8.
        labels: (n,) int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """A data set as a run uses it; `val` is None where nothing is held out."""

    train: Split
    val: Split | None
    test: Split
    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def load(
    name: str,
    root: str | Path,
    *,
    device: torch.device,
    download: bool = True,
    image_size: int | None = None,
    train_examples: int | None = None,
    test_examples: int | None = None,
    val_examples: int = 0,
) -> Data:
    """Read a data set and move it to the device.

    Args:
        name: cifar10, cifar100, mnist, mnist_sample, digits or imagefolder.
        root: the folder that holds it (mnist_sample, digits: not used).
        device: where the tensors go.
        download: whether missing files are fetched (cifar10, cifar100, mnist).
        image_size: side of the square to which an image folder's images are resized.
        train_examples, test_examples, val_examples: as `arranged` takes them.

    Raises:
        UserError: there is no such data set, files are missing or damaged, or more examples are
            asked for than there are, or none.
    """
    return arranged(
        *_read(name, Path(root), download, image_size),
        device=device,
        train_examples=train_examples,
        test_examples=test_examples,
        val_examples=val_examples,
    )


def load_configured(
    dataset: DatasetConfig, device: torch.device, *, train_examples: int | None = None
) -> Data:
    """Read the data set of a configuration and move it to the device.

    Args:
        train_examples: so many in the place of the configuration's.

    Raises:
        UserError: as `load`.
    """
    return _configured(dataset, _parts(dataset), device, train_examples)


def load_or_stand_in(dataset: DatasetConfig, device: torch.device) -> tuple[Data, bool]:
    """Return what `load_configured` does, but noise of the same size for what would be downloaded.

    Returns:
        The data, and whether they are noise.

    Raises:
        UserError: as `load`.
    """
    if isinstance(dataset, FilesConfig) and dataset.download:
        missing_file, _ = _FILES[dataset.name.value]
        if missing_file(Path(dataset.root)) is not None:
            train, test = (_noise(dataset.name, count) for count in IMAGES[dataset.name])
            return _configured(dataset, (train, test), device), True
    return load_configured(dataset, device), False


class Size(NamedTuple):
    """The size of the data that a run uses.

    Attributes:
        train, test: how many images.
        classes: K.
        shape: (C, H, W).
    """

    train: int
    test: int
    classes: int
    shape: tuple[int, int, int]


def size_of(dataset: DatasetConfig) -> Size:
    """Return the size of a configuration's data, by its name or a look into its folder.

    Nothing is downloaded, and no image is decoded but one of own data.

    Raises:
        UserError: a folder or own data cannot be read, or more is asked for than there is.
    """
    if dataset.name in IMAGES:
        (train, test), classes = IMAGES[dataset.name], CLASSES[dataset.name]
        shape = SHAPES[dataset.name]
    else:
        parts = _parts(dataset)
        train, test = (len(part.labels) for part in parts)
        classes = len(parts[0].classes)
        if isinstance(dataset, ImageFolderConfig):
            shape = (3, dataset.image_size, dataset.image_size)
        else:
            channels, height, width = parts[0].read(np.arange(1)).shape[1:]
            shape = channels, height, width
    counts = _counts(
        train, test, dataset.train_examples, dataset.test_examples, dataset.val_examples
    )
    return Size(*counts, classes, shape)


def _noise(name: DatasetName, count: int) -> Source:
    """Return images of chance in the shape of a data set, with as many of each class."""
    rng = np.random.default_rng(0)
    classes = tuple(map(str, range(CLASSES[name])))
    return Source(
        np.arange(count, dtype=np.int64) % len(classes),
        lambda indices: rng.integers(0, 256, (len(indices), *SHAPES[name]), dtype=np.uint8),
        classes,
    )


def _parts(dataset: DatasetConfig) -> tuple[Source, Source]:
    match dataset:
        case OwnDatasetConfig():
            return given.read(dataset.factory, dataset.settings)
        case FilesConfig():
            return _read(dataset.name.value, Path(dataset.root), dataset.download, None)
        case ImageFolderConfig():
            return imagefolder.read(Path(dataset.root), dataset.image_size)
        case _:
            return _INSTALLED[dataset.name.value]()


def _configured(
    dataset: DatasetConfig,
    parts: tuple[Source, Source],
    device: torch.device,
    train_examples: int | None = None,
) -> Data:
    return arranged(
        *parts,
        device=device,
        train_examples=train_examples or dataset.train_examples,
        test_examples=dataset.test_examples,
        val_examples=dataset.val_examples,
    )


def arranged(
    train: Source,
    test: Source,
    *,
    device: torch.device,
    train_examples: int | None = None,
    test_examples: int | None = None,
    val_examples: int = 0,
) -> Data:
    """Return the parts of a run's data from those of a data set, on the device.

    Args:
        train_examples, test_examples: so many of a seeded, class-balanced order; None for all.
        val_examples: so many training images are held out, class-balanced, before
            `train_examples` are taken.

    Raises:
        UserError: files are damaged, or more examples are asked for than there are.
    """
    order, test_order = (class_balanced_order(part.labels) for part in (train, test))
    many, many_test = _counts(
        len(order), len(test_order), train_examples, test_examples, val_examples
    )
    chosen, chosen_test = order[val_examples:][:many], test_order[:many_test]

    def split(source: Source, indices: Labels) -> Split:
        indices = np.sort(indices)
        images = torch.from_numpy(np.ascontiguousarray(source.read(indices)))
        return Split(images.to(device), torch.from_numpy(source.labels[indices]).to(device))

    return Data(
        train=split(train, chosen),
        val=split(train, order[:val_examples]) if val_examples else None,
        test=split(test, chosen_test),
        classes=train.classes,
    )


def class_balanced_order(labels: Labels) -> Labels:
    """Return a seeded order of the indices whose every prefix is balanced over classes if possible.

    (n,) -> (n,)
    """
    rng = np.random.default_rng(_SUBSET_SEED)
    shuffled = rng.permutation(len(labels))
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels[shuffled] == label)
        rank[members] = np.arange(len(members))
    return shuffled[np.argsort(rank, kind="stable")].astype(np.int64)


def _counts(
    train: int, test: int, train_examples: int | None, test_examples: int | None, val_examples: int
) -> tuple[int, int]:
    """Return how many images of a data set's training and test part a run takes.

    Raises:
        UserError: more are asked for than there are, or none, or no whole number.
    """
    _check_count("val_examples", val_examples, least=0)
    rest = train - val_examples
    if rest < 2:
        raise UserError(
            f"dataset.val_examples={val_examples} leaves no training images of {train}."
        )

    def checked(key: str, wanted: int | None, available: int, least: int) -> int:
        if wanted is None:
            return available
        _check_count(key, wanted, least=least)
        if wanted > available:
            raise UserError(f"dataset.{key} must be at most {available}, not {wanted}.")
        return wanted

    return (
        checked("train_examples", train_examples, rest, 2),
        checked("test_examples", test_examples, test, 1),
    )


def _check_count(key: str, value: object, *, least: int) -> None:
    """Raise UserError unless it is a whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise UserError(f"dataset.{key} must be a whole number from {least}, not {value}.")


_Reader = tuple[Callable[[Path], Path | None], Callable[[Path], tuple[Source, Source]]]

# The data sets that are files in a known layout: what is missing of them, and how to read them.
_FILES: dict[str, _Reader] = {
    "cifar10": (partial(cifar.missing_file, cifar.CIFAR10), partial(cifar.read, cifar.CIFAR10)),
    "cifar100": (partial(cifar.missing_file, cifar.CIFAR100), partial(cifar.read, cifar.CIFAR100)),
    "mnist": (mnist.missing_file, mnist.read),
}

_INSTALLED: dict[str, Callable[[], tuple[Source, Source]]] = {
    "digits": digits.read,
    "mnist_sample": mnist.read_sample,
}
"""The data sets that come with btrain."""


def _read(name: str, root: Path, download: bool, image_size: int | None) -> tuple[Source, Source]:
    if name in _INSTALLED:
        return _INSTALLED[name]()
    if name == "imagefolder":
        if image_size is None:
            raise UserError("dataset.image_size must be given for dataset=imagefolder.")
        _check_count("image_size", image_size, least=1)
        return imagefolder.read(root, image_size)
    if name not in _FILES:
        there = ", ".join([*_FILES, *_INSTALLED, "imagefolder"])
        raise UserError(f"dataset={name} is no data set; there are: {there}.")
    missing_file, read = _FILES[name]
    if (file := missing_file(root)) is not None:
        how = f"set dataset.root to the folder that holds {file.relative_to(root)}"
        if not download:
            raise UserError(f"{file} is missing; {how}, or set dataset.download=true.")
        try:
            downloads.download(name, root)
        except UserError as error:
            raise UserError(f"{file} is missing and {error} Please {how}.") from error
    return read(root)
