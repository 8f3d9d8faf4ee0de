"""Image files, looked at before they are decoded: a file of a few bytes can claim any size."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from btrain.untrusted import RefusedError, read_bytes

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})
MOST_PIXELS = 64 << 20
_LONGEST_SIDE = 65_535  # resizing takes memory by the side
_LARGEST = 128 << 20  # bytes of a file

# Pillow knows many more, some of which it hands to other programs (EPS to Ghostscript); and it goes
# by the content, whatever the file is called.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")

_LARGE = 4 << 20  # pixels; of images beyond, one is decoded at a time, whatever the threads
_large_image = threading.Lock()


_BEGINNING = 512  # bytes of a file that tell what it is
_OTHERS = {
    b"GIF8": "a GIF",
    b"%PDF": "a PDF",
    b"%!PS": "a PostScript file",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"\x00\x05\x16\x07": "what macOS keeps beside a file",
    b"\x00\x00\x01\x00": "an icon",
    b"version https://git-lfs": "a Git LFS pointer, whose file was never fetched",
}


def _described(beginning: bytes) -> str:
    """Return what a file is that is none of the formats, as far as its first bytes tell."""
    if not beginning:
        return "it is empty"
    kind = next((name for start, name in _OTHERS.items() if beginning.startswith(start)), None)
    if beginning[4:8] == b"ftyp":
        kind = "a HEIC, AVIF or video file"
    if b"<html" in (lower := beginning.lower()) or lower.lstrip().startswith(b"<!doctype"):
        kind = "a web page"
    elif b"<svg" in lower:
        kind = "an SVG drawing"
    known = f"{', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}"
    return f"by its content it is {kind}, not {known}" if kind else f"it is damaged, or not {known}"


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image whose size is known to be moderate, without decoding it yet.

    Raises:
        RefusedError: it is no plain file (but a pipe or a device) or larger than 128 MiB, or has
            more than 64 Mi pixels or a side of more than 65,535, or is of another format, whatever
            it is called.
        Exception: it is damaged; Pillow raises many kinds.
    """
    from PIL import Image, UnidentifiedImageError

    content = read_bytes(path, _LARGEST)
    try:
        opened = Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError:  # whose text is the object in memory
        raise RefusedError(_described(content[:_BEGINNING])) from None
    with opened as image:
        pixels = image.width * image.height
        if pixels > MOST_PIXELS or max(image.size) > _LONGEST_SIDE:
            raise RefusedError(
                f"{image.width}×{image.height} pixels are more than {MOST_PIXELS:,}, or longer "
                f"than {_LONGEST_SIDE:,}"
            )
        with _large_image if pixels > _LARGE else nullcontext():
            yield image
