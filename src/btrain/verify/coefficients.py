"""Linear maps from the values of one layer to the rows that are to be bounded.

A row is what is bounded: a neuron before its ReLU, or a margin. Going backward through a network,
its coefficients on the values of each layer are held in one of three forms. In all of them the
channel is the last dimension, which is what the convolutions are fastest with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]
"""Of one example's values at a layer: (C, H, W) or (N,)."""


@dataclass(frozen=True)
class Start:
    """The values themselves, before anything was passed: one row for each, or for some.

    Rows stand for channels `first` to `end` of a map, or for values `first` to `end` of a vector;
    with `negated`, the same rows with the opposite sign follow.
    """

    shape: Shape
    first: int
    end: int
    negated: bool
    like: Tensor
    """Of the dtype and on the device that the coefficients are to have."""

    def matrix(self, of: Tensor) -> Tensor:
        """The chosen rows of a matrix or kernel whose first dimension are the values."""
        rows = of[self.first : self.end]
        return torch.cat([rows, -rows]) if self.negated else rows

    def written_out(self) -> Rows:
        """The same in the form of a vector's or a map's coefficients."""
        like = self.like
        rows = self.matrix(torch.eye(self.shape[0], dtype=like.dtype, device=like.device))
        if len(self.shape) == 1:
            return Dense(rows[None], self.shape)
        patch = rows[None, None, :, None, None, :]
        return Patches(patch, self.shape, self.shape[1:], (1, 1), (0, 0), inside=True)


@dataclass(frozen=True)
class Dense:
    """A coefficient for each value: `rows` is (B or 1, R, H, W, C) or (B or 1, R, N)."""

    rows: Tensor
    shape: Shape


@dataclass(frozen=True)
class Patches:
    """Rows of a convolution's output, each with coefficients on a small window alone.

    `rows` is (B or 1, L or 1, O, h, w, C): row (o, i, j), with L = `grid` positions (i, j), has
    the window that begins at (i, j) · `stride` - `padding`. `inside` is true if all coefficients
    outside the map are zero.
    """

    rows: Tensor
    shape: Shape
    grid: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    inside: bool

    @property
    def window(self) -> tuple[int, int]:
        """Height and width."""
        return self.rows.shape[3], self.rows.shape[4]

    def overhang(self) -> tuple[int, int, int, int]:
        """How far the windows reach beyond the map: left, right, top, bottom; may be negative."""
        (top, left), (height, width) = self.padding, self.shape[1:]
        reach_h, reach_w = (
            (n - 1) * s + k for n, s, k in zip(self.grid, self.stride, self.window, strict=True)
        )
        return left, reach_w - left - width, top, reach_h - top - height

    def windows(self, values: Tensor) -> Tensor:
        """The window of each position, (B, H, W, C) -> (B, L, h, w, C), zero outside the map."""
        padded = F.pad(values, (0, 0, *self.overhang()))
        (h, w), (dy, dx) = self.window, self.stride
        seen = padded.unfold(1, h, dy).unfold(2, w, dx)
        return seen.permute(0, 1, 2, 4, 5, 3).flatten(1, 2)

    def confined(self) -> Patches:
        """The same, with zeros outside the map."""
        if self.inside or max(self.overhang()) <= 0:
            return replace(self, inside=True)
        mask = self.windows(self.rows.new_ones(1, *self.shape[1:], 1))
        return replace(self, rows=self.rows * mask[:, :, None], inside=True)

    def dense(self) -> Dense:
        """The same with a coefficient for each value of the map; rows ordered (o, i, j)."""
        rows = self.rows
        (h, w), (gh, gw), (dy, dx) = self.window, self.grid, self.stride
        left, right, top, bottom = (max(0, n) for n in self.overhang())
        tall, wide = self.shape[1] + top + bottom, self.shape[2] + left + right
        device = rows.device
        y = torch.arange(gh, device=device)[:, None] * dy + torch.arange(h, device=device)
        x = torch.arange(gw, device=device)[:, None] * dx + torch.arange(w, device=device)
        y, x = y + (top - self.padding[0]), x + (left - self.padding[1])
        places = (y[:, None, :, None] * wide + x[None, :, None, :]).reshape(1, 1, gh * gw, h * w, 1)
        batch, _, out, _, _, channels = rows.shape
        values = rows.flatten(3, 4).transpose(1, 2).expand(batch, out, gh * gw, h * w, channels)
        empty = rows.new_zeros(batch, out, gh * gw, tall * wide, channels)
        full = empty.scatter(3, places.expand_as(values), values)
        full = full.view(batch, out * gh * gw, tall, wide, channels)
        cut = full[:, :, top : top + self.shape[1], left : left + self.shape[2]]
        return Dense(cut.contiguous(), self.shape)


