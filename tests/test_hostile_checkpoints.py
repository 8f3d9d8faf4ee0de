"""Checkpoints and weights that lie about themselves: refused, whatever torch would make of them."""

from __future__ import annotations

import copy
import io
import os
import pickle
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from btrain import models
from btrain.data import Data
from btrain.errors import UserError
from btrain.exchange.from_run import load_run
from btrain.exchange.read import load_weights, read_plain, read_weights
from btrain.runs import checkpoint
from btrain.runs.folder import RunFolder
from btrain.settings.compose import compose, to_dict
from btrain.training.resume import adopt_best, check_batch, load_newest
from btrain.training.setup import make_state
from btrain.training.state import TrainState

SETTINGS = ["dataset=digits", "model=small_cnn", "model.width=2", "device=cpu"]
CONFIG = compose(SETTINGS)
LITTLE = 32 << 20


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < LITTLE
    finally:
        tracemalloc.stop()


def saved(content: object, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def rewritten(
    content: bytes,
    change: Callable[[str, bytes], bytes],
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """A zip file with other members, all sums right."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, "w", compression) as new,
    ):
        for name in old.namelist():
            new.writestr(name, change(name.partition("/")[2], old.read(name)))
    return buffer.getvalue()


def with_pickle(pickled: bytes) -> bytes:
    """A whole zip file around a pickle of one's own."""
    return rewritten(saved({}), lambda name, old: pickled if name == "data.pkl" else old)


def shortened(name: str, old: bytes) -> bytes:
    return old[:4] if name == "data/0" else old


def legacy_with_long_storage() -> bytes:
    content = saved({"a": torch.zeros(77)}, zipped=False)
    assert content.count(b"K\x4d") == 2  # its length: of the storage, of the tensor
    return content.replace(b"K\x4d", b"J\x00\x00\x00\x70")


def shared(levels: int) -> Any:
    node: Any = 0
    for _ in range(levels):
        node = [node] * 10
    return node


WEIGHTS = {"a": torch.zeros(1000)}
HOLDS_ITSELF = b"\x80\x02]q\x00h\x00a."

HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "a storage longer than its bytes": (
        lambda: rewritten(saved(WEIGHTS), shortened),
        "its storage 0 has another size than the file says",
    ),
    "one of the old format": (legacy_with_long_storage, "it is cut off"),
    "compressed": (
        lambda: rewritten(saved(WEIGHTS), lambda _, old: old, zipfile.ZIP_DEFLATED),
        "it is compressed, as torch never does",
    ),
    "strides of 0": (
        lambda: saved({"a": torch.zeros(1).expand(10**6, 10**6)}),
        "a tensor of 1000000×1000000 in it has only 1 values",
    ),
    "a list in itself": (lambda: with_pickle(HOLDS_ITSELF), "it is nested deeper than 32 levels"),
    "shared lists": (lambda: saved({"a": shared(9)}), "it holds more than 300,000 values"),
    "a large memo": (
        lambda: with_pickle(b"\x80\x02Nr\xff\xff\xff\x7f."),
        "its memo is damaged",
    ),
    "a large storage by name": (
        lambda: with_pickle(b"\x80\x02ctorch.storage\nUntypedStorage\nJ\xff\xff\xff\x7f\x85R."),
        "it asks for torch.storage.UntypedStorage, and only tensors and plain values are loaded",
    ),
    "attributes of a class": (
        lambda: with_pickle(b"\x80\x02ccollections\nCounter\nN}X\x04\0\0\0evilK\x01s\x86b."),
        "it changes what it was given",
    ),
    "a flipped bit": (
        lambda: saved(WEIGHTS).replace(bytes(1000), bytes(999) + b"\1", 1),
        "data/0 in it is damaged",
    ),
    "a second directory": (lambda: saved(WEIGHTS) + saved({}), "the directory of the zip file"),
}


@pytest.mark.parametrize("read", [read_weights, load_run], ids=["weights", "run"])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_file_that_lies_is_refused_with_little_memory(
    tmp_path: Path, hostile: str, read: Callable[[Path], object]
) -> None:
    make, reason = HOSTILE[hostile]
    path = tmp_path / "hostile.pt"
    path.write_bytes(make())
    with little_memory(), pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path} is not a readable checkpoint: ")
    assert reason in str(caught.value)
    with little_memory(), pytest.raises(UserError, match="is not a readable checkpoint; delete"):
        checkpoint.load(path)
    assert not hasattr(Counter, "evil")


