"""Training by bounds as a method of runs, and verified accuracy as a result of `btrain eval`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from btrain import cli
from btrain.allocation import signed_prediction_variance
from btrain.attacks.shadow import InBFloat16
from btrain.data import Batch, Data, Split
from btrain.errors import UserError
from btrain.evaluation import verification
from btrain.evaluation.attack import Start, Subject, clean_correct
from btrain.evaluation.chain import check, contradictions
from btrain.evaluation.examples import Examples
from btrain.evaluation.result import Result, Sanity
from btrain.evaluation.verification import Known, attacked, verified
from btrain.methods.make import make_method, make_methods
from btrain.methods.verified import MIX, Verified, Weight, at_random, nearest_right
from btrain.paper import step as paper_step
from btrain.paper.sheets.cost import read_step
from btrain.paper.step import write_step
from btrain.settings.compose import compose
from btrain.settings.evaluation import (
    EvalSettings,
    IntervalSettings,
    JumpChanges,
    PgdChanges,
    parse,
    words_for,
)
from btrain.settings.method import VerifiedConfig
from btrain.training.lines import headline
from btrain.training.setup import make_state
from btrain.verify import accuracy, bounds, losses
from btrain.verify.graph import Graph, evaluating, trace

CPU = torch.device("cpu")
FAMILY = ("mixtrain", "verified", "ibp", "crown_ibp", "mtl_ibp", "sabr")
SMALL = ["dataset=digits", "model=small_cnn", "model.width=3", "device=cpu", "attack.epsilon=0.1"]


def made(*overrides: str) -> Verified:
    method = make_method(compose([*SMALL, *overrides]), CPU)
    assert isinstance(method, Verified)
    return method


def batch_of(digits: Data, count: int = 50) -> Batch:
    images = digits.train.images[:count].float() / 255
    return Batch(images, digits.train.labels[:count], torch.arange(count))


@pytest.mark.parametrize("defense", FAMILY)
def test_one_step_of_each_is_finite_and_counted(defense: str, digits: Data) -> None:
    config = compose([*SMALL, f"defense={defense}", "defense.ramp=0"])
    method = make_method(config, CPU)
    assert isinstance(method, Verified)
    state = make_state(config, digits, CPU)
    generator = torch.Generator().manual_seed(0)
    batch = batch_of(digits)
    (examples,) = method.examples(state.model, batch, state.memory, generator)
    loss = method.loss(state.model, examples, state.memory, generator)
    loss.value.backward()
    assert loss.value.isfinite() and state.model.training
    assert all(p.grad is not None and p.grad.isfinite().all() for p in state.model.parameters())
    assert state.memory["trained"] == 50
    assert loss.stats is not None
    bounded = 50 if defense != "mixtrain" else loss.stats.boundary.item()
    assert bounded in (0, 1, 50) and loss.stats.boundary.item() == bounded
    far = (examples.x_adv - batch.x).abs().max().item()
    assert (0 < far <= 0.1 + 1e-6) if defense in ("mtl_ibp", "sabr") else far == 0


def test_the_mix_of_losses_by_hand(digits: Data) -> None:
    config = compose([*SMALL, "defense=verified", "defense.ramp=0"])
    network = make_state(config, digits, CPU).model
    batch = batch_of(digits, 8)
    x, labels = batch.x, batch.labels
    with evaluating(network):
        box = bounds.box(x, 0.1)
        upper = bounds.margins(trace(network, (1, 8, 8)), box, labels, engine="symbolic")
    worst = losses.worst_case(upper, labels).mean().item()
    plain = F.cross_entropy(network(x), labels).item()
    weight = ["defense.weight_first=2", "defense.weight_last=2"]
    cases = {
        ("defense.alpha=0",): plain,  # plain training
        ("defense.alpha=1",): worst,  # verifiable training
        ("defense.alpha=0.3",): 0.7 * plain + 0.3 * worst,
        ("defense.form=bernoulli", "defense.alpha=1", *weight): plain + 2 * worst,
        ("defense.form=bernoulli", "defense.alpha=0", *weight): plain,
        ("defense.alpha=0.3", "bt=random", "defense.k=1"): 0.7 * plain,  # none is bounded yet
    }
    for overrides, expected in cases.items():
        method = made("defense=verified", "defense.ramp=0", *overrides)
        memory, generator = method.memory(digits, CPU), torch.Generator()
        (examples,) = method.examples(network, batch, memory, generator)
        value = method.loss(network, examples, memory, generator).value.item()
        assert value == pytest.approx(expected, rel=1e-5), overrides


def test_schedules() -> None:
    weight = Weight(0.1, 10.0, 0.5)
    assert [weight.at(p) for p in (0, 0.25, 0.5, 1)] == pytest.approx([0.1, 1, 10, 10])
    method = made("defense=mixtrain", "defense.ramp=0.4")
    assert [method._share(p) for p in (0, 0.1, 0.4, 0.9)] == pytest.approx([0, 0.25, 1, 1])
    assert replace(method, ramp=0.0)._share(0) == 1


def test_the_mix_follows_the_errors_on_held_out_images(digits: Data) -> None:
    """Ahead of each epoch: the images not verified among those and the misclassified, an EMA."""
    some = [*SMALL, "defense=mixtrain", "defense.dynamic=feedback", "dataset.val_examples=80",
            "defense.ramp=0", "defense.engine=crown_ibp"]  # fmt: skip
    config = compose([*some, "train.epochs=3"])
    held_out = Split(digits.test.images[:80], digits.test.labels[:80])
    method = make_method(config, CPU, held_out=held_out)
    assert isinstance(method, Verified)
    state, generator = make_state(config, digits, CPU), torch.Generator().manual_seed(0)
    network, memory, batch = state.model, state.memory, batch_of(digits)
    for _ in range(30):  # a network that is right often, and verified nowhere
        F.cross_entropy(network(batch.x), batch.labels).backward()
        with torch.no_grad():
            for weight in network.parameters():
                weight -= 0.1 * weight.grad
        network.zero_grad()
    x, labels = held_out.images.float() / 255, held_out.labels
    with evaluating(network), torch.no_grad():
        wrong = (network(x).argmax(dim=1) != labels).double().mean().item()
        upper = bounds.margins(
            trace(network, (1, 8, 8)), bounds.box(x, 0.1), labels, engine="crown_ibp"
        )
        unverified = 1 - bounds.verified(upper, labels).double().mean().item()
    share = unverified / (unverified + wrong)
    assert 0.5 < share < 0.95
    next(method.examples(network, batch, memory, generator))
    assert memory[MIX] == pytest.approx(share)
    memory["trained"] += 50
    next(method.examples(network, batch, memory, generator))  # within the epoch
    assert memory[MIX] == pytest.approx(share)
    memory["trained"].fill_(len(digits.train))
    memory[MIX].fill_(0.2)
    next(method.examples(network, batch, memory, generator))
    mixed = (0.2 + share) / 2
    assert memory[MIX] == pytest.approx(mixed)
    assert method._mix(memory, 0.5) == pytest.approx((mixed, mixed / (1 - mixed)))


def test_the_few_are_drawn_or_nearest_the_boundary(digits: Data) -> None:
    logits = torch.tensor([[3.0, 0], [0, 3], [0.5, 0], [0, 1], [2, 0], [1, 0]])
    labels = torch.tensor([0, 0, 0, 0, 0, 1])
    score = signed_prediction_variance(logits, labels)
    assert (score < 0).tolist() == [False, True, False, True, False, True]
    choose = nearest_right(signed_prediction_variance)
    generator = torch.Generator().manual_seed(0)
    assert choose(logits, labels, 2, generator).tolist() == [2, 4]
    assert set(choose(logits, labels, 4, generator)[:3].tolist()) == {2, 4, 0}
    drawn = [tuple(at_random(logits, labels, 2, generator).tolist()) for _ in range(200)]
    assert all(len(set(pair)) == 2 for pair in drawn)
    assert {row for pair in drawn for row in pair} == set(range(6))
    assert made("defense=mixtrain").choose is at_random
    assert made("defense=mixtrain", "bt=bullettrain").choose is not at_random


def test_k_an_epoch_is_spread_over_its_batches(digits: Data) -> None:
    """k·b/n a batch: with 1,442 images 288 an epoch are 10 of a batch of 50."""
    method = made(
        "defense=mixtrain", "defense.k=288", "defense.per_batch=null", "defense.alpha=1",
        "defense.ramp=0", "bt=random",
    )  # fmt: skip
    network = make_state(compose([*SMALL, "defense=mixtrain"]), digits, CPU).model
    memory, generator = method.memory(digits, CPU), torch.Generator()
    (examples,) = method.examples(network, batch_of(digits), memory, generator)
    stats = method.loss(network, examples, memory, generator).stats
    assert stats is not None and stats.boundary.item() == 10
    logits, labels = torch.zeros(50, 10), digits.train.labels[:50]
    for k in (10, 20, 288, 700, 1441):
        memory, bounded = method.memory(digits, CPU), []
        for m in [*[50] * 28, 42] * 2:  # two epochs
            few = replace(method, k=k)._rows(logits[:m], labels[:m], memory, generator)
            bounded.append(len(few))
            memory["trained"] += m
        assert sum(bounded[:29]) == sum(bounded[29:]) == k
        assert max(bounded) - min(bounded[:28]) <= 1 and min(bounded) >= k * 42 // 1442
    with pytest.raises(UserError, match=r"defense.k=5000 is more than the 1442 images"):
        replace(method, k=5000).memory(digits, CPU)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["defense=mixtrain", "defense.per_batch=51"], "at most train.batch_size = 50, not 51"),
        (["defense=mixtrain", "defense.alpha=1.5"], r"defense.alpha must be in \[0, 1\]"),
        (["defense=mixtrain", "defense.engine=symbolic+crwon"], "defense.engine must be of ibp"),
        (["defense=sabr", "defense.ramp=0", "defense.shi_regulariser=1"], "while ε grows"),
        (["defense=mixtrain", "defense.memory=0"], "defense.memory must be finite and greater"),
        (["defense=mixtrain", "defense.engine=any"], "any is for verify= alone"),
        (["defense=mixtrain", "attack.norm=l2"], "bounds an L∞ ball; attack.norm does not go"),
        (["defense=mixtrain", "defense.k=1000"], "defense.per_batch must be null with defense.k"),
        (["defense=mixtrain", "bt=gaussian"], "only bt=random and bt=bullettrain choose"),
        (["defense=ibp", "bt=bullettrain"], "it bounds all images"),
        (["defense=mixtrain", "bt=uniform"], "defense.per_batch=1 does not go with bt=uniform"),
        (["defense=mixtrain", "bt.n_r=2"], "bt.n_r has no meaning with defense=mixtrain"),
        (["defense=ibp", "bt.gamma=.3"], "bt.gamma has no meaning with defense=ibp"),
        (["defense=ibp", "bt.n_b=3"], "bt.n_b has no meaning with defense=ibp"),
        (["defense=mixtrain", "bt.metric=margin"], "bt.metric has no meaning with bt=random"),
        (["defense=sabr", "defense.weight_last=3"], "has no meaning with defense.form=convex"),
        (
            ["defense=mixtrain", "defense.dynamic=feedback", "defense.weight_last=3"],
            "set dataset.val_examples",
        ),
        (["defense=ibp", "attack=l2_pgd"], "its bounds are for an L∞ ball"),
        (["defense=ibp", "rival=mma"], "does not go with"),
        (["defense=sabr", "defense.box=0"], r"defense.box must be in \(0, 1\]"),
    ],
)
def test_mistakes(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose([*SMALL, *overrides])


def test_an_engine_has_one_name_in_evaluations() -> None:
    typed = ["symbolic+ibp", "crown+crown", "crown+crown_ibp+symbolic+ibp"]
    settings = EvalSettings(verify=typed)
    assert settings.verify == ["crown", "ibp+symbolic", "any"]  # unions behind their members
    assert settings.verified == ["verified-crown", "verified-ibp-symbolic", "verified-any"]
    with pytest.raises(UserError, match=r"^verify=any\+ibp: any stands alone; it joins all"):
        EvalSettings(verify=["any+ibp"])
    with pytest.raises(UserError, match="must name each engine once"):
        EvalSettings(verify=["symbolic+ibp", "ibp+symbolic"])


def test_an_interval_attack_is_named_by_its_settings() -> None:
    changes = {
        "pgd": PgdChanges(steps=5, loss="ce"),
        "jumping": JumpChanges(jump=0.05, radius=0.02),
    }
    settings = EvalSettings(attacks=["interval", "interval50"], verify_memory=0.5, **changes)
    assert settings.memory == 2**29 and EvalSettings().memory == bounds.MEMORY
    names = settings.results
    assert names == ["interval5x1-ce-jump0.05-radius0.02", "interval5x50-ce-jump0.05-radius0.02"]
    for name in names:
        assert parse(["checkpoint=x", *words_for(name).split()]).results == [name]
    assert parse(["checkpoint=x", "attack=interval", "attack.restarts=50"]).results == [
        "interval50"
    ]
    for wrong, said in (
        ({"attacks": ["pgd20"], "jumping": JumpChanges(jumps=2)}, "attack.jumps is a setting of"),
        ({"attacks": ["interval"], "pgd": PgdChanges(loss="kl")}, "attack.loss=kl does not go"),
        ({"verify_memory": 2.0}, "verify.memory goes with verify= or attack=interval"),
        ({"verify": ["ibp"], "verify_memory": 0.0}, "verify.memory must be finite and greater"),
    ):
        with pytest.raises(UserError, match=said):
            EvalSettings(**wrong)


def test_a_run_that_was_cut_before_its_first_batch_has_a_headline() -> None:
    summary = {"cut": "train.max_seconds", "clean_acc": 10.0, "robust_acc": None, "f_b": None,
               "attack_norm": "linf", "eval_steps": 20, "epsilon": 0.1,
               "train_seconds": 0.0}  # fmt: skip
    told = headline(compose([*SMALL, "defense=mixtrain"]), summary)
    assert "– % of the images bounded; 0.0 s of training" in told


def test_settings_that_mean_something_else_are_told() -> None:
    def hints(*words: str, held_out: int = 0) -> list[str]:
        defense = compose([*SMALL, *words]).defense
        assert isinstance(defense, VerifiedConfig)
        return defense.hints(held_out)

    (told,) = hints("defense=ibp", "defense.engine=symbolic")
    assert told.startswith("defense=ibp is trained by defense.engine=symbolic here, not by ibp")
    (told,) = hints("defense=mixtrain", "defense.weight_first=20")
    assert told.startswith("The weight falls, from defense.weight_first=20")
    (told,) = hints("defense=sabr", "defense.box=1")
    assert told.startswith("defense.box=1 bounds the whole box")
    assert not hints("defense=sabr", "defense.box=0.9")
    feedback = ["defense=mixtrain", "defense.dynamic=feedback", "dataset.val_examples=100"]
    (told,) = hints(*feedback, held_out=100)
    assert "on 100 held-out images" in told
    assert not hints(*feedback, held_out=200)


def test_a_network_that_cannot_be_bounded_is_refused(digits: Data) -> None:
    method = made("defense=mixtrain", "defense.alpha=1")
    network = torch.nn.Sequential(
        torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(16, 10)
    )
    memory, generator = method.memory(digits, CPU), torch.Generator()
    (examples,) = method.examples(network, batch_of(digits), memory, generator)
    with pytest.raises(UserError, match=r"through the layer 0 \(MaxPool2d\)"):
        method.loss(network, examples, memory, generator)


def test_bounds_take_as_much_memory_as_they_may(digits: Data) -> None:
    assert made("defense=ibp").memory_limit == bounds.MEMORY
    assert made("defense=ibp", "defense.memory=0.5").memory_limit == 2**29
    method = made("defense=ibp", "defense.memory=1e-9")
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    memory, generator = method.memory(digits, CPU), torch.Generator()
    (examples,) = method.examples(network, batch_of(digits), memory, generator)
    with pytest.raises(UserError, match=r"for one image, and may take"):
        method.loss(network, examples, memory, generator)


OWN_NETWORK = """
import torch
class Pooled(torch.nn.Sequential):
    def __init__(self, classes, shape):
        super().__init__(torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(16, classes))
