"""A defense, an allocator and a ball of the user's keep the contract of the built-in ones."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from btrain import own
from btrain.allocation import Allocation, Expected, Scored
from btrain.cli import main
from btrain.data import Data, Split
from btrain.defenses import DEFENSES as DEFENSES_OF_BTRAIN
from btrain.defenses import Defense
from btrain.errors import UserError
from btrain.methods.own_parts import doubts_of_defense, with_own_steps
from btrain.methods.pool import no_attack
from btrain.runs import checkpoint
from btrain.settings import Config
from btrain.training.setup import doubts, make_state
from btrain.training.state import TrainState
from composing import compose
from steps import epoch_of

PARTS = """\
import random
import numpy as np
import torch
import torch.nn.functional as F
from btrain.allocation import BOUNDARY, Allocation
from btrain.attacks import Ball

class Hat:
    inner_reads_clean = False
    def __init__(self, beta=2.0):
        self.beta = beta
    def inner_loss(self, adv_logits, clean_logits, labels):
        return F.cross_entropy(adv_logits, labels, reduction="none")
    def outer_loss(self, clean_logits, adv_logits, labels):
        distance = F.mse_loss(adv_logits.softmax(1), clean_logits.softmax(1))
        return F.cross_entropy(clean_logits, labels) + self.beta * distance

class Half:
    def __init__(self, n_b, share=0.5):
        self.n_b, self.share = n_b, share
    def __call__(self, batch):
        steps = torch.zeros_like(batch.labels)
        steps[batch.score.abs().argsort()[: int(self.share * len(steps))]] = self.n_b
        return steps

class Looks:  # attacks by itself, like the oracle
    def __call__(self, batch):
        fell = batch.attacked(1, 0.1).argmax(1) != batch.labels
        return Allocation(torch.full_like(batch.labels, BOUNDARY), 2 * fell, overhead=1)

class Brighter(Ball):
    def start(self, x, generator):
        noise = torch.rand(x.shape, generator=generator, device=x.device)
        return self.project(x + self.epsilon * noise, x) - x
    def direction(self, gradient):
        return gradient.clamp(min=0).sign()
    def project(self, x_adv, x):
        return torch.maximum(x, torch.minimum(x_adv, x + self.epsilon)).clamp(0, 1)

class NoLoss:
    inner_loss = Hat.inner_loss

class Summed(Hat):
    def inner_loss(self, adv_logits, clean_logits, labels):
        return super().inner_loss(adv_logits, clean_logits, labels).sum()

class Leaves(Brighter):
    def project(self, x_adv, x):
        return x_adv + 2

def five(n_b):
    return lambda batch: 5

def halves(n_b):
    return lambda batch: batch.score

def half_a_ball(epsilon):
    return None

class Masked(Brighter):  # all images share a mask
    def region(self, x):
        return x, torch.ones(x.shape[1:])
    def project(self, x_adv, x, mask=1):
        return super().project(x + mask * (x_adv - x), x)

class Scaled(Masked):
    def region(self, x):
        return x, torch.tensor(1.0)

class Rows(Brighter):
    def region(self, x):
        return x

class Reaches(Brighter):
    reach = torch.tensor(0.1)

class Helps(Hat):
    def inner_loss(self, adv_logits, clean_logits, labels):
        return -super().inner_loss(adv_logits, clean_logits, labels)

class Divergence(Hat):
    inner_reads_clean = True
    sign = 1
    def inner_loss(self, adv_logits, clean_logits, labels):
        p, q = clean_logits.log_softmax(1), adv_logits.log_softmax(1)
        return self.sign * F.kl_div(q, p, reduction="none", log_target=True).sum(1)

class Converges(Divergence):
    sign = -1

class Added(Hat):
    def outer_loss(self, clean_logits, adv_logits, labels):
        return len(labels) * super().outer_loss(clean_logits, adv_logits, labels)

class Rolls(Hat):
    def inner_loss(self, adv_logits, clean_logits, labels):
        random.random(), np.random.rand(), torch.rand(1)
        return super().inner_loss(adv_logits, clean_logits, labels)

class Overwrites(Hat):
    def inner_loss(self, adv_logits, clean_logits, labels):
        likelihood = adv_logits.exp()
        total = likelihood.sum(1)
        likelihood.zero_()
        return total

class Unread(Hat):
    outer_reads_clean = False