@pytest.mark.parametrize(
    "state",
    [b"]K\x01a", b"}X\x08\0\0\0itemsizeK\x01s", b"N}X\x08\0\0\0itemsizeK\x01s\x86"],
    ids=["list", "dictionary", "slots"],
)
@pytest.mark.parametrize("name", [b"torch\nFloatStorage", b"torch._utils\n_rebuild_tensor_v2"])
def test_a_file_cannot_change_how_the_next_is_read(
    tmp_path: Path, name: bytes, state: bytes
) -> None:
    (tmp_path / "sound.pt").write_bytes(saved(WEIGHTS))
    (tmp_path / "hostile.pt").write_bytes(with_pickle(b"\x80\x02c" + name + b"\n" + state + b"b."))
    with pytest.raises(UserError):
        read_weights(tmp_path / "hostile.pt")
    assert torch.equal(read_weights(tmp_path / "sound.pt")["a"], WEIGHTS["a"])


def test_what_others_save_is_read(tmp_path: Path) -> None:
    content = {
        "state_dict": torch.nn.Linear(2, 3).state_dict(),
        "half": torch.ones(2, dtype=torch.float16),
        "part": torch.arange(10)[2:8:2],
        "parameter": torch.nn.Parameter(torch.ones(1)),
        "counter": Counter([1]),
        "bytes": b"\xff\0",
        "set": {1, 2},
        "size": torch.Size([1, 2]),
        "plain": [None, True, 1.5, -(2**40), "ü", (1, (2, 3))],
        "empty": torch.zeros(0, 5),
        "scalar": torch.tensor(3),
    }
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pt"
        path.write_bytes(saved(content, zipped=zipped))
        assert [*read_weights(path)] == ["weight", "bias"]
        whole = read_plain(path)
        assert whole.keys() == content.keys()
        for key, value in content.items():
            same = torch.equal(whole[key], value) if isinstance(value, Tensor) else True
            assert same, key
        assert whole["bytes"] == b"\xff\0"
        assert whole["plain"] == content["plain"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(UserError, match="is not a readable checkpoint"):
        checkpoint.load(tmp_path / "pipe.pt")


# Settings and weights that do not belong together


def run_checkpoint(**model: Any) -> dict[str, Any]:
    network = models.build("small_cnn", width=2, depth=None, classes=10, shape=(1, 8, 8))
    config = to_dict(CONFIG)
    config["model"] |= model
    return {"format": checkpoint.FORMAT, "state": {"model": network.state_dict()}, "config": config}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"width": 10**7}, "does not fit the model"),
        ({"width": 2**62}, "there is no network of model.width"),
        ({"architecture": "wide_resnet", "depth": 6 * 10**9 + 4}, "fewer weights than model.depth"),
    ],
)
def test_settings_for_an_enormous_network_make_none(
    tmp_path: Path, model: dict[str, Any], words: str
) -> None:
    path = tmp_path / "run.pt"
    torch.save(run_checkpoint(), path)
    load_run(path)
    torch.save(run_checkpoint(**model), path)
    with little_memory(), pytest.raises(UserError, match=words):
        load_run(path)


