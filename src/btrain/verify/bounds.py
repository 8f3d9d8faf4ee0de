"""Sound bounds on a network's logits for all images in a box, by four engines.

All engines enclose each ReLU between two lines and add up what the enclosures may amount to, going
backward from what is to be bounded to the box; where the lines are constants, `ibp`, no further
than to the last of them. They differ in the lines and in how the intervals before the ReLUs are
found:

| engine | intervals before the ReLUs | lines at the end |
|---|---|---|
| `ibp` | layer by layer (Gowal et al.) | constants |
| `symbolic` | backward, parallel lines | parallel lines (Wang et al., Wong & Kolter) |
| `crown_ibp` | layer by layer | the lower line of slope 0 or 1 (Zhang et al.) |
| `crown` | backward, slope 0 or 1 | the lower line of slope 0 or 1 (Zhang et al.) |

`symbolic` gives the numbers of symbolic linear relaxation going forward, and of Fast-Lin. Engines
joined by "+" give the best of their bounds, margin by margin; "any" joins all.

Rounding: each radius grows by 64 units in the last place of its own size and of the largest value
of its layer, and by what 8 units of all terms of every layer on the way may amount to, so that
large values which cancel later are covered. The latter is left out in training (`all_rounding`).
That covers the rounding that sums of thousands of terms show, by a factor of ten and more, but is
no proof against it: what is computed with the coefficients of the lines is rounded, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from btrain import precision
from btrain.errors import UserError
from btrain.settings.checks import at_least, number
from btrain.settings.names import ANY, ENGINES
from btrain.terminal import sized
from btrain.verify.coefficients import (
    Dense,
    Patches,
    Relaxation,
    Rows,
    Start,
    added,
    as_rows,
    reach,
    through_relu,
)
from btrain.verify.graph import Graph, Input, Operation, Relu, Sum, on_meta, summed
from btrain.verify.operations import Affine, Convolution, Reshape, Scale

REVISION = 2
"""The number of today's rules for rounding; a verdict in a file of another number is computed
again."""
MEMORY = 2 * 2**30
"""Bytes that bounds may take unless told otherwise."""

_IN_CACHE = 32 * 2**20
"""Bytes that a processor works on at once without waiting for its memory."""

_HELD = 3  # intermediate results of the largest size are in memory at once, without gradients

_ROUNDING = 64  # units in the last place of a result
_TERMS = 8  # of the terms that it is a sum of, with all their signs taken away

Lines = Literal["constant", "parallel", "adaptive"]
_INTERVALS: dict[str, Lines] = {
    "ibp": "constant", "symbolic": "parallel", "crown_ibp": "constant", "crown": "adaptive",
}  # fmt: skip
_IN_PIECES = ("symbolic", "crown")
"""The engines that go backward from every layer, from some of its channels at a time."""
_AT_THE_END: dict[str, Lines] = {
    "ibp": "constant", "symbolic": "parallel", "crown_ibp": "adaptive", "crown": "adaptive",
}  # fmt: skip


class Box(NamedTuple):
    """A box of images: the centre and the radius of each pixel, both (m, C, H, W)."""

    centre: Tensor
    radius: Tensor


class Interval(NamedTuple):
    """Lower and upper bounds, both of one shape."""

    lower: Tensor
    upper: Tensor


def box(x: Tensor, epsilon: float | Tensor) -> Box:
    """Return all images within ε of x in each pixel and within [0, 1].

    Args:
        x: images in [0, 1], (m, C, H, W).
        epsilon: in pixel units, or a tensor that is broadcast to x; 0 gives x alone.

    Raises:
        UserError: an ε is below 0, not finite, or no number.
    """
    if isinstance(epsilon, Tensor):
        if not ((epsilon >= 0) & epsilon.isfinite()).all():
            raise UserError("epsilon must be at least 0 and finite for every pixel.")
    else:
        epsilon = number("epsilon", epsilon)
        at_least(0, "epsilon", epsilon)
    lower, upper = (x - epsilon).clamp(0, 1), (x + epsilon).clamp(0, 1)
    return Box((lower + upper) / 2, (upper - lower) / 2)


def engines(named: str) -> tuple[str, ...]:
    """Return the engines of a name like `symbolic`, `symbolic+crown_ibp` or `any`.

    Raises:
        UserError: there is no such engine.
    """
    if named == ANY:
        return ENGINES
    names = tuple(dict.fromkeys(named.split("+")))
    for name in names:
        if name not in ENGINES:
            raise UserError(
                f"There is no engine {name}; there are {', '.join(ENGINES)}, several joined by + "
                f"and {ANY}."
            )
    return names


def margins(
    graph: Graph,
    images: Box,
    labels: Tensor,
    *,
    engine: str,
    memory: int = MEMORY,
    all_rounding: bool = True,
) -> Tensor:
    """Return upper bounds of all other logits minus the labelled one, over the box.

    The two logits' difference is bounded, not each by itself. An image is verified where all its
    margins but the labelled one, which is 0, are below 0.

    Args:
        graph: of the network, from `graph.trace`.
        images: a box for each image.
        labels: (m,) int64.
        engine: one or several, see `engines`.
        memory: in bytes, about. What does not fit is done in chunks, and in pieces computed twice
            where gradients are needed.
        all_rounding: whether to allow for the rounding of every layer, see the head of this page;
            a loss, which proves nothing, does without.

    Returns:
        (m, K), with gradients to the network's weights.

    Raises:
        UserError: no such engine, images or labels that are not the network's, a layer in training
            mode, or one image needs more memory.
    """
    check_labels(labels, len(images.centre), _if_on_cpu(images, graph.classes))
    bounds = [
        _in_chunks(graph, images, labels, engine=name, memory=memory, all_rounding=all_rounding)
        for name in engines(engine)
    ]
    best = bounds[0]
    for other in bounds[1:]:
        best = torch.minimum(best, other)
    return best


def verified(upper: Tensor, labels: Tensor) -> Tensor:
    """Return which images have no wrong logit that can reach the right one.

    `upper` is what `margins` returns. (m, K), (m,) -> (m,) bool
    """
    wrong = torch.ones_like(upper, dtype=torch.bool).scatter_(1, labels[:, None], False)
    return ((upper < 0) | ~wrong).all(dim=1)


def logits(graph: Graph, images: Box, *, engine: str, memory: int = MEMORY) -> Interval:
    """Return bounds of each logit by itself over the box, (m, K) each; otherwise like `margins`."""
    bounds = [
        _in_chunks(graph, images, None, engine=name, memory=memory, all_rounding=True)
        for name in engines(engine)
    ]
    lower, upper = bounds[0].chunk(2, dim=1)
    for other in bounds[1:]:
        lower, upper = (
            torch.maximum(lower, other.chunk(2, dim=1)[0]),
            torch.minimum(upper, other.chunk(2, dim=1)[1]),
        )
    return Interval(lower, upper)


def before_relus(graph: Graph, images: Box) -> list[Interval]:
    """Return interval bounds before each ReLU in the order of computation, layer by layer (`ibp`).

    Each (m, C, H, W) or (m, N), with gradients; without the margin for rounding.

    Raises:
        UserError: a layer is in training mode.
    """
    with precision.exactly_float32(images.centre.device):
        operations = graph.operations()
        spans: list[_Span | None] = []
        for operation in operations:
            inputs = [spans[j] for j in operation.inputs]
            spans.append(_span(operation, inputs, images, everywhere=True, rounding=False))
        relus = (o.inputs[0] for o in operations if isinstance(o.what, Relu))
        chosen = [span for i in dict.fromkeys(relus) if (span := spans[i]) is not None]
        return [Interval(s.centre - s.radius, s.centre + s.radius) for s in chosen]


def slopes(
    graph: Graph, images: Box, labels: Tensor, *, memory: int = MEMORY
) -> tuple[Tensor, Tensor]:
    """Return the symbolic margins' upper bounds and their coefficients on the images.

    With parallel lines the same coefficients belong to the upper and the lower bound: they are
    the interval gradient. No gradients.

    Returns:
        (m, K) as from `margins` with `symbolic`, and (m, K, C, H, W) or (m, K, N).

    Raises:
        UserError: as `margins`.
    """
    check_size(graph, images.centre)
    check_precision(images.centre, graph.weights())
    check_labels(labels, len(images.centre), _if_on_cpu(images, graph.classes))
    uppers, reached = [], []
    with torch.no_grad(), precision.exactly_float32(images.centre.device):
        plan = _plan(graph, "symbolic", memory, joint=True, like=images.centre, count=len(labels))
        for start in range(0, len(labels), plan.images):
            chunk = slice(start, start + plan.images)
            some = Box(images.centre[chunk], images.radius[chunk])
            state = _State(graph.operations(), some, "symbolic", plan.pieces, all_rounding=False)
            uppers.append(state.margins(labels[chunk], keep=True))
            assert state.reached is not None
            reached.append(state.reached)
    return torch.cat(uppers), torch.cat(reached)


def check_size(graph: Graph, images: Tensor) -> None:
    """Raise UserError unless images are of the size that a graph was made for."""
    if images.shape[1:] != graph.shape:
        shapes = ["×".join(map(str, shape)) for shape in (graph.shape, images.shape[1:])]
        raise UserError(f"The bounds were made for images of {shapes[0]}, not of {shapes[1]}.")


def check_precision(images: Tensor, weights: Iterable[Tensor]) -> None:
    """Raise UserError unless images are in the precision of a network's weights."""
    weight = next((w for w in weights if w.is_floating_point()), images)
    if images.dtype != weight.dtype:
        names = [str(dtype).removeprefix("torch.") for dtype in (images.dtype, weight.dtype)]
        raise UserError(
            f"images are {names[0]} and the network's weights {names[1]}; please give both in one "
            "precision."
        )


