"""The epochs of a run, batch after batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from btrain.attacks.pgd import evaluation_mode
from btrain.controllers.base import Controller
from btrain.data import Split, batches
from btrain.data.augmentation import Batch, batch_slices, to_unit
from btrain.errors import UserError
from btrain.evaluation.result import hardly_above
from btrain.methods.base import Method
from btrain.methods.bullettrain import OUTLIERS, SCORES, WEIGHTS
from btrain.methods.statistics import StepStats, averages, scores_by_batch
from btrain.methods.verified import MIX
from btrain.processes.world import ALONE, World
from btrain.terminal import counted
from btrain.training.safety.finite import FiniteCheck, NotFiniteError, Snapshot
from btrain.training.safety.inputs import InputGuard
from btrain.training.schedule import Plan
from btrain.training.state import TrainState
from btrain.training.update import train_batch

Averages = dict[str, Any]

See = Callable[[nn.Module], nn.Module]
"""A network -> the network as a step sees it, in bf16 perhaps; see `attacks.fast_paths`."""

_HEARTBEAT_SECONDS = 1.0
_CHECKED = 64  # training images
_APART = 500_009  # the random numbers that leave examples out from those that order them


@dataclass
class Heartbeat:
    """A look at the running sums once a second, for the progress bar and for NaN and infinity.

    Every look is a copy from the device; in between, the first bad step is remembered there, and
    here the random state ahead of each step, from which its batch can be drawn again.
    """

    show: Callable[[Averages], None]
    check: FiniteCheck
    draw: Callable[[int, Tensor], Batch]
    """(step, random state) -> the batch of that step"""
    random_states: dict[int, Tensor] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def step(self, state: TrainState) -> None:
        """Note that a batch is done."""
        if time.perf_counter() - self.last >= _HEARTBEAT_SECONDS:
            self.look(state)

    def look(self, state: TrainState) -> Averages:
        """Return the epoch's averages so far.

        Raises:
            NotFiniteError: logits, the loss or a gradient were not.
        """
        if found := self.check.found():
            self._stop(state, *found)
        self.random_states.clear()
        means = averages(state.epoch_sums)
        if means["loss"] is not None:
            self.show(means)
        self.last = time.perf_counter()
        return means

    def _stop(self, state: TrainState, step: int, what: str) -> None:
        x, labels, indices = self.draw(step, self.random_states[step])[:3]
        raise NotFiniteError(
            f"There is a number that is not finite in {what} in epoch {state.epoch + 1}, step "
            f"{step}; a smaller recipe.lr may help.",
            {
                "epoch": state.epoch + 1,
                "step": step,
                "tensor": what,
                "x": x.cpu(),
                "labels": labels.cpu(),
                "indices": indices.cpu(),
                "generator": self.random_states[step],
            },
        )


def epoch_order(examples: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation of an epoch, a function of seed and epoch alone. -> (examples,)"""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(examples, generator=generator)


def stand_ins(score: Tensor, share: float, batch_size: int, seed: int, epoch: int) -> Tensor:
    """Return how many examples each stands for in an epoch, 0 for one that is left out.

    An example is far from the boundary if it was predicted right and scored above the median. Of
    those a share is left out, drawn by seed and epoch, or less, so that whole batches remain; the
    others stand for them by inverse-probability weights, so that no sum over the epoch is biased
    (Qin et al., "InfoBatch", leave out those with the smallest loss). The weights add up to n.
    (n,) -> (n,)
    """
    far = (score > score.median().clamp(min=0)).nonzero().flatten()
    many = math.ceil((len(score) - int(share * len(far))) / batch_size)
    left_out = max(len(score) - many * batch_size, 0)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch + _APART) % 2**63)
    drawn = torch.randperm(len(far), generator=generator)[:left_out].to(score.device)
    weight = torch.ones_like(score)
    weight[far] = len(far) / max(len(far) - left_out, 1)
    weight[far[drawn]] = 0.0
    return weight


def weights_of_epoch(state: TrainState, labels: Tensor, plan: Plan) -> Tensor | None:
    """Return how many examples each stands for in the epoch under way, (n,); None for one each.

    That is chosen where an epoch begins and kept in the state's memory, for one that is resumed.
    Nobody is left out in the first epoch, which no scores precede, while the network hardly does
    better than a constant prediction, and in the last share `plan.skip_last` of the run. With a
    guard nobody is left out in an epoch that begins with more outliers, either, and in the first
    one behind the warm-up, for no outliers have been counted then.
    """
    if not plan.skip:
        return None
    weight = state.memory[WEIGHTS]
    if state.batch == 0:
        if _leaves_out(state, labels, plan):
            score, size = state.memory[SCORES], plan.batch_size
            weight.copy_(stand_ins(score, plan.skip, size, plan.seed, state.epoch))
        else:
            weight.fill_(1.0)
    return weight