@pytest.mark.parametrize(
    ("architecture", "settings", "words"),
    [
        ("torchvision", {"name": "vgg11", "dropout": 10**9}, "asks for a network with 1000000000"),
        (
            "torchvision",
            {"name": "resnet18", "weights": "DEFAULT"},
            "model.settings.weights is not",
        ),
        ("torchvision", {"name": "../x"}, "needs the name of a network"),
        ("timm", {"model_name": "vit_tiny_patch16_224", "depth": [10**9]}, "with 1000000000 in"),
        ("timm", {"model_name": "hf-hub:a/b"}, "needs the name of a network"),
        ("timm", {"model_name": "resnet18", "checkpoint_path": "x.pt"}, "checkpoint_path is not"),
    ],
)
def test_settings_for_a_library_fetch_nothing_and_ask_for_nothing_enormous(
    tmp_path: Path, architecture: str, settings: dict[str, Any], words: str
) -> None:
    content = run_checkpoint()
    content["config"]["model"] = {"name": "x", "architecture": architecture, "settings": settings}
    torch.save(content, tmp_path / "run.pt")
    with little_memory(), pytest.raises(UserError, match=words):
        load_run(tmp_path / "run.pt")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (shared(5), "more than 1,000 values"),
        (10**400, "is no setting of a run"),
        (torch.zeros(2), "is no setting of a run"),
        ("${oc.env:HOME}", "refers to"),
        ({"_target_": "os.system"}, "dataset.root"),
        ("a\0b", "dataset.root"),
    ],
    ids=["shared", "integer", "tensor", "reference", "target", "null"],
)
def test_settings_are_plain_values(tmp_path: Path, setting: Any, words: str) -> None:
    content = run_checkpoint()
    content["config"]["dataset"].update(name="mnist", root=setting, download=True)
    torch.save(content, tmp_path / "run.pt")
    with pytest.raises(UserError, match=words) as caught:
        load_run(tmp_path / "run.pt")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("constants", "words"),
    [
        (torch.zeros(10**6), "normalises 1000000 channels, the model has 1"),
        (torch.tensor([True]), "normalises with constants of type bool"),
        (torch.zeros(1, dtype=torch.complex64), "of type complex64"),
    ],
)
@pytest.mark.parametrize("mean", [None, [0.5]])
def test_constants_are_one_number_a_channel(
    tmp_path: Path, constants: Tensor, words: str, mean: list[float] | None
) -> None:
    model = models.build(
        "small_cnn", width=2, depth=None, classes=10, shape=(1, 8, 8), mean=mean, std=mean
    )
    weights = {**run_checkpoint()["state"]["model"], "mu": constants, "sigma": constants}
    torch.save(weights, tmp_path / "theirs.pt")
    with pytest.raises(UserError, match=words):
        load_weights(model, tmp_path / "theirs.pt")


# The state of a run


@pytest.fixture
def state(digits: Data) -> TrainState:
    state = make_state(CONFIG, digits, torch.device("cpu"))
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    return state


