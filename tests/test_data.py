"""Readers on files made here in the official layouts, subsets, and batches of augmented images."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable
from http.client import HTTPResponse
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import TensorDataset

from btrain import own
from btrain.data import Data, Split, batches, given, load
from btrain.data.augmentation import Moved, batch_slices, random_mirrors, random_shifts
from btrain.data.download import import_torchvision
from btrain.data.splits import arranged, class_balanced_order
from btrain.errors import UserError

CPU = torch.device("cpu")
Pixels = npt.NDArray[np.uint8]
Batch = dict[bytes, Any]
Cifar = tuple[str, str, list[str], str]  # name, folder, files (the test file last), labels key

CIFARS: list[Cifar] = [
    ("cifar10", "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"],
     "labels"),
    ("cifar100", "cifar-100-python", ["train", "test"], "fine_labels"),
]  # fmt: skip
CIFAR_IDS = [cifar[0] for cifar in CIFARS]
MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def read(name: str, root: Path, **kwargs: Any) -> Data:
    return load(name, root, device=CPU, **({"download": False} | kwargs))


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# CIFAR


def python3_pickle(batch: Batch) -> bytes:
    return pickle.dumps(batch, protocol=2)


def python2_pickle(batch: Batch) -> bytes:
    """Opcode by opcode what Python 2 and NumPy 1 wrote into the published files."""
    content = b"\x80\x02}("
    for key, value in batch.items():
        content += b"U" + bytes([len(key)]) + key
        if isinstance(value, np.ndarray):
            n, width = value.shape
            content += (
                b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
                b"(K\x01M" + struct.pack("<H", n) + b"M" + struct.pack("<H", width) + b"\x86"
                b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
                b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
                b"\x89T" + struct.pack("<I", value.nbytes) + value.tobytes() + b"tb"
            )
        elif isinstance(value, bytes):
            content += b"U" + bytes([len(value)]) + value
        else:
            content += b"](" + b"".join(b"K" + bytes([number]) for number in value) + b"e"
    return content + b"u."


def cifar_batch(images: Pixels, labels: list[int], labels_key: str) -> Batch:
    """A batch with the published keys: a row is the red plane, then the green, then the blue."""
    rows = [np.concatenate([plane.ravel() for plane in image]) for image in images]
    batch: Batch = {
        b"batch_label": b"made by a test",
        labels_key.encode(): labels,
        b"data": np.stack(rows),
    }
    if labels_key == "fine_labels":
        batch[b"coarse_labels"] = [0] * len(labels)
    return batch


def write_cifar(
    root: Path, cifar: Cifar, write: Callable[[Batch], bytes] = python3_pickle, each: int = 4
) -> dict[str, tuple[Pixels, list[int]]]:
    """Random images and labels in every file; returns them by the name of the file."""
    name, folder, files, labels_key = cifar
    rng = np.random.default_rng(0)
    (root / folder).mkdir(parents=True)
    made = {}
    for file in files:
        images = rng.integers(0, 256, (each, 3, 32, 32), dtype=np.uint8)
        labels = rng.integers(0, 10 if name == "cifar10" else 100, each).tolist()
        (root / folder / file).write_bytes(write(cifar_batch(images, labels, labels_key)))
        made[file] = (images, labels)
    return made


@pytest.mark.parametrize("write", [python3_pickle, python2_pickle])
@pytest.mark.parametrize("cifar", CIFARS, ids=CIFAR_IDS)
def test_cifar_pixels_and_labels_come_back_in_file_order(
    tmp_path: Path, cifar: Cifar, write: Callable[[Batch], bytes]
) -> None:
    name, _, files, _ = cifar
    made = write_cifar(tmp_path, cifar, write)
    data = read(name, tmp_path)
    images = np.concatenate([made[file][0] for file in files[:-1]])
    labels = [label for file in files[:-1] for label in made[file][1]]
    assert data.train.images.dtype is torch.uint8
    assert np.array_equal(data.train.images.numpy(), images)
    assert data.train.labels.tolist() == labels
    assert np.array_equal(data.test.images.numpy(), made[files[-1]][0])
    assert data.test.labels.tolist() == made[files[-1]][1]
    assert len(data.classes) == {"cifar10": 10, "cifar100": 100}[name]
    assert data.shape == (3, 32, 32)


def without(key: bytes) -> Callable[[Batch], bytes]:
    return lambda batch: python3_pickle({k: v for k, v in batch.items() if k != key})


def with_data(change: Callable[[Pixels], npt.NDArray[Any]]) -> Callable[[Batch], bytes]:
    return lambda batch: python3_pickle(batch | {b"data": change(batch[b"data"])})


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda batch: python3_pickle(batch)[:-100], id="truncated"),
        pytest.param(lambda batch: b"", id="empty"),
        pytest.param(lambda batch: b"<html>404</html>", id="another-file"),
        pytest.param(lambda batch: python3_pickle([1, 2]), id="no-dict"),  # type: ignore[arg-type]
        pytest.param(without(b"data"), id="no-data"),
        pytest.param(without(b"labels"), id="no-labels"),
        pytest.param(with_data(lambda data: data.astype(np.float32)), id="float-pixels"),
        pytest.param(with_data(lambda data: data.astype(np.int64)), id="int64-pixels"),
        pytest.param(with_data(lambda data: data[:, :-1]), id="short-rows"),
    ],
)
def test_a_damaged_cifar_file_is_named(tmp_path: Path, damage: Callable[[Batch], bytes]) -> None:
    made = write_cifar(tmp_path, CIFARS[0])
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(damage(cifar_batch(*made["data_batch_3"], "labels")))
    with pytest.raises(UserError, match=re.escape(str(file))):
        read("cifar10", tmp_path)


def as_text(batch: Batch) -> dict[str, Any]:
    return {key.decode(): value for key, value in batch.items()}


def numpy_labels(kind: type) -> Callable[[Batch], bytes]:
    return lambda batch: pickle.dumps(batch | {b"labels": [kind(k) for k in batch[b"labels"]]})


@pytest.mark.parametrize(
    "written",
    [
        pytest.param(lambda batch: python3_pickle(as_text(batch)), id="text-keys"),  # type: ignore[arg-type]
        pytest.param(numpy_labels(np.int64), id="int64"),
        pytest.param(numpy_labels(np.uint8), id="uint8"),
        pytest.param(
            lambda batch: python3_pickle(batch | {b"labels": [*map(np.int64, batch[b"labels"])]}),
            id="int64-protocol-2",
        ),
        pytest.param(
            lambda batch: pickle.dumps(batch | {b"labels": tuple(batch[b"labels"])}), id="tuple"
        ),
        pytest.param(
            lambda batch: pickle.dumps(
                as_text(batch) | {"labels": np.array(batch[b"labels"], np.uint8)}, protocol=5
            ),
            id="array-protocol-5",
        ),
        pytest.param(
            lambda batch: pickle.dumps(
                batch | {b"data": np.asfortranarray(batch[b"data"])}, protocol=5
            ),
            id="fortran-protocol-5",
        ),
    ],
)
def test_cifar_files_made_anew_by_others_are_read(
    tmp_path: Path, written: Callable[[Batch], bytes]
) -> None:
    made = write_cifar(tmp_path, CIFARS[0], written)
    data = read("cifar10", tmp_path)
    x, y = made["test_batch"]
    assert (data.test.images.numpy() == x).all()
    assert data.test.labels.tolist() == y


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([0.0, 1.0, 2.0, 3.0], "labels that are no whole numbers"),
        ([np.float64(k) for k in range(4)], "labels that are no whole numbers"),
        ([True] * 4, "labels that are no whole numbers"),
        (["cat"] * 4, "labels that are no whole numbers"),
        ([np.datetime64(k, "s") for k in range(4)], "it holds an array of type 'M8'"),
    ],
)
def test_what_is_wrong_with_a_cifar_file_of_ones_own_is_said(
    tmp_path: Path, labels: list[Any], reason: str
) -> None:
    made = write_cifar(tmp_path, CIFARS[0])
    file = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    file.write_bytes(python3_pickle(cifar_batch(made["data_batch_2"][0], labels, "labels")))
    with pytest.raises(UserError) as error:
        read("cifar10", tmp_path)
    assert str(error.value).startswith(f"{file} is not a readable CIFAR batch: {reason}. ")
    assert "'labels', n whole numbers from 0 to 9" in str(error.value)
    assert "download" not in str(error.value)


@pytest.mark.parametrize("labels", [[0, 1, 2, 10], [0, 1, 2, -1], [0, 1, 2]])
def test_wrong_cifar_labels_are_refused_with_their_place(tmp_path: Path, labels: list[int]) -> None:
    made = write_cifar(tmp_path, CIFARS[0])
    folder = tmp_path / "cifar-10-batches-py"
    batch = cifar_batch(made["data_batch_2"][0], labels, "labels")
    (folder / "data_batch_2").write_bytes(python3_pickle(batch))
    with pytest.raises(UserError, match=re.escape(str(folder))):
        read("cifar10", tmp_path)


def test_cifar_labels_that_belong_to_another_file_are_refused(tmp_path: Path) -> None:
    # The sums agree, but every image after the first file would have its neighbour's label.
    made = write_cifar(tmp_path, CIFARS[0])
    for file, labels in (("data_batch_1", [1, 2, 3]), ("data_batch_2", [1, 2, 3, 4, 5])):
        batch = cifar_batch(made[file][0], labels, "labels")
        (tmp_path / "cifar-10-batches-py" / file).write_bytes(python3_pickle(batch))
    with pytest.raises(UserError, match="cifar-10-batches-py"):
        read("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("called", "argument"),
    [
        ("os system", "touch {}"),
        ("posix system", "touch {}"),
        ("builtins eval", "__import__('pathlib').Path('{}').touch()"),
    ],
)
def test_a_pickle_that_asks_for_code_is_refused_unrun(
    tmp_path: Path, called: str, argument: str
) -> None:
    def hostile(mark: Path) -> bytes:
        module, name = called.split()
        return f'c{module}\n{name}\n(S"{argument.format(mark)}"\ntR.'.encode()

    # Python's own unpickler runs it: the test would see the file.
    pickle.loads(hostile(tmp_path / "run"))
    assert (tmp_path / "run").exists()

    write_cifar(tmp_path, CIFARS[0])
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(hostile(tmp_path / "refused"))
    with pytest.raises(UserError) as error:
        read("cifar10", tmp_path)
    assert str(file) in str(error.value)
    assert called.replace(" ", ".") in str(error.value)
    assert not (tmp_path / "refused").exists()


# MNIST


def idx(array: npt.NDArray[Any]) -> bytes:
    """An IDX file of bytes: two zeros, the type 8, the dimensions, each one's length, the data."""
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(
        f">{array.ndim}I", *array.shape
    )
    return header + array.astype(np.uint8).tobytes()


