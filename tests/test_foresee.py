"""What `btrain plan` foresees is what a run then takes."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch

from btrain.cli import main
from btrain.data import load
from btrain.settings import DatasetName
from btrain.settings.run import IMAGES
from btrain.training import train
from btrain.training.foresee import foresee
from composing import compose

WORDS = ["dataset=digits", "model=small_cnn", "model.width=4", "dataset.train_examples=200",
         "train.batch_size=20", "train.epochs=2", "attack.steps=3", "device=cpu"]  # fmt: skip


def test_work_and_steps_are_those_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = foresee(compose([*WORDS, "bt=uniform"]))
    assert main(["plan", *WORDS, "bt=uniform"]) == 0
    page = capsys.readouterr().out
    assert "2 epochs of 10 batches, 20 in all" in page and "boundary" not in page
    assert "held by this whole process" in page and "jobs" not in page
    assert not list(tmp_path.iterdir())
    assert main(["train", *WORDS, "bt=uniform", "eval.steps=0", "run.dir=run"]) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert told.flops == pytest.approx(summary["flops"], rel=1e-6)
    size = Path("run/checkpoints/last.pt").stat().st_size
    assert told.checkpoint == pytest.approx(size, rel=0.3)
    assert 0.1 * told.seconds < summary["train_seconds"] < 10 * told.seconds


def test_the_papers_shares_are_assumed_where_they_matter() -> None:
    plain, ours = (foresee(compose([*WORDS, f"bt={bt}"])) for bt in ("uniform", "bullettrain"))
    assert ours.by_paper and not plain.by_paper
    # An attack step is two passes, a training pass three: by hand, 3 steps for .28 of the examples
    # and 2 for .54, whose adversarial passes .18 do without, one pass to score all.
    by_hand = (2 * (3 * 0.28 + 2 * 0.54) + 1 + 3 + 3 * 0.82) / (2 * 3 + 1 + 6)
    assert ours.flops / plain.flops == pytest.approx(by_hand)


def test_a_sweep_is_told_in_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--multirun", *WORDS, "bt=uniform", "train.epochs=1,3"]) == 0
    out, err = capsys.readouterr()
    assert "Launching 2 jobs" in err and not list(tmp_path.iterdir())
    *jobs, _, total = out.splitlines()
    work = [float(line.split()[1]) for line in jobs if line.startswith("work")]
    disk = [line.split()[1] for line in jobs if line.startswith("disk")]
    assert len(work) == 2 and work[1] == pytest.approx(3 * work[0], rel=0.01)
    assert total.startswith("in all   2 jobs: ") and disk[0] == disk[1]
    assert float(total.split(", ")[1].split()[0]) == pytest.approx(sum(work), rel=0.01)
    assert float(total.split(", ")[2].split()[0]) == pytest.approx(6 * float(disk[0]), abs=3)


def test_memory_is_that_of_the_job_and_not_of_those_before() -> None:
    torch.ones(100_000_000)  # which is gone again
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = foresee(compose([*WORDS, "train.epochs=1"]))
    assert "1 epoch of 10 batches" in told.sentences()
    if told.alone:
        assert told.memory < peak - 2e8
    else:  # what no Linux tells
        assert "since it began" in told.sentences()


@pytest.mark.parametrize("size", [500, 100])
def test_an_epoch_of_one_or_two_batches_is_timed_again_and_again(size: int) -> None:
    told = foresee(compose([*WORDS, f"train.batch_size={size}", "bt=uniform"]))
    whole = foresee(compose([*WORDS, "bt=uniform"]))
    assert told.batches == (2 if size == 100 else 1) and told.timed >= told.batches
    assert told.flops == pytest.approx(whole.flops, rel=1e-6) and told.seconds > 0


def test_what_would_be_downloaded_is_planned_on_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "dataset=mnist", f"dataset.root={tmp_path / 'none'}", "model=small_cnn",
             "model.width=2", "bt=uniform", "train.batch_size=64", "device=cpu"]  # fmt: skip
    assert main([*words, "train.epochs=2"]) == 0
    out, err = capsys.readouterr()
    assert "2 epochs of 938 batches" in out  # 60,000 images
    assert "noise of mnist's size and shape, which is not here yet" in out
    assert "Downloading" not in out + err and not list(tmp_path.iterdir())
    assert main([*words, "dataset.download=false"]) == 1
    assert "or set dataset.download=true" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["digits", "mnist_sample"])
def test_the_numbers_of_images_are_known(name: str) -> None:
    data = load(name, Path("unused"), device=torch.device("cpu"))
    assert (len(data.train), len(data.test)) == IMAGES[DatasetName(name)]


def test_images_that_are_left_out_are_not_reckoned_with() -> None:
    words = [*WORDS, "bt=uniform", "train.epochs=5", "train.skip_last=0.2", "train.skip=0.6"]
    whole = foresee(compose([*words[:-2], "train.epochs=5"]))
    told = foresee(compose([*words, "attack.start=kept", "attack.store=bf16"]))
    # Of 200 images 60 of the far half in the three epochs between the first and the last.
    assert told.flops / whole.flops == pytest.approx(1 - 3 * 60 / (5 * 200))
    page = told.sentences()
    assert "5 epochs of 10 batches, 41 to 50 in all, by how many images train.skip" in page
    assert "with as many left out as may be" in page
    assert "starts   26 kB of kept starts on cpu, in every checkpoint" in page
    assert whole.fewest == 50 and "starts" not in whole.sentences()


@pytest.mark.parametrize("first", ["bt.warmup_epochs=1", "bt.score=last"])
def test_epochs_that_cost_more_at_first_are_told(tmp_path: Path, first: str) -> None:
    words = [*WORDS, "bt=random", "bt.fractions=[0.2,0.4,0.4]", "bt.robust_share=0.5", first]
    config = compose([*words, "eval.steps=0", f"run.dir={tmp_path}"])
    told = foresee(config)
    assert told.flops == pytest.approx(train(config)["flops"], rel=0.02)
    assert not told.by_paper


def test_a_guard_that_keeps_all_images_is_told_once() -> None:
    words = [*WORDS, "train.epochs=4", "train.skip=0.5", "bt.guard=0.1", "bt.guard_steps=1"]
    strict, none = (foresee(compose(more)) for more in (words, [*words[:-3], *words[-2:]]))
    assert strict.flops == none.flops and strict.seconds > 0
    page = strict.sentences()
    assert "40 in all, by how many images train.skip leaves out" in page
    assert "with none left out, as bt.guard has it at so many outliers" in page
    assert "as may be" not in page and "0.28/0.54/0.18" in page


def test_trials_are_announced_and_as_many_as_that(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "train.batch_size=50", "bt=uniform", "train.max_seconds=0.001"]
    told = foresee(compose(words))
    assert "Trying 2 to 21 batches of 50 images on cpu" in capsys.readouterr().err
    assert told.batches == 4 and told.timed == 20


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["sparsity=robust_bird", "sparsity.threshold=0"], "flops_executed"),
        (["sparsity=channel_static"], "flops"),
    ],
)
def test_a_search_and_missing_channels_are_reckoned_with(
    tmp_path: Path, words: list[str], key: str
) -> None:
    config = compose([*WORDS, *words, "bt=uniform", "eval.steps=0", f"run.dir={tmp_path}"])
    told = foresee(config)
    assert told.flops == pytest.approx(train(config)[key], rel=1e-6)
    searches = key == "flops_executed"
    assert ("search   at most 20 batches ahead of these" in told.sentences()) == searches
