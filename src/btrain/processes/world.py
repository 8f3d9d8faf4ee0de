"""One run on several processes (torchrun): who they are, and what they tell each other.

Every process holds the whole data set and draws the same batches and the same noise. It computes
with its share of a batch: the examples `rank`, `rank + size`, …, in the batch's order to score
them, and in the order of descending attack steps to attack them and to train, so that no process
has more than one example of a group more than another; where the clean forward is shared, the ones
that it has scored. One process is a world of size 1, in which nothing is sent and everything is as
it was.
"""

from __future__ import annotations

import atexit
import importlib
import inspect
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from btrain.errors import Interrupted, UserError, first_line
from btrain.processes.launched import by_torchrun, check_variables, first_complains, processes
from btrain.processes.parent import not_outliving, watch

log = logging.getLogger("btrain")

_PATIENCE = timedelta(days=7)  # of a process that waits while the first one downloads or writes
_QUIET_SECONDS = 5.0  # in which all processes of a run have usually met
_MEETING_SECONDS = 1800.0
_LOOK_SECONDS = 0.1
_T = TypeVar("_T")
_NEW = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
_NO_BUFFERS: Any = {"forward_sync_buffers" if _NEW else "broadcast_buffers": False}  # torch 2.13


class World:
    """The processes of a run.

    Attributes:
        rank: this process', from 0.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._wrapped: DistributedDataParallel | None = None

    @property
    def first(self) -> bool:
        """Return whether this is the process that writes."""
        return self.rank == 0

    def share(self, examples: int) -> slice:
        """Return which of so many examples are this process'."""
        return slice(self.rank, examples, self.size)

    def rows(self, examples: int, device: torch.device) -> Tensor | None:
        """Return the same as indices, (n,) int64; None where they are all."""
        if self.size == 1:
            return None
        return torch.arange(examples, device=device)[self.share(examples)]

    def gathered(self, rows: Tensor, examples: int) -> Tensor:
        """Return a batch's rows in order from all processes' shares. (n, K) -> (examples, K)"""
        if self.size == 1:
            return rows
        most = -(-examples // self.size)
        padded = rows.new_zeros(most, rows.shape[1])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        if padded.numel():
            dist.all_gather(parts, padded)
        return torch.stack(parts, dim=1).flatten(0, 1)[:examples]

    def attached(self, rows: Tensor, examples: int) -> Tensor:
        """Return what `gathered` does, with a gradient for the rows that are this process'."""
        own = self.rows(examples, rows.device)
        if own is None:
            return rows
        return self.gathered(rows.detach(), examples).index_copy(0, own, rows)

    def dealt(self, active: Sequence[int]) -> list[int]:
        """Return how many of this process' share take the first attack step, the second, ….

        Args:
            active: the same of the whole batch, whose share is taken in descending order of steps.
        """
        counts = (len(range(n)[self.share(n)]) for n in active)
        return [n for n in counts if n]

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the values of all processes. (n,) -> ()"""
        if self.size == 1:
            return values.mean()
        sums = self.sum(torch.stack([values.sum(), torch.ones_like(values).sum()]))
        return sums[0] / sums[1]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum all processes' tensors, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def weighted(self, loss: Tensor, share: float) -> Tensor:
        """Scale a mean loss over this share of the batch, so that gradients average to the batch's.

        DistributedDataParallel takes the mean over the processes, whatever their shares.
        """
        return loss if self.size == 1 else loss * (share * self.size)

    def wrapped(self, network: nn.Module) -> nn.Module:
        """Return the network with gradients averaged over the processes, one wrapper a network.

        BatchNorm normalises each process' share by itself: buffers are not broadcast in a forward
        pass, of which a process with an empty group makes one less.
        """
        if self.size == 1:
            return network
        if self._wrapped is None or self._wrapped.module is not network:
            self._wrapped = DistributedDataParallel(network, **_NO_BUFFERS)
        return self._wrapped

    def average_statistics(self, network: nn.Module) -> None:
        """Replace the running statistics of all norms by their means over the processes."""
        norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        running = [t for m in norms for t in (m.running_mean, m.running_var) if t is not None]
        if self.size == 1 or not running:
            return
        means = self.sum(torch.cat(running)) / self.size
        torch._foreach_copy_(running, torch.split(means, [len(t) for t in running]))

    def copy_weights(self, network: nn.Module) -> None:
        """Copy the first process' weights and buffers to all."""
        for tensor in network.state_dict().values() if self.size > 1 else ():
            copy = tensor.contiguous()
            dist.broadcast(copy, 0)
            tensor.copy_(copy)

    def largest(self, number: int) -> int:
        """Return the largest of all processes' numbers, on the host."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def told(self, content: _T) -> _T:
        """Return what the first process says, plain containers for JSON; others are not heard."""
        if self.size == 1:
            return content
        text = bytearray(json.dumps(content).encode() if self.first else b"")
        length = torch.tensor(len(text))
        dist.broadcast(length, 0)
        letters = torch.zeros(int(length), dtype=torch.uint8)
        if self.first:
            letters = torch.frombuffer(text, dtype=torch.uint8)
        dist.broadcast(letters, 0)
        return json.loads(letters.numpy().tobytes())  # type: ignore[no-any-return]

    def heard(self, content: _T) -> list[_T]:
        """Return what each process says, plain containers for JSON."""
        if self.size == 1:
            return [content]
        text = json.dumps(content).encode()
        letters = torch.zeros(1, self.largest(len(text)), dtype=torch.uint8)
        letters[0, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        rows = self.gathered(letters, self.size)
        return [json.loads(row.numpy().tobytes().rstrip(b"\0")) for row in rows]

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """Do what is inside in the first process, then in the others."""
        if not self.first:
            self.told(None)
        yield
        if self.first:
            self.told(None)


ALONE = World()


@contextmanager
def joined() -> Iterator[World]:
    """Join the world that torchrun started this process in, by its environment; else one of size 1.

    When a process fails the others end as well: torchrun sees to that, and those that notice first
    leave it to the failing one to say why.

    Raises:
        UserError: a process failed, is gone or does not come, or the environment is no launcher's.
    """
    check_variables()
    size = processes()
    if size == 1:
        yield ALONE
        return
    torchrun = os.getppid() if by_torchrun() else None
    if torchrun is not None:
        watch(torchrun)
    world = World(int(os.environ["RANK"]), size)
    if not dist.is_initialized():  # a group lasts for all trainings of a process
        # Imported any later (DistributedDataParallel does), it would hold the group for good, and
        # gloo's threads, which abort a process where they outlive the interpreter.
        importlib.import_module("torch.distributed.nn.functional")
        _meet(world)
    atexit.unregister(dist.destroy_process_group)  # which could wait for a process that failed
    try:
        in_order = nullcontext() if torchrun is None else not_outliving(torchrun)
        with first_complains(), in_order:
            yield world
    except Interrupted as stop:
        if world.first:
            raise
        raise SystemExit(128 + stop.number) from None
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        if world.first:
            raise UserError(
                "another process of the run is gone "
                f"({first_line(error)}); the same command goes on "
                "from the last checkpoint."
            ) from error
        raise SystemExit(1) from None
    atexit.register(dist.destroy_process_group)


def _meet(world: World) -> None:
    """Wait for the other processes, so that a signal is heard meanwhile: torch hears none.

    Raises:
        UserError: they do not come, or cannot be reached.
    """
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    failed: list[Exception] = []

    def join() -> None:
        try:
            dist.init_process_group(backends, timeout=_PATIENCE)
        except Exception as error:
            failed.append(error)

    joining = threading.Thread(target=join, daemon=True)
    joining.start()
    whom = "the other processes" if world.first else "process 0"
    where = f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}"
    began, told = time.monotonic(), False
    while joining.is_alive():
        joining.join(_LOOK_SECONDS)
        waited = time.monotonic() - began
        if waited > _QUIET_SECONDS and not told:
            told = True
            log.warning(
                "Process %d of %d waits for %s, at %s …", world.rank, world.size, whom, where
            )
        if waited > _MEETING_SECONDS:
            minutes = f"{_MEETING_SECONDS / 60:.0f} minutes"
            raise UserError(f"{whom} of {world.size} did not come within {minutes}, at {where}.")
    for error in failed:
        raise UserError(
            f"process {world.rank} of {world.size} could not meet the others, at {where} "
            f"({first_line(error)})."
        ) from error


def _is_lost(error: RuntimeError) -> bool:
    """Return whether the other end of a connection is gone; gloo has no exception for that."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def device_of(world: World, name: str) -> str:
    """Return the device of a setting; `auto` and `cuda` are each process' own GPU.

    Raises:
        UserError: a GPU is named, which the processes would share.
    """
    if world.size == 1 or name == "cpu":
        return name
    if name not in ("auto", "cuda"):
        raise UserError(f"device={name} would be that of all {world.size} processes; name cuda.")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else name
