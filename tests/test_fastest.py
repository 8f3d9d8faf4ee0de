"""experiment=fastest: settings without a data set, which every data set's recipe takes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from btrain.settings import OptimizerName, ScheduleName, Score
from btrain.training import train
from composing import compose
from test_training import metrics

HERE = {"imagefolder": ["dataset.root=photos"]}


@pytest.mark.parametrize("dataset", ["mnist", "digits", "cifar10", "cifar100", "imagefolder"])
def test_follows_the_recipe_of_the_data_set(dataset: str) -> None:
    options = [f"dataset={dataset}", *HERE.get(dataset, [])]
    plain, fastest = compose(options), compose(["experiment=fastest", *options])
    assert fastest.dataset == plain.dataset
    assert fastest.recipe.name == plain.recipe.name
    assert fastest.recipe.lr == plain.recipe.lr
    assert fastest.recipe.schedule is ScheduleName.cyclic
    assert fastest.train.epochs == math.ceil(plain.train.epochs / 1.5)
    assert fastest.train.batch_size == plain.train.batch_size // 2
    assert fastest.bt.step_size_b == pytest.approx(1.7 * plain.attack.epsilon / fastest.bt.n_b)


@pytest.mark.parametrize("words", [["fastest"], ["cheap_bullettrain", "bt.score=fresh"], ["demo"]])
def test_a_recipe_with_adam_has_no_nesterov(words: list[str]) -> None:
    name, *more = words
    words = [f"experiment={name}", "dataset=mnist_sample", "model=small_cnn", "defense=pgd", *more]
    recipe, plain = compose(words).recipe, compose(["dataset=mnist_sample", "defense=pgd"]).recipe
    assert (recipe.optimizer, recipe.lr) == (plain.optimizer, plain.lr)
    assert recipe.optimizer is OptimizerName.adam and not recipe.nesterov
    sgd = compose([*words, "recipe.optimizer=sgd"]).recipe
    assert sgd.nesterov and sgd.momentum == 0.9
    assert not compose([*words, "recipe.optimizer=sgd", "recipe.momentum=0"]).recipe.nesterov


@pytest.mark.parametrize("dataset", ["mnist_sample", "digits", "cifar10"])
def test_the_rival_has_the_same_recipe_everywhere_but_for_the_repair(dataset: str) -> None:
    rival = compose(["experiment=cheap_rival", f"dataset={dataset}", "model=small_cnn"]).recipe
    ours = compose(["experiment=cheap_bullettrain", f"dataset={dataset}", "model=small_cnn"]).recipe
    assert rival == replace(ours, repair_steps=1)


def test_cheapest_is_the_rival_in_fewer_epochs_and_ends_ahead_of_a_collapse() -> None:
    rival, cheapest = (compose([f"experiment={name}"]) for name in ("cheap_rival", "cheapest"))
    recipe = replace(rival.recipe, early_stop_on_collapse=True)
    train = replace(rival.train, epochs=math.ceil(rival.recipe.epochs / 2.5))
    assert replace(cheapest, run=rival.run) == replace(rival, recipe=recipe, train=train)


def test_mnists_own_differs_in_the_allocation_alone() -> None:
    own = compose(["experiment=fastest_mnist"])
    fastest = compose(["experiment=fastest", "dataset=mnist", "model=small_cnn"])
    bt = replace(fastest.bt, n_r=0, score=Score.shared)
    assert replace(own, run=fastest.run) == replace(fastest, bt=bt)


def test_learns_digits_for_a_fraction_of_the_work(tmp_path: Path) -> None:
    config = compose(
        ["experiment=fastest", "dataset=digits", "model=small_cnn", "model.width=8",
         "train.epochs=6", "eval.steps=5", "device=cpu", f"run.dir={tmp_path}"]
    )  # fmt: skip
    summary = train(config)
    assert summary["clean_acc"] > 70
    assert summary["robust_acc"] > 30
    assert summary["speedup_flops"] > 2.5
    rates = [line["lr"] for line in metrics(tmp_path)]
    assert max(rates) < config.recipe.lr
    assert rates[-1] < 0.05 * max(rates)
