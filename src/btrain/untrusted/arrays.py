"""The arrays of pickles, `.npy` and `.npz` files; sizes are checked before memory is taken."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from btrain.untrusted import RefusedError, open_plain
from btrain.untrusted.archive import check_directory
from btrain.untrusted.pickles import Call, Names, encode_latin1

Array = npt.NDArray[Any]

_KINDS = "biuf"
_MOST_DIMENSIONS = 8
_LONGEST_HEADER = 10_000  # characters, numpy's own default
_MOST_MEMBERS = 100


def open_npy(path: Path) -> Array:
    """Open an `.npy` file of plain numbers, mapped into memory, read-only.

    Raises:
        RefusedError: it holds something else than numbers, or fewer bytes than its header says.
        Exception: it is damaged; numpy raises many kinds.
    """
    with open_plain(path) as file:
        shape, fortran, dtype = _header(file, _KINDS)
        start = file.tell()
    if math.prod(shape) == 0:
        return np.empty(shape, dtype)  # which cannot be mapped
    _check_size(shape, dtype, path.stat().st_size - start)
    order = "F" if fortran else "C"
    return np.memmap(path, dtype, mode="r", offset=start, shape=shape, order=order)  # type: ignore[call-overload,no-any-return]


def read_npz(path: Path, keys: Collection[str], *, most: int) -> dict[str, Array]:
    """Read some arrays of an `.npz` file, numbers or texts.

    Args:
        path: the file.
        keys: of the arrays that are wanted; there may be others.
        most: how many bytes these may have, decompressed.

    Raises:
        RefusedError: they are larger, or hold something else than numbers and texts.
        Exception: one is missing, or the file is damaged.
    """
    with open_plain(path) as file:
        check_directory(file, most_members=_MOST_MEMBERS)
        with zipfile.ZipFile(file) as archive:
            members = {key: archive.getinfo(f"{key}.npy") for key in keys}
            if sum(member.file_size for member in members.values()) > most:
                raise RefusedError(f"it holds more than {most:,} bytes")
            return {key: _parse(archive.read(member)) for key, member in members.items()}


def _parse(content: bytes) -> Array:
    file = io.BytesIO(content)
    shape, fortran, dtype = _header(file, _KINDS + "U")
    start = file.tell()
    _check_size(shape, dtype, len(content) - start)
    if dtype.itemsize == 0 or math.prod(shape) == 0:
        return np.empty(shape, dtype)
    flat = np.frombuffer(content, dtype, count=math.prod(shape), offset=start).copy()
    return flat.reshape(shape, order="F" if fortran else "C")


def _header(file: IO[bytes], kinds: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, order and type as numpy reads them; the file stands at the data."""
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise RefusedError(f"it is of version {version} of numpy's format")
    try:
        shape, fortran, dtype = readers[version](file, max_header_size=_LONGEST_HEADER)
    except (MemoryError, RecursionError):  # of Python's parser, on thousands of brackets
        raise RefusedError("its header is damaged") from None
    if dtype.kind not in kinds or dtype.names or dtype.shape:
        raise RefusedError(f"it holds {dtype}, no plain numbers")
    sides_are_whole = all(type(side) is int and 0 <= side < 2**63 for side in shape)
    if not sides_are_whole or len(shape) > _MOST_DIMENSIONS or not _addressable(shape):
        raise RefusedError(f"its shape is {shape}")
    return shape, fortran, dtype


def _addressable(shape: tuple[int, ...]) -> bool:
    """Return whether numpy can count the bytes, which it does as if no side had length 0."""
    return math.prod(side for side in shape if side) * 64 < 2**63


def _check_size(shape: tuple[int, ...], dtype: np.dtype[Any], available: int) -> None:
    needed = math.prod(shape) * dtype.itemsize
    if needed > available:
        raise RefusedError(f"its header says {needed} bytes, there are {available}")


class PickledDtype:
    """A stand-in for `numpy.dtype`: of plain numbers only."""

    __slots__ = ("value",)

    def __init__(self, name: str | bytes, *_: object) -> None:
        name = name.decode("ascii") if isinstance(name, bytes) else name
        if not isinstance(name, str) or name not in ("b1", *_NUMBERS):
            raise RefusedError(f"it holds an array of type {name!r}")
        self.value = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        if order not in ("|", "<", ">", "="):
            raise RefusedError("it holds an array of no known byte order")
        self.value = np.dtype(f"{order}{self.value.str[1:]}")


_NUMBERS = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")


class PickledArray:
    """A stand-in for `numpy.ndarray`; `array` is None until its state was read."""

    __slots__ = ("array",)

    def __init__(self, *_: object) -> None:
        self.array: Array | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, PickledDtype) or not isinstance(raw, bytes):
            raise RefusedError("it holds an array of something else than numbers")
        sides_are_whole = isinstance(shape, tuple) and all(
            type(side) is int and side >= 0 for side in shape
        )
        if not sides_are_whole or len(shape) > _MOST_DIMENSIONS or not _addressable(shape):
            raise RefusedError("it holds an array without a shape")
        if math.prod(shape) * dtype.value.itemsize != len(raw):
            raise RefusedError(f"it holds {len(raw)} bytes for an array of {shape} {dtype.value}")
        flat = np.frombuffer(raw, dtype.value)
        self.array = flat.reshape(shape, order="F" if fortran else "C")


def pickled_scalar(dtype: PickledDtype, raw: bytes) -> int | float | bool:
    """Stand in for the function that makes NumPy's numbers: a plain one of the same value."""
    if not isinstance(dtype, PickledDtype) or not isinstance(raw, bytes):
        raise RefusedError("it holds a NumPy value that is no number")
    if len(raw) != dtype.value.itemsize:
        raise RefusedError(f"it holds {len(raw)} bytes for a number of type {dtype.value}")
    number: int | float | bool = np.frombuffer(raw, dtype.value).item()
    return number


def _from_buffer(
    raw: bytes, dtype: PickledDtype, shape: tuple[int, ...], order: str
) -> PickledArray:
    """Stand in for NumPy's function of this name, by which protocol 5 writes arrays."""
    array = PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", bytes(raw)))
    return array


_reconstruct, _scalar, _buffered = Call(PickledArray), Call(pickled_scalar), Call(_from_buffer)
ARRAY_NAMES: Names = {
    ("numpy", "dtype"): Call(PickledDtype),
    ("numpy", "ndarray"): None,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _buffered,
    ("numpy._core.numeric", "_frombuffer"): _buffered,
    ("_codecs", "encode"): Call(encode_latin1),
}
"""The names that a pickle of arrays, NumPy's numbers and plain containers asks for."""
