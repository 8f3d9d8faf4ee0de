"""Data sets, held as one uint8 tensor on the training device."""

from btrain.data.augmentation import batches
from btrain.data.splits import Data, Split, load

__all__ = ["Data", "Split", "batches", "load"]
