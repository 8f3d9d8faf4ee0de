"""What is done with one batch, and what is remembered for the next."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from btrain.data import Batch
from btrain.methods.statistics import StepStats

Memory = dict[str, Tensor]
"""What a method remembers between batches, F_R and more, by name; a step changes it in place."""

Step = Callable[
    [nn.Module, torch.optim.Optimizer, Batch, Memory, torch.Generator],
    StepStats,
]
"""One batch: (model, optimizer, batch, memory, generator) -> statistics."""