def _if_on_cpu(images: Box, classes: int) -> int | None:
    """Return K on a CPU alone: to read labels on a GPU, a training step would wait for it."""
    return classes if images.centre.device.type == "cpu" else None


def check_labels(labels: Tensor, images: int, classes: int | None = None) -> None:
    """Raise UserError unless there is a label for each image, below K where K is known."""
    if not isinstance(labels, Tensor):
        raise UserError(f"labels must be a tensor, not a {type(labels).__name__}.")
    if labels.dtype != torch.int64 or labels.shape != (images,):
        raise UserError(
            f"labels must be int64, one for each of {images} images, not {labels.dtype} of "
            f"shape {tuple(labels.shape)}."
        )
    if classes is None or not images:
        return
    first, last = (int(end) for end in torch.aminmax(labels))
    if first < 0 or last >= classes:
        raise UserError(
            f"labels must be from 0 to {classes - 1}, for {classes} logits, not from {first} to "
            f"{last}."
        )


def _in_chunks(
    graph: Graph,
    images: Box,
    labels: Tensor | None,
    *,
    engine: str,
    memory: int,
    all_rounding: bool,
) -> Tensor:
    """Return one engine's bounds, a chunk at a time: (m, K), or (m, 2·K) lower and upper of logits.

    Raises:
        UserError: the images are of another size or precision, or one needs more memory.
    """
    check_size(graph, images.centre)
    check_precision(images.centre, graph.weights())
    count, joint = len(images.centre), labels is not None
    plan = _plan(graph, engine, memory, joint=joint, like=images.centre, count=count)
    known: list[Operation] | None = None
    if plan.twice:
        # Read once: the backward pass meets the network in its own mode again, training.
        with precision.exactly_float32(images.centre.device):
            known = graph.operations()

    def bound(some: Box, their: Tensor | None, pieces: int) -> Tensor:
        with precision.exactly_float32(some.centre.device):
            operations = graph.operations() if known is None else known
            state = _State(operations, some, engine, pieces, all_rounding=all_rounding)
            return state.logits() if their is None else state.margins(their)

    parts = []
    for start in range(0, count, plan.images):
        chunk = slice(start, start + plan.images)
        some = Box(images.centre[chunk], images.radius[chunk])
        their = None if labels is None else labels[chunk]
        if plan.twice:
            parts.append(
                checkpoint(
                    bound, some, their, plan.pieces, use_reentrant=False, preserve_rng_state=False
                )
            )
        else:
            parts.append(bound(some, their, plan.pieces))
    return torch.cat(parts)


