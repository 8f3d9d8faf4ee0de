"""The readers of archives: the directory of a zip file, and tar files unpacked file by file."""

from __future__ import annotations

import gzip
import io
import shutil
import struct
import tarfile
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from btrain.untrusted import RefusedError

_END = b"PK\x05\x06"
_END_64 = b"PK\x06\x06"
_LOCATOR_64 = b"PK\x06\x07"
_LARGEST_DIRECTORY = 32 << 20  # bytes
_MOST_TAR_MEMBERS = 1000


def check_directory(file: IO[bytes], *, most_members: int) -> None:
    """Make sure that a zip file ends with one directory of moderate size and nothing else.

    Then every program finds the same members in it, and listing them takes little memory.
    Zip file format specification (APPNOTE.TXT), 4.3.14 to 4.3.16.

    Raises:
        RefusedError: it is no zip file, or the directory is elsewhere or too large.
    """
    size = file.seek(0, io.SEEK_END)
    tail = _read_at(file, size - 22 - 20, 42) if size >= 42 else b"\0" * 20 + file.read(22)
    locator, end = tail[:20], tail[20:]
    if end[:4] != _END or end[20:] != b"\0\0":
        raise RefusedError("it is no whole zip file")
    members, length, start = struct.unpack("<HLL", end[10:20])
    behind = size - 22
    if locator[:4] == _LOCATOR_64:
        (record_at,) = struct.unpack("<Q", locator[8:16])
        behind = size - 22 - 20 - 56
        record = _read_at(file, behind, 56) if record_at == behind >= 0 else b""
        if record[:4] != _END_64:
            raise RefusedError("the directory of the zip file is damaged")
        members, length, start = struct.unpack("<QQQ", record[32:56])
    if start + length != behind:
        raise RefusedError("the directory of the zip file is damaged")
    if members > most_members or length > _LARGEST_DIRECTORY:
        raise RefusedError(f"it is a zip file of {members:,} members")
    file.seek(0)


def _read_at(file: IO[bytes], position: int, length: int) -> bytes:
    file.seek(position)
    return file.read(length)


def unpack_tar(archive: Path, folder: Path, *, most: int) -> None:
    """Unpack a `.tar.gz` of plain files and folders.

    Args:
        archive: the file.
        folder: a new or empty one that gets its content.
        most: how many bytes the archive may have when it is decompressed, headers included.

    Raises:
        RefusedError: there is a link, a device or another special file in it, a name that is
            absolute or leads out of the folder, or too much of anything. What was unpacked before
            stays in the folder.
        Exception: the archive is damaged, or has a name twice.
    """
    with gzip.open(archive) as compressed:
        stream = _Limited(compressed, most)
        with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]
            for count, member in enumerate(tar):
                if count == _MOST_TAR_MEMBERS:
                    raise RefusedError(f"it holds more than {_MOST_TAR_MEMBERS:,} files")
                _unpack_member(tar, member, folder)


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    target = folder / _safe_name(member.name)
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    if not member.isreg() or member.issparse() or target == folder:
        raise RefusedError(f"{member.name} in it is no plain file")
    content = tar.extractfile(member)
    assert content is not None  # it is a plain file
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        shutil.copyfileobj(content, file)


def _safe_name(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    strange = "\\" in name or ":" in name or "\0" in name
    if path.is_absolute() or ".." in path.parts or strange:
        raise RefusedError(f"{name} in it leads out of the folder")
    return path


def unpack_gzip(archive: Path, target: Path, *, most: int) -> None:
    """Decompress one file of at most so many bytes.

    Raises:
        RefusedError: it has more.
        Exception: it is damaged.
    """
    with gzip.open(archive) as compressed, target.open("xb") as file:
        shutil.copyfileobj(_Limited(compressed, most), file)


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Limited:
    """A stream that refuses to give more than so many bytes."""

    def __init__(self, stream: _Readable, most: int) -> None:
        self._stream, self._left, self._most = stream, most, most

    def read(self, size: int = 1 << 16, /) -> bytes:
        content = self._stream.read(min(size, self._left + 1))
        self._left -= len(content)
        if self._left < 0:
            raise RefusedError(f"it holds more than {self._most:,} bytes")
        return content