Rows = Dense | Patches


def as_rows(rows: Start | Rows) -> Rows:
    """Coefficients that can be multiplied, from those that may only be a start."""
    return rows.written_out() if isinstance(rows, Start) else rows


def added(a: Start | Rows, b: Start | Rows) -> Rows:
    """The sum of two sets of coefficients on the same layer for the same rows."""
    a, b = as_rows(a), as_rows(b)
    if isinstance(a, Patches) and isinstance(b, Patches):
        if a.stride == b.stride:
            return _added_patches(a, b)
        a, b = a.dense(), b.dense()
    a, b = (rows.dense() if isinstance(rows, Patches) else rows for rows in (a, b))
    return replace(a, rows=a.rows + b.rows)


def _added_patches(a: Patches, b: Patches) -> Patches:
    """The sum on the smallest window that holds both."""
    padding = (max(a.padding[0], b.padding[0]), max(a.padding[1], b.padding[1]))
    window = tuple(
        p + max(k - q for k, q in ((a.window[i], a.padding[i]), (b.window[i], b.padding[i])))
        for i, p in enumerate(padding)
    )

    def placed(patches: Patches) -> Tensor:
        top, left = (p - q for p, q in zip(padding, patches.padding, strict=True))
        bottom, right = (
            n - k - before
            for n, k, before in zip(window, patches.window, (top, left), strict=True)
        )
        return F.pad(patches.rows, (0, 0, left, right, top, bottom))

    rows = placed(a) + placed(b)
    return replace(a, rows=rows, padding=padding, inside=a.inside and b.inside)


@dataclass(frozen=True)
class Relaxation:
    """Two lines around a ReLU for each neuron, and the point they are told from.

    On the neuron's interval, with z the value before the ReLU and d = z - `at`, the value after it
    lies between `middle` + `low`·d - `gap` and `middle` + `up`·d + `gap`. Each is (B, C, H, W) or
    (B, N). `low` None means that it equals `up`, and `up` None that both are 0.
    """

    middle: Tensor
    gap: Tensor
    up: Tensor | None
    low: Tensor | None


def through_relu(rows: Rows, relaxation: Relaxation) -> tuple[Tensor, Rows | None]:
    """What the gaps of a layer add to each row's upper bound, and the coefficients before it.

    Returns:
        (B, R), and coefficients on the values before the ReLU; None if it lets none pass.
    """
    gap, up, low = (
        None if values is None else _like_rows(values, rows)
        for values in (relaxation.gap, relaxation.up, relaxation.low)
    )
    assert gap is not None
    flat = rows.rows.flatten(3) if isinstance(rows, Patches) else rows.rows.flatten(2)
    if up is None:
        return _in_order(_Radius.apply(flat, gap), rows), None
    radius, passed = _Pass.apply(flat, gap, up, low)
    shape = (*passed.shape[:-1], *rows.rows.shape[flat.dim() - 1 :])
    before = replace(rows, rows=passed.view(shape))
    if isinstance(before, Patches):
        before = replace(before, inside=True)
    return _in_order(radius, rows), before


def radius(rows: Rows, radii: Tensor) -> Tensor:
    """How far each row moves at most, (B, R), when each value moves by its radius at most."""
    flat = rows.rows.flatten(3) if isinstance(rows, Patches) else rows.rows.flatten(2)
    return _in_order(_Radius.apply(flat, _like_rows(radii, rows)), rows)


