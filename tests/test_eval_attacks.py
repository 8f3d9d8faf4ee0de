"""PGD with restarts against closed forms and against the library's attacks."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from btrain.attacks.balls import BALLS, Ball, L2Ball, LinfBall
from btrain.data import Data
from btrain.errors import UserError
from btrain.evaluation import evaluate, robust_accuracy
from btrain.evaluation.examples import as_evaluated
from btrain.evaluation.pgd import LOSSES, Pgd, pgd_images, pgd_stands, random_start
from btrain.evaluation.worst_case import worst_case
from btrain.training.timing.look import look
from eval_nets import Linear, digits_examples, of_split

EPSILON = 0.1


def linear_problem(classes: int) -> tuple[Linear, Tensor, Tensor]:
    """A linear model and images far enough from 0 and 1 for every ε here; some labels wrong."""
    generator = torch.Generator().manual_seed(classes)
    model = Linear(torch.randn(classes, 48, generator=generator))
    images = 0.2 + 0.6 * torch.rand(400, 3, 4, 4, generator=generator)
    labels = model(images).argmax(dim=1)
    labels[::10] = (labels[::10] + 1) % classes
    return model, images, labels


DUAL = {"linf": 1, "l2": 2}


def analytically_robust(
    model: Linear, images: Tensor, labels: Tensor, epsilon: float, norm: str = "linf"
) -> Tensor:
    """Return whether z_y − z_j − ε·‖w_y − w_j‖, the least margin in the ball, is > 0 for all j.

    The norm of the weights is the dual one, 1 for L∞ and 2 for L2.
    """
    weight, logits = model.weight.detach().double(), model(images).detach().double()
    own = logits.gather(1, labels[:, None])
    difference = weight[labels][:, None] - weight[None]
    norms = torch.linalg.vector_norm(difference, ord=DUAL[norm], dim=2)
    margins = own - logits - epsilon * norms
    margins.scatter_(1, labels[:, None], torch.inf)
    return margins.amin(dim=1) > 0


@pytest.mark.parametrize(
    ("classes", "loss", "norm"),
    [
        *((2, "ce", "linf"), (2, "cw", "linf"), (5, "cw", "linf"), (5, "dlr", "linf")),
        *((10, "cw", "linf"), (2, "ce", "l2"), (5, "dlr", "l2"), (5, "cw", "l2")),
    ],
)
def test_on_a_linear_model_pgd_is_the_analytical_robustness(
    classes: int, loss: str, norm: str
) -> None:
    model, images, labels = linear_problem(classes)
    shares = []
    for size in (0.001, 0.003, 0.01, 0.03, 0.1):
        epsilon = size if norm == "linf" else 5 * size
        expected = analytically_robust(model, images, labels, epsilon, norm)
        found = robust_accuracy(
            model, images, labels, epsilon=epsilon, norm=norm, attack="custom", steps=40,
            restarts=5, loss=loss, step_size=epsilon / 4,
        )  # fmt: skip
        assert found.settings["norm"] == norm
        assert found.correct.tolist() == expected.tolist()
        shares.append(found.accuracy)
    assert shares[0] > 80 > 10 > shares[-1]


def test_cross_entropy_may_miss_the_worst_class_but_never_invents_one() -> None:
    model, images, labels = linear_problem(5)
    for epsilon in (0.003, 0.01, 0.03):
        expected = analytically_robust(model, images, labels, epsilon).numpy()
        found = robust_accuracy(
            model, images, labels, epsilon=epsilon, attack="custom", steps=40, restarts=5
        ).correct
        assert not (expected & ~found).any()
        assert (found & ~expected).mean() < 0.05


def test_a_loss_ascends_what_it_says() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0, 2.0], [0.0, 5.0, 1.0, 1.0]])
    clean, labels = torch.zeros(2, 4), torch.tensor([0, 3])
    assert LOSSES["cw"](logits, clean, labels).tolist() == [-1, 4]
    # Over z₍₁₎ − z₍₃₎: 3 − 1 in the first row, 5 − 1 in the second.
    assert LOSSES["dlr"](logits, clean, labels).tolist() == pytest.approx([-1 / 2, 4 / 4])
    moved = LOSSES["dlr"](100 * logits + 7, clean, labels)
    assert moved.tolist() == pytest.approx([-1 / 2, 4 / 4])
    cross_entropy = nn.functional.cross_entropy(logits, labels, reduction="none")
    assert torch.equal(LOSSES["ce"](logits, clean, labels), cross_entropy)
    p, q = clean.softmax(dim=1), logits.softmax(dim=1)
    divergence = (p * (p / q).log()).sum(dim=1)
    torch.testing.assert_close(LOSSES["kl"](logits, clean, labels), divergence)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_loss_fools_a_plain_network(plain_net: nn.Module, digits: Data, loss: str) -> None:
    result = robust_accuracy(
        plain_net, digits.test.images, digits.test.labels, epsilon=0.3, attack="pgd20", loss=loss
    )
    assert result.accuracy < (40 if loss == "kl" else 15)  # its target is the prediction


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", EPSILON), ("l2", 0.5)])
def test_pgd20_is_the_evaluation_of_a_training_but_for_clean_mistakes(
    robust_net: nn.Module, digits: Data, norm: str, epsilon: float
) -> None:
    ours = robust_accuracy(
        robust_net, digits.test.images, digits.test.labels, epsilon=epsilon, norm=norm, seed=3
    )
    theirs = evaluate(
        robust_net, digits.test, epsilon=epsilon, step_size=epsilon / 10, steps=20, batch_size=100,
        seed=3, threat=BALLS[norm],
    )  # fmt: skip
    mistakes = 100 - theirs.clean
    assert theirs.robust - mistakes <= ours.accuracy <= theirs.robust + 1e-6
    assert ours.settings["clean_accuracy"] == pytest.approx(theirs.clean)


def textbook_l2_pgd(
    model: nn.Module, x: Tensor, labels: Tensor, start: Tensor, epsilon: float, size: float
) -> Tensor:
    """Return the last of 20 iterates, image by image: as a textbook has it (Madry et al. 2018)."""
    found = []
    for image, label, first in zip(x, labels, start, strict=True):
        moved = first
        for _ in range(20):
            moved = moved.detach().requires_grad_()
            loss = nn.functional.cross_entropy(model(moved[None]), label[None])
            (gradient,) = torch.autograd.grad(loss, [moved])
            change = moved.detach() + size * gradient / (gradient**2).sum().sqrt() - image
            length = (change**2).sum().sqrt()
            change = change if length <= epsilon else epsilon * change / length
            moved = (image + change).clip(0, 1)
        found.append(moved)
    return torch.stack(found)


def test_pgd_in_l2_is_the_textbooks(robust_net: nn.Module, digits: Data) -> None:
    examples, epsilon, size = digits_examples(digits, 40), 0.5, 0.1
    x, labels = examples.batch(torch.arange(40))
    with as_evaluated(robust_net, torch.device("cpu")):
        attack = Pgd(epsilon, size, 20, seed=2, threat=L2Ball)
        found = pgd_images(robust_net, examples, attack)
        start = random_start(L2Ball(epsilon), x, torch.Generator().manual_seed(2))
        expected = textbook_l2_pgd(robust_net, x, labels, x + start, epsilon, size)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    lengths = (found - x).flatten(1).norm(dim=1)
    assert lengths.max() <= epsilon + 1e-6
    assert lengths.median() > epsilon - 1e-3  # it goes as far as it may
    assert found.min() >= 0
    assert found.max() <= 1
    assert start.flatten(1).norm(dim=1).max() <= epsilon + 1e-6
    # Not the same for two images, and not that of another seed.
    assert len({tuple(row.flatten().tolist()) for row in start}) == 40


def test_restarts_keep_the_worst_case_and_only_attack_what_stands(
    robust_net: nn.Module, digits: Data
) -> None:
    examples = digits_examples(digits)
    seen: list[int] = []
    handle = robust_net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    everything = torch.ones(len(examples), dtype=torch.bool)
    try:
        stands, forwards = [], []
        for restarts in (1, 2, 4):
            seen.clear()
            attack = Pgd(2 * EPSILON, EPSILON / 5, 20, restarts=restarts)
            stands.append(pgd_stands(robust_net, examples, everything, attack, batch_size=1000))
            forwards.append(sum(seen))
    finally:
        handle.remove()
    for fewer, more in itertools.pairwise(stands):
        assert not (more & ~fewer).any()
    assert 0 < stands[-1].sum() < stands[0].sum() < len(examples) / 2
    # The first restart drops what falls on the way; later ones see the standing only.
    assert forwards[0] < 0.8 * 22 * len(examples)
    assert forwards[2] < 4 * 22 * int(stands[0].sum()) + forwards[0]


def test_a_step_of_an_evaluation_copies_to_the_host_once(
    plain_net: nn.Module, digits: Data
) -> None:
    examples = digits_examples(digits, 60)
    stands = torch.ones(60, dtype=torch.bool)

    def copies(steps: int) -> int:
        attack = Pgd(epsilon=0.1, step_size=0.01, steps=steps)

        def run() -> None:
            left = pgd_stands(plain_net, examples, stands, attack, batch_size=60)
            assert 0 < left.sum() < 60

        return look(run, torch.device("cpu")).host_copies

    assert copies(8) - copies(3) <= 5


def test_results_do_not_depend_on_the_batch_size(preact: nn.Module, digits: Data) -> None:
    with torch.no_grad():
        for _ in range(50):  # BatchNorm statistics worth using
            preact.train()(digits.train.images[:128].float() / 255)
    images, labels = digits.test.images[:40], preact.eval()(digits.test.images[:40] / 255)
    found = {
        tuple(
            robust_accuracy(
                preact, images, labels.argmax(dim=1), epsilon=0.02, attack="custom", steps=4,
                restarts=3, batch_size=batch_size, seed=1,
            ).correct
        )
        for batch_size in (1, 7, 40, 1000)
    }  # fmt: skip
    assert len(found) == 1
    assert 0 < sum(next(iter(found))) < 40


@pytest.mark.parametrize(("threat", "epsilon"), [(LinfBall, EPSILON), (L2Ball, 0.5)])
def test_a_subset_has_the_random_starts_of_the_whole(
    robust_net: nn.Module, digits: Data, threat: type[Ball], epsilon: float
) -> None:
    examples = digits_examples(digits, 60)
    attack = Pgd(epsilon, epsilon, 1, restarts=3, seed=5, threat=threat)
    whole = pgd_stands(robust_net, examples, torch.ones(60).bool(), attack, batch_size=60)
    some = torch.arange(60) % 3 == 0
    part = pgd_stands(robust_net, examples, some, attack, batch_size=7)
    assert torch.equal(part, whole & some)


def test_the_model_is_left_as_it_was(preact: nn.Module, digits: Data) -> None:
    preact.train()
    preact.conv1.weight.requires_grad_(False)  # type: ignore[union-attr]
    before = {key: value.clone() for key, value in preact.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="guessing"):  # for it is not trained
        robust_accuracy(preact, digits.test.images[:8], digits.test.labels[:8], epsilon=0.1)
    assert all(module.training for module in preact.modules())
    assert all(torch.equal(before[key], value) for key, value in preact.state_dict().items())
    assert [p.requires_grad for p in preact.parameters()].count(False) == 1
    assert all(p.grad is None for p in preact.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_bf16_is_only_on_request(robust_net: nn.Module, digits: Data) -> None:
    kinds: set[torch.dtype] = set()
    handle = robust_net.register_forward_hook(lambda *call: kinds.add(call[2].dtype))
    images, labels = digits.test.images[:20], digits.test.labels[:20]
    try:
        robust_accuracy(robust_net, images, labels, epsilon=0.1)
        assert kinds == {torch.float32}
        result = robust_accuracy(robust_net, images, labels, epsilon=0.1, precision="bf16")
    finally:
        handle.remove()
    assert torch.bfloat16 in kinds
    assert result.settings["precision"] == "bf16"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": lambda x: x.float()}, "must lie in [0, 1]"),
        ({"images": lambda x: (x / 255 - 0.5) / 0.5}, "normalise inside"),
        ({"images": lambda x: x[:, 0]}, "(n, C, H, W)"),
        ({"images": lambda x: x.long()}, "uint8 or floats"),
        ({"images": lambda x: torch.cat([x, x], dim=3)}, "cannot take images of 1×8×16"),
        ({"labels": lambda y: y + 9}, "but the model has 10 classes"),
        ({"labels": lambda y: y[:-1]}, "labels (n,)"),
        ({"epsilon": lambda _: 8.0}, "epsilon must be greater than 0 and at most 1"),
        ({"epsilon": lambda _: 8.1, "norm": lambda _: "l2"}, "at most 8 (√(C·H·W), how far"),
        ({"norm": lambda _: "l1"}, "norm=l1 is no option; there are: linf, l2."),
        ({"attack": lambda _: "pgd10"}, "attack=pgd10 is no option"),
        ({"attack": lambda _: "corruptions"}, "corruptions needs files; please use the command"),
        ({"images": lambda x: x.numpy()}, "images must be a torch tensor, not ndarray"),
        ({"steps": lambda _: 2.5}, "attack.steps must be a whole number, not 2.5"),
        ({"batch_size": lambda _: 2.5}, "batch_size must be a whole number, not 2.5"),
        ({"seed": lambda _: 0.5}, "seed must be a whole number, not 0.5"),
    ],
)  # fmt: skip
def test_python_callers_get_a_sentence(
    plain_net: nn.Module, digits: Data, change: dict, words: str
) -> None:
    arguments = {
        "images": digits.test.images[:20],
        "labels": digits.test.labels[:20],
        "epsilon": 0.1,
        "attack": "pgd20",
        "norm": "linf",
        "steps": None,
        "batch_size": 20,
        "seed": 0,
    }
    arguments = {key: change.get(key, lambda v: v)(value) for key, value in arguments.items()}
    with pytest.raises(UserError) as caught:
        robust_accuracy(plain_net, **arguments)
    assert words in str(caught.value)


def test_lengths_may_be_fractions_and_clean_images_are_classified_once(
    plain_net: nn.Module, digits: Data
) -> None:
    images, labels, seen = digits.test.images[:20], digits.test.labels[:20], list[int]()
    typed: Any = {"epsilon": "8/255", "step_size": "2/255", "attack": "custom", "steps": 1}
    settings = robust_accuracy(plain_net, images, labels, **typed).settings
    assert (settings["epsilon"], settings["step_size"]) == (8 / 255, 2 / 255)
    handle = plain_net.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    result = robust_accuracy(plain_net, images, labels, epsilon=0.1, attack="clean")
    handle.remove()
    assert seen == [1, 20] and result.seconds > 0  # one tells how many classes there are


def test_a_network_of_other_numbers_than_float32_is_told_what_to_do(
    plain_net: nn.Module, digits: Data
) -> None:
    images, labels = digits.test.images[:20], digits.test.labels[:20]
    double = copy.deepcopy(plain_net).double()
    with pytest.raises(UserError, match=r"its weights are torch.float64; please pass model.float"):
        robust_accuracy(double, images, labels, epsilon=0.1)
    assert robust_accuracy(double.float(), images, labels, epsilon=0.1).correct.shape == (20,)


class WithoutGradient(nn.Module):
    """A network as it is wrapped for inference."""

    def __init__(self, network: nn.Module, how: str) -> None:
        super().__init__()
        self.network, self.how = network, how
        self.offset = nn.Parameter(torch.zeros(10))

    def forward(self, x: Tensor) -> Tensor:
        inside = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
        with inside.get(self.how, contextlib.nullcontext)():
            logits: Tensor = self.network(x.detach() if self.how == "another leaf" else x)
        if self.how == "another leaf":  # logits with a gradient, but of something else
            return logits + self.offset.detach().clone().requires_grad_()
        if self.how == "numpy":
            return torch.from_numpy(logits.detach().numpy())
        return logits


@pytest.mark.parametrize("attack", ["pgd20", "custom", "autoattack"])
@pytest.mark.parametrize("how", ["no_grad", "inference", "numpy", "another leaf"])
def test_a_model_without_gradient_is_named(
    plain_net: nn.Module, digits: Data, how: str, attack: str
) -> None:
    model, data = WithoutGradient(plain_net, how), (digits.test.images[:9], digits.test.labels[:9])
    with pytest.raises(UserError, match="no gradient with respect to the images"):
        robust_accuracy(model, *data, epsilon=0.1, attack=attack)
    assert robust_accuracy(model, *data, epsilon=0.1, attack="clean").accuracy > 50


def test_a_model_that_guesses_is_told_from_one_that_does_not(
    plain_net: nn.Module, digits: Data
) -> None:
    images, labels = digits.test.images[:100], digits.test.labels[:100]
    with pytest.warns(UserWarning, match="order of the classes"):
        turned = robust_accuracy(plain_net, images, (labels + 1) % 10, epsilon=0.1, attack="clean")
    assert f"Only {turned.accuracy:.1f} %" in turned.settings["note"]
    honest = robust_accuracy(plain_net, images, labels, epsilon=0.1, attack="clean")
    assert honest.settings["note"] is None


def test_dlr_asks_for_three_classes() -> None:
    model, images, labels = linear_problem(2)
    with pytest.raises(UserError, match="dlr needs at least 3 classes"):
        robust_accuracy(model, images, labels, epsilon=0.01, attack="custom", loss="dlr")


def test_uint8_and_unit_floats_are_the_same_images(robust_net: nn.Module, digits: Data) -> None:
    images, labels = digits.test.images[:50], digits.test.labels[:50]
    first = robust_accuracy(robust_net, images, labels, epsilon=EPSILON)
    second = robust_accuracy(robust_net, images.float() / 255, labels, epsilon=EPSILON)
    assert (first.correct == second.correct).all()
    assert of_split(images, labels).sha256() != of_split(images, labels.flip(0)).sha256()


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_tells_what_is_left_of_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten images; the first round fools the odd ones, which no later round attacks."""
    monkeypatch.setattr("sys.stderr", screen := Screen())
    seen = []

    def attack(number: int, some: Tensor) -> Tensor:
        seen.append(re.findall(r"(\w+):.* (\d+)/(\d+) ", screen.getvalue().split("\r")[-1]))
        return (some % 2 == 1) & (number == 0)

    everybody = torch.ones(10, dtype=torch.bool)
    stands = worst_case(attack, everybody, rounds=["a", "b"], batch_size=10, show_progress=True)
    assert stands.nonzero().flatten().tolist() == [0, 2, 4, 6, 8]
    assert seen == [[("a", "0", "20")], [("b", "10", "15")]]
