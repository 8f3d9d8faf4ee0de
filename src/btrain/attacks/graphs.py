"""The attack with its steps recorded once a group size and then replayed: CUDA graphs.

A step of a small network on a small group takes the GPU less time than Python takes to launch its
kernels. A graph launches all of them at once, but with the memory addresses of its recording: a
batch is copied to where the recorded step reads it. On a CPU, replaying runs the step again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from btrain.attacks.balls import Ball, per_image
from btrain.attacks.pgd import InnerLoss

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""(a step that reads and writes fixed memory) -> what runs it again on that memory"""

_LARGEST = 256  # examples; up to here groups are rounded to 8


def group_multiple(batch_size: int) -> int:
    """Return what group sizes are rounded up to: 8, or more for a batch above 256.

    So a batch has at most 32 sizes, and as many graphs. 11 % more attack on the 36 boundary
    examples of 128, on average.
    """
    return 8 * max(1, -(-batch_size // _LARGEST))


class _Batch(NamedTuple):
    """The fixed memory: of m examples, of which the first ones are moved."""

    images: Tensor
    at: Tensor
    """The points where the next gradient is taken, like the images."""
    size: Tensor
    """Step sizes, (m, 1, 1, 1)."""
    target: Tensor
    """Clean logits, (m, K)."""
    labels: Tensor
    region: tuple[Tensor, ...]
    """The ball's tensors, a row for each example."""

    def first(self, n: int) -> _Batch:
        """Return the memory of the first n examples."""
        return _Batch(
            self.images[:n],
            self.at[:n],
            self.size[:n],
            self.target[:n],
            self.labels[:n],
            tuple(part[:n] for part in self.region),
        )


class ReplayedPGD:
    """The attack `prefix_pgd`, the step of each group size recorded when that size is first met.

    The network must be in eval mode, draw no random numbers, and move its weights in place, as a
    frozen shadow does: a recorded step then follows them. With another network, weights elsewhere,
    another loss or larger batches everything is recorded anew.

    Attributes:
        recorded: how many steps have been recorded so far.
    """

    def __init__(self, new_recorder: Callable[[], Recorder], examples: int) -> None:
        """Record nothing yet; `examples` is the size of the largest batch that is expected."""
        self.recorded = 0
        self._new_recorder, self._examples = new_recorder, examples
        self._made_for: tuple[object, ...] = ()
        self._replay: dict[int, Callable[[], None]] = {}

    @property
    def memory_bytes(self) -> int:
        """Return the bytes of the fixed memory and of what the graphs keep for themselves."""
        if not self._made_for:
            return 0
        *parts, region = self._batch
        fixed = sum(part.nbytes for part in (*parts, *region))
        return fixed + (self._record.held() if isinstance(self._record, GraphRecorder) else 0)

    def __call__(
        self,
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
        """Attack as `prefix_pgd`; every number in `active` that is new costs a recording."""
        region = ball.region(x)
        self._prepare(model, x, labels, clean_logits, inner_loss, ball, region)
        for n in sorted(set(active) - self._replay.keys(), reverse=True):
            # Ahead of this batch's data, which the trial steps of a recorder would move.
            step = partial(_step, model, inner_loss, ball, self._batch.first(n))
            self._replay[n] = self._record(step)
            self.recorded += 1
        batch = self._batch.first(len(x))
        batch.images.copy_(x)
        batch.size.copy_(per_image(step_size, x))
        batch.target.copy_(clean_logits)
        batch.labels.copy_(labels)
        for ours, theirs in zip(batch.region, region, strict=True):
            ours.copy_(theirs)
        if noise is not None and active:
            batch.images[: active[0]] += noise[: active[0]]
        batch.at.copy_(batch.images if probe is None else x + probe)
        for n in active:
            self._replay[n]()
        return batch.images.clone()

    def _prepare(
        self,
        model: nn.Module,
        x: Tensor,
        labels: Tensor,
        z: Tensor,
        inner_loss: InnerLoss,
        ball: Ball,
        region: tuple[Tensor, ...],
    ) -> None:
        """Drop what was recorded if it does not hold for these, and make room for them."""
        weights = tuple(t.data_ptr() for t in chain(model.parameters(), model.buffers()))
        kinds = tuple((t.shape[1:], t.dtype, t.device) for t in (x, labels, z, *region))
        self._examples = max(self._examples, len(x))
        made_for = (model, weights, kinds, inner_loss, type(ball), self._examples)
        if made_for == self._made_for:
            return
        if self._replay and x.is_cuda:
            torch.cuda.synchronize(x.device)  # a graph may be under way
        self._replay.clear()
        self._record = self._new_recorder()
        m = self._examples
        images, at, size, target, labels, *region_memory = (
            part.new_zeros(m, *part.shape[1:])
            for part in (x, x, per_image(x.new_zeros(1), x), z, labels, *region)
        )
        self._batch = _Batch(images, at, size, target, labels, tuple(region_memory))
        self._made_for = made_for


def _step(model: nn.Module, inner_loss: InnerLoss, ball: Ball, batch: _Batch) -> None:
    """Take one step of `prefix_pgd` on the whole of this memory, and keep nothing beside it."""
    at = batch.at.detach().requires_grad_()
    with torch.enable_grad():
        loss = inner_loss(model(at), batch.target, batch.labels).sum()
    (gradient,) = torch.autograd.grad(loss, [at])
    moved = ball.direction(gradient).mul_(batch.size).add_(batch.images)
    batch.images.copy_(ball.project(moved, *batch.region))
    batch.at.copy_(batch.images)


def repeated(step: Callable[[], None]) -> Callable[[], None]:
    """Record as a CPU does: return the step itself."""
    return step


class GraphRecorder:
    """A recorder of CUDA graphs that share one pool of memory.

    They may: nothing of one is read after another ran, and two never run at once. torch's
    conditions are kept: a few runs on a side stream first, always the same stream for one pool, and
    no copy to the host inside.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.graphs: list[torch.cuda.CUDAGraph] = []

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Run the step `_TRIALS` times, then record it, which does not run it."""
        current = torch.cuda.current_stream(self._device)
        # The stream is set to bring it back: torch does not where a recording fails.
        with torch.cuda.device(self._device), torch.cuda.stream(current):
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(_TRIALS):  # cuDNN and cuBLAS choose and allocate
                    step()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                    step()
            except RuntimeError:
                with torch.cuda.stream(current), suppress(RuntimeError):
                    _end_recording(self._device)
                with suppress(RuntimeError, AttributeError):
                    # torch up to 2.12 leaves the allocator recording: its cache is then never freed
                    index = torch.cuda.current_device()
                    torch._C._cuda_endAllocateToPool(index, self._pool)
                raise
        self.graphs.append(graph)
        return graph.replay

    def held(self) -> int:
        """Return the bytes of the graphs' pool, which torch counts as free between replays."""
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        ours = (s for s in segments if tuple(s.get("segment_pool_id", ())) == tuple(self._pool))
        return sum(int(segment["total_size"]) for segment in ours)


def _end_recording(device: torch.device) -> None:
    """End a recording that failed: torch's own generator would still take it to be under way.

    It would then refuse to draw for anybody. One that succeeds ends both.
    """
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=device)


_TRIALS = 3


def replayed_pgd(device: torch.device, examples: int) -> ReplayedPGD:
    """Return the attack for batches of up to so many examples on this device."""
    cuda = device.type == "cuda"
    return ReplayedPGD((lambda: GraphRecorder(device)) if cuda else (lambda: repeated), examples)