class _Span(NamedTuple):
    """An operation's values layer by layer."""

    centre: Tensor
    radius: Tensor
    exact: bool
    """True if each value by itself takes all of its interval."""
    independent: bool
    """True if all values together do, as the images' pixels do."""


class _State:
    """One computation of bounds for a chunk of images."""

    def __init__(
        self,
        operations: Sequence[Operation],
        images: Box,
        engine: str,
        pieces: int,
        *,
        all_rounding: bool,
    ) -> None:
        self.operations = operations
        self.pieces = pieces
        self.reached: Tensor | None = None
        """The margins' coefficients on the images."""
        self._root = _root(operations)
        uses = [i for i, o in enumerate(operations) if self._root in o.inputs]
        self._on_root = uses if len(uses) == 1 else []
        """The operation that alone reads the root; empty where several do."""
        self._spans: list[_Span | None] = []
        self._values: list[Tensor] = []
        """The values at the middle of all relaxations, around which rows are bounded."""
        self._noise: list[Tensor | None] = []
        """The rounding of the values since the last ReLU or the root, with `all_rounding`."""
        self._relaxed: dict[int, Relaxation] = {}
        self._all_rounding = all_rounding
        self._forward(images, _INTERVALS[engine], _AT_THE_END[engine])

    def margins(self, labels: Tensor, *, keep: bool = False) -> Tensor:
        """Return the margins' upper bounds, (m, K).

        With `keep`, their coefficients on the images are in `reached` afterwards.
        """
        values = self._values[-1]
        unit = torch.eye(values.shape[1], dtype=values.dtype, device=values.device)
        right = unit[labels]
        start = Dense(unit - right[:, None], self.operations[-1].shape)
        centre = values - values.gather(1, labels[:, None])
        moved = self._reach(len(self.operations) - 1, start, keep=keep)
        if (noise := self._noise[-1]) is not None:
            moved = moved + noise + noise.gather(1, labels[:, None])
        return (centre + _with_rounding(moved, values)).masked_fill(right.bool(), 0)

    def logits(self) -> Tensor:
        """Return the logits' bounds, (m, 2·K), lower ones and then upper ones."""
        values = self._values[-1]
        up, down = self._both_reaches(len(self.operations) - 1, one_sided=True)
        return torch.cat([values - down, values + up], dim=1)

    def _forward(self, images: Box, before: Lines, at_the_end: Lines) -> None:
        """Compute values and relaxations, operation by operation."""
        intervals: dict[int, tuple[Tensor, Tensor]] = {}
        for i, operation in enumerate(self.operations):
            spans = [self._spans[j] for j in operation.inputs]
            constant, rounding = before == "constant", self._all_rounding
            self._spans.append(
                _span(operation, spans, images, everywhere=constant, rounding=rounding)
            )
            match operation.what:
                case Input():
                    value = images.centre
                case Sum():
                    value = summed([self._values[j] for j in operation.inputs])
                case Relu():
                    j = operation.inputs[0]
                    if j not in intervals:
                        intervals[j] = self._interval(j, before)
                    self._relaxed[i] = _relaxation(self._values[j], *intervals[j], at_the_end)
                    if (noise := self._noise[j]) is not None:
                        self._relaxed[i] = _widened(self._relaxed[i], noise)
                    value = self._relaxed[i].middle
                case affine:
                    value = affine.forward(self._values[operation.inputs[0]])
            self._values.append(value)
            self._noise.append(self._noise_at(i) if self._all_rounding else None)

    @torch.no_grad()
    def _noise_at(self, i: int) -> Tensor | None:
        """Return how far rounding may have taken an operation's values from where they belong.

        The root's is in its radius, and a ReLU's in its gap.
        """
        operation, value = self.operations[i], self._values[i]
        if i <= self._root or isinstance(operation.what, Input | Relu):
            return None
        before = [n for j in operation.inputs if (n := self._noise[j]) is not None]
        own = value.abs().mul_(_unit(value, _TERMS))
        if isinstance(operation.what, Sum):
            return summed([own, *before])
        if isinstance(operation.what, Reshape):
            return operation.what.forward(before[0]) if before else None
        terms = self._sizes(operation.inputs[0]).mul_(_unit(value, _TERMS))
        own.add_(operation.what.absolute(summed([terms, *before])))
        return _with_terms(own, operation.what)

    def _sizes(self, i: int) -> Tensor:
        """Return about how large an operation's values are over the box, in a tensor of its own."""
        span = self._spans[i]
        if span is not None:
            return span.centre.abs().add_(span.radius)
        if i in self._relaxed:
            return self._relaxed[i].middle.abs().add_(self._relaxed[i].gap)
        return self._values[i].abs()

    def _interval(self, i: int, lines: Lines) -> tuple[Tensor, Tensor]:
        """Return lower and upper bounds of an operation's values, like these."""
        span, value = self._spans[i], self._values[i]
        if span is not None and (span.exact or lines == "constant"):
            radius = _with_rounding(span.radius, span.centre)
            return span.centre - radius, span.centre + radius
        up, down = self._both_reaches(i, one_sided=lines == "adaptive")
        return value - down.view_as(value), value + up.view_as(value)

    def _both_reaches(self, i: int, *, one_sided: bool) -> tuple[Tensor, Tensor]:
        """Return how far an operation's values rise above and fall below their centre, (m, R)."""
        shape, value = self.operations[i].shape, self._values[i]
        step = math.ceil(shape[0] / self.pieces)
        ups, downs = [], []
        for first in range(0, shape[0], step):
            start = Start(shape, first, min(first + step, shape[0]), one_sided, value)
            if self.pieces > 1 and torch.is_grad_enabled():
                moved = checkpoint(
                    self._reach, i, start, use_reentrant=False, preserve_rng_state=False
                )
            else:
                moved = self._reach(i, start)
            up, down = moved.chunk(2, dim=1) if one_sided else (moved, moved)
            ups.append(up)
            downs.append(down)
        up, down = torch.cat(ups, dim=1), torch.cat(downs, dim=1)
        if (noise := self._noise[i]) is not None:
            up, down = up + noise.flatten(1), down + noise.flatten(1)
        return _with_rounding(up, value), _with_rounding(down, value)

    def _reach(self, i: int, start: Start | Rows, *, keep: bool = False) -> Tensor:
        """Return how far rows of an operation's values can rise above their centre, (m, R)."""
        pending: dict[int, Start | Rows] = {i: start}
        reaches: list[Tensor] = []
        while pending:
            i = max(pending)
            rows = pending.pop(i)
            if i == self._root:
                rows = as_rows(rows)
                span = self._spans[i]
                assert span is not None
                reaches.append(reach(rows, span.radius))
                if keep:
                    self._keep(rows)
                continue
            operation = self.operations[i]
            passed: Start | Rows | None = rows
            match operation.what:
                case Relu():
                    by_gaps, passed = through_relu(as_rows(rows), self._relaxed[i])
                    reaches.append(by_gaps)
                case Input() | Sum():
                    pass
                case Convolution() if i in self._on_root and not keep and isinstance(rows, Dense):
                    span = self._spans[self._root]
                    assert span is not None
                    moved = operation.what.reach(rows, span.radius)
                    if moved is None:
                        passed = operation.what.pull(rows)
                    else:
                        reaches.append(moved)
                        passed = None
                case affine:
                    passed = affine.pull(rows)
            if passed is not None:
                for j in operation.inputs:
                    pending[j] = added(pending[j], passed) if j in pending else passed
        return summed(reaches)

    def _keep(self, rows: Rows) -> None:
        """Remember rows on the root as coefficients on the images."""
        for operation in reversed(self.operations[1 : self._root + 1]):
            assert isinstance(operation.what, Scale | Reshape)
            rows = as_rows(operation.what.pull(rows))
        dense = rows.dense() if isinstance(rows, Patches) else rows
        on_images = dense.rows
        self.reached = on_images.permute(0, 1, 4, 2, 3) if on_images.dim() == 5 else on_images