def write_mnist(root: Path) -> list[Pixels]:
    """Random images and labels; returns the arrays in the order of MNIST_FILES."""
    rng = np.random.default_rng(0)
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    arrays = [
        rng.integers(0, high, shape, dtype=np.uint8)
        for high, shape in ((256, (12, 28, 28)), (10, 12), (256, (7, 28, 28)), (10, 7))
    ]
    for name, array in zip(MNIST_FILES, arrays, strict=True):
        (folder / name).write_bytes(idx(array))
    return arrays


def test_mnist_pixels_and_labels_come_back_in_file_order(tmp_path: Path) -> None:
    images, labels, test_images, test_labels = write_mnist(tmp_path)
    data = read("mnist", tmp_path)
    assert data.shape == (1, 28, 28)
    assert data.train.images.dtype is torch.uint8
    assert np.array_equal(data.train.images[:, 0].numpy(), images)
    assert data.train.labels.tolist() == labels.tolist()
    assert np.array_equal(data.test.images[:, 0].numpy(), test_images)
    assert data.test.labels.tolist() == test_labels.tolist()
    assert data.classes == tuple("0123456789")


@pytest.mark.parametrize("name", MNIST_FILES)
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"\x00\x00\x0d" + content[3:], id="floats"),
        pytest.param(lambda content: content[:3] + b"\x02" + content[4:], id="dimensions"),
        pytest.param(lambda content: b"\x1f\x8b\x08\x00" + content, id="still-zipped"),
        pytest.param(lambda content: content[:-1], id="truncated"),
        pytest.param(lambda content: content[:6], id="truncated-header"),
        pytest.param(lambda content: content + b"\x00", id="too-long"),
        pytest.param(lambda content: b"", id="empty"),
    ],
)
def test_a_damaged_mnist_file_is_named(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=re.escape(str(file))):
        read("mnist", tmp_path)


