"""Image folders with every kind of file that may lie in one."""

from __future__ import annotations

import io
import os
import shutil
import struct
import zlib
from pathlib import Path
from random import Random

from PIL import Image

from btrain.data import imagefolder
from fuzz.mutations import damaged, number

_SIDE = 6
_SUFFIX = {"PNG": ".png", "JPEG": ".jpg", "BMP": ".bmp", "WEBP": ".webp", "TIFF": ".tif"}


class ImageFolder:
    """Two classes of a training and a test image; one file is damaged, or in the wrong place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "images"
        self._seeds = [*_seeds()]

    def write(self, rng: Random) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for part in ("train", "test"):
            for name in ("a", "b"):
                file = self.folder / part / name / "0.png"
                file.parent.mkdir(parents=True)
                file.write_bytes(self._seeds[0][1])
        if rng.random() < 0.05:
            self._misplace(rng)
            return
        kind, content = rng.choice(self._seeds)
        if kind == "PNG" and rng.random() < 0.5:
            content = _with_chunks(content, rng)
        if rng.random() < 0.8:
            content = damaged(content, rng)
        suffix = (
            _SUFFIX.get(kind, ".png") if rng.random() < 0.8 else rng.choice([*_SUFFIX.values()])
        )
        (self.folder / "train" / "a" / f"1{suffix}").write_bytes(content)

    def _misplace(self, rng: Random) -> None:
        place = self.folder / "train" / "a"
        match rng.randrange(8):
            case 0:
                os.mkfifo(place / "pipe.png")
            case 1:
                (place / "loop.png").symlink_to("loop.png")
            case 2:
                (place / "zero.png").symlink_to("/dev/zero")
            case 3:
                (place / "folder.png").mkdir()
            case 4:
                (self.folder / "train" / "c").symlink_to(self.folder)
            case 5:
                (place / "\udcff\x1b[31m.png").write_bytes(b"")
            case 6:
                (place / "0.png").unlink()
            case _:
                (place / "notes.txt").write_text("mine")

    def read(self) -> None:
        for source in imagefolder.read(self.folder, _SIDE):
            indices = range(len(source.labels))
            images = source.read(list(indices))  # type: ignore[arg-type]
            assert images.shape == (len(indices), 3, _SIDE, _SIDE)
            assert images.dtype == "uint8"


def _seeds() -> list[tuple[str, bytes]]:
    seeds = []
    for mode in ("L", "RGB", "RGBA", "P", "1", "I;16", "LA", "CMYK"):
        image = Image.linear_gradient("L").resize((9, 7)).convert("L" if mode == "I;16" else mode)
        for kind, options in (
            ("PNG", {}), ("JPEG", {}), ("BMP", {}), ("WEBP", {}), ("TIFF", {}),
            ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "tiff_adobe_deflate"}),
            ("TIFF", {"compression": "jpeg"}), ("GIF", {}), ("EPS", {}), ("ICO", {}), ("PPM", {}),
        ):  # fmt: skip
            buffer = io.BytesIO()
            try:
                image.save(buffer, kind, **options)
            except (OSError, ValueError, KeyError):
                continue  # a format that has no such mode
            seeds.append((kind, buffer.getvalue()))
    return seeds


def _with_chunks(content: bytes, rng: Random) -> bytes:
    """A PNG with other chunks, their sums right."""
    place, chunks = 8, []
    while place + 8 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    header = bytearray(chunks[0][1])
    bomb = zlib.compress(bytes(1 << 20))
    match rng.randrange(6):
        case 0:
            header[0:8] = struct.pack(">II", number(rng) % 2**31, number(rng) % 2**31)
        case 1:
            header[8:13] = bytes(rng.choice((0, 1, 2, 3, 4, 6, 8, 16)) for _ in range(5))
        case 2:
            chunks.insert(1, (rng.choice((b"zTXt", b"iTXt", b"iCCP")), b"a\0\0" + bomb))
        case 3:
            chunks.insert(1, (b"PLTE", rng.randbytes(rng.choice((1, 3, 768, 999)))))
        case 4:
            chunks.insert(rng.randrange(1, len(chunks) + 1), rng.choice(chunks))
        case _:
            side = rng.choice((2000, 8192, 40000))
            header[0:8] = struct.pack(">II", side, side)
            chunks[1] = (b"IDAT", zlib.compress(bytes(1 << 20)))
    chunks[0] = (chunks[0][0], bytes(header))
    return content[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
