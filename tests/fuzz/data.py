"""CIFAR pickles, IDX files, corrupted test sets, and archives of data sets."""

from __future__ import annotations

import gzip
import io
import pickle
import shutil
import struct
import tarfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from btrain.corruptions.read import read as read_corrupted
from btrain.data import cifar, mnist
from btrain.errors import UserError
from btrain.untrusted.archive import unpack_tar
from fuzz.mutations import damaged, damaged_pickle, number, random_pickle


class Cifar:
    """A training file of three images beside a sound test file."""

    def __init__(self, folder: Path) -> None:
        self._canary = str(folder / "canary")
        self._root = folder
        self._layout = cifar.Layout("batches", ("train",), ("test",), "labels", 10)
        rng = np.random.default_rng(0)
        batch: dict[bytes, Any] = {
            b"batch_label": b"training batch 1 of 5",
            b"labels": [3, 0, 9],
            b"data": rng.integers(0, 256, (3, 3072), dtype=np.uint8),
            b"filenames": [b"a.png", b"b.png", b"c.png"],
        }
        of_arrays = batch | {b"labels": np.array([3, 0, 9])}
        self._seeds = [pickle.dumps(b, protocol=p) for p in (2, 3, 4) for b in (batch, of_arrays)]
        self._file = folder / "batches" / "train"
        self._file.parent.mkdir()
        (folder / "batches" / "test").write_bytes(self._seeds[0])

    def write(self, rng: Random) -> None:
        content = rng.choice(self._seeds)
        match rng.randrange(6):
            case 0 | 1 | 2:
                content = damaged_pickle(content, rng, self._canary)
            case 3:
                content = random_pickle(rng, self._canary)
            case _:
                content = damaged(content, rng)
        self._file.write_bytes(content)

    def read(self) -> None:
        train, _ = cifar.read(self._layout, self._root)
        images = train.read(np.arange(len(train.labels)))
        assert images.shape == (len(train.labels), 3, 32, 32)
        assert images.dtype == np.uint8


class Idx:
    """Images and labels of five digits; one of the two is damaged."""

    def __init__(self, folder: Path) -> None:
        self._root = folder
        images = bytes([0, 0, 8, 3]) + struct.pack(">III", 5, 4, 4) + bytes(range(80))
        labels = bytes([0, 0, 8, 1]) + struct.pack(">I", 5) + bytes(range(5))
        (folder / mnist.FOLDER).mkdir(parents=True)
        self._files = [folder / mnist.FOLDER / name for name in mnist.FILES]
        self._seeds = [images, labels, images, labels]

    def write(self, rng: Random) -> None:
        for file, content in zip(self._files, self._seeds, strict=True):
            file.write_bytes(content)
        which = rng.randrange(4)
        content = self._seeds[which]
        if rng.random() < 0.5:
            dimensions = rng.choice((1, 3, 3, number(rng) % 256))
            sides = [number(rng) % 2**32 for _ in range(rng.choice((1, 3, dimensions % 9)))]
            sides = [rng.choice((side, rng.randrange(6))) for side in sides]
            kind = rng.choice((8, 8, 8, 9, 11, 12, 13, 14))
            content = bytes([0, 0, kind, dimensions]) + struct.pack(f">{len(sides)}I", *sides)
            content += bytes(rng.choice((0, 1, 5, 80, int(np.prod(sides, dtype=object)) % 5000)))
        if rng.random() < 0.7:
            content = damaged(content, rng)
        self._files[which].write_bytes(content)

    def read(self) -> None:
        for part in mnist.read(self._root):
            images = part.read(np.arange(len(part.labels)))
            assert len(images) == len(part.labels)
            assert images.dtype == np.uint8