@pytest.mark.parametrize("name", [MNIST_FILES[1], MNIST_FILES[3]])
@pytest.mark.parametrize(
    "change", [lambda labels: np.append(labels[:-1], 10), lambda labels: labels[:-1]]
)
def test_wrong_mnist_labels_are_refused_with_their_file(
    tmp_path: Path, name: str, change: Callable[[Pixels], Pixels]
) -> None:
    arrays = write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / name
    file.write_bytes(idx(change(arrays[MNIST_FILES.index(name)])))
    with pytest.raises(UserError, match=re.escape(str(file))):
        read("mnist", tmp_path)


# Missing files and downloads

FIRST_FILE = {
    "cifar10": "cifar-10-batches-py/data_batch_1",
    "cifar100": "cifar-100-python/train",
    "mnist": "MNIST/raw/train-images-idx3-ubyte",
}


@pytest.mark.parametrize("name", FIRST_FILE)
def test_a_missing_data_set_says_what_was_looked_for_and_how_to_get_it(
    tmp_path: Path, name: str
) -> None:
    root = tmp_path / "nowhere"
    with pytest.raises(UserError) as error:
        read(name, root)
    message = str(error.value)
    assert str(root / FIRST_FILE[name]) in message
    assert "dataset.root" in message
    assert "dataset.download=true" in message
    assert "\n" not in message
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("name", MNIST_FILES)
def test_one_missing_file_of_several_is_named(tmp_path: Path, name: str) -> None:
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / name
    file.unlink()
    with pytest.raises(UserError, match=re.escape(str(file))):
        read("mnist", tmp_path)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection fails at once, as without a network."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network in this test")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("root", ["data", "new/data"])
@pytest.mark.parametrize("name", FIRST_FILE)
def test_a_download_without_network_leaves_nothing(tmp_path: Path, name: str, root: str) -> None:
    with pytest.raises(UserError) as error:
        read(name, tmp_path / root, download=True)
    message = str(error.value)
    assert str(tmp_path / root / FIRST_FILE[name]) in message
    assert f"downloaded to {tmp_path / root}" in message
    assert "no network in this test" in message  # the reason, whatever torchvision wraps it in
    assert "\n" not in message
    assert files_in(tmp_path) == []


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", FIRST_FILE)
def test_a_failed_download_leaves_an_existing_folder_as_it_was(tmp_path: Path, name: str) -> None:
    (tmp_path / "data" / "other").mkdir(parents=True)
    (tmp_path / "data" / "notes.txt").write_text("mine")
    with pytest.raises(UserError):
        read(name, tmp_path / "data", download=True)
    assert files_in(tmp_path) == ["data", "data/notes.txt", "data/other"]