"""


def test_what_cannot_be_bounded_is_refused_ahead_of_any_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factory, run = tmp_path / "pooled.py", tmp_path / "run"
    factory.write_text(OWN_NETWORK)
    words = ["dataset=digits", "dataset.train_examples=50", "dataset.test_examples=20",
             "model=own", f"model.factory={factory}:Pooled", f"run.dir={run}",
             "device=cpu"]  # fmt: skip
    assert cli.main(["train", *words, "defense=mixtrain"]) == 1
    assert "through the layer 0 (MaxPool2d)" in capsys.readouterr().err
    assert not run.exists()
    assert cli.main(["train", *words, "defense=pgd", "train.epochs=1"]) == 0
    before = sorted(run.rglob("*"))
    asked = [f"checkpoint={run}", "trust_code=true", "verify=ibp", "epsilon=0.1", "device=cpu"]
    assert cli.main(["eval", *asked]) == 1
    assert "through the layer 0 (MaxPool2d)" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("defense", ["mixtrain", "ibp", "sabr"])
def test_passes_in_bf16_leave_bounds_in_float32(defense: str, digits: Data) -> None:
    config = compose([*SMALL, f"defense={defense}", "defense.ramp=0", "defense.alpha=1"])
    method, network = make_method(config, CPU), make_state(config, digits, CPU).model
    assert isinstance(method, Verified)
    values = []
    for taken in (network, InBFloat16(network).train()):
        memory, generator = method.memory(digits, CPU), torch.Generator().manual_seed(0)
        (examples,) = method.examples(taken, batch_of(digits, 8), memory, generator)
        values.append(method.loss(taken, examples, memory, generator).value)
        values[-1].backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())
    assert values[1].item() == pytest.approx(values[0].item(), rel=2e-2)


def test_a_run_is_trained_verified_and_attacked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """CROWN-IBP on digits, from the command line to its verified accuracy."""
    run = tmp_path / "run"
    words = ["dataset=digits", "dataset.test_examples=100", "model=small_cnn", "model.width=4",
             "defense=crown_ibp", "attack.epsilon=0.05", "train.epochs=5", "defense.ramp=0.3",
             "bt.probe_every=0", "device=cpu"]  # fmt: skip
    assert cli.main(["train", *words, f"run.dir={run}"]) == 0
    lines, said = (run / "train.log").read_text(), capsys.readouterr().out
    assert " % verified; 100.0 % of the images bounded; " in lines and "boundary" not in lines
    assert f"eval checkpoint={run} attack=all verify=crown_ibp report=true" in said
    engines = ["ibp", "crown_ibp", "symbolic", "any"]
    arguments = [f"checkpoint={run}", "attack=pgd20,interval", f"verify={','.join(engines)}",
                 "verify.epsilon=0.02,8/255"]  # fmt: skip
    assert cli.main(["eval", *arguments, "sanity=false", "device=cpu"]) == 0
    results = {
        name: Result.read(run / "eval", name)
        for name in ("clean", "pgd20", "interval", *(f"verified-{e}" for e in engines))
    }
    correct = {name: r.correct for name, r in results.items() if r is not None}
    assert len(correct) == len(results)
    share = {name: c.mean() for name, c in correct.items()}
    assert share["clean"] > 0.5
    assert share["verified-crown_ibp"] > 0.25
    for engine in engines:
        assert not (correct[f"verified-{engine}"] & ~correct["pgd20"]).any()
        assert not (correct[f"verified-{engine}"] & ~correct["interval"]).any()
        assert not (correct[f"verified-{engine}"] & ~correct["verified-any"]).any()
    facts = json.loads((run / "eval" / "verified-symbolic.json").read_text())
    assert (facts["engine"], facts["norm"], facts["epsilon"]) == ("symbolic", "linf", 0.05)
    assert [epsilon for epsilon, _ in facts["shares"]] == [0.02, 8 / 255, 0.05]
    assert facts["shares"][-1][1] == facts["accuracy"] == 100 * share["verified-symbolic"]
    assert "verified-any" in capsys.readouterr().out
    # A verdict that an attack contradicts ends the command.
    wrong = results["verified-ibp"]
    assert wrong is not None
    replace(wrong, correct=~correct["pgd20"]).write(run / "eval")
    assert cli.main(["eval", *arguments, "sanity=false", "device=cpu"]) == 1
    assert "verified and broken by an attack" in capsys.readouterr().err
    assert (run / "eval" / "verified_and_broken.json").is_file()
    # So does a later command without verify=, and the table of runs.
    later = ["eval", f"checkpoint={run}", "attack=pgd20,interval", "attack.jumps=1",
             "verify.memory=0.5", "sanity=false", "device=cpu"]  # fmt: skip
    for command in (later, ["report", str(run)]):
        assert cli.main(command) == 1
        assert "verified and broken by an attack" in capsys.readouterr().err
    wrong.write(run / "eval")
    assert cli.main(later) == 0
    assert not (run / "eval" / "verified_and_broken.json").is_file()
    facts = json.loads((run / "eval" / "interval40x1-cw-jumps1.json").read_text())
    assert (facts["jumps"], facts["steps"], facts["restarts"]) == (1, 40, 1)


def test_verdicts_are_compared_with_all_attacks_of_the_same_facts(tmp_path: Path) -> None:
    labels = np.zeros(4, dtype=np.int64)
    facts = {"classes": ["0"], "epsilon": 0.1, "norm": "linf", "checkpoint_sha256": "a"}

    def result(name: str, right: list[bool], **changed: object) -> Result:
        return Result(name, np.array(right), labels, ("0",), 1.0, facts | changed)

    sound = result("verified-ibp", [True, True, False, False])
    sound.write(tmp_path)
    result("pgd20", [True, True, True, False]).write(tmp_path)
    result("pgd100x10", [False, True, False, False], epsilon=0.2).write(tmp_path)
    check(tmp_path)
    broken = result("autoattack", [True, False, False, False])
    assert contradictions(tmp_path, [broken]) == {"verified-ibp and autoattack": [1]}
    with pytest.raises(UserError, match=r"^1 image is verified and broken by an attack \(verif"):
        check(None, [sound, broken])
    assert not contradictions(tmp_path, [result("clean", [False] * 4, checkpoint_sha256="b")])
    Sanity(4, 0.1, (), {}, broken=(0, 3)).write(tmp_path, facts)
    with pytest.raises(UserError, match=r"ibp and the sanity checks\): the bounds .* tells which"):
        check(tmp_path, keep=facts)
    kept = json.loads((tmp_path / "verified_and_broken.json").read_text())
    assert kept == {"broken": {"verified-ibp and the sanity checks": [0]}} | facts
    Sanity(4, 0.1, (), {}, broken=(3,)).write(tmp_path, facts)
    check(tmp_path, keep=facts)
    assert not (tmp_path / "verified_and_broken.json").exists()


def test_mixtrain_goes_on_where_it_stopped(tmp_path: Path) -> None:
    words = ["dataset=digits", "dataset.train_examples=100", "model=small_cnn", "model.width=2",
             "defense=mixtrain", "bt=bullettrain", "train.epochs=2", "bt.probe_every=0",
             "device=cpu"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli.main(["train", *words, f"run.dir={whole}"]) == 0
    assert cli.main(["train", *words, f"run.dir={cut}", "train.max_seconds=0.001"]) == 0
    assert cli.main(["train", *words, f"run.dir={cut}"]) == 0
    first, second = (
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, cut)
    )
    assert first == second[-len(first) :]


def test_a_step_of_a_run_has_its_memory_and_its_time_over_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["dataset=digits", "dataset.train_examples=100", "dataset.test_examples=50",
             "model=small_cnn", "model.width=2", "train.epochs=1", "eval.steps=1",
             "device=cpu"]  # fmt: skip
    monkeypatch.setattr(paper_step, "_SECONDS", 0.2)
    plain, bounded = tmp_path / "plain", tmp_path / "bounded"
    for run, own in ((plain, ["defense=ibp", "defense.alpha=0"]), (bounded, ["defense=verified"])):
        assert cli.main(["train", *words, *own, f"run.dir={run}"]) == 0
    before = {path: path.read_bytes() for path in bounded.rglob("*") if path.is_file()}
    random = torch.get_rng_state()
    assert read_step(bounded) is None
    write_step(bounded, tmp_path / "none")
    alone = read_step(bounded)
    assert alone is not None and alone.times_baseline is None
    path = write_step(bounded, plain)
    step = read_step(bounded)
    assert step is not None and step.steps > 0 and step.times_baseline is not None
    assert step.times_baseline > 1.5  # symbolic bounds of all images over intervals of all
    assert step.peak_memory_mb == pytest.approx(alone.peak_memory_mb, rel=0.02)
    parameters = json.loads((bounded / "summary.json").read_text())["parameters"]
    state = 3 * 4 * parameters  # weights and Adam's two moments
    write_step(plain, plain)
    base = read_step(plain)
    assert base is not None and state / 2**20 < base.peak_memory_mb < step.peak_memory_mb
    assert torch.equal(torch.get_rng_state(), random)
    assert {p: p.read_bytes() for p in bounded.rglob("*") if p.is_file() and p != path} == before
    path.write_text('{"peak_memory_mb": 1, "times_baseline": "2", "steps": 3, "epoch": 1}')
    assert read_step(bounded) is None
    older = '{"peak_memory_mb": 1, "times_baseline": 0.01, "steps": 3}'
    path.write_text(older)  # newer than the run, but of another measure
    write_step(bounded, tmp_path / "none")
    assert path.read_text() != older and read_step(bounded) is not None


def test_the_time_over_anothers_is_that_of_an_average_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["dataset=digits", "dataset.train_examples=100", "dataset.test_examples=50",
             "model=small_cnn", "train.epochs=4", "train.batch_size=5", "bt=uniform",
             "bt.n_b=0", "recipe.optimizer=adam", "recipe.lr=0.003", "eval.steps=0",
             "bt.probe_every=0", "device=cpu"]  # fmt: skip
    monkeypatch.setattr(paper_step, "_SECONDS", 0.3)
    whole, skipping = tmp_path / "whole", tmp_path / "skipping"
    skip = ["train.skip=0.9", "train.skip_last=0"]
    for run, own in ((whole, []), (skipping, skip)):
        assert cli.main(["train", *words, *own, f"run.dir={run}"]) == 0
    write_step(skipping, whole)
    step = read_step(skipping)
    assert step is not None and step.epoch == 3 and step.times_baseline is not None
    lines = [json.loads(line) for line in (skipping / "metrics.jsonl").read_text().splitlines()]
    left_out = [line["left_out"] for line in lines]
    assert left_out[0] == 0 and left_out[-1] > 0.3
    steps = [math.ceil(20 * (1 - share)) for share in left_out]
    assert step.times_baseline == pytest.approx(sum(steps) / 80, rel=0.3)


def test_methods_of_all_epochs_are_one(digits: Data) -> None:
    """The schedules follow the images trained on, not the epochs."""
    from btrain.attacks.fast_paths import make_fast_paths

    config = compose([*SMALL, "defense=mixtrain"])
    of_epoch = make_methods(config, CPU, paths=make_fast_paths(config.train, CPU))
    assert of_epoch(0) is of_epoch(7)


class CutError(Exception):
    """An interruption."""


@dataclass(frozen=True)
class Counted(Examples):
    """Examples that count how often they are asked for, and may be cut off."""

    asked: list[int] = field(default_factory=list)
    most: int = 10**6

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(self.asked) == self.most:
            raise CutError
        self.asked.append(len(indices))
        return super().batch(indices)


def small_subjects(digits: Data) -> tuple[Graph, Callable[..., Subject]]:
    """Return a small network's graph, and what makes it and 60 digits a subject in a folder."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 12), torch.nn.ReLU(),
                                  torch.nn.Linear(12, 10))  # fmt: skip
    x, labels = digits.test.images[:60].float() / 255, digits.test.labels[:60]
    for _ in range(80):
        F.cross_entropy(network(x), labels).backward()
        with torch.no_grad():
            for weight in network.parameters():
                weight -= 0.3 * weight.grad
        network.zero_grad()
    names = tuple("0123456789")

    def subject(folder: Path, most: int = 10**6, batch_size: int = 20) -> Subject:
        examples = Counted(x, labels, names, CPU, most=most)
        correct = clean_correct(network, Examples(x, labels, names, CPU), batch_size=60)
        return Subject(network, examples, correct, 0.03, 0.01, 0, batch_size, folder=folder)

    return trace(network, (1, 8, 8)), subject