def _like_rows(values: Tensor, rows: Rows) -> Tensor:
    """A layer's values (B, C, H, W) or (B, N) as (B, M), or for patches as (B, L, M)."""
    if values.dim() == 2:
        return values
    last = values.permute(0, 2, 3, 1)
    if isinstance(rows, Patches):
        return rows.windows(last).flatten(2)
    return last.flatten(1)


def _in_order(bounds: Tensor, rows: Rows) -> Tensor:
    """(B, R) or, for patches, (B, L, O), as (B, R) with R = (o, i, j)."""
    return bounds.transpose(1, 2).flatten(1) if isinstance(rows, Patches) else bounds


def _sum_abs(rows: Tensor, radii: Tensor) -> Tensor:
    """Σ_m |rows_m|·radii_m, (b…, R, M), (B…, M) -> (B…, R)"""
    if rows.shape[:-2].numel() == 1:  # the same coefficients for all: one product of matrices
        return radii @ rows.abs().reshape(rows.shape[-2:]).t()
    return (rows.abs() @ radii.unsqueeze(-1)).squeeze(-1)


class _Radius(torch.autograd.Function):
    """Σ_m |rows_m|·radii_m, keeping nothing for the backward pass but its arguments."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, radii: Tensor) -> Tensor:
        ctx.save_for_backward(rows, radii)
        return _sum_abs(rows, radii)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, radii = ctx.saved_tensors
        for_rows = for_radii = None
        if ctx.needs_input_grad[0]:
            if rows.shape[:-2].numel() == 1:
                outer = grads[0].flatten(0, -2).t() @ radii.flatten(0, -2)
                for_rows = rows.sign().mul_(outer)
            else:
                for_rows = rows.sign().mul_(grads[0].unsqueeze(-1)).mul_(radii.unsqueeze(-2))
                for_rows = for_rows.sum_to_size(rows.shape)
        if ctx.needs_input_grad[1]:
            for_radii = _weighted_abs(grads[0], rows)
        return for_rows, for_radii


def _weighted_abs(weights: Tensor, rows: Tensor) -> Tensor:
    """Σ_r weights_r·|rows_r|, (B…, R), (b…, R, M) -> (B…, M)"""
    if rows.shape[:-2].numel() == 1:
        return weights @ rows.abs().reshape(rows.shape[-2:])
    return (weights.unsqueeze(-2) @ rows.abs()).squeeze(-2)


class _Pass(torch.autograd.Function):
    """A ReLU's gap and slopes in one function: the radius and the coefficients before it.

    Keeps no intermediate result. Lower slopes get no gradient: they are chosen, not computed.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gap: Tensor, up: Tensor, low: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows, gap, up, *(() if low is None else (low,)))
        if low is None:
            passed = rows * up.unsqueeze(-2)
        else:
            passed = rows.clamp(min=0) * up.unsqueeze(-2) + rows.clamp(max=0) * low.unsqueeze(-2)
        return _sum_abs(rows, gap), passed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, gap, up, *rest = ctx.saved_tensors
        for_radius, for_passed = grads
        up_rows = rows.clamp(min=0) if rest else rows
        for_rows = for_gap = for_up = None
        if ctx.needs_input_grad[0]:
            same = rows.shape[:-2].numel() == 1
            if rest:
                slopes = torch.where(rows > 0, up.unsqueeze(-2), rest[0].unsqueeze(-2))
                for_rows = slopes.mul_(for_passed).sum_to_size(rows.shape)
            elif same:
                for_rows = torch.einsum(
                    "arm,am->rm", for_passed.flatten(0, -3), up.flatten(0, -2)
                ).view(rows.shape)
            else:
                for_rows = for_passed * up.unsqueeze(-2)
            if same:
                outer = for_radius.flatten(0, -2).t() @ gap.flatten(0, -2)
                for_rows = for_rows + rows.sign().mul_(outer)
            else:
                outer = for_radius.unsqueeze(-1) * gap.unsqueeze(-2)
                for_rows = for_rows + outer.mul_(rows.sign()).sum_to_size(rows.shape)
        if ctx.needs_input_grad[1]:
            for_gap = _weighted_abs(for_radius, rows)
        if ctx.needs_input_grad[2]:
            for_up = (for_passed * up_rows).sum(-2)
        return for_rows, for_gap, for_up, None
