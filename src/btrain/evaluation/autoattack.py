"""AutoAttack (Croce & Hein 2020), through the library of its authors.

The library brings the attacks; which examples still stand, the order of the batches and what is
kept of an interrupted evaluation are btrain's. It is `pyautoattack` from PyPI, or `autoattack`
from the authors' repository where that is installed instead: there `bs` is the size of a batch,
images come back without labels, and progress and warnings are printed.
"""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from btrain.attacks.balls import Ball
from btrain.errors import UserError
from btrain.evaluation.examples import Examples, clean_logits, own_random_state
from btrain.evaluation.worst_case import Partial, worst_case

LIBRARIES = ("pyautoattack", "autoattack")
BATCH = 500
"""Examples that the library draws random numbers for at once."""
_WARNING = "Warning: "  # of what `autoattack` prints
_TARGETS = 9  # of the published targeted attacks, where there are as many other classes


def library() -> str:
    """Return the name of the installed library.

    Raises:
        UserError: neither is.
    """
    for name in LIBRARIES:
        try:
            import_module(name)
        except ImportError:
            continue
        return name
    raise UserError("AutoAttack is not installed; please run pip install 'btrain[eval]'.")


def library_norm(ball: Ball) -> str:
    """Return the library's name of a ball's norm.

    Raises:
        UserError: it has none.
    """
    known = {"linf": "Linf", "l2": "L2"}
    if ball.norm not in known:
        raise UserError(
            f"AutoAttack and Square know the norms {', '.join(known)}, not {ball.norm}."
        )
    return known[ball.norm]


def square_refuses(ball: Ball, examples: Examples) -> str | None:
    """Return why the library's Square cannot attack images of this size; None: it can.

    In L2 it begins with a grid of tiles a fifth of the height wide, and some sizes leave it with a
    tile that only part of is in the image, or with none.
    """
    _, height, width = examples.shape
    tile = height // 5
    if ball.norm != "l2" or tile == 1:
        return None
    begin = (height - 5 * tile) // 2
    sides = (height, width)
    if tile and all(begin + side // tile * tile <= side for side in sides):
        return None
    return f"square cannot attack {height}×{width} images in L2"


def autoattack_stands(
    model: nn.Module,
    examples: Examples,
    stands: Tensor,
    *,
    version: str,
    ball: Ball,
    seed: int,
    batch_size: int,
    partial: Partial | None = None,
    show_progress: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """Return which examples hold out against every attack of the ensemble.

    What the library returns is projected onto the ball and the box and classified once more. It
    draws its random numbers for whole batches, from the same seed for each: these are always of
    `BATCH` examples, whatever goes through the network at once.

    Args:
        stands: the examples to attack, (n,) bool on the CPU; the others count as fooled.
        version: standard or rand.
        ball: the threat model, L∞ or L2.
        batch_size: images in a pass of the network; smaller ones than `BATCH` cost one more
            forward pass for each gradient.

    Returns:
        (n,) bool on the CPU, and the attacks that were run with the library's warnings.

    Raises:
        UserError: no library is installed, or it does not know the norm.
    """
    classes = clean_logits(model, examples, torch.tensor([0])).shape[1]
    model = InParts(model, batch_size)
    notes: list[str] = []
    ensemble = _Ensemble(model, version, ball, seed, classes, examples)

    def fooled(number: int, indices: Tensor) -> Tensor:
        x, labels = examples.batch(indices)
        with _quiet(notes):
            x_adv = ensemble.attack(ensemble.attacks[number], x, labels)
        x_adv = ball.project(x_adv.to(x.device), *ball.region(x))
        with torch.no_grad():
            wrong: Tensor = model(x_adv).argmax(dim=1) != labels
        return wrong

    with own_random_state(examples.device):
        stands = worst_case(
            fooled,
            stands,
            rounds=[f"AutoAttack, {attack}" for attack in ensemble.attacks],
            batch_size=BATCH,
            partial=partial,
            show_progress=show_progress,
        )
    note = " ".join([*ensemble.notes, *notes]) or None
    return stands, {"attacks": ensemble.attacks, "note": note}


class _Ensemble:
    """The published ensemble, with no more target classes than there are."""

    def __init__(
        self,
        model: nn.Module,
        version: str,
        ball: Ball,
        seed: int,
        classes: int,
        examples: Examples,
    ) -> None:
        self.notes: list[str] = []
        norm = library_norm(ball)
        settings = {"norm": norm, "eps": ball.epsilon, "seed": seed, "version": version}
        make = import_module(library()).AutoAttack
        with _quiet([]):
            self._library = make(model, device=examples.device, **settings)
        self.attacks = [str(name) for name in self._library.attacks_to_run]
        targets = min(_TARGETS, classes - 1)
        self._library.apgd_targeted.n_target_classes = targets
        self._library.fab.n_target_classes = targets
        # The DLR losses divide by a difference to the third logit, or to the third and fourth.
        for name, least in (("apgd-dlr", 3), ("apgd-t", 4)):
            if name in self.attacks and classes < least:
                self.attacks.remove(name)
                self.notes.append(f"{name} needs {least} classes and was left out.")
        if "square" in self.attacks and (reason := square_refuses(ball, examples)):
            self.attacks.remove("square")
            self.notes.append(f"{reason} and was left out.")

    def attack(self, name: str, x: Tensor, labels: Tensor) -> Tensor:
        """Return what one attack makes of a batch, (m, C, H, W), (m,) -> (m, C, H, W)."""
        self._library.attacks_to_run = [name]
        size = "batch_size" if library() == "pyautoattack" else "bs"
        found = self._library.run_standard_evaluation(x, labels, **{size: len(x)})
        x_adv: Tensor = found[0] if isinstance(found, tuple) else found
        return x_adv


@contextmanager
def _quiet(notes: list[str]) -> Iterator[None]:
    """Collect the library's warnings, each once, and give a debugger its trace function back."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                found.append(record.getMessage())

    logger, handler, trace = logging.getLogger("auto-attack"), Collector(), sys.gettrace()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(record=True) as caught, redirect_stdout(printed):
            warnings.simplefilter("always")
            yield
        found += [str(warning.message) for warning in caught]
        lines = printed.getvalue().splitlines()
        found += [line.removeprefix(_WARNING) for line in lines if line.startswith(_WARNING)]
        notes += dict.fromkeys(note for note in found if note not in notes)
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        sys.settrace(trace)


class InParts(nn.Module):
    """A network in several passes, so that memory bounds the passes and not the batches.

    An attack whose random numbers are drawn for whole batches can thus keep its batches whatever
    the memory. Where gradients are wanted, the backward pass computes each part once more, and the
    activations of one part are all that is kept.
    """

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__()
        self.model, self.most = model, most

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch, (m, C, H, W) -> (m, K)."""
        parts = torch.split(x, self.most)
        if len(parts) > 1 and x.requires_grad and torch.is_grad_enabled():
            return torch.cat([checkpoint(self.model, part, use_reentrant=False) for part in parts])
        return torch.cat([self.model(part) for part in parts])
