"""Linear maps from the values of one layer to the rows that are to be bounded.

A row is what is bounded: a neuron before its ReLU, or a margin. Going backward through a network,
its coefficients on the values of each layer are held in one of three forms. In all of them the
channel is the last dimension, which is what the convolutions are fastest with.

In the words of the field:

- row coefficients (`Rows`): the matrix A of a linear bound A·x + b on a layer's values;
- `Start`: A = I, where backward substitution begins; it costs nothing until it is written out;
- `Patches`: A of a convolution's outputs, kept on their windows alone, as auto_LiRPA does;
- to pull (`operations`): one step of backward substitution, A -> A·W; `through_relu`: that of a
  ReLU's relaxation;
- to reach: to concretise A over a box around its centre, Σ |A|·radius.

Letters of shapes: B images, R rows, L positions of windows, O rows at a position, (C, H, W) a map,
(h, w) a window, N values of a vector. Where a first dimension is "B or 1", 1 stands for what all
images share. Sizes that do not fit together raise torch's RuntimeError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]
"""The shape of one example's values at a layer: (C, H, W) or (N,)."""


def map_size(shape: Shape) -> tuple[int, int]:
    """Return height and width of a map, (C, H, W).

    Raises:
        ValueError: it is no map.
    """
    _, height, width = shape
    return height, width


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
    """A tensor of the dtype and on the device that the coefficients are to have."""

    def matrix(self, of: Tensor) -> Tensor:
        """Return the chosen rows of a matrix or kernel, (N or C, …) -> (rows, …)."""
        rows = of[self.first : self.end]
        return torch.cat([rows, -rows]) if self.negated else rows

    def written_out(self) -> Rows:
        """Return the same as Dense (1, R, N) of a vector or Patches (1, 1, O, 1, 1, C) of a map."""
        like = self.like
        rows = self.matrix(torch.eye(self.shape[0], dtype=like.dtype, device=like.device))
        if len(self.shape) == 1:
            return Dense(rows[None], self.shape)
        patch = rows[None, None, :, None, None, :]
        return Patches(patch, self.shape, map_size(self.shape), (1, 1), (0, 0), inside=True)


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
        """Return height and width of a window."""
        return self.rows.shape[3], self.rows.shape[4]

    def overhang(self) -> tuple[int, int, int, int]:
        """Return how far the windows reach beyond the map: left, right, top, bottom; may be
        negative.
        """
        (top, left), (height, width) = self.padding, self.shape[1:]
        reach_h, reach_w = (
            (n - 1) * s + k for n, s, k in zip(self.grid, self.stride, self.window, strict=True)
        )
        return left, reach_w - left - width, top, reach_h - top - height

    def windows(self, values: Tensor) -> Tensor:
        """Return the window of each position, (B, H, W, C) -> (B, L, h, w, C), zero outside the
        map.
        """
        padded = F.pad(values, (0, 0, *self.overhang()))
        (h, w), (dy, dx) = self.window, self.stride
        seen = padded.unfold(1, h, dy).unfold(2, w, dx)
        return seen.permute(0, 1, 2, 4, 5, 3).flatten(1, 2)

    def confined(self) -> Patches:
        """Return the same, with zeros outside the map."""
        if self.inside or max(self.overhang()) <= 0:
            return replace(self, inside=True)
        mask = self.windows(self.rows.new_ones(1, *self.shape[1:], 1))
        return replace(self, rows=self.rows * mask[:, :, None], inside=True)

    def dense(self) -> Dense:
        """Return the same with a coefficient for each value of the map, (B or 1, R, H, W, C).

        Rows are ordered (o, i, j), as the convolution's outcome is when it is flattened.
        """
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
    """Return coefficients that can be multiplied, from those that may only be a start."""
    return rows.written_out() if isinstance(rows, Start) else rows


def added(a: Start | Rows, b: Start | Rows) -> Rows:
    """Return the sum of two sets of coefficients on the same layer for the same rows.

    Patches if both are, with equal strides, else dense; B is that of the one that has images.
    """
    a, b = as_rows(a), as_rows(b)
    if isinstance(a, Patches) and isinstance(b, Patches):
        if a.stride == b.stride:
            return _added_patches(a, b)
        a, b = a.dense(), b.dense()
    a, b = (rows.dense() if isinstance(rows, Patches) else rows for rows in (a, b))
    return replace(a, rows=a.rows + b.rows)