def reloaded(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    checkpoint.save(path, {"state": content, "config": {}})
    return checkpoint.load(path)["state"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("value", [None, "1", -1, float("nan"), torch.zeros(2), 2**60])
@pytest.mark.parametrize("key", ["epoch", "train_seconds", "collapsed", "best_epoch"])
def test_how_far_a_run_came_is_a_number(
    tmp_path: Path, state: TrainState, key: str, value: object
) -> None:
    path = tmp_path / "last.pt"
    sound = state.state_dict()
    state.load_state_dict(reloaded(path, sound))
    if (key, value) == ("best_epoch", None):
        return
    with pytest.raises(UserError, match="it does not say how far its run came"):
        reloaded(path, sound | {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("epoch", 1.5), ("batch", 0.5), ("batch", True), ("collapsed", 1), ("best_epoch", 1.5),
     ("best_val_acc", 101.0), ("watched_acc", float("nan")), ("train_seconds", 1e308),
     ("epoch_seconds", float("inf"))],
)  # fmt: skip
def test_every_number_of_a_state_is_of_its_kind_and_range(
    tmp_path: Path, state: TrainState, key: str, value: object
) -> None:
    with pytest.raises(UserError, match="it does not say how far its run came"):
        reloaded(tmp_path / "last.pt", state.state_dict() | {key: value})


@pytest.mark.parametrize("name", ["robust_fraction", "outlier_fraction"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 5.0, -0.1])
def test_a_running_fraction_is_one(state: TrainState, name: str, value: float) -> None:
    content = state.state_dict()
    content["memory"] = {"robust_fraction": torch.zeros(()), name: torch.tensor(value)}
    with pytest.raises(UserError, match=rf"like this: (its {name}|not every number of its)"):
        state.load_state_dict(content)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model", "trained_model", "optimizer"])
def test_weights_averages_and_momenta_are_finite(digits: Data, name: str, value: float) -> None:
    state = make_state(compose([*SETTINGS, "recipe.ema=0.9"]), digits, torch.device("cpu"))
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    content = copy.deepcopy(state.state_dict())
    state.load_state_dict(content)
    if name == "optimizer":
        content[name]["state"][0]["momentum_buffer"].view(-1)[0] = value
    else:
        next(iter(content[name].values())).view(-1)[0] = value
    with pytest.raises(UserError, match=f"like this: not every number of its {name} is finite"):
        state.load_state_dict(content)


@pytest.mark.parametrize("name", ["epoch_sums", "total_sums"])
def test_sums_can_be_added_up(state: TrainState, name: str) -> None:
    content = state.state_dict()
    state.load_state_dict(content | {name: torch.full_like(content[name], torch.nan)})
    for value in (torch.inf, 1e308):
        with pytest.raises(UserError, match=f"a number of its {name} is too large"):
            state.load_state_dict(content | {name: torch.full_like(content[name], value)})


def test_a_batch_is_one_of_the_epoch(state: TrainState, tmp_path: Path) -> None:
    check_batch(state, 0, RunFolder(tmp_path))
    state.batch = 10**9
    with pytest.raises(UserError, match=r"of batch 1,000,000,000 of an epoch, which has 5\."):
        check_batch(state, 5, RunFolder(tmp_path))


@pytest.mark.parametrize("name", ["last", "previous"])
def test_weights_alone_are_no_run_to_go_on_with(
    tmp_path: Path, state: TrainState, name: str
) -> None:
    folder = RunFolder(tmp_path)
    folder.last.parent.mkdir()
    content = {"model": state.model.state_dict(), "epoch": 1, "val_acc": 50.0}
    checkpoint.save(vars(folder)[name], {"state": content})
    with pytest.raises(UserError, match="it does not say how far its run came"):
        load_newest(folder)
    if name == "last":
        checkpoint.save(folder.previous, {"state": state.state_dict(), "config": {}})
        assert str(load_newest(folder)[1]).endswith("how far its run came. The run goes on from "
                                                    f"{folder.previous}.")  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{"epoch": 1.5}, {"val_acc": float("nan")}, {"val_acc": "1"}, {"model": {}}, {"model": None},
     {"model": {"0.weight": torch.zeros(1)}}],
)  # fmt: skip
def test_the_best_epoch_fits_ahead_of_the_training(
    tmp_path: Path, state: TrainState, changes: dict[str, Any]
) -> None:
    folder = RunFolder(tmp_path)
    folder.best.parent.mkdir()
    content = {"model": state.model.state_dict(), "epoch": 1, "val_acc": 50.0}
    checkpoint.save(folder.best, {"state": content})
    adopt_best(state, folder)
    assert (state.best_epoch, state.best_val_acc) == (1, 50.0)
    checkpoint.save(folder.best, {"state": content | changes})
    with pytest.raises(UserError, match=r"best\.pt does not hold the best epoch of a run like"):
        adopt_best(state, folder)


def graphs_of_text(content: dict[str, Any]) -> None:
    content["graphs"] = "always"