def _leaves_out(state: TrainState, labels: Tensor, plan: Plan) -> bool:
    """Return whether the epoch that begins leaves examples out."""
    if not plan.may_leave_out(state.epoch):
        return False
    if plan.guard < 1 and state.memory[OUTLIERS] > plan.guard:
        return False
    right = 100 * (state.memory[SCORES] > 0).float().mean().item()
    guessing = 100 * labels.bincount().max().item() / len(labels)
    return not hardly_above(right, guessing)


def fewest_images(examples: int, plan: Plan, outliers: float = 0.0) -> list[int]:
    """Return how many images each epoch of a run takes where it leaves out as many as it may.

    Args:
        outliers: F_O, of which a guard that allows less keeps everybody.
    """
    all_right = torch.arange(1.0, examples + 1)
    weight = stand_ins(all_right, plan.skip, plan.batch_size, plan.seed, 0)
    fewer = int((weight > 0).sum())
    return [
        fewer if plan.may_leave_out(epoch) and outliers <= plan.guard else examples
        for epoch in range(plan.epochs)
    ]


def why_nobody_is_left_out(examples: int, plan: Plan) -> str | None:
    """Return why a run leaves no image out though `train.skip` asks for it, or None.

    The reason is a setting that alone keeps all of them, or the size of a batch.
    """
    if not plan.skip or min(fewest_images(examples, plan)) < examples:
        return None

    def ever(plan: Plan) -> bool:
        return any(map(plan.may_leave_out, range(plan.epochs)))

    if ever(plan):
        most = int(plan.skip * (examples // 2))
        return (
            f"it would spare at most {counted(most, 'image')} of {examples:,} in an epoch, which "
            f"is rounded up to whole batches of {plan.batch_size} and so has all of them"
        )
    if plan.epochs == 1:
        return "the first epoch takes every image, for no scores precede it, and train.epochs=1"
    if ever(replace(plan, skip_last=0.0)):
        return (
            f"train.skip_last={plan.skip_last:g} keeps every image in all epochs that could leave "
            "some out, which the first never does"
        )
    return (
        f"with bt.guard={plan.guard:g} an epoch does so only behind one that counts outliers, the "
        f"first of which would be epoch {plan.plain_epochs + 1} of {plan.epochs} "
        f"(bt.warmup_epochs={plan.plain_epochs})"
    )


def batches_in(state: TrainState, split: Split, plan: Plan) -> int:
    """Return how many batches the epoch under way has."""
    weight = weights_of_epoch(state, split.labels, plan)
    used = len(split) if weight is None else int((weight > 0).sum())
    return len(batch_slices(used, plan.batch_size))


def train_epoch(
    state: TrainState,
    split: Split,
    method: Method,
    plan: Plan,
    *,
    see: See,
    tick: Callable[[], None],
    show: Callable[[Averages], None],
    stopped: Callable[[], bool] = lambda: False,
    watch: InputGuard | None = None,
    world: World = ALONE,
    controllers: Sequence[Controller] | None = None,
) -> Averages | None:
    """Train from `state.batch` to the end of the epoch, to the time limit or until stopped.

    Args:
        method: what is done with a batch.
        see: the network as a step sees it.
        tick: called after each batch.
        show: called about once a second with the epoch's averages so far.
        stopped: asked ahead of each batch.
        watch: looks at the epoch's last batch.
        world: the processes that train together; they stop together, by the clock of the first.
        controllers: what acts on the weights; None for all that the state has.

    Returns:
        The epoch's averages with the last learning rate, F_R and the seconds spent in the epoch,
        and `scores`, those of single batches, where the plan asks for them; None when it was
        stopped or the time was up before its first batch.

    Raises:
        NotFiniteError: logits, the loss or a gradient are NaN or infinite, and such steps are not
            skipped.
        UserError: every step of the epoch was skipped.
    """
    device = split.images.device
    epoch = plan.before + state.epoch
    order = epoch_order(len(split), plan.seed, epoch).to(device)
    weight = weights_of_epoch(state, split.labels, plan)
    if weight is not None:
        order = order[weight[order] > 0]
    steps_per_epoch = len(batch_slices(len(order), plan.batch_size))
    unskipped = len(batch_slices(len(split), plan.batch_size))
    began, worked, before = _clock(device), work_seconds(device), state.train_seconds
    several, first = (None if world.size == 1 else world), world.first

    def draw(begin: int) -> Iterator[Batch]:
        return batches(
            split,
            order,
            plan.batch_size,
            crop_padding=plan.crop_padding,
            flip=plan.flip,
            generator=state.generator,
            first=begin,
            weight=weight,
        )

    def draw_again(number: int, random_state: Tensor) -> Batch:
        state.generator.set_state(random_state)
        return next(draw(number - 1))

    def over() -> bool:
        limit, now = plan.max_seconds, time.perf_counter()
        late = first and limit is not None and before + now - began >= limit
        here = stopped() or late
        return here if several is None else several.largest(int(here)) > 0

    with state.at_work():
        acting = state.controllers if controllers is None else controllers
        heartbeat = Heartbeat(show, FiniteCheck(state.model, device), draw_again)
        state.model.train()
        if state.batch == 0 and plan.skip_nonfinite:
            state.memory["skipped"].zero_()
        drawn = draw(state.batch)
        while state.batch < steps_per_epoch and not over():
            done = epoch * unskipped + state.batch
            part = epoch * steps_per_epoch + state.batch
            lr = plan.lr * plan.schedule(part / (plan.epochs * steps_per_epoch))
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            if first:
                heartbeat.random_states[state.batch + 1] = state.generator.get_state()
            batch = next(drawn)
            last = state.batch + 1 == steps_per_epoch
            with watch.over(state.model, batch.x) if watch is not None and last else nullcontext():
                _take(state, method, batch, heartbeat.check, plan, done, see, several, acting)
            if first:
                heartbeat.step(state)
            tick()
    elapsed = world.told(_clock(device) - began)
    state.train_seconds += elapsed
    state.epoch_seconds += elapsed
    if state.epoch_work is not None:
        state.epoch_work += work_seconds(device) - worked
    if state.batch == 0:
        return None
    # The others wait for the first, which keeps a batch that ends the run.
    means: Averages = heartbeat.look(state) if world.first else averages(state.epoch_sums)
    means |= {
        "lr": state.optimizer.param_groups[0]["lr"],
        "robust_fraction": float(state.memory["robust_fraction"]),
        "train_seconds": state.epoch_seconds,
    }
    if plan.score_every is not None:
        means["scores"] = scores_by_batch(state.batch_sums, state.epoch * unskipped)
    if weight is not None:
        means["left_out"] = float((weight == 0).float().mean())
    if MIX in state.memory:
        means[MIX] = float(state.memory[MIX])
    return means | (_skipped(state) if plan.skip_nonfinite else {})


def _take(
    state: TrainState,
    method: Method,
    batch: Batch,
    check: FiniteCheck,
    plan: Plan,
    done: int,
    see: See,
    several: World | None,
    controllers: Sequence[Controller],
) -> None:
    """Take a step after `done` others of the run; undo and count it if it is to be skipped."""
    skip = plan.skip_nonfinite
    memories = [state.memory, *(controller.memory for controller in controllers)]
    before = None
    if skip:
        before = Snapshot(
            state.model, state.optimizer, *memories,
            by_example=method.by_example, indices=batch.indices,
        )  # fmt: skip
    network = see(state.model if several is None else several.wrapped(state.model))
    stats = train_batch(
        network, state.optimizer, method, batch, state.memory, state.generator, several,
        controllers, plan.clip_norm,
    )  # fmt: skip
    bad = check.see(state.batch + 1, stats)
    state.optimizer.zero_grad(set_to_none=True)  # not to be held through the next attack
    if before is not None:
        before.undo_where(bad)
        check.forget()
        state.memory["skipped"] += bad
        stats = StepStats._make(torch.where(bad, torch.zeros_like(v), v) for v in stats)
    for controller in controllers:
        controller.after_batch(done, stats, bad if skip else None)
    state.add(stats)
    if plan.score_every is not None and (state.batch - 1) % plan.score_every == 0:
        state.remember(stats)


def _skipped(state: TrainState) -> Averages:
    skipped = int(state.memory["skipped"])
    if skipped == state.batch:
        raise UserError(
            f"Every step of epoch {state.epoch + 1} was skipped for numbers that are not finite; "
            "a smaller recipe.lr may help."
        )
    return {"skipped_steps": skipped}


def check_weights(state: TrainState, split: Split) -> None:
    """Look at the weights: the last update's loss was taken before it.

    Raises:
        UserError: weights, BatchNorm statistics, or the logits of some training images are not
            finite.
    """
    with evaluation_mode(state.model), torch.no_grad():
        logits = state.model(to_unit(split.images[:_CHECKED]))
    tensors = {**state.model.state_dict(), "the logits": logits}
    if state.average is not None:
        averages = state.average.network.state_dict()
        tensors |= {f"the average of {name}": tensor for name, tensor in averages.items()}
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()])
    if not finite.all():
        name = list(tensors)[finite.tolist().index(False)]
        raise UserError(
            f"The weights are ruined after epoch {state.epoch + 1}, step {state.batch}: there is "
            f"a number that is not finite in {name}; a smaller recipe.lr may help."
        )


def work_seconds(device: torch.device) -> float:
    """Return the device's own time: a GPU's, else this process' CPU time in all threads.

    CPU time does not count what other processes take.
    """
    return _clock(device) if device.type == "cuda" else time.process_time()


def _clock(device: torch.device) -> float:
    """Return seconds, with the device's work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
