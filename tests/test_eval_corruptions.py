"""Corrupted test sets in the official layout, scored one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from btrain.cli import main
from btrain.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS
from btrain.data import Data
from btrain.errors import UserError
from btrain.evaluation.corruptions import under_corruptions
from eval_nets import digits_examples


def corrupted(folder: Path, digits: Data, names: list[str]) -> None:
    """Writes noisy digits, severity s with a standard deviation of 30·s grey levels."""
    folder.mkdir()
    images = digits.test.images.permute(0, 2, 3, 1).numpy()
    rng = np.random.default_rng(0)
    for name in names:
        blocks = [
            np.clip(images + rng.normal(0, 30 * severity, images.shape), 0, 255).astype(np.uint8)
            for severity in range(1, 6)
        ]
        np.save(folder / f"{name}.npy", np.concatenate(blocks))
    np.save(folder / "labels.npy", np.tile(digits.test.labels.numpy(), 5))


def read(root: Path, name: str, severity: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = np.load(root / f"{name}.npy"), np.load(root / "labels.npy")
    n = len(labels) // 5
    part = slice((severity - 1) * n, severity * n)
    return torch.from_numpy(images[part].transpose(0, 3, 1, 2).copy()), torch.from_numpy(
        labels[part]
    )


def test_corruptions_are_scored_one_by_one(
    plain_net: torch.nn.Module, digits: Data, tmp_path: Path
) -> None:
    root, names = tmp_path / "noisy", ["shot", "gaussian"]
    corrupted(root, digits, names)
    examples = digits_examples(digits)
    found = under_corruptions(plain_net, examples, root, names, read=read, batch_size=100)
    assert found.correct.shape == (2, 5, 355)
    images, labels = read(root, "gaussian", 5)
    by_hand = (plain_net(images.float() / 255).argmax(dim=1) == labels).float().mean()
    assert found.table()["gaussian"][4] == pytest.approx(100 * by_hand.item())
    assert found.table()["shot"][0] > found.table()["shot"][4] + 10


def test_a_subset_of_the_test_set_finds_its_corrupted_images(
    plain_net: torch.nn.Module, digits: Data, tmp_path: Path
) -> None:
    from btrain.data import load

    root = tmp_path / "noisy"
    corrupted(root, digits, ["gaussian"])
    some = load("digits", tmp_path, device=torch.device("cpu"), test_examples=50)
    whole, part = (
        under_corruptions(
            plain_net, digits_examples(data), root, ["gaussian"], read=read, batch_size=100
        ).correct[0]
        for data in (digits, some)
    )
    places = [
        int((digits.test.images == image).flatten(1).all(dim=1).nonzero()[0])
        for image in some.test.images
    ]
    assert part.tolist() == whole[:, places].tolist()


def test_corruptions_of_other_images_are_refused(
    plain_net: torch.nn.Module, digits: Data, tmp_path: Path
) -> None:
    root = tmp_path / "noisy"
    corrupted(root, digits, ["gaussian"])
    np.save(root / "labels.npy", np.tile(digits.test.labels.numpy()[::-1], 5))
    with pytest.raises(UserError, match="made of another test set"):
        under_corruptions(
            plain_net, digits_examples(digits), root, ["gaussian"], read=read, batch_size=100
        )
    np.save(root / "labels.npy", np.tile(digits.test.labels.numpy(), 5))
    np.save(root / "gaussian.npy", np.load(root / "gaussian.npy")[:, :4])
    with pytest.raises(UserError, match="images of 1×4×8, the test set of 1×8×8"):
        under_corruptions(
            plain_net, digits_examples(digits), root, ["gaussian"], read=read, batch_size=100
        )


@pytest.fixture
def made(runs_here: Path) -> Path:
    """All 19 corruptions of 30 digits, beside two runs."""
    command = ["data", "corrupt", "dataset=digits", "dataset.test_examples=30"]
    command += ["corrupt.corruptions=all", "corrupt.processes=1", "corrupt.out=C"]
    assert main(command) == 0
    return runs_here / "C"


EVAL = [
    "eval", "checkpoint=A", "attack=corruptions", "dataset.corruptions_root=C",
    "dataset.test_examples=30", "sanity=false",
]  # fmt: skip


def test_the_command_tells_table_mean_and_mce(
    made: Path, runs_here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main([*EVAL, "attack.extra_corruptions=true"]) == 0
    out = capsys.readouterr().out
    folder = runs_here / "A" / "eval" / "dataset.test_examples_30"
    found = json.loads((folder / "corruptions.json").read_text())
    with np.load(folder / "corruptions.npz", allow_pickle=False) as arrays:
        correct = arrays["correct"]
    assert correct.shape == (15, 5, 30)
    assert tuple(found["table"]) == CORRUPTIONS
    assert tuple(found["extra_table"]) == EXTRA_CORRUPTIONS
    mean = np.mean(list(found["table"].values()))  # of the standard ones only
    assert found["accuracy"] == pytest.approx(mean) == pytest.approx(100 * correct.mean())
    assert found["mce"] == pytest.approx(100 - mean)
    assert found["regenerated"] is True
    assert "Corruptions regenerated by btrain, not the official files." in out
    assert f"mean accuracy {mean:.2f} %, mCE {100 - mean:.2f} %" in out
    lines = [line.split()[0] for line in out.splitlines() if line]
    assert lines.index("jpeg_compression") < lines.index("extra,") < lines.index("saturate")

    (made / "REGENERATED.json").unlink()  # as the official files come
    assert main([*EVAL, "out=official"]) == 0
    assert "regenerated" not in capsys.readouterr().out
    found = json.loads((runs_here / "official" / "corruptions.json").read_text())
    assert found["regenerated"] is False
    assert "extra_table" not in found


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: (root / "fog.npy").unlink(), "fog.npy is missing"),
        (lambda root: np.save(root / "fog.npy", np.load(root / "fog.npy")[:120]), "(120,)"),
        (lambda root: np.save(root / "snow.npy", np.load(root / "snow.npy")[:-1]), "149 images"),
    ],
    ids=["missing", "four severities", "one image short"],
)
def test_spoilt_corruptions_are_one_sentence_and_nothing_is_written(
    made: Path,
    runs_here: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    words: str,
) -> None:
    spoil(made)
    capsys.readouterr()
    assert main(EVAL) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert words in err
    assert not (runs_here / "A" / "eval").exists()
