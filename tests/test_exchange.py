"""Weights in and out: other projects' files, runs of ours, and what `btrain export` writes."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from btrain import models
from btrain.data import Data
from btrain.errors import UserError
from btrain.exchange import names
from btrain.exchange.from_run import load_run
from btrain.exchange.read import load_weights, read_weights
from btrain.exchange.write import write
from btrain.models import Normalise
from disks import full_disk
from their_wide_resnet import TheirWideResNet

Capture = pytest.CaptureFixture[str]
HALF = {"mean": [0.5], "std": [0.5]}


def lived_in(model: nn.Module) -> nn.Module:
    """In eval mode, with BatchNorm statistics that are not the fresh ones."""
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.2, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def wide_resnet(seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    settings = {"width": 2, "depth": 10, "classes": 10, "shape": (3, 32, 32)} | changes
    return lived_in(models.build("wide_resnet", **settings))


def theirs(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return lived_in(TheirWideResNet(**settings))


def same_logits(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(one(x), other(x))


# Reading


def in_module(state: dict[str, Tensor]) -> dict[str, Any]:
    return {f"module.{key}": value for key, value in state.items()}


WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda state: state,
    "module.": in_module,
    "model.": lambda state: {f"model.{key}": value for key, value in state.items()},
    "module.model.": lambda state: {f"module.model.{key}": value for key, value in state.items()},
    "_orig_mod.": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": []}},
    "net": lambda state: {"net": in_module(state), "acc": 87.5, "epoch": 3},
    "model_state_dict": lambda state: {"epoch": 3, "model_state_dict": state},
    "augmix": lambda state: {"model": "wrn", "state_dict": in_module(state), "best_acc": 5.0},
    "ours": lambda state: {"format": 1, "state": {"model": state, "epoch": 2}, "config": {}},
    "no counters": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_are_found_however_they_are_wrapped(
    tmp_path: Path, tiles: Tensor, wrapping: str
) -> None:
    source, model = wide_resnet(), wide_resnet(seed=1)
    torch.save(WRAPPINGS[wrapping](dict(source.state_dict())), tmp_path / "w.pt")
    assert not same_logits(source, model, tiles)
    load_weights(model, tmp_path / "w.pt")
    assert same_logits(source, model, tiles)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"sub_block1": True}, {"shortcut": "conv_shortcut"}, {"mu_sigma": True}, {"depth": 16}],
    ids=str,
)
def test_other_projects_networks_give_their_logits_here(
    tmp_path: Path, tiles: Tensor, settings: dict[str, Any], zipped: bool
) -> None:
    source = theirs(**settings)
    torch.save(
        {"state_dict": in_module(source.state_dict())},
        tmp_path / "theirs.pt",
        _use_new_zipfile_serialization=zipped,
    )
    model = wide_resnet(seed=1, depth=settings.get("depth", 10))
    load_weights(model, tmp_path / "theirs.pt")
    torch.testing.assert_close(model(tiles), source(tiles))
    assert isinstance(model.normalise, Normalise) == ("mu_sigma" in settings)


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_every_network_of_ours_reads_its_own_state_dict(
    tmp_path: Path, digits: Data, architecture: str
) -> None:
    depth = 10 if architecture == "wide_resnet" else None

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = models.build(
            architecture, width=2, depth=depth, classes=10, shape=(1, 8, 8), **HALF
        )
        return lived_in(model)

    source, model = network(0), network(1)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert same_logits(source, model, digits.test.images[:24].float() / 255)


def test_a_model_keeps_its_normalisation_where_the_file_has_none(
    tmp_path: Path, tiles: Tensor
) -> None:
    """google-research/augmix normalised in its data loader: model.mean and model.std say so."""
    source = theirs(shortcut="conv_shortcut")
    torch.save(source.state_dict(), tmp_path / "theirs.pt")
    model = wide_resnet(**HALF)
    load_weights(model, tmp_path / "theirs.pt")
    torch.testing.assert_close(model(tiles), source((tiles - 0.5) / 0.5))


def test_a_normalisation_that_contradicts_the_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "theirs.pt"
    torch.save(theirs(mu_sigma=True).state_dict(), path)
    load_weights(wide_resnet(**HALF), path)  # one value for all channels says the same
    model = wide_resnet(mean=[0.5], std=[0.25])
    with pytest.raises(UserError) as caught:
        load_weights(model, path)
    assert str(caught.value) == (
        f"{path} normalises with 0.5, 0.5, 0.5 where the model (model.mean, model.std) has 0.25."
    )


# Files that do not fit


def changed(**changes: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
    """A WideResNet's state dict with other or without some tensors; `__` stands for a dot."""
    state = dict(wide_resnet().state_dict())
    for name, change in changes.items():
        key = name.replace("__", ".")
        if change is None:
            del state[key]
        else:
            state[key] = change(state[key])
    return state


