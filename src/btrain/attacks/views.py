"""AugMix for a whole batch on its device, in PIL's arithmetic.

Hendrycks et al., "AugMix: A Simple Data Processing Method to Improve Robustness and Uncertainty".
The operations take and return uint8 images (n, C, H, W), C = 1 or 3, with a parameter for each
image, and give what Pillow gives for RGB and grey images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from btrain.data.augmentation import to_unit


def augmix(
    images: Tensor,
    *,
    generator: torch.Generator,
    severity: float = 3,
    width: int = 3,
    depth: int | None = None,
    all_ops: bool = False,
    rows: Tensor | None = None,
) -> Tensor:
    """Return one AugMix view of each image, drawn from the generator alone.

    One copy from the device to the host: how many images drew each operation at each place of the
    chains. Computing every operation for every image would need none, but several times the work.

    Args:
        images: in [0, 1], multiples of 1/255, (m, C, H, W) float32.
        generator: of all draws, on the images' device.
        severity: upper end of the operations' levels, whose scale ends at 10.
        width: how many chains of operations are mixed.
        depth: how many operations a chain has; None or -1: one to three, drawn for each chain.
        all_ops: whether to draw from colour, contrast, brightness and sharpness as well.
        rows: the images whose views are wanted, (n,) int64; what is drawn is the same for all m.

    Returns:
        (m, C, H, W), or (n, C, H, W) of `rows`, float32 in [0, 1], not quantised.
    """
    draws = draw(
        len(images),
        generator=generator,
        severity=severity,
        width=width,
        lengths=(1, 3) if depth is None or depth < 1 else (depth, depth),
        kinds=len(OPERATIONS) if all_ops else DEFAULT_OPERATIONS,
    )
    if rows is not None:
        images, draws = images[rows], Draws._make(drawn[rows] for drawn in draws)
    pixels = (images * 255).round().to(torch.uint8)
    return mix(images, run_chains(pixels, draws.operations, draws.levels), draws)


class Draws(NamedTuple):
    """The random choices of `augmix`."""

    operations: Tensor
    """Indices into OPERATIONS, len(OPERATIONS) after a chain's end, (m, width, length) int64."""
    levels: Tensor
    """±u with u ~ U(0.1, severity) and a random sign, (m, width, length) float64."""
    weights: Tensor
    """The weights of the chains, Dirichlet(1, …, 1), (m, width)."""
    mixing: Tensor
    """The share of the chains in the view, Beta(1, 1), (m,)."""


def draw(
    m: int,
    *,
    generator: torch.Generator,
    severity: float,
    width: int,
    lengths: tuple[int, int],
    kinds: int,
) -> Draws:
    """Draw for m images: chains of the first `kinds` OPERATIONS, of `lengths` (least, most)."""
    device = generator.device
    least, most = lengths
    shape = (m, width, most)
    operations = torch.randint(kinds, shape, generator=generator, device=device)
    length = torch.randint(least, most + 1, (m, width, 1), generator=generator, device=device)
    over = torch.arange(most, device=device) >= length
    signed = torch.rand(shape, generator=generator, device=device, dtype=torch.float64) * 2 - 1
    # Independent exponentials divided by their sum are Dirichlet(1, …, 1).
    weights = torch.empty(m, width, device=device).exponential_(generator=generator)
    return Draws(
        operations.masked_fill(over, len(OPERATIONS)),
        torch.copysign(0.1 + (severity - 0.1) * signed.abs(), signed),
        weights / weights.sum(dim=1, keepdim=True),
        torch.rand(m, generator=generator, device=device),
    )


def run_chains(images: Tensor, operations: Tensor, levels: Tensor) -> Tensor:
    """Return each chain's result: each operation runs on the images that drew it, all warps as one.

    (m, C, H, W) uint8, (m, width, length), (m, width, length) -> (m, width, C, H, W) uint8
    """
    m, width, length = operations.shape
    x = images.repeat_interleave(width, dim=0)
    operations, levels = operations.view(m * width, length).T, levels.view(m * width, length).T
    matrices = affine_matrix(operations, levels, images.shape[3], images.shape[2])
    kinds = torch.arange(len(OPERATIONS) + 1, device=images.device)
    counts = (operations[..., None] == kinds).sum(dim=1).tolist()
    order = operations.argsort(dim=1)

    for level, matrix, drew, sizes in zip(levels, matrices, order, counts, strict=True):
        groups = drew.split(sizes)  # ends with those whose chain is over
        warped = torch.cat(groups[: len(GEOMETRIC)])
        x[warped] = affine(x[warped], matrix[warped])
        for group, operation in zip(groups[len(GEOMETRIC) : -1], INTENSITY.values(), strict=True):
            if len(group):
                x[group] = operation(x[group], level[group].abs())
    return x.view(m, width, *images.shape[1:])


