"""Files from strangers other than checkpoints: arrays, images, texts, archives."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import pickle
import struct
import subprocess
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from hashlib import md5
from http.client import HTTPResponse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from btrain import models
from btrain.cli import main
from btrain.corruptions.frost import photographs
from btrain.corruptions.read import read as read_corrupted
from btrain.data import cifar, imagefolder, load, mnist
from btrain.data.download import import_torchvision
from btrain.errors import UserError
from btrain.evaluation.result import Evaluation
from btrain.evaluation.target import find
from btrain.report import compare
from btrain.settings.compose import compose, read_yaml, run_name
from btrain.settings.evaluation import EvalSettings
from btrain.training import train
from btrain.untrusted import RefusedError
from btrain.untrusted.archive import unpack_gzip, unpack_tar
from test_hostile_checkpoints import little_memory, run_checkpoint

# CIFAR

LAYOUT = cifar.Layout("batches", ("train",), ("test",), "labels", 10)


def batch(**changes: Any) -> dict[bytes, Any]:
    sound = {"data": np.zeros((3, 3072), np.uint8), "labels": [1, 2, 3]} | changes
    return {key.encode(): value for key, value in sound.items()}


def read_cifar(folder: Path, content: bytes) -> np.ndarray[Any, Any]:
    (folder / "batches").mkdir(exist_ok=True)
    (folder / "batches" / "test").write_bytes(pickle.dumps(batch()))
    (folder / "batches" / "train").write_bytes(content)
    train_part, _ = cifar.read(LAYOUT, folder)
    return train_part.labels


def nested(levels: int) -> Any:
    node: Any = [1] * 10
    for _ in range(levels):
        node = [node] * 10
    return node


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("labels", [[1, 2, 3], np.array([1, 2, 3]), np.array([1, 2, 3], ">i2")])
def test_every_way_to_save_a_cifar_batch_is_read(
    tmp_path: Path, protocol: int, labels: object
) -> None:
    content = pickle.dumps(batch(labels=labels), protocol=protocol)
    assert read_cifar(tmp_path, content).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(batch(labels=nested(9))),
        pickle.dumps(batch(labels=np.array([{}, {}, {}], dtype=object))),
        pickle.dumps(batch(labels=["1", "2", "3"])),
        pickle.dumps(batch(labels=[10**30, 1, 2])),
        pickle.dumps(batch(data=np.zeros((3, 3072), "V1"))),
        pickle.dumps(batch(data=np.zeros((6, 1536), np.uint8))),
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # room for 2³² memo entries
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00.",  # a string of a tebibyte
        b"\x80\x04\x95\x03\0\0\0\0\0\0\0Nr\x01\x00\x00\x00N\xff\x7f0.",  # a frame too short
        b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R.",
        b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0hex\x86R.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nK\x01\x85Rcos\nsystem\nb.",
    ],
    ids=range(12),
)
def test_a_cifar_file_takes_no_more_memory_than_it_has_bytes(
    tmp_path: Path, content: bytes
) -> None:
    with little_memory(), pytest.raises(UserError, match="is not a readable CIFAR batch"):
        read_cifar(tmp_path, content)


# MNIST and arrays


def test_an_idx_file_without_data_has_no_shape(tmp_path: Path) -> None:
    file = tmp_path / "images"
    file.write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">III", 0, 2**32 - 1, 2**32 - 1))
    with pytest.raises(UserError, match="holds no data"):
        mnist.read_idx(file, 3)


@pytest.mark.parametrize(
    "header",
    [
        {"descr": "|u1", "fortran_order": False, "shape": (2**60, 8, 8, 3)},
        {"descr": "|u1", "fortran_order": False, "shape": (0, 2**62, 2**62, 3)},
        {"descr": "|u1", "fortran_order": False, "shape": (10**40,)},
        {"descr": "|u1", "fortran_order": False, "shape": (-5, 8, 8, 3)},
        {"descr": "|O", "fortran_order": False, "shape": (5, 8, 8, 3)},
        {"descr": [("a", "|u1")], "fortran_order": False, "shape": (5, 8, 8, 3)},
        "-" * 9000 + "1",
        "[" * 9000,
    ],
    ids=range(8),
)
def test_a_header_of_npy_is_held_against_the_file(tmp_path: Path, header: object) -> None:
    text = header if isinstance(header, str) else repr(header)
    content = b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode() + bytes(960)
    for name in ("fog", "labels"):
        np.save(tmp_path / "fog.npy", np.zeros((5, 8, 8, 3), np.uint8))
        (tmp_path / f"{name}.npy").write_bytes(content)
        with little_memory(), pytest.raises(UserError, match=rf"{name}\.npy"):
            read_corrupted(tmp_path, "fog", 1)


def test_labels_beyond_int64_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "fog.npy", np.zeros((5, 8, 8, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.full(5, 2**64 - 1, np.uint64))
    with pytest.raises(UserError, match=r"labels\.npy"):
        read_corrupted(tmp_path, "fog", 1)


def test_a_bomb_of_samples_is_not_unpacked(evaluation: Path) -> None:
    with zipfile.ZipFile(evaluation / "samples.npz") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["clean.npy"] += bytes(300 << 20)
    with zipfile.ZipFile(evaluation / "samples.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    del members, content
    with little_memory(), pytest.raises(UserError, match=r"samples\.npz is damaged"):
        Evaluation.read(evaluation)


# Images


def two_classes(root: Path) -> Path:
    """A folder with a training image each of a and b, and where another may go."""
    for part in ("train", "test"):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), "red").save(root / part / name / "0.png")
    return root / "train" / "a"


def read_images(root: Path) -> np.ndarray[Any, Any]:
    source, _ = imagefolder.read(root, 8)
    return source.read(np.arange(len(source.labels)))


def png(width: int, height: int, content: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        sum_of = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + sum_of

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize("size", [(8193, 8192), (2**31 - 1, 2**31 - 1), (70_000, 1), (1, 70_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_claims_to_be_large_is_not_decoded(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    (two_classes(tmp_path) / "1.png").write_bytes(png(*size))
    with little_memory(), pytest.raises(UserError, match=r"1\.png is not a readable image"):
        read_images(tmp_path)


def test_a_chunk_that_claims_to_be_long_takes_no_memory(tmp_path: Path) -> None:
    content = png(8, 8, zlib.compress(bytes(8)))
    at = content.index(b"IEND") - 4
    claim = content[:at] + struct.pack(">I", 2**31 - 1) + b"IDAT" + content[at + 8 :]
    (two_classes(tmp_path) / "1.png").write_bytes(claim)
    with little_memory():
        try:
            read_images(tmp_path)
        except UserError as error:
            assert "1.png" in str(error)


def test_no_other_program_reads_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object, **options: object) -> None:
        raise AssertionError(f"{arguments} was to run")

    for name in ("Popen", "run", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, run)
    folder = two_classes(tmp_path)
    Image.new("RGB", (8, 8)).save(folder / "1.eps")
    (folder / "1.eps").rename(folder / "1.png")
    with pytest.raises(UserError, match=r"1\.png is not a readable image"):
        read_images(tmp_path)
    with pytest.raises(UserError, match=r"1\.png is not usable"):
        (folder / "0.png").unlink()
        photographs(folder, 8, 8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "webp", "tif", "tiff", "PNG"])
def test_common_formats_are_read(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (8, 8), "white").save(two_classes(tmp_path) / f"1.{suffix}")
    assert (read_images(tmp_path)[1] > 250).all()


def test_what_is_left_out_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = two_classes(tmp_path)
    (folder / ".DS_Store").touch()
    with caplog.at_level(logging.WARNING, "btrain"):
        read_images(tmp_path)
        assert not caplog.records
        for name in ("photo.heic", "list.txt"):
            (folder / name).touch()
        read_images(tmp_path)
    assert "2 files are left out" in caplog.text
    assert "list.txt" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="no pipes, no links")
def test_pipes_and_loops_are_named(tmp_path: Path) -> None:
    folder = two_classes(tmp_path)
    (folder / "1.png").symlink_to("1.png")
    with pytest.raises(UserError, match=r"1\.png is not a readable image"):
        read_images(tmp_path)
    (folder / "1.png").unlink()
    os.mkfifo(folder / "1.png")
    with pytest.raises(UserError, match="it is no plain file"):
        read_images(tmp_path)
    (folder / "1.png").unlink()
    (tmp_path / "train" / "c").symlink_to(tmp_path / "train")
    with pytest.raises(UserError, match="holds no image"):
        read_images(tmp_path)


# Configurations and results

EXPLOSION = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (EXPLOSION, "an anchor, an alias or a tag"),
        ("a: &a [*a]", "an anchor, an alias or a tag"),
        ("a: !!python/object/apply:os.system ['true']", "an anchor, an alias or a tag"),
        ("a: " + "[" * 50_000, "nested deeper than 20 levels"),
        ("a: [" + "1, " * 10_000 + "]", "more than 4,000 values"),
        ("#" * 200_000, "larger than"),
        ("a: " + "9" * 5000, "is not a readable configuration"),
        ("a: [", "is not a readable configuration"),
        ("- a", "it holds no mapping"),
        ("a: \x00", "is not a readable configuration"),
    ],
    ids=range(10),
)
def test_a_configuration_is_plain_and_small(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with little_memory(), pytest.raises(UserError, match=words) as caught:
        read_yaml(file)
    assert str(caught.value).startswith(str(file))


def test_references_in_a_configuration_stay_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "canary")
    file = tmp_path / "config.yaml"
    file.write_text("a: ${oc.env:SECRET}\nb: {_target_: os.system, c: 1.0e-05}\n")
    content = {"a": "${oc.env:SECRET}", "b": {"_target_": "os.system", "c": 1e-5}}
    assert read_yaml(file) == content


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clean_acc": "<b>"}, "clean_acc is '<b>'"),
        ({"flops": 10**400}, "flops"),
        ({"flops": 1e308}, r"flops is 1e\+308, not a number from 0 to 1e\+30"),
        ({"speedup_measured": 1e308}, "speedup_measured"),
        ({"clean_acc": float("nan")}, "clean_acc is nan"),
        ({"train_seconds": None}, "train_seconds is None"),
        ({"device": []}, "device is"),
    ],
)
def test_a_summary_is_checked_value_by_value(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    summary: dict[str, Any] = dict.fromkeys(
        ("clean_acc", "robust_acc", "f_b", "f_r", "f_o", "theoretical_speedup",
         "attack_steps_mean", "flops", "train_seconds"), 0,
    ) | {"device": "cpu"}  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert "faster" not in compare([tmp_path])  # no time to divide by
    (tmp_path / "summary.json").write_text(json.dumps(summary | changes))
    with pytest.raises(UserError, match=words):
        compare([tmp_path])


def test_a_loop_of_links_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert main(["report", str(tmp_path / "a")]) == 1
    assert main(["report", str(tmp_path), f"out={tmp_path / 'a'}"]) == 1


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 100_000, " " * (2 << 20)])
def test_a_summary_that_is_no_json_is_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UserError, match=r"summary\.json is damaged"):
        compare([tmp_path])


# Archives


def tar_of(*members: tuple[str, bytes, bytes]) -> bytes:
    """A .tar.gz of (name, type, content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content)
            info.linkname = "/etc/passwd"
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


