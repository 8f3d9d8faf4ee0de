"""Projected gradient ascent with a step count and a step size for each example.

Examples with fewer steps cost less: sorted by descending step count, every step runs on a
contiguous prefix of the batch. Gradients reach the images only.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy

import numpy as np
import torch
from torch import Tensor, nn

from btrain.attacks.balls import Ball, LinfBall, per_image
from btrain.errors import UserError
from btrain.settings.checks import pixels

_ROUNDING = 1e-6  # of images in [0, 1], behind a change of their colours or size

InnerLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(adversarial logits (m, K), clean logits (m, K), labels (m,)) -> what to ascend (m,)"""


def pgd(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    clean_logits: Tensor,
    *,
    steps: Tensor | int,
    step_size: Tensor | float,
    inner_loss: InnerLoss,
    noise: Tensor | None,
    epsilon: float | None = None,
    ball: Ball | None = None,
) -> Tensor:
    """Return adversarial examples within the ε-ball around x and the box [0, 1].

    The model is attacked in the mode it is in (see `evaluation_mode`). Three copies from the device
    to the host: the range of the images, that of the rest, and the step counts. An example's result
    depends on the others of the batch only through the model.

    Args:
        model: maps images to logits.
        x: clean images in [0, 1], (m, C, H, W).
        labels: classes from 0, below K, (m,) integers.
        clean_logits: handed to `inner_loss`, (m, K), or (m, 0) where it does not read them.
        steps: how many steps each example takes, (m,) int64, or one number for all; with 0 it
            comes back untouched.
        step_size: of each example, in pixel units, (m,), or one number for all.
        inner_loss: per example; its sum is ascended.
        noise: added to x as the start, like x, not projected before the first step; or None.
        epsilon: radius of an L∞ ball, in pixel units, one for all images.
        ball: another threat model, in place of `epsilon`; its radii may be of each image, (m,).

    Returns:
        Like x, in x's order.

    Raises:
        UserError: images, labels, logits, steps or lengths are not that, or out of range; there is
            no radius, or two.
    """
    if epsilon is not None and ball is None:
        ball = LinfBall(pixels("epsilon", _plain(epsilon), "linf", least=True))
    elif epsilon is not None or ball is None:
        raise UserError("pgd needs either epsilon, of an L∞ ball, or a ball.")
    if not isinstance(ball, Ball):
        raise UserError(f"ball must be a btrain.attacks.Ball, not a {type(ball).__name__}.")
    check_images(x)
    steps, step_size = _for_each(steps, step_size, x, ball.norm)
    _check_batch(x, labels, clean_logits, noise, ball)
    _check_values(labels, clean_logits.shape[1], steps, step_size)
    order, counts = by_steps(steps)
    x, labels, clean_logits = x[order], labels[order].long(), clean_logits[order]
    step_size, noise = step_size[order], None if noise is None else noise[order]
    radii = getattr(ball, "epsilon", None)
    if isinstance(radii, Tensor) and radii.dim():
        ball = copy(ball)
        ball.epsilon = radii[order]
    x_adv = prefix_pgd(
        model,
        x,
        labels,
        clean_logits,
        active=counts(),
        step_size=step_size,
        inner_loss=inner_loss,
        ball=ball,
        noise=noise,
    )
    return torch.empty_like(x_adv).index_copy_(0, order, x_adv)


def check_images(images: Tensor) -> None:
    """Raise UserError unless images are floats in [0, 1], up to rounding; one copy to the host."""
    if not isinstance(images, Tensor):
        raise UserError(f"images must be a tensor, not a {type(images).__name__}.")
    if not images.is_floating_point():
        raise UserError(f"images must be floats in [0, 1], not {images.dtype}.")
    least, most = torch.stack(torch.aminmax(images)).tolist() if images.numel() else (0.0, 0.0)
    if not (least >= -_ROUNDING and most <= 1 + _ROUNDING):
        raise UserError(
            f"images must lie in [0, 1], where ε is measured, not in [{least:.7g}, {most:.7g}]; "
            "divide [0, 255] images by 255, and normalise inside the model."
        )