@pytest.mark.parametrize("name", FIRST_FILE)
def test_a_download_with_a_wrong_checksum_leaves_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(request: urllib.request.Request, *args: object, **kwargs: object) -> HTTPResponse:
        raw = BytesIO(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong")
        wire: Any = SimpleNamespace(makefile=lambda mode: raw)
        response = HTTPResponse(wire, method=request.get_method())
        response.begin()
        response.url = request.full_url
        return response

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    with pytest.raises(UserError, match="corrupted"):
        read(name, tmp_path / "data", download=True)
    assert files_in(tmp_path) == []


# torchvision

STAND_IN = """
import torch
from types import SimpleNamespace

torch.library.register_fake("torchvision::nms")(lambda dets, scores, threshold: dets)
datasets = SimpleNamespace(MNIST="imported")
"""

SCRIPT = """
import sys
import btrain.data

heavy = {"torchvision", "sklearn", "wandb", "matplotlib", "hydra"} & set(sys.modules)
assert not heavy, heavy
from btrain.data.download import import_torchvision

torchvision = import_torchvision()
assert import_torchvision() is torchvision
print(torchvision.datasets.MNIST)
"""


def test_torchvision_can_be_imported() -> None:
    datasets = import_torchvision().datasets
    assert {"CIFAR10", "CIFAR100", "MNIST"} <= set(vars(datasets))
    assert import_torchvision().datasets is datasets


def test_data_imports_nothing_heavy_and_torchvision_even_without_its_operators(
    tmp_path: Path,
) -> None:
    # The stand-in fails at import like a torchvision whose compiled part does not fit: at its
    # first statement about an operator that nobody has defined.
    (tmp_path / "torchvision.py").write_text(STAND_IN)
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "imported"


# Digits


def test_digits_are_all_of_scikit_learns_images_once(digits: Data) -> None:
    bunch = load_digits()
    theirs = Counter(
        (np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(bunch.images, bunch.target, strict=True)
    )
    ours = Counter(
        (image.numpy().tobytes(), int(label))
        for split in (digits.train, digits.test)
        for image, label in zip(split.images, split.labels, strict=True)
    )
    # All 1,797 images differ, so equal counts of 1 mean that no image is in both parts.
    assert len(theirs) == 1797
    assert ours == theirs


def test_digits_shapes_values_and_classes(digits: Data) -> None:
    assert digits.shape == (1, 8, 8)
    assert len(digits.train) + len(digits.test) == 1797
    for split in (digits.train, digits.test):
        assert split.images.dtype is torch.uint8
        assert split.labels.dtype is torch.int64
        assert (int(split.images.min()), int(split.images.max())) == (0, 255)
        assert sorted(set(split.labels.tolist())) == list(range(10))


def test_every_fifth_digit_of_a_class_is_a_test_image(digits: Data) -> None:
    per_class = np.bincount(load_digits().target)
    assert np.bincount(digits.test.labels).tolist() == [n // 5 for n in per_class]


# Image folders


def save(file: Path, image: Image.Image) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def grey(level: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def two_classes(root: Path, each: int = 1) -> None:
    """Classes a and b in both parts; a training image's grey level is its number."""
    for part in ("train", "test"):
        for c, name in enumerate("ab"):
            for i in range(each):
                save(root / part / name / f"{i:02}.png", grey(c * each + i))


def read_folder(root: Path, image_size: int = 8, **kwargs: Any) -> Data:
    return read("imagefolder", root, image_size=image_size, **kwargs)


def test_imagefolder_reads_every_mode_and_size_as_rgb_of_the_image_size(tmp_path: Path) -> None:
    colours = {"ant": (200, 30, 90), "bee": (77, 77, 77), "cat": (10, 20, 30), "dog": (5, 250, 9)}
    for part in ("test", "train"):
        save(tmp_path / part / "dog" / "1.jpeg", Image.new("RGB", (64, 48), colours["dog"]))
        save(tmp_path / part / "cat" / "1.PNG", Image.new("RGBA", (5, 40), (*colours["cat"], 255)))
        save(tmp_path / part / "bee" / "1.jpg", Image.new("L", (33, 16), 77))
        save(tmp_path / part / "ant" / "1.png", Image.new("RGB", (1, 1), colours["ant"]))
        (tmp_path / part / "ant" / "notes.txt").write_text("no image")
    data = read_folder(tmp_path, 16)
    assert data.classes == ("ant", "bee", "cat", "dog")
    for split in (data.train, data.test):
        assert split.images.shape == (4, 3, 16, 16)
        assert split.images.dtype is torch.uint8
        assert split.labels.tolist() == [0, 1, 2, 3]
        for image, name in zip(split.images, data.classes, strict=True):
            wanted = torch.tensor(colours[name]).view(3, 1, 1)
            assert (image.int() - wanted).abs().max() <= 2  # JPEG rounds


def test_imagefolder_leaves_images_of_the_right_size_as_they_are(tmp_path: Path) -> None:
    two_classes(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    save(tmp_path / "train" / "b" / "00.png", Image.fromarray(pixels))
    image = read_folder(tmp_path).train.images[1]
    for channel in range(3):
        assert np.array_equal(image[channel].numpy(), pixels[:, :, channel])


def test_imagefolder_needs_a_size(tmp_path: Path) -> None:
    two_classes(tmp_path)
    with pytest.raises(UserError, match=r"dataset\.image_size"):
        read("imagefolder", tmp_path)


def empty_class(root: Path) -> Path:
    (root / "train" / "b" / "00.png").unlink()
    return root / "train" / "b"


def unreadable_file(root: Path) -> Path:
    (root / "test" / "a" / "00.png").write_bytes(b"no image")
    return root / "test" / "a" / "00.png"


def class_missing_in_test(root: Path) -> Path:
    save(root / "train" / "zebra" / "1.png", grey(3))
    return Path("zebra")


def class_missing_in_train(root: Path) -> Path:
    save(root / "test" / "aardvark" / "1.png", grey(3))
    return Path("aardvark")


def missing_part(root: Path) -> Path:
    (root / "test").rename(root / "validation")
    return root / "test"


def one_class(root: Path) -> Path:
    for part in ("train", "test"):
        (root / part / "b" / "00.png").unlink()
        (root / part / "b").rmdir()
    return root / "train"


@pytest.mark.parametrize(
    "spoil",
    [
        empty_class,
        unreadable_file,
        class_missing_in_test,
        class_missing_in_train,
        missing_part,
        one_class,
    ],
)
def test_imagefolder_names_what_is_wrong(tmp_path: Path, spoil: Callable[[Path], Path]) -> None:
    two_classes(tmp_path)
    wrong = spoil(tmp_path)
    with pytest.raises(UserError, match=re.escape(str(wrong))):
        read_folder(tmp_path)


def test_a_missing_imagefolder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "photos"))):
        read_folder(tmp_path / "photos")


def test_only_the_chosen_images_of_a_folder_are_decoded(tmp_path: Path) -> None:
    two_classes(tmp_path, each=10)
    before = read_folder(tmp_path, train_examples=6)
    chosen = before.train.images[:, 0, 0, 0].tolist()  # the grey level is the file's number
    assert len(set(chosen)) == 6
    for number in set(range(20)) - set(chosen):
        file = tmp_path / "train" / "ab"[number // 10] / f"{number % 10:02}.png"
        file.write_bytes(b"no image")
    after = read_folder(tmp_path, train_examples=6)
    assert torch.equal(after.train.images, before.train.images)
    with pytest.raises(UserError, match="not a readable image"):
        read_folder(tmp_path)


def test_hidden_folders_and_files_are_neither_classes_nor_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two_classes(tmp_path)
    save(tmp_path / "train" / ".ipynb_checkpoints" / "00-checkpoint.png", grey(9))
    save(tmp_path / "train" / "a" / ".ipynb_checkpoints" / "00-checkpoint.png", grey(9))
    (tmp_path / "test" / ".git").mkdir()
    save(tmp_path / "test" / "__MACOSX" / "a" / "._00.png", grey(9))
    (tmp_path / "test" / "a" / "._00.png").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    data = read_folder(tmp_path)
    assert data.classes == ("a", "b")
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 1]
    assert len(data.test) == 2
    assert not caplog.records


WHAT_IS_NO_IMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "gif": (b"GIF89a" + bytes(20), "by its content it is a GIF, not PNG, JPEG, BMP, WEBP or TIFF"),
    "page": (b"<!DOCTYPE html><html><body>404", "by its content it is a web page, not PNG"),
    "page-late": (b"\n <HTML>404</HTML>", "by its content it is a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(20), "a HEIC, AVIF or video file"),
    "resource-fork": (b"\x00\x05\x16\x07Mac OS X", "what macOS keeps beside a file"),
    "text": (b"no image", "it is damaged, or not PNG"),
}


@pytest.mark.parametrize("kind", WHAT_IS_NO_IMAGE)
def test_a_file_that_is_no_image_is_described(tmp_path: Path, kind: str) -> None:
    two_classes(tmp_path)
    content, words = WHAT_IS_NO_IMAGE[kind]
    file = tmp_path / "train" / "a" / "01.jpg"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_folder(tmp_path)
    assert str(error.value).startswith(f"{file} is not a readable image (")
    assert words in str(error.value)
    assert "0x" not in str(error.value)


def test_images_are_turned_as_their_exif_orientation_says(tmp_path: Path) -> None:
    """Each of the eight orientations stores the same photograph another way."""
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4, :4, 0] = upright[:4, 4:, 1] = upright[4:, :4, 2] = 200
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: np.rot90(upright[::-1]),
        8: np.rot90(upright, -1),
    }  # fmt: skip
    two_classes(tmp_path)
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = tmp_path / "train" / "a" / f"turned{orientation}.png"
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, exif=exif)
    damaged = tmp_path / "train" / "a" / "turned9.png"
    Image.fromarray(upright).save(damaged, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    images = read_folder(tmp_path).train.images[1:10]
    for image in images:
        assert np.array_equal(image.permute(1, 2, 0).numpy(), upright)


def test_what_is_transparent_shows_white(tmp_path: Path) -> None:
    two_classes(tmp_path)
    folder = tmp_path / "train" / "a"
    (folder / "00.png").unlink()
    pixels = np.full((8, 8, 4), (200, 100, 0, 255), np.uint8)
    pixels[:4, :, 3] = 0
    Image.fromarray(pixels).save(folder / "1.png")
    Image.fromarray(pixels).save(folder / "2.webp", lossless=True, exact=True)
    flat = Image.new("RGB", (8, 8), (200, 100, 0))
    flat.paste((1, 2, 3), (0, 0, 8, 4))
    flat.save(folder / "3.png", transparency=(1, 2, 3))
    flat.quantize(4).save(folder / "4.png", transparency=flat.quantize(4).getpixel((0, 0)))
    pixels[:4, :, 3] = 51  # a fifth
    Image.fromarray(pixels).save(folder / "5.png")
    images = read_folder(tmp_path).train.images[:5].permute(0, 2, 3, 1)
    assert (images[:, 4:] == torch.tensor([200, 100, 0])).all()
    assert (images[:4, :4] == 255).all()
    assert (images[4, :4] == torch.tensor([244, 224, 204])).all()  # 255 - (255 - colour) / 5


def test_sixteen_bits_are_cut_to_eight_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two_classes(tmp_path)
    folder = tmp_path / "train" / "a"
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1020
    Image.fromarray(levels).save(folder / "1.png")
    Image.fromarray(levels).save(folder / "2.tif")
    rows = b"".join(b"\0" + row.repeat(3).astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)  # 16-bit RGB, which Pillow cannot write
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    (folder / "3.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks
        )
    )
    images = read_folder(tmp_path).train.images[1:4]
    assert (images.int() == torch.from_numpy((levels >> 8).astype(np.int32))).all()
    assert "3 images of 16 bits a channel are cut to 8" in caplog.text
    Image.fromarray(np.ones((8, 8), np.float32)).save(folder / "4.tif")
    with pytest.raises(UserError, match=r"4\.tif is not a readable image \(it has neither 8 nor"):
        read_folder(tmp_path)


