"""Clean accuracy and accuracy under PGD, as TRADES evaluates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from btrain import precision
from btrain.attacks.balls import LinfBall
from btrain.attacks.pgd import evaluation_mode, prefix_pgd
from btrain.data import Split
from btrain.data.augmentation import to_unit
from btrain.defenses import ce_inner_loss


@dataclass(frozen=True)
class Accuracy:
    """In percent of all examples."""

    clean: float
    robust: float


class Processes(Protocol):
    """Those that share an evaluation.

    Attributes:
        rank: this process', from 0.
        size: how many there are.
    """

    rank: int
    size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors."""
        ...


def evaluate(
    model: nn.Module,
    split: Split,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    batch_size: int,
    seed: int,
    show_progress: bool = False,
    processes: Processes | None = None,
    ahead: Callable[[], None] = lambda: None,
) -> Accuracy:
    """Clean and PGD accuracy in eval mode and float32.

    PGD as published with TRADES: start x + U(-ε, ε), `steps` steps on the cross-entropy, the last
    iterate counts, one restart. The start is drawn on the CPU example by example, so that neither
    batch size nor device changes the numbers drawn.

    Args:
        epsilon, step_size: in [0, 1] pixel units.
        seed: of the random start.
        processes: each attacks its share of the examples, and each returns the same.
        ahead: called ahead of each batch, by all processes equally often.
    """
    rank, size = (0, 1) if processes is None else (processes.rank, processes.size)
    device = split.images.device
    generator = torch.Generator().manual_seed(seed)
    correct = torch.zeros(2, dtype=torch.int64, device=device)
    with evaluation_mode(model), precision.exactly_float32(device):
        for begin in _progress(range(0, len(split), batch_size * size), show_progress):
            ahead()
            part = slice(begin, begin + batch_size * size)
            images, labels = split.images[part], split.labels[part][rank::size]
            noise = torch.rand(images.shape, generator=generator)[rank::size].to(device)
            if not len(labels):  # the last examples are fewer than the processes
                continue
            x, noise = to_unit(images[rank::size]), noise * (2 * epsilon) - epsilon
            with torch.no_grad():
                clean_logits = model(x)
            x_adv = prefix_pgd(
                model,
                x,
                labels,
                clean_logits,
                active=[len(x)] * steps,
                step_size=torch.full((len(x),), step_size, device=device),
                inner_loss=ce_inner_loss,
                ball=LinfBall(epsilon),
                noise=noise,
            )
            with torch.no_grad():
                adv_logits = model(x_adv)
            predicted = torch.stack([clean_logits.argmax(dim=1), adv_logits.argmax(dim=1)])
            correct += (predicted == labels).sum(dim=1)
    clean, robust = (correct if processes is None else processes.sum(correct)).tolist()
    return Accuracy(clean=100 * clean / len(split), robust=100 * robust / len(split))


def _progress(starts: Iterable[int], show: bool) -> Iterable[int]:
    from tqdm import tqdm

    bar: Iterable[int] = tqdm(starts, "evaluating", leave=False, disable=None if show else True)
    return bar