def _check_batch(
    x: Tensor, labels: Tensor, clean_logits: Tensor, noise: Tensor | None, ball: Ball
) -> None:
    """Raise UserError unless labels and logits have a row for each image, and noise is like x.

    So must a ball's radii, where it has several.
    """
    parts = {"labels": labels, "clean_logits": clean_logits, "noise": noise}
    for name, part in parts.items():
        if not isinstance(part, Tensor) and not (part is None and name == "noise"):
            raise UserError(f"{name} must be a tensor, not a {type(part).__name__}.")
    radii = getattr(ball, "epsilon", None)
    shape = tuple(radii.shape) if isinstance(radii, Tensor) else ()
    if isinstance(radii, Sequence) or shape not in ((), tuple(x.shape[:1])):
        told = shape or f"a {type(radii).__name__}"
        raise UserError(f"the ball's epsilon must be one number, or ({len(x)},), not {told}.")
    if labels.shape != x.shape[:1] or labels.is_floating_point() or labels.dtype is torch.bool:
        shape = tuple(labels.shape)
        raise UserError(
            f"labels must be integers, one for each of {len(x)} images, not {labels.dtype} of "
            f"shape {shape}."
        )
    if clean_logits.dim() != 2 or len(clean_logits) != len(x):
        shape = tuple(clean_logits.shape)
        raise UserError(f"clean_logits must be ({len(x)}, K), a row an image, not {shape}.")
    if noise is not None and noise.shape != x.shape:
        shape = tuple(noise.shape)
        raise UserError(f"noise must be like the images, {tuple(x.shape)}, not {shape}.")


