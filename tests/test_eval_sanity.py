"""Sanity checks: a masked network is suspicious, an honest one is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from btrain.attacks.balls import LinfBall
from btrain.data import Data
from btrain.errors import UserError
from btrain.evaluation import sanity, sanity_checks
from btrain.evaluation.result import Evaluation
from btrain.evaluation.sanity import Sanity
from btrain.report.evaluation import describe, write_page
from eval_nets import Quantised, Scaled, digits_examples

EPSILON = 0.1
FALLS, STEPS, UNBOUNDED, ONE_STEP, BLACK_BOX, GRADIENTS = (
    "accuracy falls with ε",
    "accuracy falls with steps",
    "an unbounded attack wins",
    "one step is no stronger than many",
    "a black-box attack is no stronger than PGD",
    "gradients are not flat",
)


def checked(model: nn.Module, digits: Data, count: int = 120, batch_size: int = 70) -> Sanity:
    images, labels = digits.test.images[:count], digits.test.labels[:count]
    return sanity_checks(model, images, labels, epsilon=EPSILON, batch_size=batch_size)


def verdicts(found: Sanity) -> dict[str, str]:
    return {check.name: check.verdict for check in found.checks}


@pytest.mark.parametrize("name", ["robust_net", "plain_net"])
def test_an_honest_network_passes(name: str, digits: Data, request: pytest.FixtureRequest) -> None:
    found = checked(request.getfixturevalue(name), digits)
    assert set(verdicts(found).values()) == {"passed"}
    assert found.warning is None
    radii = [x for x, _ in found.curves["epsilon"]]
    assert radii == pytest.approx([EPSILON * i / 2 for i in range(9)])
    assert [x for x, _ in found.curves["steps"]] == [0, 1, 2, 5, 10, 20, 50]
    # Both curves begin with the clean accuracy, and share the point ε, 20 steps.
    assert found.curves["epsilon"][0][1] == found.curves["steps"][0][1] > 85
    assert found.curves["epsilon"][2][1] == dict(found.curves["steps"])[20]
    # What is broken within ε is so by one attack at least, and hardly more than by the strongest.
    within = [left for _, left in [*found.curves["epsilon"][:3], *found.curves["steps"]]]
    left = 100 - 100 * len(found.broken) / found.n
    assert min(within) - 10 <= left <= min(within)


def test_an_honest_network_passes_in_l2(robust_net: nn.Module, digits: Data) -> None:
    images, labels = digits.test.images[:100], digits.test.labels[:100]
    found = sanity_checks(robust_net, images, labels, epsilon=3, norm="l2", batch_size=70)
    assert set(verdicts(found).values()) == {"passed"}
    assert found.norm == "l2"
    # No two images of 64 pixels are farther apart than √64.
    assert [x for x, _ in found.curves["epsilon"]] == [0, 1.5, 3, 4.5, 6, 7.5, 8]
    unbounded = next(check for check in found.checks if check.name == UNBOUNDED)
    assert "at ε = 8," in unbounded.detail


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (lambda network: Scaled(network, 1e4), {GRADIENTS}),
        (lambda network: Quantised(network, 2), {UNBOUNDED, BLACK_BOX, GRADIENTS}),
    ],
    ids=["saturated softmax", "quantised input"],
)
def test_a_masked_network_is_suspicious(
    plain_net: nn.Module,
    digits: Data,
    mask: Callable[[nn.Module], nn.Module],
    expected: set[str],
) -> None:
    found = checked(mask(plain_net), digits)
    suspicious = {name for name, verdict in verdicts(found).items() if verdict == "suspicious"}
    assert suspicious >= expected
    flat = next(check for check in found.checks if check.name == GRADIENTS)
    assert flat.numbers["zero_gradients"] > 50
    assert f"{flat.numbers['zero_gradients']:.1f} %" in flat.detail


def test_the_checks_do_not_depend_on_the_batch_size(robust_net: nn.Module, digits: Data) -> None:
    few, many = (checked(robust_net, digits, 60, batch_size) for batch_size in (25, 1000))
    assert few == many
    square = next(check for check in few.checks if check.name == BLACK_BOX).numbers["square"]
    assert 0 < square < few.curves["epsilon"][0][1]  # it did something, and not everything


def test_checks_of_a_network_at_chance_say_that_they_mean_nothing(
    robust_net: nn.Module, digits: Data, tmp_path: Path
) -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1e-3 * robust_net(x) + torch.eye(10)[0]

    found = checked(Constant(), digits)
    assert found.warning is not None
    assert "guessing gives 10.0 %: of such a network these checks say nothing" in found.warning
    found.write(tmp_path, {})
    assert Sanity.read(tmp_path / "sanity.json").warning == found.warning
    assert found.warning in describe(Evaluation(tmp_path, [], sanity=found), None).splitlines()
    assert "which says nothing at chance" in write_page(tmp_path).read_text()


def test_a_rise_is_named_with_its_numbers() -> None:
    curve = [(0.0, 90.0), (0.1, 40.0), (0.2, 45.0), (0.3, 20.0)]
    rising = sanity._falls("name", "ε", curve, 1.0)
    assert rising.verdict == "suspicious"
    assert rising.detail == "it rises from 40.0 % at ε 0.1 to 45.0 % at 0.2"
    assert rising.numbers == {"largest_rise": 5.0}
    assert sanity._falls("name", "ε", curve, 5.0).verdict == "passed"


def test_one_step_that_beats_many_is_suspicious() -> None:
    assert sanity._one_step([(0, 90.0), (1, 30.0), (5, 50.0), (20, 60.0)], 1.0).passed is False
    assert sanity._one_step([(0, 90.0), (1, 50.0), (5, 40.0), (20, 60.0)], 1.0).passed is True


def test_without_the_library_square_is_skipped(
    plain_net: nn.Module, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise UserError("AutoAttack is not installed; please run pip install 'btrain[eval]'.")

    monkeypatch.setattr(sanity, "library", missing)
    examples = digits_examples(digits, 10)
    correct = torch.ones(10, dtype=torch.bool)
    ball = LinfBall(EPSILON)
    missing_why = sanity._under_square(plain_net, examples, correct, ball, 0, 10)
    assert isinstance(missing_why, str)
    check = sanity._black_box(missing_why, 50.0, 1.0)
    assert check.verdict == "skipped"
    assert "btrain[eval]" in check.detail
