"""The accuracy on corrupted test images: CIFAR-10-C and what has its layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from btrain.corruptions import SEVERITIES
from btrain.data.splits import class_balanced_order
from btrain.errors import UserError
from btrain.evaluation.examples import Examples, predictions
from btrain.terminal import counted

Reader = Callable[[Path, str, int], tuple[Tensor, Tensor]]
"""(folder, corruption, severity 1 to 5) -> images (n, C, H, W) uint8 and labels (n,) int64"""


@dataclass(frozen=True)
class Corrupted:
    """The answers of a model under corruptions.

    Attributes:
        names: of the corruptions.
        correct: (corruptions, severities, n) bool.
    """

    names: tuple[str, ...]
    correct: npt.NDArray[np.bool_]

    def table(self) -> dict[str, list[float]]:
        """Return the percent accuracy at severities 1 to 5, by corruption."""
        accuracies = 100 * self.correct.mean(axis=2)
        return {name: row.tolist() for name, row in zip(self.names, accuracies, strict=True)}

    def split(self, count: int) -> tuple[Corrupted, Corrupted]:
        """Return the first so many corruptions, and the others."""
        return (
            Corrupted(self.names[:count], self.correct[:count]),
            Corrupted(self.names[count:], self.correct[count:]),
        )


def under_corruptions(
    model: nn.Module,
    examples: Examples,
    root: Path,
    names: Sequence[str],
    *,
    read: Reader,
    batch_size: int,
    show_progress: bool = False,
) -> Corrupted:
    """Classify every corruption at every severity, in the precision the model is in.

    Args:
        examples: the clean test images, whose labels the files must repeat.
        root: the folder of the `.npy` files.
        read: of one severity of one file.

    Raises:
        UserError: a file is missing or of another shape, or belongs to other test images.
    """
    from tqdm import tqdm

    for name in names:  # what is missing or damaged is rather known now than after hours
        read(root, name, 1)
    correct = np.zeros((len(names), SEVERITIES, len(examples)), dtype=bool)
    cells = [(i, severity) for i in range(len(names)) for severity in range(1, SEVERITIES + 1)]
    for i, severity in tqdm(
        cells, "corruptions", leave=False, disable=None if show_progress else True
    ):
        images, labels = read(root, names[i], severity)
        chosen = _matching(labels, examples, root)
        corrupted = Examples(
            images[chosen],
            examples.labels,
            examples.classes,
            examples.device,
        )
        if corrupted.images.shape != examples.images.shape:
            raise UserError(
                f"{root / names[i]}.npy holds images of {_side(corrupted.images)}, the test set "
                f"of {_side(examples.images)}."
            )
        found = predictions(model, corrupted, batch_size=batch_size)
        correct[i, severity - 1] = (found == examples.labels.cpu()).numpy()
    return Corrupted(tuple(names), correct)


def mean_settings(corrupted: Corrupted) -> dict[str, Any]:
    """Return the table, and mCE as usual for CIFAR: 100 − mean accuracy, no normalisation."""
    return {
        "table": corrupted.table(),
        "mce": 100 - 100 * float(corrupted.correct.mean()),
    }


def _matching(labels: Tensor, examples: Examples, root: Path) -> Tensor:
    """Return the indices of the test examples in the files: all, or a class-balanced subset."""
    wanted = examples.labels.cpu()
    order = torch.from_numpy(class_balanced_order(labels.numpy()))
    for chosen in (torch.arange(len(labels)), order[: len(wanted)].sort().values):
        if torch.equal(labels[chosen], wanted):
            return chosen
    raise UserError(
        f"{root} holds {counted(len(labels), 'image')} whose labels are not those "
        f"of the {counted(len(wanted), 'test image')}: it was made of another test set."
    )


def _side(images: Tensor) -> str:
    return "×".join(str(side) for side in images.shape[1:])
