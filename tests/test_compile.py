"""`train.compile`: the attack's passes compiled, against the plain ones."""

from __future__ import annotations

import copy
import os
import re
import shutil
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from btrain import models
from btrain.attacks.fast_paths import check_fast_paths
from btrain.attacks.shadow import Shadowed, attacked
from btrain.data import Batch
from btrain.errors import UserError
from composing import compose
from steps import step_of

CPU = torch.device("cpu")
TINY = ["dataset=digits", "model=small_cnn", "attack.steps=3", "device=cpu"]


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its own, hidden from users
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_steps_are_the_plain_ones_up_to_rounding(
    small_cnn: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    x = torch.cat([batch[0], batch[0].flip(3)])
    seen = Shadowed(small_cnn, compiled=True)
    with attacked(seen) as network:
        for n in (48, 24, 33, 16, 3):  # the last as it is
            for parameter in small_cnn.parameters():
                parameter.data *= 1.1
            images = x[:n].requires_grad_()
            logits, plainly = network(images), small_cnn.eval()(images)
            torch.testing.assert_close(logits, plainly, rtol=1e-4, atol=1e-5)
            ours, theirs = (
                torch.autograd.grad(each.square().sum(), [images])[0] for each in (logits, plainly)
            )
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]

    # A whole step of a run; another network of the same kind needs no other code.
    predicted = small_cnn(x).argmax(dim=1)
    data, results = Batch(x, predicted, torch.arange(48)), []
    for words in ([], ["train.compile=true"]):
        model = copy.deepcopy(small_cnn).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        memory = {"robust_fraction": torch.tensor(0.4)}
        step = step_of(compose([*TINY, "bt.n_r=1", *words]), CPU)
        stats = step(model, optimizer, data, memory, torch.Generator().manual_seed(0))
        results.append((model.state_dict(), stats.units, stats.loss))
    (plain, units, loss), (compiled, compiled_units, compiled_loss) = results
    assert units == compiled_units
    torch.testing.assert_close(loss, compiled_loss, rtol=1e-3, atol=1e-3)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-2, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_group_as_large_as_the_images_are_high_is_no_other_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._dynamo.utils import counters

    # Without generating code, which takes its time and changes no graph.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    network = models.build("small_cnn", width=2, depth=None, classes=10, shape=(3, 32, 32))
    counters.clear()
    with attacked(Shadowed(network, compiled=True)) as shadow:
        for n in (32, 24, 40):
            images = torch.rand(n, 3, 32, 32).requires_grad_()
            torch.autograd.grad(shadow(images).square().sum(), [images])
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["defense=pgd", "rival=mma", "model.width=4"], "rival=mma"),
        (["defense=augmix", "attack.steps=2", "bt.n_r=0"], "defense=augmix"),
        (["bt=uniform", "attack.mode=train"], "attack.mode=train"),
    ],
)
def test_what_has_no_such_attack_is_refused(settings: list[str], key: str) -> None:
    compose([*TINY, *settings])
    words = rf"^train\.compile=true does not go with {re.escape(key)}: .+\.$"
    with pytest.raises(UserError, match=words):
        compose([*TINY, *settings, "train.compile=true"])


def test_without_a_compiler_it_is_refused_ahead_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_fast_paths(compose(TINY).train, CPU)
    with pytest.raises(
        UserError, match=r"^train\.compile=true needs a C\+\+ compiler, and no-such-"
    ):
        check_fast_paths(compose([*TINY, "train.compile=true"]).train, CPU)