PLAIN, LINK, HARD, DEVICE, FIFO = (
    tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE,
)  # fmt: skip


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (("../up", PLAIN, b"x"), "leads out of the folder"),
        (("/absolute", PLAIN, b"x"), "leads out of the folder"),
        (("a/../../up", PLAIN, b"x"), "leads out of the folder"),
        (("C:\\up", PLAIN, b"x"), "leads out of the folder"),
        (("link", LINK, b""), "is no plain file"),
        (("link", HARD, b""), "is no plain file"),
        (("device", DEVICE, b""), "is no plain file"),
        (("pipe", FIFO, b""), "is no plain file"),
        ((".", PLAIN, b"x"), "is no plain file"),
        (("large", PLAIN, bytes(2 << 20)), "holds more than"),
        (("a" * (2 << 20), PLAIN, b""), "holds more than"),
    ],
    ids=range(11),
)
def test_an_archive_stays_in_its_folder(
    tmp_path: Path, member: tuple[str, bytes, bytes], words: str
) -> None:
    archive = tmp_path / "data.tar.gz"
    archive.write_bytes(tar_of(("batches/one", PLAIN, b"1"), member))
    with little_memory(), pytest.raises(RefusedError, match=words):
        unpack_tar(archive, tmp_path / "in" / "here", most=1 << 20)
    files = {path for path in tmp_path.rglob("*") if not path.is_dir()}
    assert files - {archive} <= {tmp_path / "in" / "here" / "batches" / "one"} | {
        path for path in files if path.name == "large"
    }


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(4 << 20)))
    unpack_gzip(tmp_path / "a.gz", tmp_path / "a", most=4 << 20)
    assert (tmp_path / "a").stat().st_size == 4 << 20
    with pytest.raises(RefusedError, match="holds more than"):
        unpack_gzip(tmp_path / "a.gz", tmp_path / "b", most=1 << 20)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Makes every download give some bytes, with the sum that CIFAR-10's archive should have."""

    def serve(content: bytes) -> None:
        def answer(request: urllib.request.Request, *_: object, **__: object) -> HTTPResponse:
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            wire: Any = SimpleNamespace(makefile=lambda mode: io.BytesIO(head + content))
            response = HTTPResponse(wire, method=request.get_method())
            response.begin()
            response.url = request.full_url
            return response

        monkeypatch.setattr(urllib.request, "urlopen", answer)
        monkeypatch.setattr(
            import_torchvision().datasets.CIFAR10, "tgz_md5", md5(content).hexdigest()
        )

    return serve


