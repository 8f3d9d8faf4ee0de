"""Robust Bird's search: dense epochs ahead of a run, until its ticket is drawn."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields, replace

from btrain.attacks.fast_paths import FastPaths
from btrain.controllers.sparsity.ticket import RobustBird
from btrain.data import Data
from btrain.data.augmentation import batch_slices
from btrain.methods.make import make_method
from btrain.methods.statistics import UNITS
from btrain.processes.world import World
from btrain.settings import AllocatorName, AttackMode, Config, DefenseName, Score, Start
from btrain.settings.method import BTConfig, PGDConfig, RivalConfig, UniformConfig
from btrain.settings.names import SearchName
from btrain.settings.sparsity import RobustBirdConfig
from btrain.terminal import counted
from btrain.training.epochs import check_weights, train_epoch
from btrain.training.lines import tell_masks
from btrain.training.schedule import Plan, make_plan, step_decay
from btrain.training.setup import known_of
from btrain.training.state import TrainState

log = logging.getLogger("btrain")

_FALL = 0.1  # of the learning rate at each milestone
_FGSM = 1.25  # of ε is its step


def search(
    config: Config,
    state: TrainState,
    data: Data,
    *,
    paths: FastPaths,
    world: World,
    stopped: Callable[[], bool],
    save: Callable[[], None],
) -> None:
    """Train until the ticket is drawn, the time is up, or the run is stopped.

    Behind the draw the state is that of a run that has not begun, but for the masks, the weights
    and the generator. Everything the search costs counts as the run's.

    Args:
        save: called behind each epoch.
    """
    bird, wanted = state.sparsity, config.sparsity
    assert isinstance(bird, RobustBird)
    assert isinstance(wanted, RobustBirdConfig)
    method_config = search_method(config, wanted.search)
    method = make_method(
        method_config, state.device, paths=paths, known=known_of(data), world=world
    )
    plan = search_plan(method_config, wanted)
    batches = len(batch_slices(len(data.train), plan.batch_size))
    while True:
        means = train_epoch(
            state, data.train, method, replace(plan, before=bird.searched), see=paths.view,
            tick=lambda: None, show=lambda means: None, stopped=stopped, world=world,
            controllers=(),
        )  # fmt: skip
        if means is not None:
            check_weights(state, data.train)
        if means is None or state.batch < batches:
            return
        bird.spend(float(state.epoch_sums[UNITS]), share=1.0)
        epoch = bird.searched + 1
        apart = bird.look()
        log.info("search, epoch %d: loss %.4f%s", epoch, means["loss"], _apart(apart, wanted))
        state.end_search_epoch()
        drawn = not bird.searching
        if drawn:
            state.begin_again(make_method(config, state.device, known=known_of(data)).memory(
                data, state.device
            ))  # fmt: skip
            _tell(bird, apart)
        save()
        if drawn:
            return


def search_method(config: Config, name: SearchName) -> Config:
    """Return the run's settings with the search's way of training: cross-entropy, dense."""
    defense = PGDConfig(name=DefenseName.pgd)
    attack = replace(config.attack.unkept(), augmix=None, mode=AttackMode.eval)
    if name is SearchName.fgsm:
        attack = replace(attack, steps=1, step_size=_FGSM * attack.epsilon, start=Start.uniform)
    steps = 0 if name is SearchName.plain else attack.steps
    common = {item.name: getattr(config.bt, item.name) for item in fields(BTConfig)}
    common |= {"name": AllocatorName.uniform, "n_b": steps, "step_size_b": attack.step_size}
    common |= {"pool": 1, "forward_unperturbed": False, "score": Score.fresh}
    return replace(
        config,
        defense=defense,
        attack=attack,
        bt=UniformConfig(**common),
        rival=RivalConfig(),
        recipe=replace(config.recipe, repair_steps=0),
    )


def search_plan(config: Config, wanted: RobustBirdConfig) -> Plan:
    """Return the portions and the learning rate of the search."""
    milestones = wanted.search_milestones
    factors = [_FALL ** (number + 1) for number in range(len(milestones))]
    return replace(
        make_plan(config),
        epochs=wanted.search_epochs,
        schedule=step_decay(milestones, factors),
        score_every=None,
        skip=0.0,
    )


def _apart(apart: float | None, wanted: RobustBirdConfig) -> str:
    if apart is None:
        return ""
    of_kept = apart / (2 * wanted.density)
    return f", masks up to {apart:.3f} apart ({100 * of_kept:.0f} % of what they keep)"


def _tell(bird: RobustBird, apart: float | None) -> None:
    after = counted(bird.searched, "epoch")
    if apart is None or apart > bird.ticket.threshold:
        log.warning(
            "The search is over without a ticket after %s; the largest weights of now stay.", after
        )
    else:
        log.info("The ticket is drawn after %s.", after)
    tell_masks(bird)
