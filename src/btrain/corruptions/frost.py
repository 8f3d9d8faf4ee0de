"""The photographs of frost from the user's folder, or textures in their place."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from btrain.corruptions.arrays import Floats, Images
from btrain.corruptions.plasma import plasma
from btrain.errors import UserError
from btrain.untrusted.images import SUFFIXES, open_image

# The original shrinks its photographs, some 600 pixels wide, to a fifth for images of 32 pixels.
_SHRINKING = 0.2 / 32

_ORIGINALS = 6  # photographs of the original, which draws among five of them
_DRAWN = 5
_TEXTURES = 5
_TEXTURE_SEED = 0
_TEXTURE_SIDES = 4  # the side of a texture over the image's
_OVERSAMPLING = 4
_MEAN_COLOUR = np.array([146.0, 167.0, 179.0])  # a pale blue, the mean of the original photographs
_CRYSTALS = 50  # a texture


def photographs(folder: Path, height: int, width: int) -> tuple[Images, ...]:
    """Return the photographs of a folder, by name, shrunk for images of H×W.

    Of six the first five are taken: the original has six and never draws the last. They are shrunk
    by nearest neighbour, which keeps the grain of the ice.

    Returns:
        (h, w, 3) uint8 each.

    Raises:
        UserError: there is no folder or no image in it, or one is damaged or too small.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder} with photographs of frost.")
    files = sorted(file for file in folder.iterdir() if _is_photograph(file))
    if not files:
        raise UserError(f"{folder} holds no photograph ({', '.join(sorted(SUFFIXES))}).")
    drawn = files[:_DRAWN] if len(files) == _ORIGINALS else files
    return tuple(_photograph(file, height, width) for file in drawn)


def _is_photograph(file: Path) -> bool:
    """Return whether it is an image by its name and not hidden, as macOS' `._frost1.png` is."""
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")


def _photograph(file: Path, height: int, width: int) -> Images:
    scale = _SHRINKING * max(height, width)
    try:
        with open_image(file) as image:
            size = round(image.width * scale), round(image.height * scale)
            if size[0] < width or size[1] < height:
                raise ValueError(
                    f"too small: {width}×{height} images need at least "
                    f"{int(np.ceil(width / scale))}×{int(np.ceil(height / scale))} pixels"
                )
            return np.asarray(image.convert("RGB").resize(size, Image.Resampling.NEAREST))
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"{file} is not usable as a photograph of frost ({error}).") from error


@lru_cache(maxsize=2)
def synthesised(height: int, width: int) -> tuple[Images, ...]:
    """Return textures of ice crystals that stand in for photographs; the same in every run.

    Brightness, colour and contrast are near those of the original photographs.

    Returns:
        (4s, 4s, 3) uint8 each, s the longer side.
    """
    rng = np.random.default_rng(_TEXTURE_SEED)
    side = _TEXTURE_SIDES * max(height, width)
    return tuple(_texture(side, rng) for _ in range(_TEXTURES))


def _texture(side: int, rng: np.random.Generator) -> Images:
    """Return crystals and grain on a cloudy ground. (side, side, 3)"""
    clouds = plasma(1, 1 << (side - 1).bit_length(), 1.9, rng)[0, :side, :side]
    grain = rng.normal(0, 8, size=(side, side))
    grey = 70 * clouds + grain + 0.5 * _crystals(side, rng)
    contrast = rng.uniform(18, 40)
    grey = (grey - grey.mean()) / grey.std() * contrast
    return np.asarray(np.clip(_MEAN_COLOUR + grey[..., None], 0, 255).astype(np.uint8))


def _crystals(side: int, rng: np.random.Generator) -> Floats:
    """Return feathers of ice, up to three from a nucleus, barbs at 60°. (side, side), 0 to 255"""
    canvas = Image.new("L", (side * _OVERSAMPLING,) * 2)
    draw = ImageDraw.Draw(canvas)
    for _ in range(_CRYSTALS):
        centre = rng.uniform(0, canvas.width, size=2)
        length, level = canvas.width * rng.uniform(0.1, 0.5), int(rng.integers(90, 256))
        for _ in range(rng.integers(1, 4)):
            angle = rng.uniform(0, 2 * np.pi)
            _feather(draw, centre, angle, length * rng.uniform(0.4, 1), level)
    return np.asarray(canvas.resize((side, side), Image.Resampling.BOX), dtype=float)


def _feather(
    draw: ImageDraw.ImageDraw, start: Floats, angle: float, length: float, level: int
) -> None:
    direction = np.array([np.cos(angle), np.sin(angle)])
    draw.line([*start, *(start + length * direction)], fill=level, width=_OVERSAMPLING)
    for share in np.arange(0.05, 1, 0.05):
        root = start + share * length * direction
        for side in (-1, 1):
            barb = angle + side * np.pi / 3
            tip = root + 0.3 * (1 - share) * length * np.array([np.cos(barb), np.sin(barb)])
            draw.line([*root, *tip], fill=level, width=_OVERSAMPLING // 2)
