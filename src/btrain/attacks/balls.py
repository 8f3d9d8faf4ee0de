"""Threat models: the ball around an image that an attack may move in, always within [0, 1].

A ball knows how an attack starts, which way is up for a gradient, and how to come back inside.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor


class Ball:
    """The neighbourhood of an image; subclass it for a threat model of your own.

    Images, gradients and differences are (m, C, H, W).

    Attributes:
        norm: the name of the norm in files and tables.
        epsilon: the radius in [0, 1] pixel units, one number or one for each example, (m,).
    """

    norm: ClassVar[str] = "own"

    def __init__(self, epsilon: float | Tensor) -> None:
        self.epsilon = epsilon

    @property
    def reach(self) -> float | Tensor | None:
        """Return how far from x an attack may end; None for any distance."""
        return self.epsilon

    def start(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return a random point of the ball minus x, like x."""
        raise NotImplementedError

    def direction(self, gradient: Tensor) -> Tensor:
        """Return the steepest ascent of length 1 in this norm, like the gradient."""
        raise NotImplementedError

    def region(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what `project` reads of x: tensors with a row for each example."""
        return (x,)

    def project(self, x_adv: Tensor, *region: Tensor) -> Tensor:
        """Return the nearest points within ball and box; `region` as `region(x)` gave it."""
        raise NotImplementedError

    def distance(self, difference: Tensor) -> Tensor:
        """Return the norm of each difference, (m, C, H, W) -> (m,)."""
        raise NotImplementedError


class LinfBall(Ball):
    """The ball in which every pixel moves by at most ε."""

    norm = "linf"

    def start(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if isinstance(self.epsilon, Tensor):
            noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            noise = (2 * noise - 1) * per_image(self.epsilon, x)
        else:
            noise = torch.empty_like(x)
            noise.uniform_(-self.epsilon, self.epsilon, generator=generator)
        return (x + noise).clamp_(0, 1).sub_(x)

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def region(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the lowest and the highest point of ball and box, like x."""
        radius = _radius(self.epsilon, x)
        return (x - radius).clamp_(0, 1), (x + radius).clamp_(0, 1)

    def project(self, x_adv: Tensor, *region: Tensor) -> Tensor:
        lower, upper = region
        return torch.clamp(x_adv, lower, upper)

    def distance(self, difference: Tensor) -> Tensor:
        return difference.abs().flatten(1).amax(dim=1)


class NoisyBall(LinfBall):
    """The box itself around a start with more noise than ε (N-FGSM, de Jorge et al., 2022).

    Attributes:
        noise: the radius of the start's noise, in ε.
    """

    def __init__(self, epsilon: float | Tensor, noise: float) -> None:
        super().__init__(epsilon)
        self.noise = noise

    @property
    def reach(self) -> None:
        """Return None: a step leads on from the noise, and out of the ball."""
        return None

    def start(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        return LinfBall(self.noise * self.epsilon).start(x, generator)

    def region(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return black and white: nothing is projected onto the ball."""
        return torch.zeros_like(x), torch.ones_like(x)


class L2Ball(Ball):
    """The ball in which the Euclidean length of the change is at most ε."""

    norm = "l2"

    def start(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return a uniform draw from the ball, cut to the box, minus x."""
        noise = torch.empty_like(x).normal_(generator=generator)
        share = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype)
        length = _radius(self.epsilon, x) * per_image(share ** (1 / x[0].numel()), x)
        return (x + length * self.direction(noise)).clamp_(0, 1).sub_(x)

    def direction(self, gradient: Tensor) -> Tensor:
        """Return the gradient at length 1; a gradient of zero stays zero."""
        # Scaled by its largest entry first: the squares of a confident example's would underflow.
        largest = gradient.abs().flatten(1).amax(dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)
        scaled = gradient / per_image(largest, gradient)
        length = scaled.flatten(1).norm(dim=1).clamp(min=_TINY)
        return scaled / per_image(length, gradient)

    def region(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return x and the radius of each example, (m, 1, 1, 1)."""
        radius = torch.as_tensor(self.epsilon, device=x.device, dtype=x.dtype).expand(len(x))
        return x, per_image(radius, x)

    def project(self, x_adv: Tensor, *region: Tensor) -> Tensor:
        """Return the points drawn back towards x, then cut to the box, which takes none further."""
        x, radius = region
        difference = x_adv - x
        length = per_image(self.distance(difference), x).clamp(min=_TINY)
        return (x + difference * (radius / length).clamp(max=1)).clamp_(0, 1)

    def distance(self, difference: Tensor) -> Tensor:
        lengths: Tensor = torch.linalg.vector_norm(difference.flatten(1), dim=1)
        return lengths


_TINY = 1e-12

BALLS: dict[str, type[Ball]] = {ball.norm: ball for ball in (LinfBall, L2Ball)}
"""The threat models by the name of their norm."""


def per_image(values: Tensor, x: Tensor) -> Tensor:
    """Shape one value an example to meet the images x: (m,) -> (m, 1, 1, 1)."""
    return values.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def _radius(epsilon: float | Tensor, x: Tensor) -> float | Tensor:
    return per_image(epsilon, x) if isinstance(epsilon, Tensor) else epsilon
