"""The operations that bounds pass through: forward on values, backward on coefficients.

All but the ReLU and the sum are affine, x -> A·x + b: `forward` computes it, `absolute` |A|·r, and
`pull` takes coefficients on the outcome to coefficients on x, which need A alone. Letters of shapes
are those of `coefficients`; sizes that do not fit together raise torch's RuntimeError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from btrain.verify.coefficients import Dense, Patches, Rows, Shape, Start, as_rows, map_size, reach

_WASTE = 8
"""A product with a matrix that is mostly zeros pays up to so many times the multiplications."""

_FEW = 8
"""Channels below which convolutions waste most of a vector register."""

Pair = tuple[int, int]


class Affine(Protocol):
    """An affine map of one example's values, from (C, H, W) or (N,) to another such shape."""

    def forward(self, x: Tensor) -> Tensor:
        """Return A·x + b of B images' values, (B, …) -> (B, …)."""

    def absolute(self, radii: Tensor) -> Tensor:
        """Return how far the outcome moves at most when x moves by radii at most, |A|·r.

        `radii` is at least 0; shapes are those of `forward`.
        """

    def pull(self, rows: Start | Rows) -> Start | Rows:
        """Return the coefficients on x of rows that have coefficients on the outcome.

        Of as many rows and images; those that all images share stay shared.
        """

    def scaled(self, scale: Scale) -> Affine | None:
        """Return this map followed by a scale, as one; None if that is no map of this kind."""

    @property
    def terms(self) -> Tensor | None:
        """Return the size of all that was added up to b, where that was more than one term."""


@dataclass(frozen=True)
class Linear:
    """W·x + b on vectors; `weight` (out, in)."""

    weight: Tensor
    bias: Tensor | None
    terms: Tensor | None = None
    """(out,)"""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def absolute(self, radii: Tensor) -> Tensor:
        return F.linear(radii, self.weight.abs())

    def pull(self, rows: Start | Rows) -> Rows:
        shape = (self.weight.shape[1],)
        if isinstance(rows, Start):
            return Dense(rows.matrix(self.weight)[None], shape)
        return Dense(rows.rows @ self.weight, shape)

    def scaled(self, scale: Scale) -> Affine | None:
        factor, shift = (_each(t, self.weight.shape[0]) for t in (scale.factor, scale.shift))
        weight = self.weight if factor is None else self.weight * factor[:, None]
        terms = _added_sizes(self, self.bias, factor, scale)
        return Linear(weight, _affine_bias(self.bias, factor, shift), terms)