MISFITS: dict[str, tuple[Callable[[], Any], str]] = {
    "preact": (
        lambda: models.build(
            "preact_resnet18", width=2, depth=None, classes=10, shape=(3, 32, 32)
        ).state_dict(),
        "is of another architecture than the model: it lacks block1.layer.0.bn1.weight, "
        "block1.layer.0.bn1.bias, block1.layer.0.bn1.running_mean and 34 more and the model has no "
        "blocks.0.bn1.weight, blocks.0.bn1.bias, blocks.0.bn1.running_mean and ",
    ),
    "deeper": (
        lambda: wide_resnet(depth=16).state_dict(),
        "is of another architecture than the model: the model has no block1.layer.1.bn1.weight,",
    ),
    "a key gone": (
        lambda: changed(fc__bias=None),
        "is of another architecture than the model: it lacks fc.bias.",
    ),
    "wider": (
        lambda: wide_resnet(width=3).state_dict(),
        "does not fit the model: block1.layer.0.conv1.weight is 48×16×3×3 there and 32×16×3×3 in "
        "the model (",
    ),
    "grey": (
        lambda: wide_resnet(shape=(1, 32, 32)).state_dict(),
        "does not fit the model: conv1.weight is 16×1×3×3 there and 16×3×3×3 in the model.",
    ),
    "classes": (
        lambda: wide_resnet(classes=100).state_dict(),
        "has 100 classes, the model 10.",
    ),
    "classifier of other features": (
        lambda: changed(fc__weight=lambda w: w[:, :3]),
        "does not fit the model: fc.weight is 10×3 there and 10×128 in the model.",
    ),
    "integers": (
        lambda: changed(conv1__weight=lambda w: w.long()),
        "does not fit the model: conv1.weight is of type int64 there.",
    ),
    "complex": (
        lambda: changed(conv1__weight=lambda w: w.to(torch.complex64)),
        "does not fit the model: conv1.weight is of type complex64 there.",
    ),
    "sparse": (
        lambda: changed(fc__weight=lambda w: w.to_sparse()),
        "is not a readable checkpoint: it asks for torch._utils._rebuild_sparse_tensor, and only ",
    ),
    "channels": (
        lambda: {**wide_resnet().state_dict(), "mu": torch.zeros(4), "sigma": torch.ones(4)},
        "normalises 4 channels, the model has 3.",
    ),
    "mu alone": (
        lambda: {**wide_resnet().state_dict(), "mu": torch.zeros(3)},
        "is of another architecture than the model: the model has no normalise.mean.",
    ),
    "twice": (
        lambda: {**wide_resnet().state_dict(), "module.fc.bias": torch.zeros(10)},
        "holds fc.bias twice, once of them as module.fc.bias.",
    ),
    "no weights": (lambda: {"epoch": 3, "model": "wrn"}, "holds no weights: "),
    "a list": (lambda: [torch.zeros(2)], "holds no weights: "),
    "nothing": (dict, "holds no weights: "),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_named_and_leaves_the_model_alone(tmp_path: Path, misfit: str) -> None:
    make, sentence = MISFITS[misfit]
    path = tmp_path / "other.pt"
    torch.save(make(), path)
    model = wide_resnet()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError) as caught:
        load_weights(model, path)
    assert str(caught.value).startswith(f"{path} {sentence}")
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


