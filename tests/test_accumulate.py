"""A batch that is trained in parts is the same batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from btrain import models
from btrain.data import Batch, Data
from btrain.data.augmentation import to_unit
from btrain.errors import UserError
from btrain.methods.make import make_method
from btrain.methods.statistics import StepStats
from btrain.processes.world import ALONE
from btrain.runs import checkpoint
from btrain.settings import Config
from btrain.training.setup import make_state
from btrain.training.update import train_batch
from composing import compose
from parallel_steps import CPU, MIXED, ONE_PERTURBED, labelled, run
from steps import epoch_of, memory_of
from test_training import same, tiny

M = 51
CASES = {
    "trades": [],
    "mart": ["defense=mart"],
    "plain pgd": ["defense=pgd", "bt=uniform", "attack.steps=3"],
    "early_exit": ["bt=early_exit"],
    "oracle": ["bt=oracle"],
    "all forwarded": ["bt.forward_unperturbed=true"],
    "kept starts": ["attack.start=kept", "bt.n_b=2", "bt.n_r=1"],
    "a share of the robust": ["bt.robust_share=0.5"],
    "a share of the robust, pgd": ["bt.robust_share=0.5", "defense=pgd"],
}


def config_of(*settings: str, parts: int = 1, m: int = M) -> Config:
    made = compose(["dataset=digits", "model=small_cnn", *settings, f"train.batch_size={m}",
                    f"train.accumulate={parts}"])  # fmt: skip
    assert isinstance(made, Config)
    return made


def small(name: str) -> nn.Module:
    return models.build(name, width=4, depth=None, classes=10, shape=(1, 8, 8))


@pytest.mark.parametrize("case", CASES)
def test_parts_learn_what_the_whole_batch_does(digits: Data, case: str) -> None:
    """Weights, F_R, kept starts and all sums of the log after four updates, in float64."""
    kind, parts = (ONE_PERTURBED, 7) if case == "mart" else (MIXED, 4)
    whole = run(digits, ALONE, config_of(*CASES[case]), kind, M)
    cut = run(digits, ALONE, config_of(*CASES[case], parts=parts), kind, M)
    assert whole.keys() == cut.keys()
    units = StepStats._fields.index("units")
    if case == "mart":  # each part in which one example is perturbed takes another along
        assert torch.all(cut["stats"][:, units] >= whole["stats"][:, units])
        for found in (whole, cut):
            found["stats"][:, units] = 0
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=1e-12, atol=1e-12, equal_nan=True)
    counts = [StepStats._fields.index(name) for name in ("boundary", "robust", "outlier", "steps")]
    assert torch.equal(cut["stats"][:, counts], whole["stats"][:, counts])


def test_every_example_has_its_class_its_steps_and_its_gradient(digits: Data) -> None:
    """With clipped gradients, weights of examples and remembered scores."""
    settings = ["train.skip=0.5", "recipe.clip_norm=0.01"]
    found = []
    for parts in (1, 3):
        config = config_of(*settings, parts=parts)
        torch.manual_seed(0)
        model = small("small_cnn").double()
        x, indices = to_unit(digits.train.images[:M]).double(), torch.arange(M) + 5
        batch = Batch(x, labelled(model, x, MIXED), indices, weight=1 + indices % 2)
        method, memory = make_method(config, CPU), memory_of(config, digits, CPU)
        memory["robust_fraction"] += 0.5
        generator = torch.Generator().manual_seed(1)
        yielded = list(method.examples(model, batch, dict(memory), generator))
        assert [len(part.x) for part in yielded] == ([M] if parts == 1 else [17, 17, 17])
        order = torch.cat([part.indices for part in yielded]).argsort()
        classes, steps, x_adv = (
            torch.cat(tensors)[order]
            for tensors in zip(
                *((p.allocation.classes, p.allocation.steps, p.x_adv) for p in yielded),
                strict=True,
            )
        )
        assert len(steps.unique()) == 3
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train_batch(
            model, optimizer, method, batch, memory, generator.manual_seed(1),
            clip_norm=config.recipe.clip_norm,
        )  # fmt: skip
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((classes, steps, x_adv, gradients, memory["score"], memory["robust_fraction"]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12)
    assert torch.equal(found[0][1], found[1][1])
    assert float(found[0][3].norm()) == pytest.approx(0.01)


class Passes(nn.Module):
    """A network that notes how many images each pass has."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        logits: Tensor = self.network(x)
        return logits


@pytest.mark.parametrize(("examples", "most"), [(64, 16), (65, 17), (40, 14), (5, 5), (2, 2)])
def test_no_pass_is_larger_than_a_part(digits: Data, examples: int, most: int) -> None:
    """Nor is there one example alone in training; a last batch has fewer parts, not smaller ones.

    65 is a batch that a last example has joined.
    """
    config = config_of("bt=oracle", parts=4, m=64)
    model = Passes(small("preact_resnet18"))
    x = to_unit(digits.train.images[:examples])
    batch = Batch(x, digits.train.labels[:examples], torch.arange(examples))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method, memory = make_method(config, CPU), memory_of(config, digits, CPU)
    train_batch(model, optimizer, method, batch, memory, torch.Generator())
    assert max(model.sizes) == most


def test_a_run_in_parts_with_all_that_acts_on_weights_resumes(tmp_path: Path, digits: Data) -> None:
    settings = [
        "train.accumulate=3", "train.batch_size=30",
        "recipe.ema=0.9", "recipe.clip_norm=1",
        "sparsity=flying_bird", "sparsity.density=0.5", "train.on_nonfinite=skip",
    ]  # fmt: skip
    config = tiny(tmp_path, *settings)
    whole, cut, resumed = (make_state(config, digits, CPU) for _ in range(3))
    epoch_of(config, whole, digits.train, stopped=lambda: whole.batch == 9)
    epoch_of(config, cut, digits.train, stopped=lambda: cut.batch == 4)
    checkpoint.save(tmp_path / "cut.pt", {"state": cut.state_dict()})
    resumed.load_state_dict(checkpoint.load(tmp_path / "cut.pt")["state"])
    epoch_of(config, resumed, digits.train, stopped=lambda: resumed.batch == 9)
    assert not same(resumed.model.state_dict(), cut.model.state_dict())
    assert same(resumed.evaluated.state_dict(), whole.evaluated.state_dict())
    assert same(resumed.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize(
    ("settings", "other"),
    [
        (["rival=free", "defense=pgd"], "rival=free"),
        (["defense=augmix"], "defense=augmix"),
        (["bt.pool=2"], r"bt\.pool=2"),
        (["bt.score=shared"], r"bt\.score=shared"),
        (["bt=uniform", "attack.mode=train"], r"attack\.mode=train"),
        (["train.cuda_graphs=auto"], r"train\.cuda_graphs=auto"),
    ],
)
def test_what_it_does_not_go_with_is_one_sentence(settings: list[str], other: str) -> None:
    with pytest.raises(UserError, match=rf"train\.accumulate=2 does not go with {other}: .*\.$"):
        config_of(*settings, parts=2)


def test_parts_have_two_examples_at_least() -> None:
    with pytest.raises(UserError, match=r"between 1 and half of train\.batch_size = 8, not 5"):
        config_of(parts=5, m=8)
    config_of(parts=4, m=8)