def test_squeezed_images_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    two_classes(tmp_path)
    save(tmp_path / "train" / "a" / "1.png", grey(5, (40, 40)))
    read_folder(tmp_path)
    assert not caplog.records
    save(tmp_path / "train" / "a" / "2.png", grey(5, (9, 8)))
    save(tmp_path / "train" / "b" / "3.png", grey(5, (200, 20)))
    read_folder(tmp_path)
    (said,) = caplog.messages
    assert said.startswith(
        "2 images that are not square are squeezed to 8×8, the longest of 200×20"
    )
    assert "3.png" in said


def test_images_in_folders_within_a_class_are_its_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two_classes(tmp_path)
    save(tmp_path / "train" / "a" / "images" / "2019" / "1.png", grey(40))
    save(tmp_path / "train" / "a" / "odd.png" / "1.png", grey(50))
    (tmp_path / "train" / "a" / "loop").symlink_to(tmp_path / "train")
    (tmp_path / "train" / "a" / "images" / "notes.txt").touch()
    data = read_folder(tmp_path)
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 40, 50, 1]
    assert data.train.labels.tolist() == [0, 0, 0, 1]
    files, links = caplog.messages
    assert files.startswith("1 file is left out, no image by the name: ")
    assert links.startswith("1 folder is left out, a link within a class folder: ")


def test_val_stands_for_test_and_an_only_folder_for_the_root(tmp_path: Path) -> None:
    two_classes(tmp_path / "photos")
    (tmp_path / "photos" / "test").rename(tmp_path / "photos" / "val")
    (tmp_path / "__MACOSX").mkdir()
    for root in (tmp_path / "photos", tmp_path):
        assert len(read_folder(root).test) == 2


