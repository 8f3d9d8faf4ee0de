"""The user's own images: root/train/<class>/** and root/test/<class>/**, or val/ for test/.

Tiny-ImageNet is read as it is published, with the classes of `val/images` in
`val/val_annotations.txt`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from btrain.data.source import Images, Source
from btrain.errors import UserError
from btrain.terminal import counted, plural
from btrain.untrusted import RefusedError, read_text
from btrain.untrusted.images import SUFFIXES, open_image

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("btrain")

_MOST_FILES = 5_000_000
_ANNOTATIONS = "val_annotations.txt"
_LARGEST_ANNOTATIONS = 256 << 20  # bytes
_LAYOUT = "an image folder holds train/<class>/*.png|jpg and test/<class>/*.png|jpg, or val/ for it"

Files = dict[str, list[Path]]
"""The image files of each class, both sorted by name."""


def read(root: Path, image_size: int) -> tuple[Source, Source]:
    """Return the training and the test part; images are decoded when `Source.read` asks for them.

    Hidden files and folders, whose names begin with a dot, are no images and no classes.

    Raises:
        UserError: a folder is missing or a class empty, or the parts have different classes.
    """
    root = _with_the_parts(root)
    train = _files_by_class(root / "train")
    folder = _test_folder(root, train)
    classes = tuple(train)
    annotated = _is_annotated(folder, train)
    test = _annotated(folder, classes) if annotated else _files_by_class(folder)
    if tuple(test) != classes:
        odd = sorted(set(test) ^ set(classes))[0]
        raise UserError(f"The class folder {odd} is in only one of {root / 'train'} and {folder}.")
    if len(classes) < 2:
        raise UserError(f"{root / 'train'} needs at least two class folders.")
    return _source(train, image_size), _source(test, image_size)


def _with_the_parts(root: Path) -> Path:
    """Return the root, or its only folder where that has the parts, as archives unpack."""
    if root.is_dir() and not (root / "train").is_dir():
        inside = _folders(root)
        if len(inside) == 1 and (inside[0] / "train").is_dir():
            return inside[0]
    return root


def _test_folder(root: Path, train: Files) -> Path:
    """Return test/, or val/ where that is not there or, as in Tiny-ImageNet, has no classes."""
    test, val = root / "test", root / "val"
    if not test.is_dir():
        return val if val.is_dir() else test
    annotated = (val / _ANNOTATIONS).is_file()
    return val if annotated and not _has_classes(test, train) else test


def _is_annotated(folder: Path, train: Files) -> bool:
    return (folder / _ANNOTATIONS).is_file() and not _has_classes(folder, train)


def _has_classes(folder: Path, train: Files) -> bool:
    return any(part.name in train for part in _folders(folder))


def _folders(folder: Path) -> list[Path]:
    """Return the folders in a folder, by name, but for hidden ones and what macOS' archives add."""
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}).") from error
    return [part for part in inside if part.is_dir() and not _is_hidden(part.name)]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _files_by_class(folder: Path) -> Files:
    """Return the images in each class folder and in the folders below it.

    Raises:
        UserError: there is no such folder, it cannot be read, or a class has no image.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; {_LAYOUT}.")
    files: Files = {}
    rest: list[Path] = []
    links: list[Path] = []
    for class_folder in _folders(folder):
        inside = _below(class_folder, links)
        files[class_folder.name] = [file for file in inside if _is_image(file)]
        rest += (file for file in inside if not _is_image(file))
        if not files[class_folder.name]:
            raise UserError(
                f"The class folder {class_folder} holds no image ({', '.join(sorted(SUFFIXES))})."
            )
    if sum(map(len, files.values())) > _MOST_FILES:
        raise UserError(f"{folder} holds more than {_MOST_FILES:,} images.")
    _say_left_out(rest, "file", "no image by the name")
    _say_left_out(links, "folder", "a link within a class folder")
    return files


def _below(folder: Path, links: list[Path]) -> list[Path]:
    """Return the files in a folder and in those below it, by path, but for hidden ones.

    Args:
        links: takes the linked folders, which are not entered: they can lead in a circle.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}).") from error

    found = []
    above = folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())
    for base, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not _is_hidden(name) and not above]
        links += sorted(p for p in (Path(base, name) for name in folders) if p.is_symlink())
        found += [Path(base, name) for name in files if not _is_hidden(name)]
    return sorted(found)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def _say_left_out(paths: Sequence[Path], kind: str, why: str) -> None:
    if paths:
        are = plural(len(paths), f"{kind} is", f"{kind}s are")
        log.warning("%d %s left out, %s: %r.", len(paths), are, why, str(paths[0]))


