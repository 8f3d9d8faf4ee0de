"""Clean accuracy and accuracy under PGD, as TRADES evaluates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from btrain import precision
from btrain.attacks import evaluation_mode, prefix_pgd
from btrain.data import Split
from btrain.data.augmentation import to_unit
from btrain.defenses import ce_inner_loss


@dataclass(frozen=True)
class Accuracy:
    """In percent of all examples."""

    clean: float
    robust: float


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
) -> Accuracy:
    """Clean and PGD accuracy in eval mode and float32.

    PGD as published with TRADES: start x + U(-ε, ε), `steps` steps on the cross-entropy, the last
    iterate counts, one restart. The start is drawn on the CPU example by example, so that neither
    batch size nor device changes the numbers drawn.

    Args:
        epsilon, step_size: in [0, 1] pixel units.
        seed: of the random start.
    """
    device = split.images.device
    generator = torch.Generator().manual_seed(seed)
    clean_correct = torch.zeros((), dtype=torch.int64, device=device)
    robust_correct = clean_correct.clone()
    with evaluation_mode(model), precision.exactly_float32(device):
        for begin in _progress(range(0, len(split), batch_size), show_progress):
            part = slice(begin, begin + batch_size)
            x, labels = to_unit(split.images[part]), split.labels[part]
            noise = torch.rand(x.shape, generator=generator).to(device) * (2 * epsilon) - epsilon
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
                epsilon=epsilon,
                noise=noise,
            )
            with torch.no_grad():
                adv_logits = model(x_adv)
            clean_correct += (clean_logits.argmax(dim=1) == labels).sum()
            robust_correct += (adv_logits.argmax(dim=1) == labels).sum()
    return Accuracy(
        clean=100 * clean_correct.item() / len(split),
        robust=100 * robust_correct.item() / len(split),
    )


def _progress(starts: Iterable[int], show: bool) -> Iterable[int]:
    from tqdm import tqdm

    bar: Iterable[int] = tqdm(starts, "evaluating", leave=False, disable=None if show else True)
    return bar
