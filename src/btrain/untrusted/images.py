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


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image whose size is known to be moderate, without decoding it yet.

    Raises:
        RefusedError: it is no plain file (but a pipe or a device) or larger than 128 MiB, or has
            more than 64 Mi pixels or a side of more than 65,535.
        Exception: it is damaged; Pillow raises many kinds.
    """
    from PIL import Image

    content = io.BytesIO(read_bytes(path, _LARGEST))  # which gives no more than it has
    with Image.open(content, formats=_FORMATS) as image:
        pixels = image.width * image.height
        if pixels > MOST_PIXELS or max(image.size) > _LONGEST_SIDE:
            raise RefusedError(
                f"{image.width}×{image.height} pixels are more than {MOST_PIXELS:,}, or longer "
                f"than {_LONGEST_SIDE:,}"
            )
        with _large_image if pixels > _LARGE else nullcontext():
            yield image
