"""Files of `torch.save`, gone through before torch reads them.

`torch.load(weights_only=True)` runs no code, but it believes what a file says of its own sizes: a
storage that claims to be longer than its bytes makes it read other memory, a compressed member or a
tensor of strides 0 makes a small file large. So the pickle is first read with stand-ins for tensors
and storages, and every size in it is held against the bytes that are there.
"""

from __future__ import annotations

import io
import math
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from btrain.untrusted import RefusedError, check_hash, open_plain
from btrain.untrusted.archive import check_directory
from btrain.untrusted.arrays import PickledArray, PickledDtype, pickled_scalar
from btrain.untrusted.pickles import (
    TENSOR_OPERATIONS,
    Call,
    Names,
    encode_latin1,
    make_set,
    read_pickle,
)
from btrain.untrusted.tree import check_tree

_MOST_VALUES = 300_000
_MOST_MEMBERS = 100_000
_MOST_DIMENSIONS = 16
_LEGACY = (0x1950A86A20F9469CFC6C, 1001)  # the first two pickles of the format before torch 1.6


def load(path: Path) -> Any:
    """Load tensors and plain containers, as `torch.save` wrote them, on the CPU.

    What people keep beside weights comes as a plain value: NumPy's numbers as Python's, an
    `argparse.Namespace` and a `defaultdict` as a dictionary, a path as a text. Takes about as much
    memory as the file is long.

    Raises:
        RefusedError: it asks for code, its sizes contradict each other, or it is not the file whose
            hash stands beside it.
        Exception: it is damaged; torch raises many kinds.
    """
    check_hash(path)
    with open_plain(path) as file:
        _check(file)
        file.seek(0)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_STAND_INS):
            warnings.simplefilter("ignore")  # about odd pickles, which are refused all the same
            return torch.load(file, map_location="cpu", weights_only=True)


def _check(file: IO[bytes]) -> None:
    storages: dict[str, _Storage] = {}
    start = file.read(4)
    file.seek(0)
    if start == b"PK\x03\x04":
        content = _check_zip(file, storages)
    elif start[:2] == b"\x80\x02":  # a pickle of protocol 2
        content = _check_legacy(file, storages)
    else:
        raise RefusedError("torch.save did not write it")
    check_tree(content, most=_MOST_VALUES)


def _check_zip(file: IO[bytes], storages: dict[str, _Storage]) -> object:
    """Return what the pickle in a zip file builds, with stand-ins for tensors."""
    check_directory(file, most_members=_MOST_MEMBERS)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        _check_members(members, file)
        if damaged := archive.testzip():  # torch itself reads flipped bits without a word
            raise RefusedError(f"{damaged} in it is damaged")
        root = members[0].filename.partition("/")[0]
        pickled = io.BytesIO(archive.read(f"{root}/data.pkl"))
        content = _read(pickled, storages)
        for key, storage in storages.items():
            if archive.getinfo(f"{root}/data/{key}").file_size != storage.nbytes:
                raise RefusedError(f"its storage {key} has another size than the file says")
    return content


def _check_members(members: list[zipfile.ZipInfo], file: IO[bytes]) -> None:
    names = {member.filename.lower() for member in members}  # as torch compares them
    if not members or len(names) != len(members):
        raise RefusedError("members of the zip file share a name")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise RefusedError("it is compressed, as torch never does")
    if sum(member.file_size for member in members) > file.seek(0, io.SEEK_END):
        raise RefusedError("members of the zip file overlap")


def _check_legacy(file: IO[bytes], storages: dict[str, _Storage]) -> object:
    """Return what the fourth of five pickles builds; storages follow, each with its length.

    The first three are a number, a version and what machine wrote the file.
    """
    for expected in _LEGACY:
        if _read(file, {}) != expected:
            raise RefusedError("torch.save did not write it")
    _read(file, {})
    content = _read(file, storages)
    keys = _read(file, {})
    if not isinstance(keys, list) or {*keys} != {*storages} or len(keys) != len(storages):
        raise RefusedError("its storages are not those that its tensors need")
    start = file.tell()
    needed = sum(8 + storage.nbytes for storage in storages.values())
    if needed > file.seek(0, io.SEEK_END) - start:
        raise RefusedError("it is cut off")
    return content


def _read(file: IO[bytes], storages: dict[str, _Storage]) -> Any:
    def storage(pid: Any) -> _Storage:
        kind, data_type, key, _, numel, *view = pid
        whole = isinstance(numel, int) and numel >= 0 and isinstance(key, str)
        of_a_storage = kind == "storage" and isinstance(data_type, _StorageType)
        if not whole or not of_a_storage or any(part is not None for part in view):
            raise RefusedError("it refers to something that is no storage")
        found = _Storage(data_type.itemsize, numel)
        if storages.setdefault(key, found) != found:
            raise RefusedError(f"its storage {key} has two sizes")
        return found

    return read_pickle(file, _NAMES, operations=TENSOR_OPERATIONS, persistent_load=storage)


