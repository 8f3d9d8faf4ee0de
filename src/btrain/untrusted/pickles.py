"""Pickles, read by rules that are narrower than pickle's own.

A pickle is a program. Here it may build plain containers and call the few functions that its reader
names; these are stand-ins of the reader's own, never the functions that the file asks for.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

from btrain.untrusted import RefusedError

_MOST_OPERATIONS = 2_000_000
_FRAME_HEADER = 9  # bytes

# What torch.save writes (protocol 2) …
TENSOR_OPERATIONS = frozenset({
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE",
    "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "GLOBAL", "REDUCE",
    "NEWOBJ", "BUILD", "BINPERSID", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT",
})  # fmt: skip
# … and what other protocols have for strings, bytes and the memo.
DATA_OPERATIONS = (TENSOR_OPERATIONS - {"BINPERSID"}) | frozenset({
    "BINSTRING", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
    "EMPTY_SET", "ADDITEMS", "MEMOIZE", "FRAME", "STACK_GLOBAL", "BYTEARRAY8",
})  # fmt: skip


class AsksForCodeError(RefusedError):
    """The fault of a pickle that needs a function or class that its reader does not name."""


Names = Mapping[tuple[str, str], Any]
"""(module, name) to what stands in for it. A pickle can set attributes of what it holds, so these
are objects that have none to set."""


class Call:
    """A stand-in for a function or class: calls `function`, and has no attribute to set."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: object) -> None:
        raise RefusedError("it changes what it was given")


def read_pickle(
    file: IO[bytes],
    names: Names,
    *,
    operations: frozenset[str],
    encoding: str = "utf-8",
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """Read one pickle from where the file stands; then the file stands behind it.

    Args:
        file: seekable.
        names: all that the pickle may ask for.
        operations: the names of `pickletools` of those it may use.
        encoding: of its 8-bit strings; `bytes` leaves them as they are.
        persistent_load: what stands for an object outside of the pickle.

    Raises:
        RefusedError: it asks for another name or uses another operation.
        Exception: it is damaged; pickle raises almost anything.
    """
    start = file.tell()
    frames = _scan(file, names, operations)
    pickled = _without_frames(file, start, [*frames, file.tell()])
    return _Unpickler(io.BytesIO(pickled), names, encoding, persistent_load).load()


def _without_frames(file: IO[bytes], start: int, ends: list[int]) -> bytes:
    """Return a pickle's parts between the headers of its frames; then the file stands behind it.

    A frame is a hint and changes nothing, but where one ends within an operation, Python's
    unpickler goes on at another byte than the scan did.
    """
    parts = []
    for end in ends:
        file.seek(start)
        parts.append(file.read(end - start))
        start = end + _FRAME_HEADER
    return b"".join(parts)


def _scan(file: IO[bytes], names: Names, operations: frozenset[str]) -> list[int]:
    """Read over a pickle without following it, and tell where its frames begin.

    The memo deserves its own check: Python's unpickler makes room for twice the largest index
    before it looks at anything else, 64 GiB for eight bytes of a file.
    """
    frames = []
    operation: pickletools.OpcodeInfo
    argument: Any
    clipped = cast(IO[bytes], _Clipped(file))
    for count, (operation, argument, position) in enumerate(pickletools.genops(clipped)):
        if count == _MOST_OPERATIONS:
            raise RefusedError(f"it has more than {_MOST_OPERATIONS:,} operations")
        if operation.name == "GLOBAL":
            module, _, name = argument.partition(" ")
            _known(names, module, name)
        if operation.name not in operations:
            raise RefusedError(f"it uses pickle's {operation.name}")
        if operation.name in ("BINPUT", "LONG_BINPUT") and argument > count:
            raise RefusedError("its memo is damaged")
        if operation.name == "FRAME":
            assert position is not None  # the file knows where it stands
            frames.append(position)
    return frames


class _Clipped:
    """A file that is asked for no more than it has: it makes room before it looks."""

    def __init__(self, file: IO[bytes]) -> None:
        here = file.tell()
        self._file, self._size = file, file.seek(0, io.SEEK_END)
        file.seek(here)
        self.readline, self.tell = file.readline, file.tell

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, self._size - self.tell()))


def _known(names: Names, module: str, name: str) -> Any:
    try:
        return names[module, name]
    except KeyError:
        raise AsksForCodeError(
            f"it asks for {module}.{name}, and only tensors and plain values are loaded, never code"
        ) from None


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        file: IO[bytes],
        names: Names,
        encoding: str,
        persistent_load: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__(file, encoding=encoding)
        self._names = names
        self._persistent_load = persistent_load

    def find_class(self, module: str, name: str) -> Any:
        return _known(self._names, module, name)

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent_load is None:
            raise RefusedError("it refers to something outside of itself")
        return self._persistent_load(pid)


def encode_latin1(text: str, encoding: str) -> bytes:
    """Stand in for `_codecs.encode`, by which protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise RefusedError("it encodes a text otherwise than pickle does")
    return text.encode("latin-1")


def make_set(items: list[Any]) -> set[Any]:
    """Stand in for `set`, which protocol 2 calls with a list."""
    return set(items)
