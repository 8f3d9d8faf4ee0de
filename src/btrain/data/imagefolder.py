"""The user's own images: root/train/<class>/* and root/test/<class>/*."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from btrain.data.source import Images, Source
from btrain.errors import UserError
from btrain.untrusted.images import SUFFIXES, open_image

log = logging.getLogger("btrain")

_MOST_FILES = 5_000_000


def read(root: Path, image_size: int) -> tuple[Source, Source]:
    """Return the training and the test part; images are decoded when `Source.read` asks for them.

    Raises:
        UserError: a folder is missing or a class empty, or the parts have different classes.
    """
    parts = {name: _files_by_class(root / name) for name in ("train", "test")}
    classes = tuple(parts["train"])
    if tuple(parts["test"]) != classes:
        odd = sorted(set(parts["test"]) ^ set(classes))[0]
        raise UserError(
            f"The class folder {odd} is in only one of {root / 'train'} and {root / 'test'}."
        )
    if len(classes) < 2:
        raise UserError(f"{root / 'train'} needs at least two class folders.")
    return _source(parts["train"], image_size), _source(parts["test"], image_size)


def _files_by_class(folder: Path) -> dict[str, list[Path]]:
    """Return the image files of each class folder, both sorted by name."""
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder}; an image folder holds train/<class>/*.png|jpg and "
            "test/<class>/*.png|jpg."
        )
    try:
        entries = {
            part: sorted(part.iterdir()) for part in sorted(folder.iterdir()) if part.is_dir()
        }
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}).") from error
    files = {}
    for class_folder, inside in entries.items():
        files[class_folder.name] = [file for file in inside if file.suffix.lower() in SUFFIXES]
        if not files[class_folder.name]:
            raise UserError(
                f"The class folder {class_folder} holds no image ({', '.join(sorted(SUFFIXES))})."
            )
    if sum(map(len, files.values())) > _MOST_FILES:
        raise UserError(f"{folder} holds more than {_MOST_FILES:,} images.")
    _name_the_rest([file for inside in entries.values() for file in inside])
    return files


def _name_the_rest(files: list[Path]) -> None:
    """Say what is left out, but for hidden files such as `.DS_Store`."""
    rest = [f for f in files if f.suffix.lower() not in SUFFIXES and not f.name.startswith(".")]
    if rest:
        count = "1 file is" if len(rest) == 1 else f"{len(rest)} files are"
        log.warning("%s left out, no image by the name: %r.", count, str(rest[0]))


def _source(files_by_class: dict[str, list[Path]], image_size: int) -> Source:
    files = [file for files in files_by_class.values() for file in files]
    counts = [len(files) for files in files_by_class.values()]
    labels = np.repeat(np.arange(len(counts)), counts)

    def decode(indices: npt.NDArray[np.int64]) -> Images:
        from tqdm import tqdm

        wanted = [files[index] for index in indices]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            images = pool.map(partial(_decode, image_size=image_size), wanted)
            bar = tqdm(images, "reading images", len(wanted), leave=False, disable=None)
            return np.stack(list(bar))

    return Source(labels, decode, tuple(files_by_class))


def _decode(file: Path, image_size: int) -> Images:
    from PIL import Image

    try:
        with open_image(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits a channel")
            rgb = image.convert("RGB")
            if rgb.size != (image_size, image_size):
                rgb = rgb.resize((image_size, image_size), Image.Resampling.BILINEAR)
            return np.asarray(rgb).transpose(2, 0, 1)
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"{file} is not a readable image ({error}).") from error