def _root(operations: Sequence[Operation]) -> int:
    """Return the last operation whose values fill a box as the images do, value by value."""
    uses = [j for operation in operations for j in operation.inputs]
    root = 0
    while (
        root + 1 < len(operations)
        and uses.count(root) == 1
        and operations[root + 1].inputs == (root,)
        and isinstance(operations[root + 1].what, Scale | Reshape)
    ):
        root += 1
    return root


def _span(
    operation: Operation,
    inputs: Sequence[_Span | None],
    images: Box,
    *,
    everywhere: bool,
    rounding: bool,
) -> _Span | None:
    """Return an operation's values layer by layer; None if not asked for `everywhere` and not
    exact.

    With `rounding` the radius holds what rounding may have taken from the centre.
    """
    if isinstance(operation.what, Input):
        return _Span(images.centre, images.radius, exact=True, independent=True)
    known = [span for span in inputs if span is not None]
    if len(known) < len(inputs) or not (everywhere or (len(known) == 1 and known[0].independent)):
        return None
    first = known[0]
    match operation.what:
        case Relu():
            middle, half = _after_relu(first.centre - first.radius, first.centre + first.radius)
            return _Span(middle, half, first.exact, first.independent)
        case Sum():
            centre = summed([span.centre for span in known])
            radius = summed([span.radius for span in known])
            if rounding:
                radius = radius + centre.detach().abs() * _unit(centre, _TERMS)
            return _Span(centre, radius, exact=False, independent=False)
        case affine:
            centre, radius = affine.forward(first.centre), first.radius
            if rounding and not isinstance(affine, Reshape):
                unit = _unit(centre, _TERMS)
                radius = torch.add(radius * (1 + unit), first.centre.detach().abs(), alpha=unit)
                radius = torch.add(affine.absolute(radius), centre.detach().abs(), alpha=unit)
                radius = _with_terms(radius, affine)
            else:
                radius = affine.absolute(radius)
            return _Span(
                centre,
                radius,
                first.independent,
                first.independent and isinstance(affine, Scale | Reshape),
            )