def a_momentum_of_one_number(content: dict[str, Any]) -> None:
    content["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(())


def a_missing_momentum(content: dict[str, Any]) -> None:
    del content["optimizer"]["state"][0]


def momenta_of_another_optimizer(content: dict[str, Any]) -> None:
    for momenta in content["optimizer"]["state"].values():
        momenta["exp_avg"] = momenta.pop("momentum_buffer")


def momenta_of_another_shape(content: dict[str, Any]) -> None:
    content["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(3)


def momenta_of_text(content: dict[str, Any]) -> None:
    content["optimizer"]["state"][0]["momentum_buffer"] = "fast"


def a_rate_of_text(content: dict[str, Any]) -> None:
    content["optimizer"]["param_groups"][0]["lr"] = "fast"


def a_missing_setting(content: dict[str, Any]) -> None:
    del content["optimizer"]["param_groups"][0]["weight_decay"]


def a_stretched_memory(content: dict[str, Any]) -> None:
    content["memory"]["robust_fraction"] = torch.zeros(1, 1)


def stretched_sums(content: dict[str, Any]) -> None:
    content["total_sums"] = torch.zeros(1)


def no_weights(content: dict[str, Any]) -> None:
    content["model"] = 3


@pytest.mark.parametrize(
    "spoil",
    [
        momenta_of_another_shape,
        momenta_of_text,
        a_rate_of_text,
        a_missing_setting,
        a_stretched_memory,
        stretched_sums,
        no_weights,
        a_momentum_of_one_number,
        a_missing_momentum,
        momenta_of_another_optimizer,
        graphs_of_text,
    ],
)
def test_a_state_of_another_run_is_refused(
    tmp_path: Path, state: TrainState, spoil: Callable[[dict[str, Any]], None]
) -> None:
    content = pickle.loads(pickle.dumps(state.state_dict()))
    state.load_state_dict(reloaded(tmp_path / "last.pt", content))
    spoil(content)
    with pytest.raises(UserError, match="does not hold the state of a run like this"):
        state.load_state_dict(reloaded(tmp_path / "last.pt", content))


def test_a_format_that_is_no_number_is_another_format(tmp_path: Path) -> None:
    torch.save({"format": torch.zeros(3), "state": {}}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="not a checkpoint of this version"):
        checkpoint.load(tmp_path / "last.pt")
    torch.save({"format": checkpoint.FORMAT}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="not a checkpoint of this version"):
        checkpoint.load(tmp_path / "last.pt")


def stepped(state: TrainState) -> list[torch.Tensor]:
    """The weights after an update by gradients of 1."""
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    return [parameter.detach() for parameter in state.model.parameters()]


def adam_state(digits: Data) -> TrainState:
    config = compose(["dataset=digits", "model=small_cnn", "recipe.optimizer=adam"])
    state = make_state(config, digits, torch.device("cpu"))
    stepped(state)
    return state


def test_adam_s_count_of_steps_is_one_number(tmp_path: Path, digits: Data) -> None:
    state = adam_state(digits)
    content = pickle.loads(pickle.dumps(state.state_dict()))
    content["optimizer"]["state"][0]["step"] = torch.ones(16, 1, 4, 4)
    with pytest.raises(UserError, match="does not hold the state of a run like this"):
        state.load_state_dict(reloaded(tmp_path / "last.pt", content))


def test_a_momentum_in_another_layout_is_the_same_momentum(
    tmp_path: Path, state: TrainState
) -> None:
    """Views that overlap or lie otherwise in memory are copied into the weights' layout."""
    path = tmp_path / "last.pt"
    content = pickle.loads(pickle.dumps(state.state_dict()))
    spread = pickle.loads(pickle.dumps(content))
    shape = content["optimizer"]["state"][0]["momentum_buffer"].shape
    numbers = torch.arange(shape.numel()).float()
    last = numbers.as_strided(shape, (0, 0, 0, 1), shape.numel() - shape[-1])  # row after row
    content["optimizer"]["state"][0]["momentum_buffer"] = last.clone().contiguous()
    spread["optimizer"]["state"][0]["momentum_buffer"] = last
    state.load_state_dict(reloaded(path, content))
    plain = [weight.clone() for weight in stepped(state)]
    state.load_state_dict(reloaded(path, spread))
    assert all(map(torch.equal, plain, stepped(state)))
    momentum = state.optimizer.state_dict()["state"][0]["momentum_buffer"]
    assert momentum.stride() == next(state.model.parameters()).stride()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_run_that_was_not_fused_goes_on_fused(
    tmp_path: Path, state: TrainState, digits: Data, optimizer: str
) -> None:
    state = state if optimizer == "sgd" else adam_state(digits)
    content = pickle.loads(pickle.dumps(state.state_dict()))
    (group,) = content["optimizer"]["param_groups"]
    group["fused"] = None
    del content["graphs"]  # which such a run did not keep
    state.load_state_dict(reloaded(tmp_path / "last.pt", content))
    assert state.optimizer.param_groups[0]["fused"] is True
    plain = [
        torch.nn.Parameter(parameter.detach().clone()) for parameter in state.model.parameters()
    ]
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
    before = kind(plain, lr=0.1)
    before.load_state_dict(content["optimizer"])
    for parameter in plain:
        parameter.grad = torch.ones_like(parameter)
    before.step()
    for ours, theirs in zip(stepped(state), plain, strict=True):
        torch.testing.assert_close(ours, theirs.detach())