def _added_patches(a: Patches, b: Patches) -> Patches:
    """Return the sum on the smallest window that holds both."""
    padding = (max(a.padding[0], b.padding[0]), max(a.padding[1], b.padding[1]))
    window = tuple(
        p + max(k - q for k, q in ((a.window[i], a.padding[i]), (b.window[i], b.padding[i])))
        for i, p in enumerate(padding)
    )

    def placed(patches: Patches) -> Tensor:
        top, left = (p - q for p, q in zip(padding, patches.padding, strict=True))
        bottom, right = (
            n - k - before for n, k, before in zip(window, patches.window, (top, left), strict=True)
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
    """Return what the gaps of a layer add to each row's bound, and the coefficients before it.

    Args:
        rows: on the values after the ReLU, of B or 1 images.
        relaxation: of B images.

    Returns:
        (B, R), and coefficients on the values before the ReLU; None if it lets none pass.
    """
    if relaxation.up is None:
        return reach(rows, relaxation.gap), None
    values = [relaxation.gap, relaxation.up]
    if relaxation.low is not None:
        values.append(relaxation.low)
    flat, *values = _place_by_place(rows, *values)
    moved, passed = _pass(flat, *values, *(() if len(values) == 3 else (None,)))
    return _in_order(moved, rows, len(relaxation.gap)), _like(passed, rows, len(relaxation.gap))


def reach(rows: Rows, radii: Tensor) -> Tensor:
    """Return how far each row moves at most, when each value moves by its radius.

    Args:
        rows: of B or 1 images.
        radii: at least 0, (B, C, H, W) or (B, N).

    Returns:
        (B, R), of patches with R = (o, i, j)
    """
    return _in_order(_reach(*_place_by_place(rows, radii)), rows, len(radii))


def _place_by_place(rows: Rows, *values: Tensor) -> list[Tensor]:
    """Return coefficients as (b or 1, R, M) and values of their layer (B, …) as (b, M), each with
    its own.

    For patches b counts the images' positions, R their channels and M the values of a window; else
    b counts images.
    """
    last = [v.permute(0, 2, 3, 1) if v.dim() == 4 else v for v in values]
    if isinstance(rows, Patches):
        windows = [rows.windows(v).flatten(2).flatten(0, 1) for v in last]
        flat = rows.rows.flatten(3)
        if 1 < flat.shape[0] * flat.shape[1] < len(windows[0]):
            flat = flat.expand(len(values[0]), *flat.shape[1:])
        return [flat.flatten(0, 1), *windows]
    return [rows.rows.flatten(2), *(v.flatten(1) for v in last)]


def _in_order(moved: Tensor, rows: Rows, images: int) -> Tensor:
    """Return (b, R), place by place, as (B, R), image by image; of patches with R = (o, i, j)."""
    if isinstance(rows, Patches):
        return moved.view(images, -1, moved.shape[1]).transpose(1, 2).flatten(1)
    return moved


def _like(flat: Tensor, rows: Rows, images: int) -> Rows:
    """Return coefficients (b, R, M), place by place, in the form of those they were made of."""
    if isinstance(rows, Patches):
        shaped = flat.view(images, -1, *rows.rows.shape[2:])
        return replace(rows, rows=shaped, inside=True)
    return replace(rows, rows=flat.view(images, *rows.rows.shape[1:]))


_AT_ONCE = 2**19
"""Numbers that a processor keeps at hand; more are taken slice by slice."""


def _slices(rows: Tensor, places: int) -> list[slice]:
    """Return slices of (b, R, M): large tensors cost a CPU more time to be made than filled.

    What is needed on the way is made for one slice and written over by the next.
    """
    step = places
    if rows.device.type == "cpu":
        step = min(places, max(1, _AT_ONCE // rows.shape[1:].numel()))
    return [slice(start, min(start + step, places)) for start in range(0, places, step)]


def _sum_abs(rows: Tensor, radii: Tensor) -> Tensor:
    """Return Σ_m |rows_m|·radii_m, (b or 1, R, M), (b, M) -> (b, R)."""
    if len(rows) == 1:  # the same coefficients everywhere: one product of matrices
        return radii @ rows[0].abs().t()
    moved = radii.new_empty(*rows.shape[:2], 1)
    parts = _slices(rows, len(rows))
    sizes = torch.empty_like(rows[parts[0]])
    for part in parts:
        size = torch.abs(rows[part], out=sizes[: part.stop - part.start])
        torch.bmm(size, radii[part].unsqueeze(-1), out=moved[part])
    return moved.squeeze(-1)


def _weighted_abs(weights: Tensor, rows: Tensor) -> Tensor:
    """Return Σ_r weights_r·|rows_r|, (b, R), (b or 1, R, M) -> (b, M)."""
    return _sum_abs(rows.transpose(1, 2), weights)


class _Reach(torch.autograd.Function):
    """Σ_m |rows_m|·radii_m, keeping nothing for the backward pass but its arguments."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, radii: Tensor) -> Tensor:
        ctx.save_for_backward(rows, radii)
        return _sum_abs(rows, radii)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, radii = ctx.saved_tensors
        for_rows = _through_abs(rows, grads[0], radii) if ctx.needs_input_grad[0] else None
        for_radii = _weighted_abs(grads[0], rows) if ctx.needs_input_grad[1] else None
        return for_rows, for_radii


def _through_abs(rows: Tensor, for_moved: Tensor, radii: Tensor) -> Tensor:
    """Return the gradient to rows of Σ_m |rows_m|·radii_m."""
    if len(rows) == 1:
        return rows.sign().mul_(for_moved.t() @ radii)
    for_rows = torch.empty_like(rows)
    for part in _slices(rows, len(rows)):
        torch.sign(rows[part], out=for_rows[part])
        for_rows[part] *= radii[part].unsqueeze(1)
        for_rows[part] *= for_moved[part].unsqueeze(2)
    return for_rows


class _Pass(torch.autograd.Function):
    """A ReLU's gap and slopes in one function: the reach of its gaps, and the rows before it.

    Keeps no intermediate result. Lower slopes get no gradient: they are chosen, not computed.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gap: Tensor, up: Tensor, low: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows, gap, up, *(() if low is None else (low,)))
        passed = rows.new_empty(len(up), *rows.shape[1:])
        for part in _slices(rows, len(up)):
            own = rows if len(rows) == 1 else rows[part]
            if low is None:
                torch.mul(own, up[part].unsqueeze(1), out=passed[part])
            else:
                torch.mul(own.clamp(min=0), up[part].unsqueeze(1), out=passed[part])
                passed[part].addcmul_(own.clamp(max=0), low[part].unsqueeze(1))
        return _sum_abs(rows, gap), passed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, gap, up, *rest = ctx.saved_tensors
        for_moved, for_passed = grads
        shared = len(rows) == 1
        for_rows = _through_abs(rows, for_moved, gap)
        for_gap = _weighted_abs(for_moved, rows)
        for_up = torch.empty_like(up)
        parts = _slices(rows, len(up))
        products = torch.empty_like(for_passed[parts[0]])
        for part in parts:
            own, theirs = rows if shared else rows[part], for_passed[part]
            product = products[: part.stop - part.start]
            slopes = up[part].unsqueeze(1)
            if rest:
                slopes = torch.where(own > 0, slopes, rest[0][part].unsqueeze(1))
            if shared:
                for_rows += torch.mul(theirs, slopes, out=product).sum(0)
            else:
                for_rows[part].addcmul_(theirs, slopes)
            torch.mul(theirs, own.clamp(min=0) if rest else own, out=product)
            torch.sum(product, 1, out=for_up[part])
        return for_rows, for_gap, for_up, None


_reach: Callable[[Tensor, Tensor], Tensor] = _Reach.apply
_pass: Callable[..., tuple[Tensor, Tensor]] = _Pass.apply