@dataclass(frozen=True)
class Convolution:
    """A convolution with zeros around the map; `weight` (out, in / groups, h, w)."""

    weight: Tensor
    bias: Tensor | None
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    shape: Shape
    """(C, H, W) of what comes in."""
    terms: Tensor | None = None
    """(out, 1, 1)"""

    def forward(self, x: Tensor) -> Tensor:
        return self._convolved(x, self.weight, self.bias)

    def absolute(self, radii: Tensor) -> Tensor:
        return self._convolved(radii, self.weight.abs(), None)

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def scaled(self, scale: Scale) -> Affine | None:
        if any(t is not None and t[0].numel() > 1 for t in (scale.factor, scale.shift)):
            return None  # not the same for all positions
        factor, shift = (_each(t, self.weight.shape[0]) for t in (scale.factor, scale.shift))
        weight = self.weight if factor is None else self.weight * factor[:, None, None, None]
        terms = _added_sizes(self, self.bias, factor, scale)
        terms = None if terms is None else terms[:, None, None]
        return replace(
            self, weight=weight, bias=_affine_bias(self.bias, factor, shift), terms=terms
        )

    def pull(self, rows: Start | Rows) -> Rows:
        if isinstance(rows, Start) and self.groups == 1 and self.dilation == (1, 1):
            kernels = rows.matrix(self.weight).permute(0, 2, 3, 1)[None, None]
            grid = map_size(rows.shape)
            return self._small(
                Patches(kernels, self.shape, grid, self.stride, self.padding, inside=False)
            )
        rows = as_rows(rows)
        if isinstance(rows, Patches):
            return self._pull_patches(rows.confined())
        return self._pull_dense(rows)

    def reach(self, dense: Dense, radii: Tensor) -> Tensor | None:
        """Return how far rows on the outcome move at most when what comes in moves by `radii` at
        most.

        The same as from `pull`, but the coefficients are left in the order in which a convolution
        with a channel for each phase of the stride gives them: on images, which have few channels,
        that takes a third of the time.

        Returns:
            (B, R); None for convolutions it is not made for.
        """
        if self.groups > 1 or self.dilation != (1, 1):
            return None
        batch, many, height, width, out = dense.rows.shape
        (sy, sx), (top, left) = self.stride, self.padding
        taps_y, taps_x = (
            math.ceil(k / s) for k, s in zip(self.weight.shape[2:], self.stride, strict=True)
        )
        missing = (0, taps_x * sx - self.weight.shape[3], 0, taps_y * sy - self.weight.shape[2])
        into = self.shape[0]
        phases = F.pad(self.weight, missing).view(out, into, taps_y, sy, taps_x, sx)
        kernel = phases.flip(2, 4).permute(1, 3, 5, 0, 2, 4).flatten(0, 2)
        moved = F.conv2d(
            dense.rows.reshape(batch * many, height, width, out).permute(0, 3, 1, 2),
            kernel.contiguous(memory_format=torch.channels_last),
            padding=(taps_y - 1, taps_x - 1),
        )
        tall, wide = moved.shape[2] * sy, moved.shape[3] * sx
        around = (left, wide - left - self.shape[2], top, tall - top - self.shape[1])
        by_phase = F.pad(radii, around).view(
            len(radii), into, moved.shape[2], sy, moved.shape[3], sx
        )
        by_phase = by_phase.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
        rows = moved.permute(0, 2, 3, 1).reshape(batch, many, *moved.shape[2:], moved.shape[1])
        return reach(Dense(rows, tuple(by_phase.shape[1:])), by_phase)

    def _small(self, patches: Patches) -> Rows:
        """Return the same, without patches once they are no smaller than the whole map."""
        (h, w), (_, height, width) = patches.window, self.shape
        return patches.dense() if h * w >= height * width else patches

    def _pull_patches(self, patches: Patches) -> Rows:
        rows = patches.rows
        batch, positions, out, h, w, channels = rows.shape
        kernel = self.weight.shape[2:]
        window = tuple(
            (n - 1) * s + d * (k - 1) + 1
            for n, s, d, k in zip((h, w), self.stride, self.dilation, kernel, strict=True)
        )
        into = self.shape[0]
        before, after = h * w * channels, window[0] * window[1] * into
        many = batch * positions * out
        needed = before * kernel[0] * kernel[1] * into // self.groups
        if self.groups == 1 and (into < _FEW or before * after <= _WASTE * needed):
            pulled = rows.reshape(many, before) @ self._table((h, w), (window[0], window[1]))
        else:
            pulled = self._transposed(rows.reshape(many, h, w, channels), (0, 0), (0, 0))
        stride, padding = (
            tuple(a * s for a, s in zip(of, self.stride, strict=True))
            for of in (patches.stride, patches.padding)
        )
        return self._small(
            Patches(
                pulled.view(batch, positions, out, *window, into),
                self.shape,
                patches.grid,
                (stride[0], stride[1]),
                (padding[0] + self.padding[0], padding[1] + self.padding[1]),
                inside=False,
            )
        )

    def _table(self, window: Pair, reached: Pair) -> Tensor:
        """Return the matrix from a window's values to those of the window it reaches, both (h, w,
        C).
        """
        weight, device = self.weight, self.weight.device
        kernel = weight.shape[2:]
        place = torch.zeros((), dtype=torch.int64, device=device)
        within = torch.ones((), dtype=torch.bool, device=device)
        for axis in range(2):  # which tap leads from each place to each that it reaches
            size = [1, 1, 1, 1]
            size[axis], size[axis + 2] = window[axis], reached[axis]
            begin = torch.arange(window[axis], device=device)[:, None] * self.stride[axis]
            offset = torch.arange(reached[axis], device=device) - begin
            tap = offset.div(self.dilation[axis], rounding_mode="floor").view(size)
            fits = (offset % self.dilation[axis] == 0).view(size)
            within = within & fits & (tap >= 0) & (tap < kernel[axis])
            place = place * kernel[axis] + tap
        taps = F.pad(weight.permute(2, 3, 0, 1).flatten(0, 1), (0, 0, 0, 0, 0, 1))  # 0 at last
        place = torch.where(within, place, len(taps) - 1)
        table = taps.index_select(0, place.flatten()).view(*place.shape, *taps.shape[1:])
        return table.permute(0, 1, 4, 2, 3, 5).reshape(
            math.prod(window) * weight.shape[0], math.prod(reached) * weight.shape[1]
        )

    def _pull_dense(self, dense: Dense) -> Rows:
        batch, many, height, width, channels = dense.rows.shape
        left_over = [
            n - ((m - 1) * s - 2 * p + d * (k - 1) + 1)
            for n, m, s, p, d, k in zip(
                self.shape[1:], (height, width), self.stride, self.padding, self.dilation,
                self.weight.shape[2:], strict=True,
            )
        ]  # fmt: skip
        pulled = self._transposed(
            dense.rows.reshape(batch * many, height, width, channels),
            self.padding,
            (left_over[0], left_over[1]),
        )
        return Dense(pulled.view(batch, many, *pulled.shape[1:]), self.shape)

    def _transposed(self, rows: Tensor, padding: Pair, left_over: Pair) -> Tensor:
        """Return rows of the outcome as rows of x, with the memory in this order before and after.

        (n, h, w, C) -> (n, h', w', C')
        """
        pulled = F.conv_transpose2d(
            rows.permute(0, 3, 1, 2),
            self.weight.contiguous(memory_format=torch.channels_last),
            None, self.stride, padding, left_over, self.groups, self.dilation,
        )  # fmt: skip
        return pulled.permute(0, 2, 3, 1).contiguous()