# Files that cannot or must not be read


class Payload:
    """Unpickled, it would make a file."""

    def __init__(self, proof: Path) -> None:
        self.command = f"touch '{proof}'"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def saved(content: object, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


HOSTILE: dict[str, Callable[[Payload], bytes]] = {
    "zip": lambda payload: saved({"state_dict": {"a": torch.zeros(1)}, "x": payload}),
    "legacy": lambda payload: saved({"a": payload}, zipped=False),
    "pickle 2": lambda payload: pickle.dumps(payload, protocol=2),
    "pickle 4": lambda payload: pickle.dumps({"a": payload}, protocol=4),
}


@pytest.mark.parametrize("read", [read_weights, load_run], ids=["weights", "run"])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_pickle_is_refused_and_never_run(
    tmp_path: Path, hostile: str, read: Callable[[Path], object]
) -> None:
    proof, path = tmp_path / "ran", tmp_path / "hostile.pt"
    content = HOSTILE[hostile](Payload(proof))
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path} is not a readable checkpoint")
    if hostile in ("zip", "legacy"):
        assert f"it asks for {os.name}.system" in str(caught.value)
    assert not proof.exists()
    if hostile.startswith("pickle"):  # the payload is live: plain pickle would have run it
        pickle.loads(content)
        assert proof.exists()


def test_a_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(UserError, match=r"it asks for torch\.nn\.modules\.linear\.Linear, and"):
        read_weights(tmp_path / "module.pt")


