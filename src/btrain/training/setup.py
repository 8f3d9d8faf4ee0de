"""The way from a configuration to the state of a run that has not begun."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from btrain.attacks.kept import KNOWN, STORE
from btrain.build import (
    check_network,
    check_size,
    doubts_of_network,
    free_memory,
    make_model,
)
from btrain.controllers.sparsity.controller import Sparsity
from btrain.controllers.sparsity.make import Length, make_sparsity
from btrain.data import Data
from btrain.data.augmentation import batch_slices
from btrain.errors import UserError
from btrain.evaluation.pgd import farthest, threat_of
from btrain.methods.bullettrain import BulletTrain
from btrain.methods.make import Known, make_ball, make_defense, make_method, make_store
from btrain.methods.own_parts import doubts_of_ball, doubts_of_defense
from btrain.methods.verified import Verified
from btrain.precision import to_channels_last
from btrain.processes.world import World
from btrain.settings import (
    AttackMode,
    Config,
    OnNonfinite,
    OptimizerName,
    RecipeConfig,
    Score,
    Store,
)
from btrain.settings.checks import no_farther
from btrain.settings.method import (
    BulletTrainConfig,
    OwnAttackConfig,
    OwnDefenseConfig,
    VerifiedConfig,
)
from btrain.settings.names import MixForm
from btrain.terminal import counted, plural, sized
from btrain.training.epochs import why_nobody_is_left_out
from btrain.training.schedule import make_plan, updates_per_epoch
from btrain.training.state import TrainState
from btrain.verify import losses

_NEED_ONE_PROCESS = ("one_process", "graphs")
"""Kinds of `settings.method.Choice`."""


def check_shares(config: Config, examples: int, world: World) -> None:
    """Make sure that this training, on so many examples, can be done by several processes.

    Raises:
        UserError: it cannot; the sentence names the key.
    """
    if world.size == 1:
        return
    for kind in _NEED_ONE_PROCESS:
        if (written := config.chosen(kind)) is not None:
            raise UserError(f"{written} needs one process; with torchrun there are {world.size}.")
    sizes = [part.stop - part.start for part in batch_slices(examples, config.train.batch_size)]
    if min(sizes) < 2 * world.size:
        raise UserError(
            f"train.batch_size={config.train.batch_size} leaves a batch of {min(sizes)} of "
            f"{counted(examples, 'example')}; {world.size} processes need two examples each "
            "of every batch."
        )


def check_radius(config: Config, data: Data) -> None:
    """Raise UserError for an ε beyond what any change of such an image is long."""
    most = farthest(threat_of(config.attack, known_of(data)), data.shape)
    for key in ("attack", "eval"):
        no_farther(f"{key}.epsilon", getattr(config, key).epsilon, most)


def make_state(config: Config, data: Data, device: torch.device) -> TrainState:
    """Return the state of a run that has not begun."""
    check_size(config.model, len(data.classes), data.shape)
    torch.manual_seed(config.seed)
    model = make_model(config.model, len(data.classes), data.shape).to(device)
    if isinstance(config.defense, VerifiedConfig) and config.defense.shi_init:
        losses.initialise(model)
    check_network(config.model, model, data)
    if config.train.channels_last:
        model = to_channels_last(model)
    optimizer = make_optimizer(config.recipe, model)
    method = make_method(config, device, known=known_of(data))
    if isinstance(method, Verified):
        method.check(model, data.shape)
    check_store(config, data, device)
    memory = method.memory(data, device)
    if config.train.on_nonfinite is OnNonfinite.skip:
        memory["skipped"] = torch.zeros((), dtype=torch.int64, device=device)
    state = TrainState.fresh(model, optimizer, memory, config.seed, device, config.recipe.ema)
    if not config.attack.checkpoint_store:
        state.unsaved = (STORE, KNOWN)
    state.sparsity = sparsity_of(config, state, data)
    return state


def doubts(config: Config, state: TrainState, data: Data) -> list[str]:
    """Return a sentence for all that can be trained with, but hardly as it is meant.

    There is none where a run goes on. The random states of Python, NumPy and torch stay as they
    were.
    """
    if state.epoch or state.batch:
        return []
    known, attack, defense = known_of(data), config.attack, config.defense
    with _random_states_kept(state.device):
        found = doubts_of_network(config.model, state.model, data)
        if isinstance(defense, OwnDefenseConfig):
            made = make_defense(defense, known)
            found += doubts_of_defense(made, defense.factory, known)
        if isinstance(attack, OwnAttackConfig):
            found += doubts_of_ball(make_ball(attack, 1.0, known), attack.factory, known)
        found += _doubts_of_settings(config, state, data)
    return found


def _doubts_of_settings(config: Config, state: TrainState, data: Data) -> list[str]:
    """Return a sentence for each setting that does nothing beside the others, or harm."""
    bt, train, attack, found = config.bt, config.train, config.attack, []
    if isinstance(bt, BulletTrainConfig) and bt.guards_nothing and not train.skip:
        found.append(
            f"bt.guard={bt.guard:g} changes nothing here: it lifts bt.robust_share and train.skip, "
            "which spare nobody, and gives outliers bt.guard_steps, which are bt.n_o."
        )
    if (why := why_nobody_is_left_out(len(data.train), make_plan(config))) is not None:
        found.append(f"train.skip={train.skip:g} leaves nobody out: {why}.")
    if bt.n_b > 0 and attack.epsilon_warmup_epochs >= train.epochs:
        found.append(
            f"attack.epsilon_warmup_epochs={attack.epsilon_warmup_epochs} is not below "
            f"train.epochs={train.epochs}: no epoch attacks at the whole ε, the last one has "
            f"{100 * attack.share(train.epochs - 1):.0f} % of it."
        )
    defense = config.defense
    if isinstance(defense, VerifiedConfig) and defense.k is not None:
        batches = math.ceil(len(data.train) / train.batch_size)
        if defense.k < batches and defense.form is MixForm.convex and defense.alpha == 1:
            found.append(
                f"defense.k={defense.k} leaves {batches - defense.k} of {batches} batches without "
                "bounded images, from which nothing is learnt with defense.alpha=1."
            )
    shares = bt.n_b > 0 and bt.score is Score.shared and attack.mode is AttackMode.eval
    if shares and _normalises(state.model):
        method = make_method(config, state.device, known=known_of(data))
        uses = []
        if isinstance(method, BulletTrain):
            uses += ["examples are scored"] if method.allocator.needs_scores else []
            uses += ["the attack's target is made"] if method.defense.inner_reads_clean else []
        if uses:
            found.append(
                f"bt.score=shared: {' and '.join(uses)} by BatchNorm's statistics of the batch, "
                "while the attack is made in eval mode, which cost two points of robust accuracy "
                "where it was measured; bt.score=fresh takes a forward pass more."
            )
    return found


def _normalises(network: nn.Module) -> bool:
    """Return whether a network has BatchNorm."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())


