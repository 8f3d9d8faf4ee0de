"""The corruptions of CIFAR-10-C and CIFAR-100-C, made anew from their published constants.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations". The official files were drawn without a seed, so no one can make them again byte for
byte: what comes from here has their statistics, not their pixels.

The constants are those for 32×32 images. On other sizes pixelate and elastic_transform follow the
side, zoom_blur and fog are free of scale, frost shows the same part of its photograph; blur radii,
glass_blur's shifts, snowflakes and drops are lengths in pixels and stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from btrain import lazy
from btrain.errors import UserError
from btrain.settings.corrupt import CORRUPTIONS, EXTRA_CORRUPTIONS, check_name

if TYPE_CHECKING:
    import numpy as np

    from btrain.corruptions import frost, read
    from btrain.corruptions.arrays import Corruption, Images

__all__ = [
    "CORRUPTIONS",
    "EXTRA_CORRUPTIONS",
    "SEVERITIES",
    "check_images",
    "check_name",
    "check_severity",
    "corrupt",
    "frost",
    "read",
]

__getattr__, __dir__ = lazy.attributes(__name__, ("frost", "read"))

SEVERITIES = 5
SMALLEST_SIDE = 8


def corrupt(
    images: Images,
    name: str,
    severity: int,
    rng: np.random.Generator,
    *,
    photographs: tuple[Images, ...] | None = None,
) -> Images:
    """Corrupt a batch; grey images stay grey.

    The result is truncated to whole levels as the official files are, not rounded.

    Args:
        images: (n, H, W, C) uint8, C = 1 or 3, H and W at least 8. Left as they are.
        name: one of CORRUPTIONS or EXTRA_CORRUPTIONS.
        severity: 1 to 5.
        rng: of all draws.
        photographs: of frost, as `btrain.corruptions.frost.photographs` reads them from a folder;
            by default synthesised textures.

    Returns:
        (n, H, W, C) uint8.

    Raises:
        UserError: an unknown corruption or severity, or images of another shape or type.
    """
    import numpy as np

    check_name(name)
    check_severity(severity)
    check_images(images)
    levels = _functions(photographs)[name](images, severity, rng)
    return np.clip(levels, 0, 255).astype(np.uint8)


def check_severity(severity: int) -> None:
    """Raise UserError where there is no such severity."""
    if severity not in range(1, SEVERITIES + 1):
        raise UserError(f"The severity of a corruption must be 1 to {SEVERITIES}, not {severity}.")


def check_images(images: Images) -> None:
    """Raise UserError for what is no batch of uint8 images that are large enough."""
    is_batch = images.ndim == 4 and images.shape[3] in (1, 3) and images.dtype == "uint8"
    if not is_batch or min(images.shape[1:3]) < SMALLEST_SIDE:
        raise UserError(
            "Corruptions take uint8 images (n, H, W, 1 or 3) of at least "
            f"{SMALLEST_SIDE}×{SMALLEST_SIDE}, not {images.dtype} {images.shape}."
        )


def _functions(photographs: tuple[Images, ...] | None) -> dict[str, Corruption]:
    from functools import partial

    from btrain.corruptions import blur, digital, noise, spatter, weather

    modules = (noise, blur, weather, spatter, digital)
    names = (*CORRUPTIONS, *EXTRA_CORRUPTIONS)
    found: dict[str, Corruption] = {
        name: getattr(module, name) for module in modules for name in names if hasattr(module, name)
    }
    return found | {"frost": partial(weather.frost, photographs=photographs)}
