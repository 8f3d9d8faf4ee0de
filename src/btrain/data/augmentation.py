"""The batches of augmented images, drawn and made on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from btrain.data.splits import Split


@dataclass(frozen=True)
class Moved:
    """The way in which augmentation moved the images of a batch.

    Attributes:
        padding: zero pixels around an image before its crop.
        shifts: the first row and column of each crop, (2, m, 1) int64; None without crops.
        mirrored: which crops were mirrored, (m,) bool; None for none.
    """

    padding: int = 0
    shifts: Tensor | None = None
    mirrored: Tensor | None = None

    def of(self, rows: Tensor) -> Moved:
        """Return the same of some images, (k,) int64."""
        return Moved(
            self.padding,
            None if self.shifts is None else self.shifts[:, rows],
            None if self.mirrored is None else self.mirrored[rows],
        )

    def follow(self, images: Tensor) -> Tensor:
        """Move whatever lies on the images as they were moved. (m, C, H, W) -> (m, C, H, W)"""
        if self.shifts is not None:
            padded = F.pad(images, [self.padding] * 4)
            images = padded[_window(images, self.shifts)]
        return images if self.mirrored is None else _mirrored(images, self.mirrored)

    def undo(self, moved: Tensor, images: Tensor) -> Tensor:
        """Return images with what `follow` showed of them replaced by `moved`.

        Pixels that were cut off keep their values. (m, C, H, W), (m, C, H, W) -> (m, C, H, W)
        """
        if self.mirrored is not None:
            moved = _mirrored(moved, self.mirrored)
        if self.shifts is None:
            return moved
        inside, (height, width) = self.padding, images.shape[2:]
        padded = F.pad(images, [inside] * 4)
        padded[_window(images, self.shifts)] = moved
        return padded[:, :, inside : inside + height, inside : inside + width]


class Batch(NamedTuple):
    """The images and labels that a training step gets.

    Attributes:
        x: images (m, C, H, W) float32 in [0, 1].
        labels: (m,) int64.
        indices: where the examples stand in the training set, (m,) int64.
        moved: what augmentation did to the images.
        weight: inverse-probability weights, by which examples count for those that were left out,
            (m,); None for ones.
    """

    x: Tensor
    labels: Tensor
    indices: Tensor
    moved: Moved = Moved()
    weight: Tensor | None = None


def batch_slices(examples: int, batch_size: int) -> list[slice]:
    """Return consecutive batches; a last one of a single example joins its neighbour.

    BatchNorm cannot normalise one example.
    """
    starts = list(range(0, examples, batch_size))
    if len(starts) > 1 and examples - starts[-1] == 1:
        starts.pop()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], examples], strict=True)]


def batches(
    split: Split,
    order: Tensor,
    batch_size: int,
    *,
    crop_padding: int,
    flip: bool,
    generator: torch.Generator,
    first: int = 0,
    weight: Tensor | None = None,
) -> Iterator[Batch]:
    """Yield batch after batch of an epoch.

    Args:
        split: what to draw from.
        order: the indices of the epoch's examples, shuffled, (k,).
        batch_size: m, but for the last batch.
        crop_padding: zero pixels around an image before a random crop to its size; 0: no crop.
        flip: whether each image is mirrored with probability 1/2.
        generator: of the augmentation, on the split's device.
        first: the batch to begin with; earlier ones draw nothing.
        weight: inverse-probability weights of the examples, (n,); None for ones.
    """
    for part in batch_slices(len(order), batch_size)[first:]:
        indices = order[part]
        m = len(indices)
        shifts = random_shifts(m, crop_padding, generator) if crop_padding else None
        mirrored = random_mirrors(m, generator) if flip else None
        moved = Moved(crop_padding, shifts, mirrored)
        images = to_unit(moved.follow(split.images[indices]))
        stands_for = None if weight is None else weight[indices]
        yield Batch(images, split.labels[indices], indices, moved, stands_for)


def to_unit(images: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [0, 1]."""
    return images.float() / 255


def random_shifts(m: int, padding: int, generator: torch.Generator) -> Tensor:
    """Return where the crops of padded images begin: rows and columns, (2, m, 1) int64."""
    return torch.randint(2 * padding + 1, (2, m, 1), generator=generator, device=generator.device)


def random_mirrors(m: int, generator: torch.Generator) -> Tensor:
    """Return which images are mirrored, each with probability 1/2. -> (m,) bool"""
    return torch.rand(m, generator=generator, device=generator.device) < 0.5


def _window(images: Tensor, shifts: Tensor) -> tuple[Tensor, ...]:
    """Return the indices of crops as large as the images (m, C, H, W) in their padded ones."""
    m, channels, height, width = images.shape
    device = images.device
    rows = shifts[0] + torch.arange(height, device=device)  # (m, H)
    columns = shifts[1] + torch.arange(width, device=device)  # (m, W)
    image = torch.arange(m, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(-1, 1, 1)
    return image, channel, rows[:, None, :, None], columns[:, None, None, :]


def _mirrored(images: Tensor, which: Tensor) -> Tensor:
    return torch.where(which[:, None, None, None], images.flip(3), images)
