"""The images and labels of an evaluation, and the state that a model is evaluated in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from btrain import precision
from btrain.attacks.pgd import check_images, evaluation_mode
from btrain.data.augmentation import to_unit
from btrain.errors import UserError, first_line
from btrain.evaluation.result import hardly_above_chance
from btrain.terminal import counted


@dataclass(frozen=True)
class Examples:
    """Test images in their order, and the device they are attacked on.

    Attributes:
        images: (n, C, H, W), uint8, or floats in [0, 1].
        labels: (n,) int64.
        classes: the names of the K classes.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    device: torch.device

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the size of an image, (C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (m, C, H, W) float32 in [0, 1] and labels (m,), on the device."""
        images = self.images[indices.to(self.images.device)].to(self.device)
        images = to_unit(images) if images.dtype == torch.uint8 else images.float()
        return images, self.labels[indices.to(self.labels.device)].to(self.device)

    def subset(self, indices: Tensor) -> Examples:
        """Return some of them, in the order of the indices."""
        return Examples(
            self.images[indices.to(self.images.device)],
            self.labels[indices.to(self.labels.device)],
            self.classes,
            self.device,
        )

    def sha256(self) -> str:
        """Return a hash that is the same for the same images and labels in the same order."""
        digest = hashlib.sha256()
        for tensor in (self.images, self.labels):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()


def checked(images: Tensor, labels: Tensor, device: torch.device | None) -> Examples:
    """Return examples of anybody's tensors, to be attacked on a device; None for the images' own.

    Raises:
        UserError: shapes, types or the range of the values are not what attacks assume.
    """
    given: dict[str, object] = {"images": images, "labels": labels}
    for name, thing in given.items():
        if not isinstance(thing, Tensor):
            raise UserError(f"{name} must be a torch tensor, not {type(thing).__name__}.")
    if images.dim() != 4 or labels.shape != images.shape[:1] or not len(labels):
        raise UserError(
            "images must be (n, C, H, W) and labels (n,), not "
            f"{tuple(images.shape)} and {tuple(labels.shape)}."
        )
    if labels.dtype != torch.int64 or int(labels.min()) < 0:
        raise UserError("labels must be int64 from 0 upwards.")
    if images.dtype != torch.uint8:
        if not images.is_floating_point():
            raise UserError(f"images must be uint8 or floats in [0, 1], not {images.dtype}.")
        check_images(images)
    names = tuple(str(label) for label in range(int(labels.max()) + 1))
    return Examples(images.detach(), labels, names, device or images.device)


@contextmanager
def as_evaluated(model: nn.Module, device: torch.device, kind: str = "float32") -> Iterator[None]:
    """Switch to eval mode, weights without gradients, and float32 (or bf16 autocast) inside."""
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with evaluation_mode(model), precision.exactly_float32(device):
            if kind == "bf16":
                with torch.autocast(device.type, dtype=torch.bfloat16):
                    yield
            else:
                yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


@contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """Restore torch's global generators afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def batches(indices: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yield so many at a time, (n,) -> (m,) …."""
    for begin in range(0, len(indices), batch_size):
        yield indices[begin : begin + batch_size]


def predictions(model: nn.Module, examples: Examples, *, batch_size: int) -> Tensor:
    """Return the classes that a model, as it is, gives to clean images, (n,) on the CPU.

    Raises:
        UserError: it does not take these images, or not one finite logit for each class.
    """
    found = []
    for indices in batches(torch.arange(len(examples)), batch_size):
        logits = clean_logits(model, examples, indices)
        if logits.shape[1] != len(examples.classes):
            raise UserError(
                f"The model has {counted(logits.shape[1], 'class')}, the data set "
                f"{len(examples.classes)}."
            )
        found.append(logits.argmax(dim=1).cpu())
    return torch.cat(found)


def clean_logits(model: nn.Module, examples: Examples, indices: Tensor) -> Tensor:
    """Return the logits of a model, as it is, for some clean images, (m,) -> (m, K).

    Raises:
        UserError: it does not take these images, or does not return finite logits.
    """
    x, _ = examples.batch(indices)
    try:
        with torch.no_grad():
            logits: object = model(x)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = first_line(error)
        others = {weight.dtype for weight in model.parameters()} - {x.dtype}
        hint = f" (its weights are {others.pop()}; please pass model.float())" if others else ""
        raise UserError(f"The model cannot take images of {_shape(x)}: {reason}{hint}.") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
        raise UserError("The model must return logits (m, K), a row for each image.")
    if not torch.isfinite(logits).all():
        raise UserError("The model returns logits that are not finite on clean images.")
    return logits


def check_gradient(model: nn.Module, examples: Examples) -> None:
    """Make sure that a model, as it is, can be attacked by gradients.

    Raises:
        UserError: its logits do not depend on the images in a way that torch can differentiate.
    """
    x, _ = examples.batch(torch.tensor([0]))
    x.requires_grad_()
    gradient, reason = None, "is it wrapped in torch.no_grad, or does it detach something?"
    with torch.enable_grad():
        logits: Tensor = model(x)
        try:
            if logits.requires_grad:
                (gradient,) = torch.autograd.grad(logits.sum(), [x], allow_unused=True)
        except RuntimeError as error:
            reason = first_line(error)
    if gradient is None:
        raise UserError(
            "The model's logits have no gradient with respect to the images, which PGD and "
            f"AutoAttack need ({reason})."
        )


def near_chance(correct: Tensor, classes: int) -> str | None:
    """Return a hint where a model hardly does better than guessing on clean images, (n,), K."""
    accuracy, chance = 100 * correct.float().mean().item(), 100 / classes
    if not hardly_above_chance(accuracy, classes):
        return None
    return (
        f"Only {accuracy:.1f} % of the clean images are classified correctly, where guessing gives "
        f"{chance:.1f} %: does the model expect other images (size, normalisation) or another "
        "order of the classes?"
    )


def _shape(x: Tensor) -> str:
    return "×".join(str(side) for side in x.shape[1:])
