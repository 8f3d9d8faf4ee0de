"""The watch for NaN and infinity in logits, loss and gradients: on the device, undone if asked."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from btrain.errors import UserError
from btrain.methods.base import Memory
from btrain.methods.statistics import StepStats


class NotFiniteError(UserError):
    """A number that training met and that is not finite.

    Attributes:
        batch: the offending batch, plain containers for a checkpoint file.
    """

    def __init__(self, sentence: str, batch: dict[str, Any]) -> None:
        super().__init__(sentence)
        self.batch = batch

    def __reduce__(self) -> tuple[type[NotFiniteError], tuple[str, dict[str, Any]]]:
        return NotFiniteError, (str(self), self.batch)


class FiniteCheck:
    """A memory on the device of the step in which each quantity was first not finite.

    A gradient counts as finite if its Euclidean norm is, which takes the CPU a tenth to a thirtieth
    of the time of the largest magnitude; in float32 a norm beyond 1.8·10¹⁹ is not. No copy to the
    host.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._parameters = [parameter for _, parameter in named]
        # In the order in which one makes the others bad: backward goes from the last layer up.
        gradients = [f"the gradient of {name}" for name, _ in named]
        self._names = ["the logits", "the loss", *gradients[::-1]]
        self._first = torch.zeros(len(self._names), dtype=torch.int64, device=device)

    def see(self, step: int, stats: StepStats) -> Tensor:
        """Look at one step, counted from 1; return whether anything is bad, () bool."""
        gradients = [p.grad if p.grad is not None else p.new_zeros(1) for p in self._parameters]
        norms = torch.stack(torch._foreach_norm(gradients))
        ahead = torch.stack([stats.bad_logits > 0, ~torch.isfinite(stats.loss)])
        bad = torch.cat([ahead, ~torch.isfinite(norms).flip(0)])
        self._first = torch.where((self._first == 0) & bad, step, self._first)
        return bad.any()

    def forget(self) -> None:
        """Forget what was seen, once it has been dealt with."""
        self._first.zero_()

    def found(self) -> tuple[int, str] | None:
        """Return the first bad step and what was bad in it; one copy to the host."""
        steps = self._first.tolist()
        if not any(steps):
            return None
        first = min(step for step in steps if step)
        return first, self._names[steps.index(first)]


class Snapshot:
    """The weights, BatchNorm statistics, momenta and memory as they were before a step.

    Taking and undoing copies each of them once: memory and time of two more copies of the weights
    and momenta a step. Of a memory with a row for each training example these are the batch's rows.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *memories: Memory,
        by_example: Collection[str] = (),
        indices: Tensor | None = None,
    ) -> None:
        """Keep what a step changes.

        Args:
            memories: of the method and of the controllers.
            by_example: names in them of tensors with a row for each training example.
            indices: the rows of these that the step may change, (m,) int64; None without any.
        """
        self._model, self._optimizer, self._memories = model, optimizer, memories
        self._by_example, self._indices = frozenset(by_example), indices
        self._before = {name: tensor.clone() for name, tensor in self._tensors()}
        self._rows_before = {name: tensor[indices] for name, tensor in self._tensors_by_example()}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._model.state_dict().items():
            yield f"model.{name}", tensor
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for i, parameter in enumerate(parameters):
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield f"optimizer.{i}.{key}", value
        for i, memory in enumerate(self._memories):
            for name in memory.keys() - self._by_example:
                yield f"memory.{i}.{name}", memory[name]

    def _tensors_by_example(self) -> Iterator[tuple[str, Tensor]]:
        for i, memory in enumerate(self._memories):
            for name in memory.keys() & self._by_example:
                yield f"memory.{i}.{name}", memory[name]

    @torch.no_grad()
    def undo_where(self, bad: Tensor) -> None:
        """Restore everything if `bad`, () bool, and do nothing otherwise.

        Momenta that the step created become zero, which is what they begin from.
        """
        for name, now in self._tensors():
            before = self._before.get(name)
            now.copy_(torch.where(bad, torch.zeros_like(now) if before is None else before, now))
        for name, now in self._tensors_by_example():
            rows = now[self._indices]
            now[self._indices] = torch.where(bad, self._rows_before[name], rows)