def mix(images: Tensor, chains: Tensor, draws: Draws) -> Tensor:
    """Return (1 - mixing)·image + mixing·Σ weight·chain.

    (m, C, H, W), (m, width, C, H, W) uint8 -> (m, C, H, W)
    """
    mixture = (to_unit(chains) * draws.weights[:, :, None, None, None]).sum(dim=1)
    view = torch.lerp(images, mixture, draws.mixing[:, None, None, None])
    return view.clamp(0, 1)  # the rounded weights may add up to more than 1


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel to 0…255; a constant one stays. (n, C, H, W) -> (n, C, H, W)"""
    low, high = (end.double() for end in images.flatten(2).aminmax(dim=2))
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)  # 255 / … takes the reciprocal
    scale, offset = scale[..., None, None], (-low * scale)[..., None, None]
    # float64 and this order of operations: Pillow truncates, and so loses a level now and then.
    stretched = (images * scale + offset).to(torch.uint8)
    return torch.where((high > low)[..., None, None], stretched, images)


def equalize(images: Tensor) -> Tensor:
    """Make each channel's histogram flat. (n, C, H, W) -> (n, C, H, W)

    A channel of fewer than 255 pixels below its maximum stays as it is.
    """
    pixels = images.flatten(2).long()
    histogram = pixels.new_zeros(*pixels.shape[:2], 256)
    histogram.scatter_add_(2, pixels, torch.ones_like(pixels))
    below = histogram.cumsum(dim=2) - histogram  # how many pixels are darker than each level
    step = below.gather(2, pixels.amax(dim=2, keepdim=True)) // 255
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    equalized = torch.where(step > 0, table.gather(2, pixels), pixels)
    return equalized.to(torch.uint8).view_as(images)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest `bits` bits of each pixel. (n, C, H, W), (n,) int64 -> (n, C, H, W)"""
    mask = (0xFF << (8 - bits)).to(torch.uint8)
    return images & mask[:, None, None, None]


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert pixels from `threshold` up. (n, C, H, W), (n,) int64 -> (n, C, H, W)"""
    return torch.where(images < threshold[:, None, None, None], images, 255 - images)


def enhance_color(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with grey: 0: grey, 1: the image. (n, C, H, W), (n,) -> (n, C, H, W)"""
    return blend(luminance(images), images, factor)


def enhance_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with one grey: 0: the mean luminance, 1: the image.

    (n, C, H, W), (n,) -> (n, C, H, W)
    """
    pixels = images.shape[2] * images.shape[3]
    total = luminance(images).sum(dim=(2, 3), keepdim=True)
    return blend((2 * total + pixels) // (2 * pixels), images, factor)


def enhance_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with black: 0: black, 1: the image. (n, C, H, W), (n,) -> (n, C, H, W)"""
    return blend(torch.zeros_like(images), images, factor)


def enhance_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with a smoothed one: 0: smoothed, 1: the image, 2: sharpened.

    (n, C, H, W), (n,) -> (n, C, H, W)
    """
    return blend(smooth(images), images, factor)


def blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Return degenerate + factor·(image - degenerate), in float32, clipped, truncated.

    (n, C or 1, H or 1, W or 1), (n, C, H, W), (n,) -> (n, C, H, W)
    """
    base = degenerate.float()
    mixed = base + factor.float()[:, None, None, None] * (images - base)
    return mixed.clamp(0, 255).to(torch.uint8)


def luminance(images: Tensor) -> Tensor:
    """Return ITU-R 601 luma in fixed point; grey is its own. (n, C, H, W) -> (n, 1, H, W)"""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.int()[:, :, None].unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8)