@dataclass(frozen=True)
class Scale:
    """factor·x + shift, value by value; each None, or with as many dimensions as the values."""

    factor: Tensor | None
    shift: Tensor | None
    shape: Shape
    terms: Tensor | None = None
    """The sizes, with as many dimensions as the shift."""

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.factor is None else x * self.factor
        return x if self.shift is None else x + self.shift

    def absolute(self, radii: Tensor) -> Tensor:
        return radii if self.factor is None else radii * self.factor.abs()

    def pull(self, rows: Start | Rows) -> Rows:
        rows, factor = as_rows(rows), self.factor
        if factor is None:
            return rows
        if len(self.shape) == 1:
            return replace(rows, rows=rows.rows * factor)
        last = factor.permute(1, 2, 0)  # (H or 1, W or 1, C or 1)
        if isinstance(rows, Patches) and last.shape[:2].numel() > 1:
            last = last.expand(self.shape[1], self.shape[2], -1)[None]
            return replace(rows, rows=rows.rows * rows.windows(last)[:, :, None], inside=True)
        return replace(rows, rows=rows.rows * last)

    def scaled(self, scale: Scale) -> Affine | None:
        factor = scale.factor if self.factor is None else self.factor
        if self.factor is not None and scale.factor is not None:
            factor = self.factor * scale.factor
        shift = _affine_bias(self.shift, scale.factor, scale.shift)
        sizes = [_size(self.shift, scale.factor), _size(self.terms, scale.factor)]
        return Scale(factor, shift, self.shape, _sum([*sizes, _size(scale.shift), scale.terms]))


@dataclass(frozen=True)
class Reshape:
    """The same values in another shape."""

    shape: Shape
    out: Shape
    terms: None = None

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.out)

    def absolute(self, radii: Tensor) -> Tensor:
        return self.forward(radii)

    def pull(self, rows: Start | Rows) -> Start | Rows:
        if isinstance(rows, Start):
            if (of_map := self._of_map(rows)) is not None:
                return of_map
            rows = rows.written_out()
        if isinstance(rows, Patches):
            rows = rows.dense()
        batch, many = rows.rows.shape[:2]
        values = rows.rows
        if len(self.out) == 3:
            values = values.permute(0, 1, 4, 2, 3)
        values = values.reshape(batch, many, *self.shape)
        if len(self.shape) == 3:
            values = values.permute(0, 1, 3, 4, 2).contiguous()
        return Dense(values, self.shape)

    def _of_map(self, start: Start) -> Start | None:
        """Return the start of a vector as that of the map that was flattened, if it has whole
        channels.
        """
        if len(self.shape) == 1 or len(self.out) == 3:
            return None
        pixels = self.shape[1] * self.shape[2]
        if start.first % pixels or start.end % pixels:
            return None
        first, end = start.first // pixels, start.end // pixels
        return replace(start, shape=self.shape, first=first, end=end)

    def scaled(self, scale: Scale) -> Affine | None:
        del scale
        return None


def _each(values: Tensor | None, many: int) -> Tensor | None:
    """Return one value for each channel or neuron, (many,), from what may be one for all."""
    return None if values is None else values.reshape(-1).expand(many)


def _affine_bias(bias: Tensor | None, factor: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """Return bias·factor + shift, each (C,) or None."""
    if bias is not None and factor is not None:
        bias = bias * factor
    if bias is None or shift is None:
        return bias if shift is None else shift
    return bias + shift


def _added_sizes(
    before: Linear | Convolution, bias: Tensor | None, factor: Tensor | None, scale: Scale
) -> Tensor | None:
    """Return the size of all that is added up to a map's bias when a scale joins it, (C,) or None.

    The network itself adds them one after another, and rounds each sum.
    """
    many = before.weight.shape[0]
    shift, theirs = (_each(t, many) for t in (scale.shift, scale.terms))
    own = None if before.terms is None else before.terms.reshape(-1)
    return _sum([_size(bias, factor), _size(own, factor), _size(shift), theirs])


def _size(values: Tensor | None, factor: Tensor | None = None) -> Tensor | None:
    if values is None:
        return None
    return (values if factor is None else values * factor).detach().abs()


def _sum(sizes: Sequence[Tensor | None]) -> Tensor | None:
    known = [size for size in sizes if size is not None]
    return sum(known[1:], known[0]) if known else None