class CorruptedSet:
    """`fog.npy` and `labels.npy`; one of the two is damaged."""

    def __init__(self, folder: Path) -> None:
        self._root = folder
        self._arrays = {
            "fog": np.arange(10 * 8 * 8 * 3, dtype=np.uint8).reshape(10, 8, 8, 3),
            "labels": np.tile(np.arange(2, dtype=np.uint8), 5),
        }

    def write(self, rng: Random) -> None:
        for name, array in self._arrays.items():
            np.save(self._root / f"{name}.npy", array)
        file = self._root / f"{rng.choice(('fog', 'fog', 'labels'))}.npy"
        content = file.read_bytes()
        if rng.random() < 0.6:
            content = self._with_header(content[128:], rng)
        if rng.random() < 0.6:
            content = damaged(content, rng)
        file.write_bytes(content)

    def _with_header(self, data: bytes, rng: Random) -> bytes:
        sides = [rng.choice((number(rng), -number(rng), 2, 8, 10)) for _ in range(rng.randrange(6))]
        shape = rng.choice(
            (tuple(sides), "(" * 90 + ")" * 90, [10], None, 10.0, (10**40,), (0, 2**62))
        )
        kinds = (
            "|u1", "<i8", "<u8", "|O", "<f8", "|V1000000", "|S0", "<U0", "<M8[s]", "|b1",
            ">i2", [("a", "|O")], [("a", "<f8", (2**31,))], "x", None, ("<f8", (3,)),
        )  # fmt: skip
        order = rng.choice((True, False, 1, ""))
        header = repr({"descr": rng.choice(kinds), "fortran_order": order, "shape": shape})
        if rng.random() < 0.1:
            header = rng.choice(
                ("-" * 9000 + "1", "[" * 9000, "__import__('os').getcwd()", "{}" * 999)
            )
        version = rng.choice(((1, 0), (1, 0), (2, 0), (3, 0), (9, 9)))
        length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
        if rng.random() < 0.1:
            length = struct.pack("<I", number(rng) % 2**32)
        return b"\x93NUMPY" + bytes(version) + length + header.encode() + data

    def read(self) -> None:
        images, labels = read_corrupted(self._root, "fog", 3)
        assert len(images) == len(labels)
        images.sum(), labels.sum()


class Archive:
    """A `.tar.gz` of three files, with other members and other headers."""

    writes = True

    def __init__(self, folder: Path) -> None:
        self._file, self._root = folder / "data.tar.gz", folder / "unpacked" / "here"
        self._folder = folder

    def write(self, rng: Random) -> None:
        shutil.rmtree(self._root.parent, ignore_errors=True)
        self._root.mkdir(parents=True)
        buffer = io.BytesIO()
        with tarfile.open(
            fileobj=buffer, mode="w", format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
        ) as tar:
            for count in range(3):
                info = tarfile.TarInfo(f"batches/file{count}")
                if rng.random() < 0.5:
                    info.name = rng.choice(_PATHS)
                    info.linkname = rng.choice(_PATHS)
                    info.type = rng.choice(_MEMBER_TYPES)
                content = rng.randbytes(100)
                info.size = 100
                tar.addfile(info, io.BytesIO(content))
        content = buffer.getvalue()
        if rng.random() < 0.5:
            content = damaged(content, rng)
        packed = gzip.compress(content, 1, mtime=0)
        if rng.random() < 0.3:
            packed = damaged(packed, rng)
        if rng.random() < 0.02:
            packed = gzip.compress(content + bytes(8 << 20), mtime=0)
        self._file.write_bytes(packed)

    def read(self) -> None:
        before = {*self._folder.rglob("*")}
        try:
            unpack_tar(self._file, self._root, most=1 << 20)
        except Exception as error:
            raise UserError(str(error)) from error
        finally:
            made = {*self._folder.rglob("*")} - before
            assert all(self._root in path.parents or path == self._root for path in made), made
            assert not any(path.is_symlink() for path in made), made


_PATHS = ("../up", "/absolute", "a/../../up", "..", ".", "", "a", "a/b", "\0", "C:\\up", "..\\up",
          "a" * 300, "batches/file0", "/dev/null")  # fmt: skip
_MEMBER_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE,
                 tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
                 tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME)  # fmt: skip