def smooth(images: Tensor) -> Tensor:
    """Take the 3×3 mean with weight 5 of 13 in the middle; the border stays. Like images"""
    x = images.float()
    rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smoothed = images.clone()
    smoothed[..., 1:-1, 1:-1] = ((box + 4 * x[..., 1:-1, 1:-1]) / 13 + 0.5).to(torch.uint8)
    return smoothed


def affine(images: Tensor, matrix: Tensor) -> Tensor:
    """Warp by Pillow's bilinear AFFINE transform, black outside.

    The pixel (x, y) comes from (a·x + b·y + c, d·x + e·y + f), with pixel centres at halves. The
    interpolation is truncated to a level, which takes float64 to do as Pillow does.

    (n, C, H, W), (n, 6) float64 -> (n, C, H, W)
    """
    n, channels, height, width = images.shape
    a, b, c, d, e, f = matrix.view(n, 6, 1, 1).unbind(1)
    column = torch.arange(width, device=images.device, dtype=matrix.dtype) + 0.5
    row = torch.arange(height, device=images.device, dtype=matrix.dtype)[:, None] + 0.5
    x, y = a * column + b * row + c, d * column + e * row + f  # (n, H, W)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x - 0.5, y - 0.5
    left, top = x.floor(), y.floor()
    columns = [(left.long() + i).clamp(0, width - 1) for i in (0, 1)]
    rows = [(top.long() + i).clamp(0, height - 1) * width for i in (0, 1)]

    def interpolate_along(row: Tensor) -> Tensor:
        taps = [(row + column).flatten(1)[:, None].expand(-1, channels, -1) for column in columns]
        first, second = (images.flatten(2).gather(2, tap).view_as(images).to(x) for tap in taps)
        return first.lerp_(second, (x - left)[:, None])

    upper, lower = (interpolate_along(row) for row in rows)
    levels = upper.lerp_(lower, (y - top)[:, None]).to(torch.uint8)
    return levels * inside[:, None]


def affine_matrix(operations: Tensor, levels: Tensor, width: int, height: int) -> Tensor:
    """Return coefficients a…f of `affine` for geometric operations, the identity for others.

    (…), (…) -> (…, 6) float64
    """
    amounts = [amount(levels, width, height) for amount in GEOMETRIC.values()]
    drawn = [torch.where(operations == i, amount, 0) for i, amount in enumerate(amounts)]
    degrees, shear_x, shear_y, shift_x, shift_y = drawn
    cos, sin = torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees))
    x, y = width / 2, height / 2  # the centre of rotation
    # At most one amount is not zero: adding up is choosing.
    c, f = sin * y - cos * x + x + shift_x, -sin * x - cos * y + y + shift_y
    return torch.stack([cos, shear_x - sin, c, shear_y + sin, cos, f], dim=-1)


GEOMETRIC: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "rotate": lambda u, width, height: (3 * u).trunc(),  # degrees, counter-clockwise
    "shear_x": lambda u, width, height: 0.03 * u,
    "shear_y": lambda u, width, height: 0.03 * u,
    "translate_x": lambda u, width, height: (u * (width / 3) / 10).trunc(),
    "translate_y": lambda u, width, height: (u * (height / 3) / 10).trunc(),
}
"""The operation's amount for a level ±u, an image's width and its height: (…) -> (…)"""

INTENSITY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autocontrast": lambda images, u: autocontrast(images),
    "equalize": lambda images, u: equalize(images),
    "posterize": lambda images, u: posterize(images, 4 - (0.4 * u).long()),
    "solarize": lambda images, u: solarize(images, 256 - (25.6 * u).long()),
    "color": lambda images, u: enhance_color(images, 0.18 * u + 0.1),
    "contrast": lambda images, u: enhance_contrast(images, 0.18 * u + 0.1),
    "brightness": lambda images, u: enhance_brightness(images, 0.18 * u + 0.1),
    "sharpness": lambda images, u: enhance_sharpness(images, 0.18 * u + 0.1),
}
"""The operation at level u: (n, C, H, W), (n,) -> (n, C, H, W)"""

OPERATIONS = (*GEOMETRIC, *INTENSITY)
DEFAULT_OPERATIONS = 9  # the first; the others resemble the test corruptions of CIFAR-10-C
