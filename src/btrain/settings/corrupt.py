"""The settings of `btrain data corrupt`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btrain.errors import UserError
from btrain.settings import MISSING, DatasetConfig
from btrain.settings.checks import at_least, seed_in_range

CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
    "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
    "jpeg_compression",
)  # fmt: skip
"""The fifteen that count, in the official order."""

EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""Meant for validation; no part of the mean."""

_SETS = {"standard": CORRUPTIONS, "all": CORRUPTIONS + EXTRA_CORRUPTIONS}


def check_name(name: str) -> None:
    """Raise UserError where there is no such corruption."""
    names = CORRUPTIONS + EXTRA_CORRUPTIONS
    if name not in names:
        raise UserError(f"There is no corruption {name}; there are: {', '.join(names)}.")


@dataclass
class CorruptionSettings:
    out: str | None = None
    corruptions: Any = MISSING  # standard, all, a name, or a list of names
    seed: int = MISSING
    processes: int | None = None
    frost: str | None = None

    def __post_init__(self) -> None:
        seed_in_range("corrupt.seed", self.seed)
        at_least(1, "corrupt.processes", self.processes)
        if not self.names:
            raise UserError("corrupt.corruptions names none.")
        for name in self.names:
            check_name(name)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the corruptions that are asked for, in the user's order."""
        if isinstance(self.corruptions, list):
            return tuple(dict.fromkeys(map(str, self.corruptions)))
        return _SETS.get(self.corruptions, (str(self.corruptions),))


@dataclass
class CorruptConfig:
    """The settings that decide a corrupted test set."""

    dataset: DatasetConfig = MISSING
    corrupt: CorruptionSettings = MISSING

    @property
    def source(self) -> str:
        """Return the name of the data set."""
        return self.dataset.title

    @property
    def out(self) -> Path:
        """Return the folder of the corrupted test set."""
        return Path(self.corrupt.out or f"data/{self.source}-C-regenerated")
