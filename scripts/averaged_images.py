"""Make a small image folder of a large one: few classes, few images, pixels averaged 2×2 to PNGs.

    python scripts/averaged_images.py path/to/cifar10-jpeg data/cifar10-16

keeps airplane, automobile, bird and cat of CIFAR-10 (the first 4 classes by the order of their
names), of each the first 212 training and 250 test images, 16×16 pixels: the data of
`make sparse_table PROFILE=cpu`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image


def averaged(pixels: np.ndarray) -> np.ndarray:
    """Return the means over squares of 2×2 pixels, rounded. (H, W, 3) -> (H/2, W/2, 3)"""
    height, width, channels = pixels.shape
    squares = pixels.reshape(height // 2, 2, width // 2, 2, channels)
    return np.rint(squares.mean(axis=(1, 3))).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="an image folder: train/<class>, test/<class>")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--train", type=int, default=212, help="images of a class")
    parser.add_argument("--test", type=int, default=250, help="images of a class")
    given = parser.parse_args()
    for part, count in (("train", given.train), ("test", given.test)):
        folders = sorted(folder for folder in (given.source / part).iterdir() if folder.is_dir())
        for folder in folders[: given.classes]:
            made = given.out / part / folder.name
            made.mkdir(parents=True)
            for path in sorted(folder.iterdir())[:count]:
                with Image.open(path) as image:
                    small = averaged(np.asarray(image.convert("RGB")))
                Image.fromarray(small).save(made / f"{path.stem}.png")


if __name__ == "__main__":
    main()