def test_the_interval_attack_is_the_same_for_all_batch_sizes_and_goes_on_where_it_was(
    tmp_path: Path, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "BATCH", 16)  # drawn for at once
    graph, subject = small_subjects(digits)
    settings = IntervalSettings(steps=1, restarts=3, jumps=1, step_size=0.003)

    def stands(of: Subject) -> list[bool]:
        of = replace(of, epsilon=0.06)
        correct: list[bool] = attacked(of, graph, "interval", settings, Start(of.correct)).correct
        return list(correct)

    whole = subject(tmp_path / "whole")
    found = stands(whole)
    assert 0 < sum(found) < whole.correct.sum()
    assert stands(subject(tmp_path / "small", batch_size=5)) == found
    cut, again = subject(tmp_path / "cut", most=2), subject(tmp_path / "cut")
    with pytest.raises(CutError):
        stands(cut)
    assert stands(again) == found
    asked = [len(of.examples.asked) for of in (whole, again)]  # type: ignore[attr-defined]
    assert asked[1] == asked[0] - 2 > 0
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [
        "interval.json", "interval.npz",
    ]  # fmt: skip


def test_shares_at_several_radii_fall_and_a_cut_verification_goes_on(
    tmp_path: Path, digits: Data
) -> None:
    graph, subject = small_subjects(digits)
    network, x, labels = (of := subject(tmp_path)).model, of.examples.images, of.examples.labels

    radii = [0.01, 0.02, 0.05]
    whole = subject(tmp_path / "whole")
    result = verified(whole, graph, "ibp", radii)
    shares = dict(map(tuple, result.settings["shares"]))
    assert list(shares) == [0.01, 0.02, 0.03, 0.05]
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    for epsilon, share in shares.items():  # by intervals, which grow with the box, all at once
        (alone,) = accuracy.verify(network, x, labels, epsilon=epsilon, engines=["ibp"])
        assert share == pytest.approx(100 * alone.accuracy)
    assert 100 > shares[0.01] > shares[0.05] and result.accuracy == shares[0.03]
    cut = subject(tmp_path / "cut", most=5)
    with pytest.raises(CutError):
        verified(cut, graph, "ibp", radii)
    again = subject(tmp_path / "cut")
    assert verified(again, graph, "ibp", radii).settings["shares"] == result.settings["shares"]
    counted = [len(of.examples.asked) for of in (whole, again)]  # type: ignore[attr-defined]
    assert counted[1] == counted[0] - 5
    assert not list((tmp_path / "cut").glob("*.partial.npz"))
    # What other radii take comes on top.
    path = tmp_path / "cut" / "verified-ibp.json"
    path.write_text(path.read_text().replace('"seconds": ', '"seconds": 1000'))
    assert verified(again, graph, "ibp", [0.07]).seconds > 1000
    # A union is asked for what its members left open alone.
    known: Known = {}
    members, union, alone = (subject(tmp_path / name) for name in ("whole", "union", "alone"))
    verified(members, graph, "ibp", radii, known=known)
    joined = verified(union, graph, "ibp+crown", known=known)
    assert (joined.correct == verified(alone, graph, "ibp+crown").correct).all()
    spared = sum(alone.examples.asked) - sum(union.examples.asked)  # type: ignore[attr-defined]
    assert spared == result.correct.sum() > 0