def tiny_imagenet(root: Path) -> None:
    """The published layout, in small: the labels of val/ are in a table, test/ has none."""
    for c, name in enumerate(["n01443537", "n01629819"]):
        for i in range(3):
            save(root / "train" / name / "images" / f"{name}_{i}.JPEG", grey(50 * c + i))
        (root / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t63\n")
    for i in range(4):
        save(root / "val" / "images" / f"val_{i}.JPEG", grey(100 + i))
        save(root / "test" / "images" / f"test_{i}.JPEG", grey(9))
    names = ["n01629819", "n01443537", "n01629819", "n01443537"]
    (root / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{i}.JPEG\t{name}\t0\t32\t44\t62\n" for i, name in enumerate(names))
    )
    (root / "wnids.txt").write_text("\n".join(names[:2]))


def test_tiny_imagenet_is_read_as_it_is_published(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    data = read_folder(tmp_path)
    assert data.classes == ("n01443537", "n01629819")
    assert len(data.train) == 6
    assert data.test.images[:, 0, 0, 0].tolist() == [101, 103, 100, 102]
    assert data.test.labels.tolist() == [0, 0, 1, 1]


def test_tiny_imagenet_arranged_by_classes_is_read_by_them(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    for i, name in enumerate(["n01443537", "n01629819"]):
        save(tmp_path / "val" / name / "images" / f"val_{i}.JPEG", grey(200 + i))
    shutil.rmtree(tmp_path / "val" / "images")
    assert read_folder(tmp_path).test.images[:, 0, 0, 0].tolist() == [200, 201]


@pytest.mark.parametrize(
    "line", ["../../secret.png\tn01443537", "val_0.JPEG\tn9", "val_9.JPEG\tn01443537", "val_0.JPEG"]
)
def test_a_table_of_classes_that_is_wrong_is_named(tmp_path: Path, line: str) -> None:
    tiny_imagenet(tmp_path)
    save(tmp_path / "secret.png", grey(1))
    table = tmp_path / "val" / "val_annotations.txt"
    table.write_text(f"val_0.JPEG\tn01443537\n{line}\n")
    with pytest.raises(UserError, match=re.escape(f"{table}, line 2: ")):
        read_folder(tmp_path)


# The user's own


def taken(thing: object, **kwargs: Any) -> Data:
    """What btrain makes of what a user's function returns."""
    return arranged(*given.read(own.give(thing), {}), device=CPU, **kwargs)


@pytest.fixture
def arrays(digits: Data) -> tuple[Pixels, ...]:
    """60 training and 20 test images of real digits, with their labels."""
    parts = [digits.train.images[:60], digits.train.labels[:60], digits.test.images[:20],
             digits.test.labels[:20]]  # fmt: skip
    return tuple(part.numpy() for part in parts)


class Examples:
    """A torch data set: what it holds, one example after the other."""

    def __init__(self, images: list[Any], labels: Any, classes: list[str] | None = None) -> None:
        self.images, self.labels = images, labels
        if classes is not None:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.images[index], self.labels[index]


def test_own_data_are_the_same_in_whatever_form_they_come(arrays: tuple[Pixels, ...]) -> None:
    x, y, x_test, y_test = arrays
    tensors = tuple(map(torch.from_numpy, arrays))
    floats = (x / 255, y.tolist(), (x_test / 255).astype(np.float32), y_test.astype(np.int32))
    pillow = [[Image.fromarray(image[0]) for image in images] for images in (x, x_test)]
    for thing in (
        arrays,
        list(arrays),
        tensors,
        floats,
        (tensors[0].float() / 255, tensors[1], tensors[2].double() / 255, tensors[3]),
        (TensorDataset(*tensors[:2]), TensorDataset(*tensors[2:])),
        (Examples(pillow[0], y), Examples(pillow[1], y_test)),
        (Examples([image / 255 for image in tensors[0]], y), Examples(list(tensors[2]), y_test)),
        lambda: arrays,
    ):
        data = taken(thing)
        for split, images, labels in ((data.train, x, y), (data.test, x_test, y_test)):
            assert split.images.dtype == torch.uint8
            assert torch.equal(split.images, torch.from_numpy(images))
            assert torch.equal(split.labels, torch.from_numpy(labels).long())
        assert data.classes == tuple("0123456789")
        assert data.shape == (1, 8, 8)


def test_parts_of_own_data_are_held_out_as_of_others(arrays: tuple[Pixels, ...]) -> None:
    data = taken(arrays, val_examples=10, train_examples=30, test_examples=5)
    assert data.val is not None
    assert [len(part) for part in (data.train, data.val, data.test)] == [30, 10, 5]
    with pytest.raises(UserError, match=r"dataset\.test_examples must be at most 20, not 21"):
        taken(arrays, test_examples=21)


def test_colour_images_of_own_data_are_by_channel(tiles: Tensor) -> None:
    pixels = (tiles * 255).byte()
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    part = Examples(images, [0, 1] * 12, classes=["cat", "dog"])
    data = taken((part, part))
    assert torch.equal(data.train.images, pixels)
    assert data.classes == ("cat", "dog")


def test_floats_between_two_levels_go_to_the_nearest_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    levels = np.linspace(0, 255, 3001)[:3000].reshape(30, 1, 10, 10)
    labels = np.arange(30) % 3
    with caplog.at_level("INFO", "btrain"):
        data = taken((levels / 255, labels, levels / 255, labels))
    change = np.abs(data.train.images.numpy() - levels)
    assert change.max() <= 0.5
    assert change.max() > 0.4
    assert "x is not made of whole 255ths: pixels are rounded to them, by up to 0.5/255" in (
        caplog.text
    )


def wrong(**parts: Any) -> tuple[Any, ...]:
    right = {"x": np.zeros((6, 1, 4, 4), np.uint8), "y": np.arange(6) % 2}
    both = right | {f"{key}_test": value for key, value in right.items()}
    return tuple((both | parts).values())


@pytest.mark.parametrize(
    ("thing", "sentence"),
    [
        (3, "must return .x, y, x_test, y_test. .*, not a thing of type int"),
        ((1, 2, 3), r"not 3 things \(int, int, int\)"),
        (wrong(x=np.zeros((6, 4, 4), np.uint8)), "x must be images by .n, C, H, W.,"),
        (wrong(x=np.zeros((6, 1, 0, 4))), r"x of shape \(6, 1, 0, 4\) has no pixels"),
        (wrong(x=np.zeros((6, 4, 4, 3), np.uint8)), "channels last; right is"),
        (wrong(x=np.zeros((6, 1, 4, 4), np.int64)), "uint8, or floats in .0, 1., not int64"),
        (wrong(x=np.full((6, 1, 4, 4), 255.0)), "must lie in .0, 1., not between 255 and 255"),
        (wrong(x=np.full((6, 1, 4, 4), -1.0)), "model.mean and model.std normalise within"),
        (wrong(x=np.full((6, 1, 4, 4), np.nan)), "must lie in"),
        (wrong(x_test=np.zeros((6, 1, 5, 4), np.uint8)), "those of x_test 1×5×4; they must be"),
        (wrong(y=np.zeros(6)), "y must be whole numbers by .n,., not float64"),
        (wrong(y=np.zeros((6, 2), int)), "y must be whole numbers"),
        (wrong(y=np.zeros(5, int)), "holds 6 images for 5 labels"),
        (wrong(y=np.arange(6) - 1), "holds labels from -1 to 4"),
        (wrong(y_test=np.full(6, 2)), "holds labels from 2 to 2; right would be 0 to 1"),
        (wrong(y=np.arange(6) * 100), "y must count the classes from 0, but goes from 0 to 500"),
        ((Examples([], []), Examples([], [])), "a data set is empty"),
        ((Examples([np.zeros((1, 2, 2)), np.zeros((1, 3, 3))], [0, 1]),) * 2, "several sizes"),
        ((Examples([1, 2, 3], "abc"),) * 2, "reading the images fails: ValueError: inv"),
        ((TensorDataset(torch.zeros(3, 1, 4, 4)),) * 2, "an example must be .image, label."),
    ],
)  # fmt: skip
def test_own_data_that_are_none_are_named(thing: object, sentence: str) -> None:
    with pytest.raises(UserError, match=rf"^dataset\.factory=object:\w+.* ?{sentence}"):
        taken(thing)


# Subsets


@pytest.mark.parametrize("counts", [[20, 20, 20], [1, 5, 20], [7], [3, 0, 4]])
def test_every_prefix_of_the_order_is_as_balanced_as_can_be(counts: list[int]) -> None:
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    order = class_balanced_order(labels)
    assert sorted(order.tolist()) == list(range(len(labels)))
    taken = [0] * len(counts)
    for index in order:
        taken[labels[index]] += 1
        for mine, available in zip(taken, counts, strict=True):
            # A class that has images left is at most one behind any other.
            assert mine == available or mine >= max(taken) - 1


def test_the_order_is_the_same_on_every_call_and_shuffled() -> None:
    labels = np.arange(100) % 4
    order = class_balanced_order(labels)
    np.random.seed(3)
    assert np.array_equal(class_balanced_order(labels), order)
    assert not np.array_equal(order, np.sort(order))


def keys(split: Split | None) -> set[bytes]:
    """The images of digits are all different: one is known by its pixels."""
    assert split is not None
    return {image.numpy().tobytes() for image in split.images}


def test_the_parts_are_disjoint_balanced_and_of_the_sizes_asked_for() -> None:
    sizes = {"train_examples": 205, "test_examples": 100, "val_examples": 153}
    data = read("digits", Path("unused"), **sizes)
    assert data.val is not None
    for split, size in ((data.train, 205), (data.val, 153), (data.test, 100)):
        assert len(split) == len(split.images) == len(keys(split)) == size
        per_class = np.bincount(split.labels, minlength=10)
        # Two for training: it begins where the held-out part left some classes one behind.
        assert per_class.max() - per_class.min() <= (2 if split is data.train else 1)
    assert not keys(data.train) & keys(data.val)
    assert not keys(data.train) & keys(data.test)
    assert not keys(data.val) & keys(data.test)


def test_a_subset_keeps_each_image_with_its_label(digits: Data) -> None:
    label_of = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(digits.train.images, digits.train.labels, strict=True)
    }
    subset = read("digits", Path("unused"), train_examples=50).train
    for image, label in zip(subset.images, subset.labels, strict=True):
        assert label_of[image.numpy().tobytes()] == int(label)


def test_holding_nothing_out_leaves_everything(digits: Data) -> None:
    assert digits.val is None
    held_out = read("digits", Path("unused"), val_examples=100)
    assert keys(held_out.train) | keys(held_out.val) == keys(digits.train)


def test_subsets_do_not_depend_on_global_seeds() -> None:
    parts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        data = read("digits", Path("unused"), train_examples=100, val_examples=20)
        parts.append([keys(data.train), keys(data.val)])
    assert parts[0] == parts[1]


@pytest.mark.parametrize("key", ["train_examples", "test_examples", "val_examples"])
def test_more_examples_than_there_are_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=rf"dataset\.{key}.*1800|dataset\.{key}=1800"):
        read("digits", "unused", **{key: 1800})


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"train_examples": -3}, "dataset.train_examples must be a whole number from 2, not -3"),
        ({"train_examples": 1.5}, "dataset.train_examples must be a whole number from 2, not 1.5"),
        ({"test_examples": 0}, "dataset.test_examples must be a whole number from 1, not 0"),
        ({"val_examples": -5}, "dataset.val_examples must be a whole number from 0, not -5"),
        ({"val_examples": None}, "dataset.val_examples must be a whole number from 0, not None"),
        ({"name": "cifar-10"}, "dataset=cifar-10 is no data set; there are: cifar10, cifar100, mn"),
        ({"name": "imagefolder", "image_size": 0}, "dataset.image_size must be a whole number fro"),
    ],
)
def test_what_load_cannot_take_is_one_sentence(asked: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{sentence}"):
        read(**{"name": "digits", "root": Path("unused")} | asked)


def test_held_out_images_are_no_training_images(digits: Data) -> None:
    n = len(digits.train)
    with pytest.raises(UserError, match=r"dataset\.train_examples"):
        read("digits", Path("unused"), val_examples=100, train_examples=n - 99)
    data = read("digits", Path("unused"), val_examples=100, train_examples=n - 100)
    assert len(data.train) == n - 100


# Batches


@pytest.fixture
def split() -> Split:
    """23 random images without a black pixel, so that a crop's zeros show."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (23, 3, 6, 7), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(10, (23,), generator=generator))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(split: Split, **kwargs: Any) -> list[tuple[Tensor, Tensor]]:
    """The images and labels of every batch."""
    defaults: dict[str, Any] = {"crop_padding": 0, "flip": False, "generator": seeded()}
    order = torch.randperm(len(split), generator=seeded(5))
    return [batch[:2] for batch in batches(split, order, 5, **(defaults | kwargs))]


@pytest.mark.parametrize("padding", [1, 2])
def test_a_crop_is_a_window_of_the_padded_image_for_each_image_its_own(padding: int) -> None:
    images = torch.randint(1, 256, (400, 3, 6, 7), generator=seeded(), dtype=torch.uint8)
    cropped = Moved(padding, random_shifts(400, padding, seeded(1))).follow(images)
    assert cropped.dtype is torch.uint8
    offsets: Counter[tuple[int, int]] = Counter()
    for image, crop in zip(images, cropped, strict=True):
        padded = F.pad(image, (padding, padding, padding, padding))
        fitting = [
            (y, x)
            for y in range(2 * padding + 1)
            for x in range(2 * padding + 1)
            if torch.equal(crop, padded[:, y : y + 6, x : x + 7])
        ]
        assert len(fitting) == 1
        offsets[fitting[0]] += 1
    # Uniform over the windows: 400 draws leave none of 25 out, and none has more than a fifth.
    assert len(offsets) == (2 * padding + 1) ** 2
    assert max(offsets.values()) < 80


def test_a_flip_is_the_image_or_its_mirror_with_equal_chances() -> None:
    images = torch.randint(256, (400, 3, 6, 7), generator=seeded(), dtype=torch.uint8)
    flipped = Moved(mirrored=random_mirrors(400, seeded(1))).follow(images)
    kept = mirrored = 0
    for image, result in zip(images, flipped, strict=True):
        mirror = torch.stack([image[:, :, 6 - x] for x in range(7)], dim=2)
        kept += torch.equal(result, image)
        mirrored += torch.equal(result, mirror)
    assert kept + mirrored == 400
    assert 150 < mirrored < 250


@pytest.mark.parametrize(
    ("examples", "batch_size", "sizes"),
    [
        (8, 4, [4, 4]),
        (10, 4, [4, 4, 2]),
        (9, 4, [4, 5]),
        (3, 2, [3]),
        (3, 4, [3]),
        (1, 4, [1]),
    ],
)
def test_batch_slices_cover_everything_once_and_leave_no_single_example(
    examples: int, batch_size: int, sizes: list[int]
) -> None:
    parts = [list(range(examples))[part] for part in batch_slices(examples, batch_size)]
    assert [len(part) for part in parts] == sizes
    assert [index for part in parts for index in part] == list(range(examples))


def test_batches_are_the_images_in_order_as_float32_between_0_and_1(split: Split) -> None:
    order = torch.randperm(23, generator=seeded(5))
    images = torch.cat([x for x, _ in drawn(split)])
    labels = torch.cat([y for _, y in drawn(split)])
    assert images.dtype is torch.float32
    assert [len(x) for x, _ in drawn(split)] == [5, 5, 5, 5, 3]
    assert labels.tolist() == [int(split.labels[i]) for i in order]
    expected = np.stack([split.images[i].numpy() for i in order]).astype(np.float64) / 255
    np.testing.assert_allclose(images.numpy(), expected, rtol=1e-6)


def test_augmented_values_stay_between_0_and_1(split: Split) -> None:
    images = torch.cat([x for x, _ in drawn(split, crop_padding=2, flip=True)])
    assert images.dtype is torch.float32
    assert images.shape == (23, 3, 6, 7)
    assert images.min() == 0  # the crop's border
    assert 0.9 < images.max() <= 1


@pytest.mark.parametrize("first", [0, 1, 3, 5])
def test_batches_can_begin_in_the_middle(split: Split, first: int) -> None:
    rest, everything = drawn(split, first=first), drawn(split)
    assert len(rest) == len(everything) - first
    for (x, y), (expected_x, expected_y) in zip(rest, everything[first:], strict=True):
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)


def test_skipped_batches_draw_nothing(split: Split) -> None:
    # What a resumed epoch relies on: with the generator's state of after batch k it goes on alike.
    generator = seeded()
    order = torch.randperm(len(split), generator=seeded(5))
    whole = batches(split, order, 5, crop_padding=2, flip=True, generator=generator)
    next(whole), next(whole)
    state = generator.get_state()
    rest = [x for x, *_ in whole]
    again = drawn(split, crop_padding=2, flip=True, generator=seeded().set_state(state), first=2)
    assert all(torch.equal(a, b) for a, (b, _) in zip(rest, again, strict=True))


def test_augmentation_is_a_function_of_the_generators_seed(split: Split) -> None:
    def images(seed: int) -> Tensor:
        torch.manual_seed(len(runs))  # the global generator plays no part
        part = drawn(split, crop_padding=2, flip=True, generator=seeded(seed))
        runs.append(torch.cat([x for x, _ in part]))
        return runs[-1]

    runs: list[Tensor] = []
    assert torch.equal(images(1), images(1))
    assert not torch.equal(images(1), images(2))


def test_the_sample_of_mnist_is_balanced() -> None:
    data = load("mnist_sample", Path("unused"), device=CPU)
    assert data.shape == (1, 28, 28)
    for split, each in ((data.train, 1000), (data.test, 200)):
        assert torch.bincount(split.labels).tolist() == [each] * 10


# Real data, where the environment names it


@pytest.fixture(scope="module")
def real_data() -> Path:
    """The folder with MNIST/raw/*-ubyte and cifar10-jpeg.tar.xz."""
    folder = os.environ.get("BTRAIN_DATA")
    if not folder:
        pytest.skip(
            "The tests on real MNIST and CIFAR-10 (JPEG) were left out; set BTRAIN_DATA to the "
            "folder that holds MNIST/raw and cifar10-jpeg.tar.xz."
        )
    return Path(folder)


def test_real_mnist_has_the_published_statistics(real_data: Path) -> None:
    data = read("mnist", real_data)
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert data.shape == (1, 28, 28)
    counts = np.bincount(data.train.images.numpy().ravel(), minlength=256)
    values = np.arange(256) / 255
    mean = (counts * values).sum() / counts.sum()
    variance = (counts * (values - mean) ** 2).sum() / counts.sum()
    assert mean == pytest.approx(0.1307, abs=1e-4)
    assert variance**0.5 == pytest.approx(0.3081, abs=1e-4)
    assert data.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]


def test_the_sample_is_a_part_of_real_mnist(real_data: Path) -> None:
    sample = load("mnist_sample", Path("unused"), device=CPU)
    part = load("mnist", real_data, device=CPU, train_examples=10_000, test_examples=2_000)
    for ours, theirs in ((sample.train, part.train), (sample.test, part.test)):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)


def test_real_cifar10_jpeg_reads_as_an_image_folder(real_data: Path, tmp_path: Path) -> None:
    # The archive holds 60,000 files, in order within a class: 20 of each class and part are enough.
    with tarfile.open(real_data / "cifar10-jpeg.tar.xz", "r|xz") as archive:
        for member in archive:
            if re.search(r"/00[01]\d\.jpg$", member.name):
                archive.extract(member, tmp_path, filter="data")
    data = read_folder(tmp_path / "cifar10-jpeg", 32)
    assert data.classes == (
        "airplane", "automobile", "bird", "cat", "deer",
        "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip
    assert data.shape == (3, 32, 32)
    for split in (data.train, data.test):
        assert split.labels.tolist() == [c for c in range(10) for _ in range(20)]
        colour = split.images.float().mean(dim=(0, 2, 3)) / 255
        # The published means of CIFAR-10 are .491 .482 .447; red above blue tells RGB from BGR.
        assert colour.tolist() == pytest.approx([0.491, 0.482, 0.447], abs=0.05)
        assert colour[0] > colour[2]
