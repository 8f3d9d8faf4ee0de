"""AutoAttack's adapter: agreement, interruption, memory, few classes, either library."""

from __future__ import annotations

import builtins
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyautoattack
import pytest
import torch
from torch import Tensor, nn

from btrain import models
from btrain.attacks.balls import Ball, L2Ball, LinfBall
from btrain.data import Data
from btrain.errors import UserError
from btrain.evaluation import autoattack, robust_accuracy
from btrain.evaluation.autoattack import InParts, autoattack_stands
from btrain.evaluation.examples import Examples, as_evaluated
from btrain.evaluation.pgd import Pgd, pgd_stands
from btrain.evaluation.worst_case import Partial
from eval_nets import CPU, Linear, digits_examples, of_split, shorten, trained_on

EPSILON = 0.1
BALL = LinfBall(EPSILON)
VERSIONS = ("standard", "rand")


def standing(
    model: nn.Module,
    examples: Examples,
    stands: Tensor | None = None,
    *,
    version: str = "standard",
    ball: Ball = BALL,
    batch_size: int = 20,
    partial: Partial | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    if stands is None:
        stands = torch.ones(len(examples), dtype=torch.bool)
    with as_evaluated(model, CPU):
        return autoattack_stands(
            model,
            examples,
            stands,
            version=version,
            ball=ball,
            seed=0,
            batch_size=batch_size,
            partial=partial,
        )


def test_our_pgd_and_the_librarys_agree_within_one_of_500(digits: Data) -> None:
    # Trained by several steps: FGSM's networks hide some of their gradients, and then it depends on
    # their weights' last digits, and so on the processor, which attack finds an example more.
    torch.manual_seed(0)
    network = models.build("small_cnn", width=4, depth=None, classes=10, shape=(1, 8, 8))
    trained_on(digits, network, epsilon=EPSILON, epochs=5, steps=5, step_size=0.5)
    images = torch.cat([digits.test.images, digits.train.images])[:500]
    labels = torch.cat([digits.test.labels, digits.train.labels])[:500]
    ours = robust_accuracy(network, images, labels, epsilon=EPSILON, attack="pgd100x10").correct
    library = pyautoattack.AutoAttack(
        network, eps=EPSILON, version="custom", attacks=["apgd-ce"], seed=0, device="cpu"
    )
    library.apgd.n_restarts = 5
    x = images.float() / 255
    x_adv, _ = library.run_standard_evaluation(x, labels, batch_size=500)
    assert (x_adv - x).abs().max() <= EPSILON + 1e-6
    theirs = (network(x_adv).argmax(dim=1) == labels).numpy()
    assert 100 < ours.sum() < 400
    assert abs(int(ours.sum()) - int(theirs.sum())) <= 1


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's ensemble with a few steps of each attack."""
    shorten(monkeypatch)


@pytest.mark.usefixtures("short")
def test_a_chained_attack_begins_with_what_the_weaker_one_left(
    robust_net: nn.Module, digits: Data
) -> None:
    examples, pgd = digits_examples(digits, 40), Pgd(EPSILON, EPSILON / 10, 20)
    left = pgd_stands(robust_net, examples, torch.ones(40).bool(), pgd, batch_size=40)
    chained, _ = standing(robust_net, examples, left)
    assert not (chained & ~left).any()
    assert chained.any()


class InterruptedAttackError(Exception):
    pass


def interrupting(model: nn.Module, calls: int) -> Callable[[], None]:
    """Raises at some forward pass; the result takes that back."""
    count = 0

    def hook(*_: object) -> None:
        nonlocal count
        count += 1
        if count == calls:
            raise InterruptedAttackError

    return model.register_forward_pre_hook(hook).remove


def forward_passes(model: nn.Module, run: Callable[[], Any]) -> tuple[Any, int]:
    count = 0

    def hook(*_: object) -> None:
        nonlocal count
        count += 1

    handle = model.register_forward_pre_hook(hook)
    try:
        return run(), count
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def uninterrupted(robust_net: nn.Module, digits: Data) -> tuple[Tensor, int]:
    """Return which of twelve digits hold out in batches of five, and the passes that took."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        patch.setattr(autoattack, "BATCH", 5)
        (whole, _), passes = forward_passes(
            robust_net, lambda: standing(robust_net, digits_examples(digits, 12), batch_size=5)
        )
    return whole, passes


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_an_interrupted_autoattack_goes_on_where_it_was(
    robust_net: nn.Module,
    digits: Data,
    uninterrupted: tuple[Tensor, int],
    tmp_path: Path,
    share: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(autoattack, "BATCH", 5)
    examples, (whole, passes) = digits_examples(digits, 12), uninterrupted
    partial = Partial(tmp_path / "autoattack.partial.npz", {"epsilon": EPSILON})
    remove = interrupting(robust_net, int(share * passes))
    with pytest.raises(InterruptedAttackError):
        standing(robust_net, examples, batch_size=5, partial=partial)
    remove()
    (resumed, _), rest = forward_passes(
        robust_net, lambda: standing(robust_net, examples, batch_size=5, partial=partial)
    )
    assert torch.equal(resumed, whole)
    assert 0 < whole.sum() < 12
    if share >= 0.6:
        assert rest < 0.75 * passes


def test_an_interrupted_pgd_goes_on_where_it_was(
    robust_net: nn.Module, digits: Data, tmp_path: Path
) -> None:
    examples, attack = digits_examples(digits, 60), Pgd(EPSILON, EPSILON / 10, 5, restarts=6)
    everything = torch.ones(60, dtype=torch.bool)

    def run(partial: Partial | None = None) -> Tensor:
        return pgd_stands(robust_net, examples, everything, attack, batch_size=9, partial=partial)

    whole, passes = forward_passes(robust_net, run)
    partial = Partial(tmp_path / "pgd.partial.npz", {"seed": 0})
    remove = interrupting(robust_net, passes // 2)
    with pytest.raises(InterruptedAttackError):
        run(partial)
    remove()
    other = Partial(tmp_path / "pgd.partial.npz", {"seed": 1})
    assert other.load(60) is None  # somebody else's
    assert partial.load(59) is None
    assert partial.seconds_before == 0
    resumed, rest = forward_passes(robust_net, lambda: run(partial))
    assert torch.equal(resumed, whole)
    assert rest < 0.6 * passes
    assert partial.seconds_before > 0
    (tmp_path / "pgd.partial.npz").write_bytes(b"PK\x03\x04 broken")
    assert partial.load(60) is None


@pytest.mark.usefixtures("short")
def test_the_batch_size_bounds_the_passes_and_not_the_result(
    robust_net: nn.Module, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoattack, "BATCH", 8)
    examples = digits_examples(digits, 16)
    found, longest = [], []
    for batch_size in (3, 8, 1000):
        seen: list[int] = []
        handle = robust_net.register_forward_pre_hook(
            lambda _, x, seen=seen: seen.append(len(x[0]))
        )
        found.append(standing(robust_net, examples, batch_size=batch_size)[0])
        handle.remove()
        longest.append(max(seen))
    assert longest == [3, 8, 8]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])
    assert 0 < found[0].sum() < 16


def test_a_network_in_parts_has_the_gradients_of_the_whole(preact: nn.Module) -> None:
    preact.double()
    x = torch.rand(7, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    whole, parts = preact.eval()(x), InParts(preact, 3)(x)
    torch.testing.assert_close(parts, whole)
    for k in range(2):  # the graph may be used more than once
        (expected,) = torch.autograd.grad(whole[:, k].sum(), [x], retain_graph=True)
        (found,) = torch.autograd.grad(parts[:, k].sum(), [x], retain_graph=True)
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(InParts(preact, 3)(x), whole.detach())


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("classes", "version", "ball"),
    [
        *((classes, version, LinfBall(0.01)) for classes in (2, 3, 5) for version in VERSIONS),
        *((classes, "standard", L2Ball(0.05)) for classes in (2, 5)),
    ],
    ids=lambda value: getattr(value, "norm", str(value)),
)
def test_few_classes_do_not_crash(classes: int, version: str, ball: Ball) -> None:
    generator = torch.Generator().manual_seed(classes)
    model = Linear(torch.randn(classes, 48, generator=generator))
    images = 0.2 + 0.6 * torch.rand(6, 3, 4, 4, generator=generator)
    examples = of_split(images, model(images).argmax(dim=1), classes)
    stands, found = standing(model, examples, version=version, ball=ball)
    logits = model(images)
    own = logits.gather(1, examples.labels[:, None])
    difference = model.weight[examples.labels][:, None] - model.weight[None]
    norms = torch.linalg.vector_norm(difference, ord={"linf": 1, "l2": 2}[ball.norm], dim=2)
    margins = (own - logits - ball.epsilon * norms).scatter(1, examples.labels[:, None], torch.inf)
    provable = margins.amin(dim=1) > 0
    assert not (provable & ~stands).any()
    if version == "standard":  # whose targeted attacks try every class
        assert torch.equal(stands, provable)
        assert ("apgd-t" in found["attacks"]) == (classes >= 4)
        assert ("apgd-t" in (found["note"] or "")) == (classes < 4)
        in_l2 = ball.norm == "l2"
        assert ("square" in found["attacks"]) != in_l2
        assert ("square cannot attack 4×4 images in L2" in (found["note"] or "")) == in_l2


def test_square_is_left_out_where_it_would_crash() -> None:
    from pyautoattack.square import SquareAttack

    torch.manual_seed(0)
    ball, refused = L2Ball(0.1), set()
    sizes = [(side, side) for side in (4, 5, 8, 9, 10, 14, 18, 24, 28, 32)] + [(10, 14), (14, 10)]
    for height, width in sizes:
        x = 0.2 + 0.6 * torch.rand(4, 1, height, width)
        model = Linear(torch.randn(2, height * width))
        labels = model(x).argmax(dim=1)
        examples = of_split(x, labels, 2)
        attack = SquareAttack(model, norm="L2", eps=0.1, n_queries=3, device="cpu")
        if autoattack.square_refuses(ball, examples) is None:
            assert (attack.perturb(x, labels) - x).flatten(1).norm(dim=1).max() <= 0.1 + 1e-6
        else:
            refused.add((height, width))
            with pytest.raises((RuntimeError, ZeroDivisionError)):
                attack.perturb(x, labels)
        assert autoattack.square_refuses(LinfBall(0.5), examples) is None
    assert (4, 4) in refused
    assert (32, 32) not in refused


def test_a_norm_that_the_library_does_not_know_is_told(robust_net: nn.Module, digits: Data) -> None:
    class Own(LinfBall):
        norm = "own"

    with pytest.raises(UserError, match="AutoAttack and Square know the norms linf, l2, not own"):
        standing(robust_net, digits_examples(digits, 2), ball=Own(0.1))


class UpstreamsAutoAttack:
    """The interface of the authors' repository over the attacks of `pyautoattack`."""

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        version: str = "standard",
        device: object = "cuda",
    ) -> None:
        print(f"setting parameters for {version} version")
        self.inner = pyautoattack.AutoAttack(
            model, norm=norm, eps=eps, seed=seed, version=version, device=device
        )
        self.attacks_to_run = self.inner.attacks_to_run
        self.apgd, self.apgd_targeted = self.inner.apgd, self.inner.apgd_targeted
        self.fab, self.square = self.inner.fab, self.inner.square

    def run_standard_evaluation(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> Tensor:
        print("Warning: it seems to be a dynamic defense!")
        self.inner.attacks_to_run = self.attacks_to_run
        found: Tensor = self.inner.run_standard_evaluation(x_orig, y_orig, batch_size=bs)[0]
        return found


@pytest.mark.usefixtures("short")
def test_the_interface_of_the_authors_repository_serves_as_well(
    robust_net: nn.Module,
    digits: Data,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    examples = digits_examples(digits, 12)
    expected, _ = standing(robust_net, examples)
    module = types.ModuleType("autoattack")
    module.AutoAttack = UpstreamsAutoAttack  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "autoattack", module)
    monkeypatch.setattr(autoattack, "LIBRARIES", ("autoattack",))
    found, facts = standing(robust_net, examples)
    assert torch.equal(found, expected)
    assert facts["note"] == "it seems to be a dynamic defense!"
    assert capsys.readouterr().out == ""


def test_nothing_left_to_attack(plain_net: nn.Module, digits: Data) -> None:
    examples = digits_examples(digits, 5)
    stands, _ = standing(plain_net, examples, torch.zeros(5, dtype=torch.bool))
    assert not stands.any()


@pytest.mark.usefixtures("short")
def test_global_random_state_stays(robust_net: nn.Module, digits: Data) -> None:
    state = torch.get_rng_state()
    standing(robust_net, digits_examples(digits, 2), version="rand")
    assert torch.equal(torch.get_rng_state(), state)


def test_without_the_library_the_extra_is_named(
    robust_net: nn.Module, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> Any:
        if name.split(".")[0] in autoattack.LIBRARIES:
            raise ImportError(name)
        return real(name, globals, locals, fromlist, level)

    def not_there(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(autoattack, "import_module", not_there)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'btrain\[eval\]'"):
        robust_accuracy(
            robust_net, digits.test.images[:2], digits.test.labels[:2], epsilon=0.1,
            attack="autoattack",
        )  # fmt: skip