# Tuples, because a pickle can set the attributes of anything else, of a frozen dataclass too.


class _StorageType(NamedTuple):
    """A stand-in for torch.FloatStorage and the like."""

    itemsize: int


class _Storage(NamedTuple):
    """A storage of so many numbers of so many bytes, somewhere in the file."""

    itemsize: int
    numel: int

    @property
    def nbytes(self) -> int:
        return self.itemsize * self.numel


class _Tensor:
    """A stand-in for a tensor."""

    __slots__ = ()


def _rebuild_tensor(
    storage: _Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool = False,
    backward_hooks: Mapping[Any, Any] | None = None,
    metadata: object = None,
) -> _Tensor:
    numbers = [offset, *size, *stride]
    if (
        not isinstance(storage, _Storage)
        or not all(type(number) is int and 0 <= number < 2**48 for number in numbers)
        or not len(size) == len(stride) <= _MOST_DIMENSIONS
        or type(requires_grad) is not bool
        or backward_hooks
        or metadata
    ):
        raise RefusedError("it holds a tensor of no known kind")
    count = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if count and (last >= storage.numel or count > storage.numel):
        raise RefusedError(
            f"a tensor of {'×'.join(map(str, size))} in it has only {storage.numel} values"
        )
    return _Tensor()


def _rebuild_parameter(
    data: _Tensor, requires_grad: bool, backward_hooks: Mapping[Any, Any]
) -> _Tensor:
    if not isinstance(data, _Tensor) or type(requires_grad) is not bool or backward_hooks:
        raise RefusedError("it holds a parameter of no known kind")
    return data


class _StateDict(OrderedDict[Any, Any]):
    """An OrderedDict whose only attribute may be a state dict's versions by module name."""

    def __setstate__(self, state: object) -> None:
        match state:
            case {"_metadata": dict() as versions, **others} if not others:
                check_tree(versions, most=_MOST_VALUES)
                if all(type(key) is str and isinstance(of, dict) for key, of in versions.items()):
                    return
        raise RefusedError("it holds a dictionary of no known kind")


class _Namespace(dict[str, Any]):
    """A stand-in for `argparse.Namespace`: its attributes as a dictionary."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise RefusedError("it holds an argparse.Namespace without attributes")
        self.update(state)


def _default_dict(*_: object) -> dict[Any, Any]:
    """Stand in for `collections.defaultdict`, whose default is not needed."""
    return {}


def _path(*parts: object) -> str:
    """Stand in for the classes of `pathlib`."""
    return str(Path(*(part for part in parts if isinstance(part, str))))


_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_BESIDE: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): _Namespace,
    ("collections", "defaultdict"): _default_dict,
    **{(module, name): _path for module in ("pathlib", "pathlib._local") for name in _PATHS},
    ("numpy", "dtype"): PickledDtype,
    ("numpy", "ndarray"): None,
    **{
        (f"numpy.{core}.multiarray", name): stand_in
        for core in ("core", "_core")
        for name, stand_in in (("scalar", pickled_scalar), ("_reconstruct", PickledArray))
    },
    **{
        (module, name): None  # what a defaultdict makes
        for module in ("builtins", "__builtin__")
        for name in ("list", "dict", "tuple", "int", "float", "str", "bool")
    },
}
"""The things beside the weights of which torch knows nothing."""

_STAND_INS: list[Any] = [
    (stand_in, f"{module}.{name}") for (module, name), stand_in in _BESIDE.items()
]
_STORAGES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1,
    "Byte": 1, "Bool": 1, "ComplexFloat": 8, "ComplexDouble": 16,
}  # fmt: skip
_DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
    "complex64", "complex128",
)  # fmt: skip

_NAMES: Names = {
    ("torch._utils", "_rebuild_tensor"): Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): Call(_rebuild_parameter),
    ("torch", "Size"): Call(tuple),
    ("torch", "device"): Call(lambda *_: None),
    ("collections", "OrderedDict"): Call(_StateDict),
    ("collections", "Counter"): Call(Counter),
    ("_codecs", "encode"): Call(encode_latin1),
    ("__builtin__", "set"): Call(make_set),
    **{
        key: stand_in if stand_in in (_Namespace, None) else Call(stand_in)
        for key, stand_in in _BESIDE.items()
    },
    ("builtins", "set"): Call(make_set),
    **{("torch", f"{kind}Storage"): _StorageType(size) for kind, size in _STORAGES.items()},
    **{("torch", name): None for name in _DTYPES},
}
