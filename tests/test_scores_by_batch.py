"""The scores of single batches in the log: of the right batches, whatever interrupts the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from btrain.data import Data, Split
from btrain.training import train
from btrain.training.setup import make_state
from btrain.training.state import TrainState
from steps import epoch_of
from test_training import CPU, metrics, tiny, untimed, weights


def test_every_so_many_batches_of_each_epoch_are_logged(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", "train.epochs=2", "train.score_every=2"))
    found = [[row[0] for row in line["scores"]] for line in metrics(tmp_path / "run")]
    assert found == [[1, 3, 5], [6, 8, 10]]  # five batches an epoch


def test_a_batchs_scores_are_an_epochs_of_that_batch_alone(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", "train.epochs=3", "train.score_every=1", "train.batch_size=300"))
    keys = ("score_boundary", "score_robust", "score_outlier")
    for line in metrics(tmp_path / "run"):
        ((iteration, *scores),) = line["scores"]
        assert iteration == line["epoch"]
        for ours, key in zip(scores, keys, strict=True):
            assert ours == (None if line[key] is None else pytest.approx(line[key], rel=1e-3))
    assert line["score_outlier"] < 0


def test_the_setting_changes_no_training_and_may_change(tmp_path: Path) -> None:
    train(tiny(tmp_path / "plain", "train.epochs=2"))
    train(tiny(tmp_path / "run", "train.epochs=2", "train.score_every=1"))
    lines = [{k: v for k, v in line.items() if k != "scores"} for line in metrics(tmp_path / "run")]
    assert untimed(lines) == untimed(metrics(tmp_path / "plain"))
    ours, plain = weights(tmp_path / "run"), weights(tmp_path / "plain")
    assert all(torch.equal(ours[key], plain[key]) for key in plain)
    train(tiny(tmp_path / "plain", "train.epochs=2", "train.score_every=3"))  # finished already
    assert "scores" not in metrics(tmp_path / "plain")[0]


def test_a_checkpoint_within_an_epoch_keeps_the_batches_before_it(
    tmp_path: Path, digits: Data
) -> None:
    config = tiny(tmp_path, "train.score_every=2")
    split = Split(digits.train.images[:300], digits.train.labels[:300])

    def go_on(state: TrainState, batches: int | None) -> list[list[float | None]]:
        stop = batches if batches is not None else 99
        means = epoch_of(config, state, split, stopped=lambda: state.batch >= stop)
        assert means is not None
        scores: list[list[float | None]] = means["scores"]
        return scores

    whole = go_on(make_state(config, digits, CPU), None)
    first, second = make_state(config, digits, CPU), make_state(config, digits, CPU)
    assert go_on(first, 4) == whole[:2]
    second.load_state_dict(first.state_dict())
    assert go_on(second, None) == whole
    assert [row[0] for row in whole] == [1, 3, 5]
    saved = second.state_dict() | {"batch_sums": {9: torch.zeros(18)}}
    with pytest.raises(Exception, match="does not hold the state"):
        first.load_state_dict(saved)