class Down(Brighter):
    def direction(self, gradient):
        return -super().direction(gradient)

def alloc(batch):
    return batch.labels

def far(n_b):
    return lambda batch: torch.full_like(batch.labels, n_b + 1)

class Softmax(torch.nn.Sequential):
    def __init__(self, classes):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, classes), torch.nn.Softmax(1))
"""
DEFENSES = ["defense=trades", "defense=pgd", "defense=own defense.factory=parts.py:Hat"]
ALLOCATORS = [
    "bt=bullettrain",
    "bt=own bt.factory=parts.py:Half",
    "bt=own bt.factory=parts.py:Looks",
]
BALLS = ["attack=linf_pgd", "attack=own attack.factory=parts.py:Brighter attack.start=uniform"]
OWN = [row for row in itertools.product(DEFENSES, ALLOCATORS, BALLS) if "own" in " ".join(row)]
CPU = torch.device("cpu")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "parts.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own, "_allowed", set())
    return tmp_path


def settings(*words: str) -> list[str]:
    return [
        "dataset=digits", "model=small_cnn", "model.width=2", "attack.steps=2", "bt.probe_every=0",
        "train.batch_size=40", "train.epochs=1", "eval.steps=1", "device=cpu",
        *(word for group in words for word in group.split()),
    ]  # fmt: skip


def allowed(*words: str) -> Config:
    config: Config = compose(settings(*words))
    own.allow_parts(config)
    return config


@pytest.mark.parametrize("parts", OWN, ids=lambda row: "-".join(w.rpartition(":")[2] for w in row))
def test_own_parts_keep_the_contract(here: Path, parts: tuple[str, ...], digits: Data) -> None:
    """Two steps, one of a short batch: finite, in ball and box, and resumed exactly."""
    config = allowed(*parts)
    few = Split(digits.train.images[:63], digits.train.labels[:63])

    def epoch(state: TrainState, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
        means = epoch_of(config, state, few, tick=tick)
        assert means is not None
        return {key: value for key, value in means.items() if key != "train_seconds"}

    def stop() -> None:
        raise InterruptedError

    whole, cut, resumed = (make_state(config, digits, CPU) for _ in range(3))
    seen: list[torch.Tensor] = []
    handle = whole.model.register_forward_pre_hook(
        lambda model, args: seen.append(args[0].detach().clone()) if model.training else None
    )
    means = epoch(whole)
    handle.remove()
    assert all(torch.isfinite(value).all() for value in whole.model.state_dict().values())
    images = few.images.float().flatten(1) / 255
    for x in seen:
        assert 0 <= x.min() <= x.max() <= 1
        nearest = torch.cdist(x.flatten(1), images, p=float("inf")).amin(dim=1)
        assert nearest.max() <= config.attack.epsilon + 1e-5
        if "Brighter" in parts[2]:
            over = x.flatten(1)[:, None] - images[None]
            assert (over.amin(dim=2).amax(dim=1) >= -1e-6).all()

    with pytest.raises(InterruptedError):
        epoch(cut, stop)
    checkpoint.save(here / "cut.pt", {"state": cut.state_dict()})
    resumed.load_state_dict(checkpoint.load(here / "cut.pt")["state"])
    assert epoch(resumed) == means
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    "extra",
    [
        "train.precision=bf16 recipe.ema=0.9",
        "bt.pool=2",
        "bt.score=shared train.on_nonfinite=skip",
    ],
)
def test_own_parts_go_with_the_other_settings(here: Path, extra: str) -> None:
    parts = (DEFENSES[2], ALLOCATORS[1], BALLS[1])
    words = settings(*parts, extra, "dataset.train_examples=90 dataset.test_examples=40")
    assert main(["train", *words, "run.dir=run"]) == 0
    assert main(["eval", "checkpoint=run"]) == 1  # nobody has named the parts
    assert main(["eval", "checkpoint=run", "trust_code=true", "sanity=false"]) == 0


def test_an_allocator_s_steps_are_those_that_the_log_counts(here: Path, digits: Data) -> None:
    config = allowed("bt=own bt.factory=parts.py:Half bt.settings.share=0.25")
    state = make_state(config, digits, CPU)
    few = Split(digits.train.images[:80], digits.train.labels[:80])
    means = epoch_of(config, state, few)
    assert means is not None
    assert means["attack_steps_mean"] == pytest.approx(0.25 * 2)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("defense=own defense.factory=parts.py:NoLoss", "has no outer_loss"),
        ("defense=own defense.factory=parts.py:Summed", r"inner_loss must return \(4,\), not \(\)"),
        ("attack=own attack.factory=parts.py:Leaves", r"project leaves the pixel box \[0, 1\]"),
        ("attack=own attack.factory=parts.py:half_a_ball", "a ball is a subclass of"),
        ("attack=own attack.factory=parts.py:Masked", r"row for each image, \(4, …\), not \(1, 8"),
        ("attack=own attack.factory=parts.py:Scaled", r"a row for each image, \(4, …\), not \(\)"),
        ("attack=own attack.factory=parts.py:Rows", "region must return a tuple of tensors"),
        ("attack=own attack.factory=parts.py:Reaches", "reach must be a number or None, not a Ten"),
        ("bt=own bt.factory=parts.py:five", "returned a int, neither steps nor an Allocation"),
        ("bt=own bt.factory=parts.py:halves", r"steps must be \(40,\) integers, not \(40,\)"),
        ("bt=own bt.factory=parts.py:alloc", r"make the allocator; if it is that itself, name a "
         r"function around it: def make\(\): return alloc\."),
        ("defense=own defense.factory=parts.py:Overwrites",
         "Overwrites: the gradient of inner_loss fails: RuntimeError: one of the variables needed"),
        ("defense=own defense.factory=parts.py:Unread", r"line \d+: .*: outer_loss reads the clean "
         "logits, which it does not get with outer_reads_clean = False"),
        ("attack=own attack.factory=parts.py:Brighter rival=mma defense=pgd", "does not go with"),
        ("attack=own attack.factory=parts.py:Brighter train.cuda_graphs=auto", "only btrain's own"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(here: Path, words: str, sentence: str, digits: Data) -> None:
    with pytest.raises(UserError, match=sentence):
        config = allowed(words)
        state = make_state(config, digits, CPU)
        epoch_of(config, state, Split(digits.train.images[:80], digits.train.labels[:80]))


@pytest.mark.parametrize(
    ("words", "doubt"),
    [
        ("defense=own defense.factory=parts.py:Hat", None),
        ("defense=own defense.factory=parts.py:Divergence", None),
        ("defense=own defense.factory=parts.py:Rolls", None),
        ("defense=own defense.factory=parts.py:Helps", "makes the examples easier"),
        ("defense=own defense.factory=parts.py:Converges", "makes the examples easier"),
        ("defense=own defense.factory=parts.py:Added", r"2\.0 times as large for a batch taken"),
        (BALLS[1], None),
        ("attack=own attack.factory=parts.py:Down", "goes down the gradient; is its sign wrong"),
    ],
)
def test_what_is_meant_otherwise_is_doubted(
    here: Path, words: str, doubt: str | None, digits: Data
) -> None:
    config = allowed(words)
    state = make_state(config, digits, CPU)
    before = [torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())]
    found = doubts(config, state, digits)
    after = [torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())]
    assert after == before
    assert len(found) == (doubt is not None)
    assert doubt is None or re.search(doubt, found[0])
    state.batch = 1
    assert doubts(config, state, digits) == []  # a run that goes on has been told


@pytest.mark.parametrize("name", DEFENSES_OF_BTRAIN)
def test_btrain_s_own_defenses_are_beyond_doubt(name: str) -> None:
    beta = {} if name == "pgd" else {"beta": 6.0}
    assert doubts_of_defense(DEFENSES_OF_BTRAIN[name](**beta), name, {"classes": 10}) == []


LABEL_FREE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "entropy": lambda adv, clean: -(adv.softmax(1) * adv.log_softmax(1)).sum(1),
    "least likely": lambda adv, clean: -F.cross_entropy(adv, clean.argmin(1), reduction="none"),
    "predicted": lambda adv, clean: F.cross_entropy(adv, clean.argmax(1), reduction="none"),
}


@pytest.mark.parametrize("loss", LABEL_FREE)
@pytest.mark.parametrize("sign", [1, -1])
def test_inner_losses_without_labels_are_doubted_for_their_sign_alone(loss: str, sign: int) -> None:
    defense = Defense(
        lambda adv, clean, labels: sign * LABEL_FREE[loss](adv, clean),
        lambda clean, adv, labels: F.cross_entropy(adv, labels),
        inner_reads_clean=True,
        outer_reads_clean=False,
    )
    for classes in (2, 10, 100):
        assert len(doubts_of_defense(defense, loss, {"classes": classes})) == (sign < 0)


def test_an_allocator_that_writes_into_its_batch_changes_nothing() -> None:
    def writes(batch: Scored) -> Tensor:
        batch.score[batch.score.isnan()] = 0
        batch.z.numpy()[:] = 7
        batch.robust_fraction.zero_()
        return batch.labels.fill_(2)

    generator = torch.Generator().manual_seed(0)
    score, z = torch.tensor([0.5, torch.nan, 0.1]), torch.randn(3, 4)
    batch = Scored(score, z, torch.arange(3), torch.tensor(0.5), generator, no_attack)
    before = [part.clone() for part in batch[:4]]
    assert with_own_steps(writes, "writes")(batch).steps.tolist() == [2, 2, 2]
    torch.testing.assert_close(list(batch[:4]), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": np.arange(3)}, r"steps must be \(3,\) integers of torch, not a ndarray"),
        ({"classes": [0, 1, 2]}, r"classes must be \(3,\) integers of torch, not a list"),
        ({"steps": torch.tensor([0, -2, 1])}, "steps must be 0 or more, not -2"),
        ({"classes": torch.tensor([0, 7, 1])}, "classes must be 0 to 2, not 7"),
        ({"overhead": -3}, "overhead must be at least 0, not -3"),
        ({"overhead": None}, "overhead must be a whole number, not None"),
        ({"patience": 1.5}, "patience must be a whole number, not 1.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_allocation_is_checked_whole(changes: dict[str, Any], sentence: str) -> None:
    numbers, generator = torch.arange(3), torch.Generator()
    batch = Scored(numbers / 4, torch.eye(3), numbers, torch.tensor(0.5), generator, no_attack)
    right = Allocation(numbers, numbers, patience=2)
    assert with_own_steps(lambda batch: right, "mine")(batch).steps.tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=f"^bt.factory=mine: {sentence}"):
        with_own_steps(lambda batch: right._replace(**changes), "mine")(batch)


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ((1.5, 0.5), "returns a tuple, neither btrain.allocation.Expected nor None"),
        (Expected(-1.0, 0.5), "must return numbers from 0, and an attacked share up to 1, not "),
        (Expected(float("nan"), 0.5), "must return numbers"),
        (Expected(9.0, 2.0), "must return numbers"),
        (ZeroDivisionError("by 0"), "fails: ZeroDivisionError: by 0."),
    ],
    ids=str,
)
def test_what_an_allocator_expects_is_checked(told: Any, sentence: str) -> None:
    class Theirs:
        def __call__(self, batch: Scored) -> Tensor:
            return batch.labels

        def expected(self, fractions: tuple[float, float, float]) -> Any:
            if isinstance(told, Exception):
                raise told
            return told

    with pytest.raises(UserError, match=f"^bt.factory=theirs: expected {sentence}"):
        with_own_steps(Theirs(), "theirs").expected((0.28, 0.54, 0.18))


def test_a_run_says_that_its_network_gives_probabilities(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model=own", "model.factory=parts.py:Softmax", "dataset.train_examples=80",
             "dataset.test_examples=20"]  # fmt: skip
    of_all = [word for word in settings() if not word.startswith("model")]
    assert main(["train", *of_all, *words, "run.dir=run"]) == 0
    assert "parts.py:Softmax gives probabilities" in capsys.readouterr().err
    assert "parts.py:Softmax gives probabilities" in (here / "run" / "train.log").read_text()


def test_steps_beyond_the_longest_budget_share_its_way(here: Path, digits: Data) -> None:
    config = allowed("bt=own bt.factory=parts.py:far attack.start=clean defense=pgd")
    seen = []
    state = make_state(config, digits, CPU)
    images = digits.train.images[:40].float().flatten(1) / 255
    state.model.register_forward_pre_hook(
        lambda model, args: seen.append(args[0].detach().flatten(1).clone())
    )
    epoch_of(config, state, Split(digits.train.images[:40], digits.train.labels[:40]))
    moved = torch.cdist(seen[2], images, p=float("inf")).amin(dim=1).max()  # behind one step
    assert len(seen) == 1 + 3 + 1
    assert moved == pytest.approx(1.7 * config.attack.epsilon / 3, abs=1e-5)
