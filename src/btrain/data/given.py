"""The user's own data, returned by a function or given as an object from Python, as sources."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from btrain import own
from btrain.data.source import Images, Source, in_memory
from btrain.errors import UserError

log = logging.getLogger("btrain")

_RETURNS = (
    "must return (x, y, x_test, y_test) with images of uint8, or floats in [0, 1], by "
    "(n, C, H, W), or two torch data sets"
)
_FLOAT_LEVELS = 255


def read(factory: str, settings: Mapping[str, Any]) -> tuple[Source, Source]:
    """Return the training and the test part of what a factory makes.

    Floats are rounded to the nearest of the 256 levels that an image file has; where that changes
    them, which is by half a level at most, the log says by how much. The classes' names are those
    of an attribute `classes` of what is returned or of its training part; otherwise they are
    numbers, as many as the training labels tell.

    Raises:
        UserError: the code fails, or what it returns are not images and labels.
    """
    made = own.call("dataset", factory, settings)
    where = f"dataset.factory={factory}"
    parts = list(made) if isinstance(made, list | tuple) else []
    if len(parts) == 4:
        arrays = [_array(part, where) for part in parts]
    elif len(parts) == 2 and all(hasattr(part, "__getitem__") and hasattr(part, "__len__")
                                 and not _is_array(part) for part in parts):  # fmt: skip
        with own.explained(f"{where}: reading the images"):
            arrays = [array for part in parts for array in _all_of(part, where)]
    else:
        raise UserError(f"{where} {_RETURNS}, not {_described(made)}.")
    x, y, x_test, y_test = arrays
    images = _images(x, f"{where}: x"), _images(x_test, f"{where}: x_test")
    labels = _labels(y, f"{where}: y"), _labels(y_test, f"{where}: y_test")
    if images[0].shape[1:] != images[1].shape[1:]:
        raise UserError(
            f"{where}: the images of x are {_sizes(images[0])}, those of x_test "
            f"{_sizes(images[1])}; they must be of one size."
        )
    names = getattr(made, "classes", None) or getattr(parts[0], "classes", None)
    classes = _classes(names, labels[0], where)
    x_part, y_part = (
        in_memory(*part, classes, Path(where)) for part in zip(images, labels, strict=True)
    )
    return x_part, y_part


def _is_array(part: Any) -> bool:
    return hasattr(part, "shape") and hasattr(part, "dtype")


def _array(part: Any, where: str) -> npt.NDArray[Any]:
    """Return whatever NumPy understands as an array; a torch tensor may be on any device."""
    try:
        return np.asarray(part.detach().cpu().numpy() if hasattr(part, "detach") else part)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where} {_RETURNS}; {_described(part)} is no array.") from error


def _all_of(part: Any, where: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return images and labels of a map-style torch data set, each example read once."""
    images, labels = [], []
    for index in range(len(part)):
        example = part[index]
        if not isinstance(example, Sequence) or len(example) != 2:
            raise UserError(f"{where}: an example must be (image, label), not {type(example)}.")
        image = _array(example[0], where)
        if hasattr(example[0], "getbands"):  # Pillow's, (H, W) or (H, W, C)
            image = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
        images.append(image)
        labels.append(int(example[1]))
    if not images:
        raise UserError(f"{where}: a data set is empty.")
    if len(sizes := {image.shape for image in images}) > 1:
        raise UserError(f"{where}: images are of several sizes, {sorted(sizes)[:2]} among them.")
    return np.stack(images), np.asarray(labels)


def _images(x: npt.NDArray[Any], what: str) -> Images:
    """Return images as bytes, or raise UserError. (n, C, H, W) uint8"""
    if x.ndim != 4:
        raise UserError(f"{what} must be images by (n, C, H, W), not of shape {x.shape}.")
    if len(x) and not x.size:
        raise UserError(f"{what} of shape {x.shape} has no pixels.")
    if x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        raise UserError(f"{what} of shape {x.shape} has its channels last; right is (n, C, H, W).")
    if x.dtype == np.uint8:
        return np.ascontiguousarray(x)
    if not np.issubdtype(x.dtype, np.floating):
        raise UserError(f"{what} must be uint8, or floats in [0, 1], not {x.dtype}.")
    low, high = (float(x.min()), float(x.max())) if x.size else (0.0, 0.0)
    if not (low >= 0 and high <= 1):  # which NaN is not, either
        raise UserError(
            f"{what} must lie in [0, 1], not between {low:g} and {high:g}; model.mean and "
            "model.std normalise within the network."
        )
    rounded = np.empty(x.shape, np.uint8)
    change = 0.0
    for i, image in enumerate(x):  # one at a time, for they may fill the memory
        levels = image.astype(np.float64) * _FLOAT_LEVELS
        rounded[i] = np.rint(levels)
        change = max(change, float(np.abs(levels - rounded[i]).max()))
    if change > 0.01:
        log.info(
            "%s is not made of whole 255ths: pixels are rounded to them, by up to %.2g/255. Images "
            "as uint8 are taken as they are.", what, change,
        )  # fmt: skip
    return rounded


def _labels(y: npt.NDArray[Any], what: str) -> npt.NDArray[np.int64]:
    """Return labels as numbers, or raise UserError. (n,)"""
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise UserError(f"{what} must be whole numbers by (n,), not {y.dtype} of shape {y.shape}.")
    return y.astype(np.int64)


def _classes(names: Any, labels: npt.NDArray[np.int64], where: str) -> tuple[str, ...]:
    if names is not None:
        return tuple(map(str, names))
    if len(labels) and (labels.min() > 0 or labels.max() >= max(len(labels), 2)):
        raise UserError(
            f"{where}: y must count the classes from 0, but goes from {labels.min()} to "
            f"{labels.max()}; an attribute `classes` names them where some are missing."
        )
    return tuple(str(k) for k in range(int(labels.max(initial=1)) + 1))


def _sizes(images: Images) -> str:
    return "×".join(map(str, images.shape[1:]))


def _described(made: Any) -> str:
    if isinstance(made, list | tuple):
        return f"{len(made)} things ({', '.join(type(part).__name__ for part in made[:6])})"
    return f"a thing of type {type(made).__name__}"
