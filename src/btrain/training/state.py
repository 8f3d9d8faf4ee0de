"""The state of a run: all that changes while it goes on, which checkpoints hold."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from btrain.controllers.averaging import WeightAverage
from btrain.controllers.base import Controller
from btrain.controllers.sparsity.channels import Channels, Trained
from btrain.controllers.sparsity.controller import Sparsity
from btrain.errors import UserError
from btrain.exchange.read import start_from
from btrain.methods.base import Memory
from btrain.methods.bullettrain import OUTLIERS
from btrain.methods.statistics import StepStats, stacked
from btrain.untrusted import RefusedError


@dataclass
class TrainState:
    """The state between two batches.

    Attributes:
        model, optimizer: with their weights and momenta.
        generator: of augmentation and attack noise, on the training device.
        memory: what the method remembers between batches, tensors on the device; of every method
            `robust_fraction` (F_R, 0-d).
        epoch: epochs completed.
        batch: batches done in the epoch that is under way.
        epoch_sums: `StepStats` summed over that epoch, float64 on the device.
        total_sums: the same over the epochs completed, and over one that a collapse undid.
        epoch_seconds, train_seconds: time spent in training steps, in that epoch and in all.
        best_epoch, best_val_acc: of the held-out evaluation; None where there is none.
        epoch_work: seconds that the device worked in that epoch; None if another session began it.
        watched_acc: PGD accuracy on the watched training batch after the last epoch, percent.
        watched_images: the size that this batch was filled up to; None for an ordinary one.
        collapsed: whether that fell so far that the run was stopped for it.
        repairs: whether the epoch under way takes more steps, for the one before overfitted.
        average: of the model's weights, with `recipe.ema`.
        sparsity: what masks the model's weights, unless it is `none`.
        batch_sums: of the epoch under way, the `StepStats` of the batches whose scores the log will
            show, by the number of the batch from 1; float64 on the device.
        graphs: whether `train.cuda_graphs=auto` found that graphs pay; None if nothing was timed.
        unsaved: names of the memory that a checkpoint leaves out; a run that goes on begins there
            as a new one does.

    torch's own random numbers, which an own network with dropout draws, are of the process and
    stand in a checkpoint, too; of several processes the first one's.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    memory: dict[str, Tensor]
    epoch_sums: Tensor
    total_sums: Tensor
    epoch: int = 0
    batch: int = 0
    epoch_seconds: float = 0.0
    train_seconds: float = 0.0
    best_epoch: int | None = None
    best_val_acc: float | None = None
    watched_acc: float | None = None
    watched_images: int | None = None
    collapsed: bool = False
    repairs: bool = False
    average: WeightAverage | None = None
    sparsity: Sparsity | None = None
    epoch_work: float | None = 0.0
    batch_sums: dict[int, Tensor] = field(default_factory=dict)
    graphs: bool | None = None
    unsaved: tuple[str, ...] = ()

    @staticmethod
    def fresh(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        memory: dict[str, Tensor],
        seed: int,
        device: torch.device,
        ema: float = 0.0,
    ) -> TrainState:
        """Return the state of a new run; `ema` is the decay of its average, 0 for none."""
        sums = torch.zeros(len(StepStats._fields), dtype=torch.float64, device=device)
        return TrainState(
            model=model,
            optimizer=optimizer,
            generator=torch.Generator(device).manual_seed(seed),
            memory=memory,
            epoch_sums=sums,
            total_sums=sums.clone(),
            average=WeightAverage(model, ema) if ema else None,
        )

    @property
    def device(self) -> torch.device:
        """Return the device on which the run trains."""
        return self.generator.device

    @property
    def evaluated(self) -> nn.Module:
        """Return the network that is scored and handed on: the average, where there is one."""
        return self.model if self.average is None else self.average.network

    @property
    def controllers(self) -> list[Controller]:
        """Return what acts on the weights, masks last: the average is to have them, too."""
        both: tuple[Controller | None, ...] = (self.average, self.sparsity)
        return [controller for controller in both if controller is not None]

    def start_from(self, path: Path) -> str:
        """Take the weights of a file or a run for a run that has not begun.

        Returns:
            A sentence that says which.

        Raises:
            UserError: they cannot be read or do not fit.
        """
        said = start_from(self.model, path)
        if self.average is not None:
            self.average.network.load_state_dict(self.model.state_dict())
        return said

    def add(self, stats: StepStats) -> None:
        """Count one more batch."""
        self.batch += 1
        self.epoch_sums += stacked(stats)

    def remember(self, stats: StepStats) -> None:
        """Keep the statistics of the batch that was counted last, for the log."""
        self.batch_sums[self.batch] = stacked(stats)

    def end_epoch(self) -> None:
        """Count one more epoch and clear its sums."""
        self.epoch += 1
        self.batch = 0
        self.epoch_seconds = self.epoch_work = 0.0
        self.total_sums += self.epoch_sums
        self.epoch_sums.zero_()
        self.batch_sums.clear()
        if self.sparsity is not None:
            self.sparsity.end_epoch()

    def end_search_epoch(self) -> None:
        """Clear the sums of an epoch that is none of the run's."""
        self.batch = 0
        self.epoch_seconds = self.epoch_work = 0.0
        self.epoch_sums.zero_()

    def begin_again(self, memory: Memory) -> None:
        """Begin with the weights of now, and a method's fresh memory."""
        self.optimizer.state.clear()
        for name, tensor in memory.items():
            self.memory[name].copy_(tensor)
        if self.average is not None:
            self.average.network.load_state_dict(self.model.state_dict())

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Have the network that is trained in the place of the whole one, where channels lack."""
        if not isinstance(self.sparsity, Channels):
            yield
            return
        whole = Trained(self.model, self.optimizer, self.average)
        try:
            with self.sparsity.at_work(whole) as small:
                self.model, self.optimizer, self.average = small
                yield
        finally:
            self.model, self.optimizer, self.average = whole

    def throw_away_copy(self, without: Container[str] = ()) -> TrainState:
        """Return a copy of all that training changes, at the beginning of the same epoch.

        Args:
            without: names of the memory that what is tried does not read; they may be large.
        """
        memory = {name: tensor for name, tensor in self.memory.items() if name not in without}
        model, optimizer, memory = copy.deepcopy((self.model, self.optimizer, memory))
        generator = torch.Generator(self.device)
        generator.set_state(self.generator.get_state())
        sums = torch.zeros_like(self.epoch_sums)
        return TrainState(model, optimizer, generator, memory, sums, sums.clone(), self.epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values only: `torch.load(weights_only=True)` reads them."""
        return {
            "model": self.evaluated.state_dict(),
            **({} if self.average is None else {"trained_model": self.model.state_dict()}),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "torch_generators": _torch_generators(self.device),
            "device": self.device.type,
            "memory": {k: v for k, v in self.memory.items() if k not in self.unsaved},
            "batch_sums": self.batch_sums,
            "graphs": self.graphs,
            **({} if self.sparsity is None else {"sparsity": self.sparsity.state_dict()}),
            **{name: getattr(self, name) for name in _TENSORS + _NUMBERS},
            **({} if self.watched_images is None else {"watched_images": self.watched_images}),
            **({"repairs": True} if self.repairs else {}),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, on this state's kind of device.

        Raises:
            UserError: the state is of another kind of device, or not one of a run like this.
        """
        here = self.device.type
        if saved.get("device", here) != here:
            raise UserError(
                f"The run was begun with device={saved['device']} and cannot go on with "
                f"device={here}, whose random numbers differ."
            )
        try:
            self._load(saved)
        except RefusedError as error:
            raise UserError(
                f"The checkpoint does not hold the state of a run like this: {error}."
            ) from error
        except Exception as error:  # torch's loaders believe what they get
            raise UserError("The checkpoint does not hold the state of a run like this.") from error

    def go_back(self, saved: dict[str, Any]) -> None:
        """Continue from an earlier state of the run; what it has cost since remains counted.

        Raises:
            UserError: as `load_state_dict`.
        """
        sums, seconds = self.total_sums + self.epoch_sums, self.train_seconds
        memory = {} if self.sparsity is None else self.sparsity.memory
        counts = {k: memory[k].clone() for k in ("counted_units", "extra_units") if k in memory}
        self.load_state_dict(saved)
        self.total_sums.copy_(sums)
        self.train_seconds = seconds
        for name, count in counts.items():
            memory[name].copy_(count)

    def fits(self, weights: object) -> bool:
        """Return whether weights from a file are finite and of the shapes of this network's."""
        own = self.evaluated.state_dict()
        return (
            isinstance(weights, dict)
            and weights.keys() == own.keys()
            and all(isinstance(theirs, Tensor) for theirs in weights.values())
            and all(weights[key].shape == ours.shape for key, ours in own.items())
            and _all_finite(weights)
        )

    def _load(self, saved: dict[str, Any]) -> None:
        for name in ("model", "trained_model", "optimizer", "memory"):
            if not _all_finite(saved.get(name)):
                raise RefusedError(f"not every number of its {name} is finite")
        for name in ("epoch_sums", "total_sums", "batch_sums"):
            if not _all_small(saved.get(name)):
                raise RefusedError(f"a number of its {name} is too large")
        for name in ("robust_fraction", OUTLIERS):
            fraction = saved["memory"].get(name, torch.zeros(()))
            if not bool(((fraction >= 0) & (fraction <= 1)).all()):
                raise RefusedError(f"its {name} is no fraction")
        self.evaluated.load_state_dict(saved["model"])
        if self.average is not None:
            self.model.load_state_dict(saved["trained_model"])
        self._load_optimizer(saved["optimizer"])
        self.generator.set_state(saved["generator"].cpu())
        for name, random in saved.get("torch_generators", {}).items():  # older ones have none
            _of_torch(self.device)[name].set_state(random.cpu())
        for name, tensor in self.memory.items():
            if name not in self.unsaved:
                _copy(saved["memory"][name], tensor)
        for name in _TENSORS:
            _copy(saved[name], getattr(self, name))
        for name in _NUMBERS:
            setattr(self, name, saved[name])
        self.watched_images = saved.get("watched_images")  # older ones have none
        if self.watched_images is not None and type(self.watched_images) is not int:
            raise ValueError("no number of images")
        self._load_batch_sums(saved.get("batch_sums", {}))
        self.repairs = saved.get("repairs", False)
        if type(self.repairs) is not bool:
            raise ValueError("neither repairs nor does not")
        if self.sparsity is not None:
            self.sparsity.load_state_dict(saved["sparsity"])
        self.epoch_work = None if self.batch else 0.0
        self.graphs = saved.get("graphs")
        if self.graphs not in (None, False, True):
            raise ValueError("neither with graphs nor without")

    def _load_batch_sums(self, saved: dict[int, Tensor]) -> None:
        """Take sums of single batches; raise ValueError for any that is not of the epoch."""
        self.batch_sums.clear()
        for number, sums in saved.items():
            if type(number) is not int or not 0 < number <= self.batch:
                raise ValueError("no batch of the epoch")
            self.batch_sums[number] = torch.empty_like(self.epoch_sums)
            _copy(sums, self.batch_sums[number])

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        """Take settings and momenta; raise ValueError for those of another optimizer."""
        groups = self.optimizer.param_groups
        before = [_kinds(group) for group in groups]
        # How updates are computed is today's choice: earlier runs were not fused.
        today = [{key: group[key] for key in _IMPLEMENTATION & group.keys()} for group in groups]
        theirs = [dict(a) | b for a, b in zip(saved["param_groups"], today, strict=True)]
        self.optimizer.load_state_dict({**saved, "param_groups": theirs})
        if [_kinds(group) for group in self.optimizer.param_groups] != before:
            raise ValueError("other settings")
        self._take_momenta()

    def _take_momenta(self) -> None:
        """Copy what was loaded to tensors in the weights' own layout.

        A fused update trusts shapes and strides: with others it would read and write out of bounds.
        Raises ValueError for momenta that are not those of this optimizer.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        held = set()
        for parameter in parameters:
            state = self.optimizer.state.get(parameter, {})
            for name, value in state.items():
                like = parameter if name != _STEP else torch.zeros((), device=parameter.device)
                state[name] = torch.empty_like(like)
                _copy(value, state[name])
            held.add(frozenset(state))
        if held not in ({frozenset()}, {_MOMENTA[type(self.optimizer)]}):
            raise ValueError("momenta of another optimizer, or of some weights only")


def _of_torch(device: torch.device) -> dict[str, torch.Generator]:
    """Return the generators that torch's functions draw from when they are given none."""
    found = {"cpu": torch.default_generator}
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        found["cuda"] = torch.cuda.default_generators[index]
    return found


def _torch_generators(device: torch.device) -> dict[str, Tensor]:
    return {name: generator.get_state() for name, generator in _of_torch(device).items()}


def _tensors(tree: object) -> Iterator[Tensor]:
    """Yield all numbers of containers."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, float):
        yield torch.tensor(tree, dtype=torch.float64)
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


def _all_finite(tree: object) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(tree))


def _all_small(tree: object) -> bool:
    """Return whether sums can be added up; NaN stands for what a method does not measure."""
    return not any(bool((tensor.abs() > _LARGEST_SUM).any()) for tensor in _tensors(tree))


def _kinds(group: dict[str, Any]) -> dict[str, type]:
    return {key: type(value) for key, value in group.items() if key != "params"}


def _copy(saved: Tensor, tensor: Tensor) -> None:
    if saved.shape != tensor.shape:  # which copy_ would stretch
        raise ValueError("a tensor of another shape")
    tensor.copy_(saved)


_LARGEST_SUM = 1e30
_IMPLEMENTATION = {"fused", "foreach", "capturable"}
_STEP = "step"  # of Adam, a count; all else is one number a weight
_MOMENTA: dict[type, frozenset[str]] = {
    torch.optim.SGD: frozenset({"momentum_buffer"}),
    torch.optim.Adam: frozenset({_STEP, "exp_avg", "exp_avg_sq"}),
}
_TENSORS = ("epoch_sums", "total_sums")
_NUMBERS = (
    "epoch",
    "batch",
    "epoch_seconds",
    "train_seconds",
    "best_epoch",
    "best_val_acc",
    "watched_acc",
    "collapsed",
)
