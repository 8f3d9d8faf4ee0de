"""The batches of augmented images, drawn and made on the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from btrain.data.splits import Split


class Batch(NamedTuple):
    """The images and labels that a training step gets.

    Attributes:
        x: images (m, C, H, W) float32 in [0, 1].
        labels: (m,) int64.
        indices: where the examples stand in the training set, (m,) int64.
    """

    x: Tensor
    labels: Tensor
    indices: Tensor


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
) -> Iterator[Batch]:
    """Yield batch after batch of an epoch.

    Args:
        split: what to draw from.
        order: the epoch's permutation of the indices, (n,).
        batch_size: m, but for the last batch.
        crop_padding: zero pixels around an image before a random crop to its size; 0: no crop.
        flip: whether each image is mirrored with probability 1/2.
        generator: of the augmentation, on the split's device.
        first: the batch to begin with; earlier ones draw nothing.
    """
    for part in batch_slices(len(order), batch_size)[first:]:
        indices = order[part]
        images = split.images[indices]
        if crop_padding:
            images = random_crop(images, crop_padding, generator)
        if flip:
            images = random_flip(images, generator)
        yield Batch(to_unit(images), split.labels[indices], indices)


def to_unit(images: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [0, 1]."""
    return images.float() / 255


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Shift each image by up to ±padding pixels in both directions, zeros moving in.

    (m, C, H, W) -> (m, C, H, W)
    """
    m, channels, height, width = images.shape
    device = images.device
    padded = F.pad(images, [padding] * 4)
    shifts = torch.randint(2 * padding + 1, (2, m, 1), generator=generator, device=device)
    rows = shifts[0] + torch.arange(height, device=device)  # (m, H)
    columns = shifts[1] + torch.arange(width, device=device)  # (m, W)
    image = torch.arange(m, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(-1, 1, 1)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2. (m, C, H, W) -> (m, C, H, W)"""
    mirror = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(mirror[:, None, None, None], images.flip(3), images)
