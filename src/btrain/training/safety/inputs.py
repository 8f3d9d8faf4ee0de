"""The conditions that must hold at the end of every epoch; the log says where one does not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from btrain.evaluation import Accuracy
from btrain.methods.base import Reach

COLLAPSE = 20.0  # points
_ROUNDING = 1e-5
_EXAMPLES = 32
_NORMS = {"linf": torch.inf, "l2": 2.0}
_EXACTLY = "donot_use_mm_for_euclid_dist"  # whose rounding would be taken for a step outside


class InputGuard:
    """A watch over the images that a network is trained on: do they lie in the box and the ε-ball?

    It looks at the inputs themselves, whatever made them: in one batch, at the first 32 images of
    each train-mode pass, each against the nearest clean image of the batch. The passes of an attack
    in train mode are none of training; where they begin may lie outside.
    """

    def __init__(self, reach: Reach) -> None:
        self._radius, norm, self._slack = reach
        self._p = _NORMS.get(norm)
        if self._p is None:
            self._radius = None
        self._outside: list[Tensor] = []

    @contextmanager
    def over(self, model: nn.Module, x: Tensor) -> Iterator[None]:
        """Watch a step on the clean images x, (m, C, H, W)."""
        self._outside = []
        clean = x.detach().float().flatten(1)

        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            (images,) = inputs
            of_an_attack = images.requires_grad and images.is_leaf  # its gradient is asked for
            if not module.training or of_an_attack:
                return
            seen = images.detach()[:_EXAMPLES].float().flatten(1)
            box = torch.maximum(-seen.amin(), seen.amax() - 1)
            pairs = torch.cdist(seen, clean, p=self._p or torch.inf, compute_mode=_EXACTLY)
            ball = pairs.amin(dim=1).amax()
            self._outside.append(torch.stack([box, ball]))

        handle = model.register_forward_pre_hook(look)
        try:
            yield
        finally:
            handle.remove()

    def warnings(self) -> list[str]:
        """Return what was wrong in the batch that was watched last; one copy to the host."""
        if not self._outside:
            return []
        box, ball = torch.stack(self._outside).amax(dim=0).tolist()
        found = []
        if box > self._slack + _ROUNDING:
            found.append(f"training images leave the pixel box by {box:.3g}")
        if self._radius is not None and ball > self._radius + _ROUNDING:
            found.append(
                f"training images are {ball:.3g} away from the clean ones, more than the radius "
                f"{self._radius:.3g}"
            )
        return found


def epoch_warnings(means: Mapping[str, Any], watched: Accuracy, watched_examples: int) -> list[str]:
    """Return what is odd about an epoch.

    Args:
        means: the epoch's averages.
        watched: accuracies on the watched training batch.
    """
    found = []
    total = means["f_b"] + means["f_r"] + means["f_o"]
    if abs(total - 1) > _ROUNDING:
        found.append(f"F_B + F_R + F_O is {total:.6f}")
    if is_above(watched, watched_examples):
        found.append(
            f"PGD accuracy on a training batch, {watched.robust:.1f} %, is above the clean "
            f"accuracy, {watched.clean:.1f} %"
        )
    return found


def overfitting(
    under_attack: float | None, pgd: float, before: float | None, *, from_start: bool
) -> str | None:
    """Return how a network has learnt to resist the training's attack alone, or None.

    It has where training sees over 20 points more images resist than PGD does.

    Args:
        under_attack: images that resist the training's attack, percent; None where there is none.
        pgd: those of a training batch that resist PGD.
        before: the same one epoch earlier, or None.
        from_start: whether that tells even if PGD accuracy has not just fallen, as with one large
            step for everybody, which a network can learn to resist alone in its first epochs.
    """
    if under_attack is None or under_attack <= pgd + COLLAPSE:
        return None
    if fell(before, pgd):
        was = f"fell from {before:.1f} to"
    elif from_start:
        was = "is"
    else:
        return None
    return (
        f"catastrophic overfitting: PGD accuracy on a training batch {was} {pgd:.1f} % while "
        f"training sees {under_attack:.1f} %"
    )


def is_above(accuracy: Accuracy, examples: int) -> bool:
    """Return whether robust is above clean accuracy by over three deviations and an example."""
    share = accuracy.clean / 100
    noise = 3 * math.sqrt(share * (1 - share) / examples) + 1 / examples
    return accuracy.robust > accuracy.clean + 100 * noise


def fell(before: float | None, now: float) -> bool:
    """Return whether PGD accuracy fell by more than 20 points within an epoch."""
    return before is not None and now < before - COLLAPSE
