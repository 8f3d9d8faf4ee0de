"""Data sets, held as one uint8 tensor on the training device."""

from btrain.data.augmentation import Batch, batches
from btrain.data.splits import Data, Split, load

__all__ = ["Batch", "Data", "Split", "batches", "load"]