def _annotated(folder: Path, classes: Sequence[str]) -> Files:
    """Return the images that a table of file names and classes lists, tab after tab.

    Raises:
        UserError: the table cannot be read, or names another class, a file elsewhere or not there.
    """
    table = folder / _ANNOTATIONS
    try:
        lines = read_text(table, _LARGEST_ANNOTATIONS).splitlines()
    except (OSError, ValueError) as error:  # UnicodeError is of the latter
        raise UserError(f"{table} is not a readable table of classes.") from error
    files: Files = {name: [] for name in classes}
    for number, line in enumerate(filter(None, lines), 1):
        name, _, others = line.partition("\t")
        label = others.partition("\t")[0].strip()
        file = folder / "images" / name
        if Path(name).name != name or label not in files or not file.is_file():
            raise UserError(
                f"{table}, line {number}: right is the name of a file in {folder / 'images'}, a "
                f"tab, and a class folder of train, not {line[:80]!r}."
            )
        files[label].append(file)
    if empty := [name for name, of_class in files.items() if not of_class]:
        raise UserError(f"{table} lists no image of the class {empty[0]}.")
    return {name: sorted(of_class) for name, of_class in files.items()}


def _source(files_by_class: Files, image_size: int) -> Source:
    files = [file for files in files_by_class.values() for file in files]
    counts = [len(files) for files in files_by_class.values()]
    labels = np.repeat(np.arange(len(counts)), counts)

    def decode(indices: npt.NDArray[np.int64]) -> Images:
        from tqdm import tqdm

        wanted = [files[index] for index in indices]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            images = pool.map(partial(_decode, image_size=image_size), wanted)
            decoded = list(tqdm(images, "reading images", len(wanted), leave=False, disable=None))
        _say_changed(wanted, decoded, image_size)
        return np.stack([image.pixels for image in decoded])

    return Source(labels, decode, tuple(files_by_class))


class _Decoded(NamedTuple):
    """An image as it is used, and what was lost on the way.

    Attributes:
        pixels: (3, image_size, image_size) uint8.
        size: width and height as it was, upright.
        deep: whether it had 16 bits a channel.
    """

    pixels: Images
    size: tuple[int, int]
    deep: bool


def _say_changed(files: Sequence[Path], decoded: Sequence[_Decoded], image_size: int) -> None:
    """Say how many images lost their proportions or their finer levels."""

    def count(is_one: Callable[[_Decoded], bool]) -> tuple[str, list[int]]:
        which = [i for i, image in enumerate(decoded) if is_one(image)]
        return counted(len(which), "image"), which

    images, oblong = count(lambda image: image.size[0] != image.size[1])
    if oblong:
        worst = max(oblong, key=lambda i: max(decoded[i].size) / min(decoded[i].size))
        width, height = decoded[worst].size
        log.warning(
            "%s that %s not square %s squeezed to %d×%d, the longest of %d×%d: %r.", images,
            *2 * (plural(len(oblong), "is", "are"),), image_size, image_size, width, height,
            str(files[worst]),
        )  # fmt: skip
    images, deep = count(lambda image: image.deep)
    if deep:
        log.warning(
            "%s of 16 bits a channel %s cut to 8: %r.", images, plural(len(deep), "is", "are"),
            str(files[deep[0]]),
        )  # fmt: skip


def _decode(file: Path, image_size: int) -> _Decoded:
    from PIL import Image

    try:
        with open_image(file) as image:
            # Pillow's name for how the pixels lie in the file; of BMP it means 16 bits a pixel.
            deep = image.format in ("PNG", "TIFF") and ";16" in str(getattr(image, "tile", ""))
            rgb = _rgb(_upright(image))
            size = rgb.size
            if size != (image_size, image_size):
                rgb = rgb.resize((image_size, image_size), Image.Resampling.BILINEAR)
            return _Decoded(np.asarray(rgb).transpose(2, 0, 1), size, deep)
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds
        reason = error if isinstance(error, RefusedError) else f"it is damaged: {error}"
        raise UserError(f"{file} is not a readable image ({reason}).") from error


def _upright(image: Image.Image) -> Image.Image:
    """Return the image turned as its EXIF orientation says, as every viewer shows it."""
    from PIL import ImageOps

    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data say nothing, and the pixels are sound
        return image


def _rgb(image: Image.Image) -> Image.Image:
    """Return the image in 8-bit RGB: what is transparent shows white, 16 bits lose the lower 8."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        levels = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode.startswith(("I", "F")):
        raise RefusedError("it has neither 8 nor 16 bits a channel")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