def _for_each(steps: object, step_size: object, x: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Return steps and their size for each image, (m,) and (m,); a number is the same for all."""
    if not isinstance(step_size, Tensor | np.ndarray | list | tuple):
        step_size = pixels("step_size", _plain(step_size), norm, least=True)
    many = _numbers("steps", "integers", steps, x)
    size = _numbers("step_size", "numbers", step_size, x, x.dtype)
    return many.expand(len(x)), size.expand(len(x))


def _numbers(
    name: str, kind: str, given: object, x: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Return what is given as a tensor, (m,) or (); of the dtype only if it was none.

    Raises:
        UserError: it is not that, or not of this kind.
    """
    rule = f"{name} must be {kind}, one for each of {len(x)} images, or one for all, not"
    try:
        value = given if isinstance(given, Tensor) else torch.as_tensor(given, dtype=dtype)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{rule} {given}.") from None
    unlike = value.dim() > 0 and value.shape != x.shape[:1]
    no_count = kind == "integers" and value.is_floating_point()
    if unlike or no_count or value.dtype is torch.bool:
        raise UserError(f"{rule} {value.dtype} of shape {tuple(value.shape)}.")
    return value.to(x.device)


def _check_values(labels: Tensor, classes: int, steps: Tensor, step_size: Tensor) -> None:
    """Raise UserError for labels, steps or sizes out of range; one copy to the host."""
    if not len(labels):
        return
    ends = [end.float() for part in (labels, steps, step_size) for end in torch.aminmax(part)]
    first, last, fewest, _, shortest, longest = torch.stack(ends).tolist()
    if first < 0 or (classes and last >= classes):
        below = f" to {classes - 1}, for {classes} logits" if classes else ""
        raise UserError(f"labels must be from 0{below}, not from {first:g} to {last:g}.")
    if fewest < 0:
        raise UserError(f"steps must be 0 or more, not {fewest:g}.")
    if not (shortest >= 0 and math.isfinite(longest)):
        raise UserError(
            f"step_size must be finite and at least 0, not in [{shortest:g}, {longest:g}]."
        )


def _plain(number: object) -> object:
    """Return a number of torch's or NumPy's as one of Python's, all else as it is."""
    if isinstance(number, Tensor):
        return number.item() if number.numel() == 1 else f"a tensor {tuple(number.shape)}"
    return number.item() if isinstance(number, np.generic) else number


def by_steps(
    steps: Tensor, distance: Tensor | None = None
) -> tuple[Tensor, Callable[[], list[int]]]:
    """Return the order of descending step count, and how many examples take step 1, step 2, ….

    Of equal counts those with the smallest distance come first, if one is given, (m,); else they
    stay as they were. The counts, one copy from the device to the host, are on their way: a call
    waits for them, best after all that needs only the order. (m,) -> (m,) and a list, when called
    """
    if distance is None:
        order = torch.argsort(steps, descending=True, stable=True)
    else:
        nearest = torch.argsort(distance, stable=True)
        order = nearest[torch.argsort(steps[nearest], descending=True, stable=True)]
    arrived = _on_its_way(steps[order])
    return order, lambda: active_counts(arrived())


def _on_its_way(numbers: Tensor) -> Callable[[], list[int]]:
    """Begin to copy numbers to the host; a call waits for these alone.

    A GPU has what it was given in the meantime to do while the host reads them.
    """
    if numbers.device.type != "cuda":
        return numbers.tolist
    copy = numbers.to("cpu", non_blocking=True)  # in pinned memory
    there = torch.cuda.Event()  # type: ignore[no-untyped-call]
    there.record(torch.cuda.current_stream(numbers.device))

    def arrived() -> list[int]:
        there.synchronize()
        return copy.tolist()

    return arrived


def active_counts(steps: Sequence[int]) -> list[int]:
    """Return how many examples take the first step, the second, …; `steps` in descending order."""
    longest = steps[0] if steps else 0
    return [bisect_left(steps, -step, key=lambda n: -n) for step in range(longest)]


def prefix_pgd(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    clean_logits: Tensor,
    *,
    active: Sequence[int],
    step_size: Tensor,
    inner_loss: InnerLoss,
    ball: Ball,
    noise: Tensor | None,
    probe: Tensor | None = None,
) -> Tensor:
    """Run `pgd` on a batch in descending order of steps: step j moves the first `active[j]`.

    `active` is what `active_counts` returns, on the host, so that nothing is copied here. The first
    gradient is taken at x + `probe`, like x, if one is given: a point so far off that its logits
    differ from x's by more than rounding.
    """
    x_adv = x.detach().clone()
    region = ball.region(x)
    target = clean_logits.detach()
    step_size = per_image(step_size, x)
    everybody = bool(active) and active[-1] == len(x)
    if noise is not None and active:
        x_adv[: active[0]] += noise[: active[0]]

    for step, n in enumerate(active):
        images = x_adv[:n] if probe is None or step else x[:n] + probe[:n]
        images.requires_grad_()
        with torch.enable_grad():
            loss = inner_loss(model(images), target[:n], labels[:n]).sum()
        (gradient,) = torch.autograd.grad(loss, [images])
        moved = ball.direction(gradient).mul_(step_size[:n]).add_(x_adv[:n])
        projected = ball.project(moved, *(part[:n] for part in region))
        if everybody:  # a plain attack is spared the copies
            x_adv = projected
        else:
            x_adv[:n] = projected
    return x_adv


def early_exit_pgd(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    clean_logits: Tensor,
    *,
    steps: Tensor,
    active: Sequence[int],
    exits: Tensor,
    patience: int,
    step_size: Tensor,
    inner_loss: InnerLoss,
    ball: Ball,
    noise: Tensor,
    probe: Tensor | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Run `prefix_pgd`; some examples stop `patience` steps after they are misclassified.

    A stopped example is masked, which needs no copy to the host; it leaves the batch after steps
    2, 4, 8, …, and whenever `active` falls, with one copy each after the first step.

    Args:
        steps: the most that each example takes, descending, (m,) int64; `active` counts them.
        exits: which examples may stop earlier, (m,) bool.
        patience: 0 stops an example where it is.
        probe: as for `prefix_pgd`; what is misclassified there does not count as fallen.

    Returns:
        Adversarial examples like x, the steps taken (m,) int64, and how many images went through
        the network.
    """
    n = active[0] if active else 0
    rows = torch.arange(n, device=x.device)
    batch = [per_image(step_size, x), clean_logits.detach(), labels, exits, steps, *ball.region(x)]
    size, target, labels, exits, left, *region = (part[:n] for part in batch)
    images, taken, forwarded = x[:n] + noise[:n], torch.zeros_like(steps), 0
    x_adv = x.detach().clone()
    for done, n in enumerate(active):
        falls = done > 0 and n < active[done - 1]
        if falls or (done > 1 and done & (done - 1) == 0):
            # Behind the first step still a prefix; later a mask would be copied once for each part.
            stay = slice(n) if done == 1 else left.nonzero().flatten()
            x_adv[rows] = images
            batch = [rows, images, size, target, labels, exits, left, *region]
            rows, images, size, target, labels, exits, left, *region = (
                part[stay] for part in batch
            )
        if len(rows) == 0:
            break
        forwarded += len(rows)
        at = images if probe is None or done else x[: len(rows)] + probe[: len(rows)]
        at.requires_grad_()
        with torch.enable_grad():
            logits = model(at)
            loss = inner_loss(logits, target, labels).sum()
        (gradient,) = torch.autograd.grad(loss, [at])
        fallen = exits & (logits.argmax(dim=1) != labels)
        if at is images:  # what falls further off says nothing of the example where it is
            left = torch.where(fallen, left.clamp(max=patience), left)
        moves = (left > 0).long()
        step = ball.direction(gradient).mul_(per_image(moves, x) * size)
        images = ball.project(step.add_(images.detach()), *region)
        left = left - moves
        taken[rows] += moves
    x_adv[rows] = images
    return x_adv, taken, forwarded


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode inside, and back to each module's own afterwards.

    A frozen BatchNorm stays frozen.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