@contextmanager
def _random_states_kept(device: torch.device) -> Iterator[None]:
    """Restore the global random states of Python, NumPy and torch afterwards."""
    ours, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)


def check_store(config: Config, data: Data, device: torch.device) -> None:
    """Raise UserError for kept starts that the device has no memory for."""
    size, free = store_bytes(config, data), free_memory(device)
    if size is not None and free is not None and size > free:
        images, shape = len(data.train), "×".join(map(str, data.shape))
        smaller = "" if config.attack.store is Store.int8 else "attack.store=int8 or "
        raise UserError(
            f"attack.start=kept needs {sized(size)} for its store ({images:,} "
            f"{plural(images, 'image')} of {shape} in {config.attack.store.name}), more than the "
            f"{sized(free)} that {device} has left; {smaller}fewer training images need less."
        )


def store_bytes(config: Config, data: Data) -> int | None:
    """Return the size of the store of kept starts; None without one."""
    store = make_store(config.attack)
    return None if store is None else store.nbytes(data)


def notes_on_store(config: Config, data: Data, state: TrainState) -> list[str]:
    """Return sentences for the log on the store of kept starts, if there is one."""
    size, saved = store_bytes(config, data), config.attack.checkpoint_store
    if size is None:
        return []
    where = "also in every checkpoint" if saved else "and is in no checkpoint"
    notes = [f"The store of kept starts takes {sized(size)}, {where}."]
    if not saved and (state.epoch or state.batch):
        notes.append(
            "It is empty now, for the run goes on from a checkpoint: every example's next attack "
            "begins as its first did."
        )
    return notes


def sparsity_of(config: Config, state: TrainState, data: Data) -> Sparsity | None:
    """Return what masks a network whose training has not begun, and mask it."""
    return make_sparsity(
        config.sparsity,
        state.model,
        data,
        beside=[] if state.average is None else [state.average.network],
        length=Length(config.train.epochs, updates_per_epoch(config, len(data.train))),
        seed=config.seed,
    )


def known_of(data: Data) -> Known:
    """Return what own parts may want to know of the data."""
    return {"classes": len(data.classes), "shape": data.shape}


def make_optimizer(recipe: RecipeConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the recipe's optimizer of all weights; fused, so that Adam counts on the device."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if recipe.optimizer is OptimizerName.adam:
        return torch.optim.Adam(
            trained,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
    return torch.optim.SGD(
        trained,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        fused=True,
    )