def test_a_download_is_unpacked_and_read_but_never_unpickled(
    tmp_path: Path, served: Callable[[bytes], None]
) -> None:
    sound = pickle.dumps(batch(), protocol=2)
    names = [*cifar.CIFAR10.train_files, *cifar.CIFAR10.test_files]
    members = [(f"{cifar.CIFAR10.folder}/{name}", PLAIN, sound) for name in names]
    hostile = f"cos\nsystem\n(S'touch {tmp_path / 'canary'}'\ntR.".encode()
    served(tar_of(*members, (f"{cifar.CIFAR10.folder}/batches.meta", PLAIN, hostile)))
    data = load("cifar10", tmp_path / "data", device=torch.device("cpu"), download=True)
    assert len(data.train) == 15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [cifar.CIFAR10.folder]


def test_a_hostile_download_leaves_nothing(tmp_path: Path, served: Callable[[bytes], None]) -> None:
    served(tar_of((f"{cifar.CIFAR10.folder}/data_batch_1", LINK, b"")))
    with pytest.raises(UserError, match="no plain file"):
        load("cifar10", tmp_path / "data", device=torch.device("cpu"), download=True)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("root", ["/somewhere/else", "../up", "data"])
def test_a_checkpoint_does_not_choose_where_downloads_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    def download(name: str, place: Path) -> None:
        raise UserError(f"it was to be downloaded to {place}.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("btrain.data.download.download", download)
    content = run_checkpoint()
    content["config"]["dataset"] |= {"name": "mnist", "root": root, "download": True}
    network = models.build("small_cnn", width=2, depth=None, classes=10, shape=(1, 28, 28))
    content["state"]["model"] = network.state_dict()
    torch.save(content, tmp_path / "stray.pt")
    for config, downloads in (({}, root == "data"), ({"dataset.root": f"{tmp_path}/mine"}, True)):
        with pytest.raises(UserError) as caught:
            find(EvalSettings(checkpoint=str(tmp_path / "stray.pt"), config=config))
        assert ("was to be downloaded" in str(caught.value)) == downloads, caught.value


# Names, sentences, secrets


def test_a_name_has_the_length_of_a_file_name(tmp_path: Path) -> None:
    config = compose(["dataset=imagefolder", f"dataset.root={tmp_path}"])
    names = set()
    for root in ("画" * 60, "画" * 61, "..", "\udcff" * 300, "é" * 100):
        config.dataset.root = str(tmp_path / root)
        name = run_name(config, ["attack.epsilon=../../up", "+a=/etc", "seed=1"])
        assert len(name.encode()) <= 150
        assert Path(name).name == name
        assert name not in (".", "..")
        names.add(name)
    assert len(names) == 5


@pytest.mark.parametrize("key", ["train.epochs", "seed", "attack.epsilon", "model.width"])
def test_a_number_of_any_length_is_answered(key: str) -> None:
    with pytest.raises(UserError):
        compose([f"{key}={'9' * 400}"])


def test_a_sentence_is_one_line_that_a_terminal_shows_as_it_is() -> None:
    error = UserError("a\x1b[31mb\nc\udcffd\u202ee" + "x" * 5000)
    assert str(error).startswith(r"a\x1b[31mb\nc\udcffd\u202eex")
    assert str(error).isprintable()
    assert len(str(error)) < 2100
    assert str(UserError("ε = 0.1 – für “Größe” ×2")) == "ε = 0.1 – für “Größe” ×2"


@pytest.mark.parametrize("logger", ["jsonl", "tensorboard", "wandb"])
def test_no_secret_of_the_environment_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: str
) -> None:
    if logger != "jsonl":
        pytest.importorskip(logger)
    key = "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("SOME_TOKEN", "canary-of-the-environment")
    folder = tmp_path / "run"
    small = "dataset=digits model=small_cnn model.width=2 dataset.train_examples=32 train.epochs=1"
    overrides = [*small.split(), "dataset.test_examples=10", "bt=uniform", "attack.steps=1"]
    offline = ["logger.mode=offline"] if logger == "wandb" else []
    train(compose([*overrides, "device=cpu", f"run.dir={folder}", f"logger={logger}", *offline]))
    if logger == "jsonl":
        evaluation = ["attack=pgd20", "attack.steps=1", "report=true", "device=cpu"]
        assert main(["eval", f"checkpoint={folder}", *evaluation]) == 0
        assert [*folder.rglob("index.html")]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 5
    for file in files:
        content = file.read_bytes()
        assert key.encode() not in content, file
        assert b"canary-of-the-environment" not in content, file