@pytest.mark.parametrize("length", [0, 1, 100, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files_are_named(tmp_path: Path, kind: str, length: float) -> None:
    state = wide_resnet().state_dict()
    if kind == "safetensors":
        content = pytest.importorskip("safetensors.torch").save(dict(state))
    else:
        content = saved(state, zipped=kind == "zip")
    path = tmp_path / ("cut.safetensors" if kind == "safetensors" else "cut.pt")
    path.write_bytes(content[: int(length * len(content)) if 0 < length < 1 else int(length)])
    with pytest.raises(UserError) as caught:
        read_weights(path)
    assert str(caught.value).startswith(f"{path} is not a readable checkpoint")
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pt does not exist\.$"):
        read_weights(tmp_path / "nowhere.pt")
    with pytest.raises(UserError, match=r"is a folder, not a checkpoint\.$"):
        read_weights(tmp_path)


# Writing


@pytest.mark.parametrize("sub_block1", [False, True])
@pytest.mark.parametrize("constants", [{}, HALF, {"mean": [0.5] * 3, "std": [0.5] * 3}], ids=str)
def test_robustbench_classes_load_ours_strictly_and_ours_come_back(
    tmp_path: Path, tiles: Tensor, constants: dict[str, Any], sub_block1: bool
) -> None:
    model, path = wide_resnet(**constants), tmp_path / "out.pt"
    told = write(model, path, format="robustbench", shape=(3, 32, 32), sub_block1=sub_block1)
    network = TheirWideResNet(sub_block1=sub_block1, mu_sigma=bool(constants)).eval()
    copied = ("mu", "sigma", "sub_block1.")  # of no parameter of ours
    named = [p for name, p in network.named_parameters() if not name.startswith(copied)]
    assert told == sum(parameter.numel() for parameter in named)
    network.load_state_dict(torch.load(path, weights_only=True), strict=True)
    torch.testing.assert_close(network(tiles), model(tiles))

    back = wide_resnet(seed=1, **constants)
    load_weights(back, path)
    assert same_logits(model, back, tiles)
    assert same_logits(model, back, torch.rand(3, 3, 32, 32))


def test_sub_block1_has_the_published_size() -> None:
    """TRADES' WRN-34-10 counts 48,262,586 parameters with it, 46,160,474 without."""
    with torch.device("meta"):
        model = models.build("wide_resnet", width=10, depth=34, classes=10, shape=(3, 32, 32))
    counted = {key for key, _ in model.named_parameters()}
    for sub_block1, size in ((False, 46_160_474), (True, 48_262_586)):
        weights = names.robustbench(dict(model.state_dict()), sub_block1=sub_block1)
        parameters = (v for k, v in weights.items() if k.removeprefix("sub_") in counted)
        assert sum(value.numel() for value in parameters) == size


@pytest.mark.parametrize("format", ["state_dict", "safetensors"])
def test_our_own_names_come_back(tmp_path: Path, tiles: Tensor, format: str) -> None:
    if format == "safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / ("out.safetensors" if format == "safetensors" else "out.pt")
    model, back = wide_resnet(**HALF), wide_resnet(seed=1, **HALF)
    write(model, path, format=format, shape=(3, 32, 32))
    load_weights(back, str(path))
    assert same_logits(model, back, tiles)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_tied_weights_go_into_safetensors_and_come_back(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

    ours, theirs, path = Tied(), Tied(), tmp_path / "tied.safetensors"
    write(ours, path, format="safetensors", shape=(1, 1, 3))
    load_weights(theirs, path)
    assert theirs.b.weight is theirs.a.weight
    for name, weight in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], weight)


def test_onnx_takes_batches_of_any_size(tmp_path: Path, tiles: Tensor, capfd: Any) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, path = wide_resnet(**HALF), tmp_path / "out.onnx"
    write(model, path, format="onnx", shape=(3, 32, 32))
    assert capfd.readouterr() == ("", "")
    assert [file.name for file in tmp_path.iterdir()] == ["out.onnx"]
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    (images,), (logits,) = graph.graph.input, graph.graph.output
    batch, *shape = images.type.tensor_type.shape.dim
    assert images.name == "images"
    assert logits.name == "logits"
    assert batch.dim_param
    assert [size.dim_value for size in shape] == [3, 32, 32]

    run = onnx_runner(path)
    for n in (1, 5):
        with torch.no_grad():
            torch.testing.assert_close(run(tiles[:n]), model(tiles[:n]), rtol=1e-3, atol=1e-4)


def onnx_runner(path: Path) -> Callable[[Tensor], Tensor]:
    """By onnxruntime where it is installed, else by onnx' own slow reference."""
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        session: Any = ReferenceEvaluator(str(path))
    else:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def test_robustbench_takes_no_other_size(tmp_path: Path) -> None:
    model = wide_resnet(shape=(1, 8, 8))
    with pytest.raises(UserError, match="takes 3×32×32 images, not 1×8×8"):
        write(model, tmp_path / "o.pt", format="robustbench", shape=(1, 8, 8))


def test_what_cannot_be_written_leaves_what_is_there(tmp_path: Path) -> None:
    model, path = wide_resnet(), tmp_path / "A.pt"
    path.write_bytes(b"before")
    beside = tmp_path / "A.pt.md"
    beside.mkdir()
    for format, said in (
        ("foo", "format must be one of robustbench, .*, not foo"),
        ("compact", "format=compact needs a run's config"),
        ("state_dict", r"A\.pt\.md is there already as a folder"),
    ):
        with pytest.raises(UserError, match=said):
            write(model, path, format=format, shape=(3, 32, 32), overwrite=True)
        assert path.read_bytes() == b"before" and beside.is_dir()


def test_an_export_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, as /dev/full has it: what torch.save has written by then goes again."""
    with full_disk(monkeypatch), pytest.raises(UserError, match=r"o\.pt could not be written"):
        write(wide_resnet(), tmp_path / "o.pt", format="state_dict", shape=(3, 32, 32))
    assert list(tmp_path.iterdir()) == []