def _with_terms(radius: Tensor, affine: Affine) -> Tensor:
    """Return a radius with what rounding may take from what was added up to the map's constant."""
    terms = affine.terms
    return radius if terms is None else radius + terms * _unit(radius, _TERMS)


def _after_relu(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Return middle and half width of the interval after a ReLU."""
    lower, upper = lower.clamp(min=0), upper.clamp(min=0)
    return (upper + lower) / 2, (upper - lower) / 2


def _relaxation(value: Tensor, lower: Tensor, upper: Tensor, lines: Lines) -> Relaxation:
    """Return the lines around a ReLU on [lower, upper], told from `value`.

    The upper line goes through (lower, 0) and (upper, upper) where the interval holds 0 inside;
    elsewhere both lines are the ReLU itself.
    """
    if lines == "constant":
        return Relaxation(*_after_relu(lower, upper), None, None)
    lower, upper = lower.clamp(max=0), upper.clamp(min=0)
    slope = upper / (upper - lower).clamp(min=torch.finfo(value.dtype).tiny)
    if lines == "parallel":
        gap = slope * lower / -2
        return Relaxation(torch.addcmul(gap, slope, value), gap, slope, None)
    low = (upper > -lower).to(value.dtype)
    line, low_line = slope * (value - lower), low * value
    return Relaxation((line + low_line) / 2, (line - low_line) / 2, slope, low)


def _widened(relaxation: Relaxation, noise: Tensor) -> Relaxation:
    """Return the same lines, further apart by the rounding of the values that they are told from.

    A neuron lets no more of it pass than its steeper line. Constant lines were made of intervals
    that hold it.
    """
    if relaxation.up is None:
        return relaxation
    steeper = 1 if relaxation.low is None else 2  # a lower line of slope 1 is below one above 1/2
    gap = torch.addcmul(relaxation.gap, noise, relaxation.up.detach(), value=steeper)
    return replace(relaxation, gap=gap)


def _unit(values: Tensor, many: int) -> float:
    """Return so many units in the last place, as a share of a value."""
    return many * torch.finfo(values.dtype).eps


def _with_rounding(moved: Tensor, values: Tensor) -> Tensor:
    """Return a radius made larger by what rounding may have taken from it; see the head of this
    page.
    """
    with torch.no_grad():
        largest = values.abs().flatten(1).amax(dim=1)
        size = moved.abs() + largest.view(-1, *(1 for _ in moved.shape[1:]))
        margin = size.mul_(_unit(moved, _ROUNDING))
    return moved + margin


class _Plan(NamedTuple):
    """The way in which bounds are computed within their memory."""

    images: int
    """The number of images in a chunk."""
    pieces: int
    """The number of parts, of whole channels, that a layer's rows are bounded in."""
    twice: bool
    """True if a chunk is computed once more for its gradients."""


def check_memory(graph: Graph, *, engine: str, like: Tensor, memory: int = MEMORY) -> None:
    """Raise UserError if the margins of one image need more memory, with gradients if enabled.

    Args:
        engine: one or several, see `engines`.
        like: a tensor of the images' dtype.
    """
    for name in engines(engine):
        _plan(graph, name, memory, joint=True, like=like, count=1)


def _plan(
    graph: Graph, engine: str, memory: int, *, joint: bool, like: Tensor, count: int
) -> _Plan:
    """Return the largest chunk that fits.

    Raises:
        UserError: one image needs more, one channel of a layer at a time.
    """
    with_gradients = torch.is_grad_enabled() and any(w.requires_grad for w in graph.weights())
    split = [i for node in graph.nodes if node.make is Relu for i in node.inputs]
    most = max(graph.nodes[i].shape[0] for i in (*split, -1)) if engine in _IN_PIECES else 1

    def needed(engine: str, pieces: int) -> tuple[int, Size]:
        found = size(graph, engine, joint=joint, like=like, pieces=pieces)
        return found.total // pieces if with_gradients else _HELD * found.largest, found

    pieces = 1
    at_once, found = needed(engine, pieces)
    if at_once > memory * most:  # a piece is no less than its share of the whole
        raise _too_large(engine, f"at least {sized(at_once // most)}", memory, needed)
    if at_once > memory:
        pieces = min(2 ** math.ceil(math.log2(at_once / memory)), most)
        at_once, found = needed(engine, pieces)
    while at_once > memory:
        if pieces >= most:
            raise _too_large(engine, f"about {sized(at_once)}", memory, needed)
        pieces = min(2 * pieces, most)
        at_once, found = needed(engine, pieces)
    fitting = max(1, memory // at_once)
    images = fitting
    if like.device.type == "cpu":
        images = min(images, max(1, _IN_CACHE // (_HELD * found.largest)))
    return _Plan(images, pieces, with_gradients and count > fitting)


def _too_large(
    engine: str, need: str, memory: int, needed: Callable[[str, int], tuple[int, Size]]
) -> UserError:
    """Return what is said of bounds that do not fit, with an engine whose bounds do."""
    cheaper = ""
    if engine in _IN_PIECES and (less := needed("crown_ibp", 1)[0]) <= memory:
        cheaper = f"; those by crown_ibp need {sized(less)}"
    return UserError(
        f"Bounds by {engine} need {need} for one image, and may take {sized(memory)}{cheaper}."
    )


class Size(NamedTuple):
    """Bytes for the bounds of one image."""

    largest: int
    """The bytes of the largest intermediate result."""
    total: int
    """The bytes of all intermediate results, of all pieces together."""


def size(graph: Graph, engine: str, *, joint: bool, like: Tensor, pieces: int = 1) -> Size:
    """Return what the bounds of one image take, by a computation without numbers.

    The graph remembers it.

    Args:
        joint: True for margins, False for logits.
        like: a tensor of the images' dtype.
        pieces: into how many a layer's channels are split.
    """
    key = (engine, joint, like.dtype, pieces)
    if key not in graph.sizes:
        images = torch.empty((1, *graph.shape), dtype=like.dtype, device="meta")
        with torch.no_grad(), _Counted() as counted:
            operations = [on_meta(o) for o in graph.operations()]
            state = _State(operations, Box(images, images), engine, pieces, all_rounding=False)
            if joint:
                state.margins(torch.zeros(1, dtype=torch.int64, device="meta"))
            else:
                state.logits()
        graph.sizes[key] = (counted.largest, counted.total)
    return Size(*graph.sizes[key])


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and func._schema.returns[0].alias_info is None:
            made = out.numel() * out.element_size()
            self.largest = max(self.largest, made)
            self.total += made
        return out
