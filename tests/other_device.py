"""Training on a device that is not the CPU, in a process of its own, for torch keeps the device.

Tensors of the device "other" are computed on the CPU, but they mix with the CPU's as little as a
GPU's do: an operation on both raises, and so does a generator of the wrong one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from btrain.data import load
from btrain.settings.compose import compose
from btrain.training import epochs
from btrain.training.setup import make_state
from btrain.training.update import train_batch
from steps import epoch_of

OTHER = "other"
_MARK = 2**62  # the seed of a generator of the other device is larger
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
host_copies = 0


class There(Tensor):
    """A tensor of the other device, around one of the CPU."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(),
            dtype=here.dtype, device=torch.device(OTHER, 0),
        )  # fmt: skip
        made.here = here
        return made

    def tolist(self) -> Any:
        """As for a GPU, the whole tensor is copied."""
        global host_copies
        host_copies += 1
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


class _Everything(TorchDispatchMode):
    """Operations that make tensors as well."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _is_other(device: Any) -> bool:
    return device is not None and torch.device(device).type == OTHER


def _wrapped(value: Any) -> Any:
    return There(value) if isinstance(value, Tensor) and not isinstance(value, There) else value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation, on the CPU, if it would be allowed."""
    global host_copies
    name, leaves = func._overloadpacket.__name__, tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    there = any(isinstance(tensor, There) for tensor in tensors)
    goes = _is_other(kwargs["device"]) if kwargs.get("device") is not None else there
    _refuse_mixture(name, args, leaves, tensors, goes)
    masks = name in _INDEXING and any(t.dtype is torch.bool for t in tensors[1:])
    host_copies += there and (masks or name in ("_local_scalar_dense", "nonzero"))
    if _is_other(kwargs.get("device")):
        kwargs = kwargs | {"device": torch.device("cpu")}
    inside = tree_map(lambda v: v.here if isinstance(v, There) else v, (args, kwargs))
    result = func(*inside[0], **inside[1])
    if func._schema.is_mutable:  # what was changed comes back as it went in
        before = {id(leaf.here): leaf for leaf in leaves if isinstance(leaf, There)}
        return tree_map(lambda v: before.get(id(v), v), result)
    return tree_map(_wrapped, result) if goes else result


def _refuse_mixture(
    name: str, args: Any, leaves: list[Any], tensors: list[Tensor], goes: bool
) -> None:
    for leaf in leaves:
        if isinstance(leaf, torch._C.Generator) and (leaf.initial_seed() >= _MARK) != goes:
            raise RuntimeError(f"{name} with a generator of another device")
    if not goes or name in ("_to_copy", "copy_"):
        return
    indices = {*map(id, tree_leaves(args[1]))} if name in _INDEXING else set()
    for tensor in tensors:
        if not isinstance(tensor, There) and tensor.dim() and id(tensor) not in indices:
            raise RuntimeError(f"{name} on tensors of two devices")


@contextmanager
def other_device() -> Iterator[torch.device]:
    """The device, with what torch makes by other ways than operations."""
    backend_registration._setup_privateuseone_for_python_backend(OTHER)
    plain, tensor = torch.Generator, torch.tensor

    class Generator(plain):  # type: ignore[misc, valid-type]
        """Of either device; a seed tells of which."""

        def __new__(cls, device: Any = "cpu") -> Any:
            return plain.__new__(_OtherGenerator if _is_other(device) else plain)

        def __init__(self, device: Any = "cpu") -> None:
            pass

    class _OtherGenerator(Generator):
        device = torch.device(OTHER, 0)

        def manual_seed(self, seed: int) -> Any:
            return plain.manual_seed(self, seed + _MARK)

    def make(data: Any, *, device: Any = None, **kind: Any) -> Tensor:
        made = tensor(data, **kind)
        return There(made) if _is_other(device) else made

    torch.Generator, torch.tensor = Generator, make  # type: ignore[misc]
    try:
        with _Everything():
            yield torch.device(OTHER)
    finally:
        torch.Generator, torch.tensor = plain, tensor  # type: ignore[misc]


def copies_of_a_step(settings: list[str], device: torch.device) -> int:
    """An epoch of three batches; the host copies of the last one's step."""
    config = compose(["dataset=digits", "train.epochs=1", "train.batch_size=24", *settings])
    data = load("digits", Path("unused"), device=device, train_examples=72, test_examples=40)
    state = make_state(config, data, device)
    counts: list[int] = []

    def counted(*args: Any) -> Any:
        before = host_copies
        stats = train_batch(*args)
        counts.append(host_copies - before)
        return stats

    epochs.train_batch = counted
    epoch_of(config, state, data.train)
    epochs.check_weights(state, data.train)
    tensors = [*state.model.state_dict().values(), *state.memory.values(), state.epoch_sums]
    assert all(isinstance(tensor, There) for tensor in tensors)
    return counts[-1]


def main(settings: list[str]) -> None:
    """Print, for each text of settings, how often a training step copies to the host."""
    torch.set_num_threads(1)
    with other_device() as other:
        for words in settings:
            print(words, copies_of_a_step(words.split(), other), sep="\t", flush=True)
