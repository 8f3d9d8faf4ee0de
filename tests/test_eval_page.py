"""The page of an evaluation: what is in the files, all of it, and nothing else."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from btrain.errors import UserError
from btrain.evaluation.result import Evaluation, Result
from btrain.report.evaluation import describe, write_page
from btrain.terminal import lasting
from disks import full_disk
from evaluation_page import Page, change, samples, write_samples

HOSTILE = (
    '</title></style><script>alert(1)</script><img src="http://evil.example/x" onerror=alert(1)>'
    "<!--'&amp;$x^{2}$\x00\u202e\ud800"
)


def test_a_whole_evaluation_has_every_section(evaluation: Path) -> None:
    path = write_page(evaluation)
    assert path == evaluation / "index.html"
    page = Page(path)
    assert page.headings == [
        "Attacks",
        "Sanity checks",
        "Accuracy against attack strength",
        "Accuracy by class",
        "Corrupted images",
        "Images",
    ]
    assert page.absent == []
    assert page.tags.count("svg") == 2
    assert page.tags.count("img") == 3 * 6
    for fact in ("0.03137 (8/255)", "120, the whole test set", "torch 2.13.0", "digits", "float32"):
        assert fact in page.words
    for word in ("✓ passed", "⚠ suspicious", "– skipped", "1 of 2", "3 min 05 s", "Regenerated"):
        assert word in page.words


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("clean.json", "clean"),
        ("pgd1000x5.json", "pgd1000x5"),
        ("autoattack.json", "autoattack"),
        ("corruptions.json", "corruptions.json"),
        ("sanity.json", "sanity.json"),
        ("samples.npz", "samples.npz"),
    ],
)
def test_what_was_not_measured_is_said(evaluation: Path, file: str, said: str) -> None:
    whole = Page(write_page(evaluation))
    (evaluation / file).unlink()
    page = Page(write_page(evaluation))
    assert page.headings == whole.headings
    assert page.absent
    assert all(line.startswith("Not measured") and said in line for line in page.absent)


@pytest.mark.parametrize("file", ["pgd20.json", "corruptions.json", "sanity.json", "samples.npz"])
def test_one_file_is_enough(evaluation: Path, file: str) -> None:
    for other in [*evaluation.glob("*.json"), evaluation / "samples.npz"]:
        if other.name != file:
            other.unlink()
    page = Page(write_page(evaluation))
    assert f"Made by btrain from {file}." in page.words
    assert len(page.absent) >= 4


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no evaluation"):
        write_page(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_numbers_are_those_of_the_files(evaluation: Path) -> None:
    page = Page(write_page(evaluation))
    attacks = ("clean", "pgd20", "pgd100x10", "pgd1000x5")
    contents = [json.loads((evaluation / f"{name}.json").read_text()) for name in attacks]
    for name, content in zip(attacks, contents, strict=True):
        assert page.numbers(name) == [[content["accuracy"], *content["ci95"]]]
    contents.append(json.loads((evaluation / "autoattack.json").read_text()))
    curves = json.loads((evaluation / "sanity.json").read_text())["curves"]
    classes = [[c["per_class"][str(k)]["accuracy"] for c in contents] for k in range(10)]
    by_class = [v for v in page.values if len(v) == len(contents)]
    corrupted = json.loads((evaluation / "corruptions.json").read_text())
    table = [*corrupted["table"].values(), *corrupted["extra_table"].values()]
    assert by_class == classes + table  # five attacks, five severities
    in_curves = [v for v in page.values if len(v) == 1]
    assert in_curves == [[accuracy] for points in curves.values() for _, accuracy in points]
    assert page.words.index("snow") < page.words.index("no part of the means above")
    assert page.words.index("no part of the means above") < page.words.index("saturate")
    assert f"Mean accuracy {corrupted['accuracy']:.2f} %, mCE {corrupted['mce']:.2f} %" in (
        page.words
    )
    for row, values in zip(page.rows, page.values, strict=True):  # what is shown is its rounding
        shown = [float(cell) for cell in row if re.fullmatch(r"\d+\.\d\d", cell)]
        assert all(any(abs(s - v) <= 0.005 + 1e-9 for v in values) for s in shown)


def test_facts_that_differ_between_attacks_name_them(evaluation: Path) -> None:
    change(evaluation, "pgd20.json", epsilon=0.1, test_examples=120, precision="bf16")
    page = Page(write_page(evaluation))
    assert "0.1 (25.5/255) (pgd20)" in page.words
    assert "0.03137 (8/255) (pgd100x10, pgd1000x5, autoattack)" in page.words
    assert "120, not the whole test set (dataset.test_examples=120) (pgd20)" in page.words
    assert "bf16, not float32 (pgd20)" in page.words


def test_what_all_attacks_share_stands_once(evaluation: Path) -> None:
    part = "40 test images, class-balanced, not the whole test set."
    for file in evaluation.glob("*.json"):
        if file.name not in ("sanity.json", "corruptions.json"):
            change(evaluation, file.name, test_examples=40, note=f"{part} In half the night.")
    page = Page(write_page(evaluation))
    assert page.words.count("not the whole test set") == 1
    assert page.words.count("In half the night.") == 1
    change(evaluation, "pgd20.json", note=f"{part} By day.")
    page = Page(write_page(evaluation))
    assert page.words.count("By day.") == 1 < page.words.count("In half the night.")


def test_hostile_strings_stay_text(evaluation: Path) -> None:
    before = Page(write_page(evaluation))
    change(
        evaluation,
        "pgd20.json",
        **dict.fromkeys(("note", "checkpoint", "dataset", "loss", "device", "seed"), HOSTILE),
        versions={HOSTILE: HOSTILE},
        precision=HOSTILE,
        attack=HOSTILE,
        per_class={HOSTILE: {"accuracy": 50, "n": 3}},
    )
    (evaluation / "pgd20.json").rename(evaluation / "<img src=x>&.json")
    change(evaluation, "corruptions.json", table={HOSTILE: [1, 2, 3, 4, 5]}, note=HOSTILE)
    check = {"name": HOSTILE, "passed": True, "detail": HOSTILE}
    change(evaluation, "sanity.json", checks=[check])
    arrays = samples(evaluation)
    names = [HOSTILE[:-1] + str(c) for c in range(10)]  # no lone surrogate in an array of strings
    write_samples(evaluation, **arrays | {"class_names": np.array(names)})

    page = Page(write_page(evaluation))
    assert set(page.tags) == set(before.tags)
    assert page.words.count("<script>alert(1)</script>") > 15
    assert "<img src=x>&.json" in page.words
    assert not any(key.startswith("on") for _, key, _ in page.attributes)
    assert page.tags.count("img") == 3 * 6
    assert not re.search("[\x00-\x09\x0b-\x1f\u202a-\u202e\ud800-\udfff]", page.source)


def test_a_very_long_string_does_not_swell_the_page(evaluation: Path) -> None:
    change(evaluation, "pgd20.json", note="x" * 5_000_000)
    assert write_page(evaluation).stat().st_size < 300_000


def test_nothing_is_loaded_and_nothing_runs(evaluation: Path) -> None:
    page = Page(write_page(evaluation))
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "a"} & set(page.tags)
    loads = [value for _, key, value in page.attributes if key in ("src", "href", "srcset")]
    assert all(value.startswith("data:image/png;base64,") for value in loads)
    references = [v for _, key, v in page.attributes if key == "xlink:href"]
    references += re.findall(r"url\(([^)]*)\)", page.source)
    assert all(reference.startswith("#") for reference in references)
    addresses = [(key, value) for _, key, value in page.attributes if "://" in value]
    assert all(key.startswith("xmlns") for key, _ in addresses)
    assert page.source.count("://") == len(addresses)
    assert "@import" not in page.source
    policies = [v for _, key, v in page.attributes if key == "content" and "default-src" in v]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_ids_are_unique_and_the_same_files_give_the_same_page(evaluation: Path) -> None:
    first = Page(write_page(evaluation))
    ids = [value for _, key, value in first.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert Page(write_page(evaluation)).source == first.source


def decoded(page: Page) -> list[np.ndarray]:
    sources = [value for tag, key, value in page.attributes if (tag, key) == ("img", "src")]
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))
        for source in sources
    ]


def test_the_pictures_are_the_images(evaluation: Path) -> None:
    arrays = samples(evaluation)
    page = Page(write_page(evaluation))
    pictures = decoded(page)
    assert "amplified 15 times" in page.words  # 15 · 8/255 is the most that fits around grey
    difference = arrays["adversarial"] - arrays["clean"]
    for i in range(6):
        clean, adversarial, amplified = pictures[3 * i : 3 * i + 3]
        assert (clean == (255 * arrays["clean"][i, 0]).round()).all()
        assert (adversarial == (255 * arrays["adversarial"][i, 0]).round()).all()
        expected = 255 * (0.5 + 15 * difference[i, 0])
        assert np.abs(amplified - expected).max() <= 0.51


def test_many_large_photographs_stay_under_two_megabytes(evaluation: Path) -> None:
    rng = np.random.default_rng(0)
    clean = rng.random((32, 3, 224, 180), dtype=np.float32)
    adversarial = (clean + rng.uniform(-0.03, 0.03, clean.shape)).clip(0, 1).astype(np.float32)
    one = np.ones(32, dtype=np.int64)
    write_samples(
        evaluation,
        clean=clean,
        adversarial=adversarial,
        labels=one,
        clean_prediction=one,
        adversarial_prediction=0 * one,
        class_names=np.array(["cat", "dog"]),
    )
    path = write_page(evaluation)
    assert path.stat().st_size < 2_000_000
    page = Page(path)
    shown = page.tags.count("img") // 3
    assert 4 <= shown < 32
    assert f"The first {shown} of 32 samples" in page.words
    assert "Shown at 1/2 of their size" in page.words
    blocks = clean[0].reshape(3, 112, 2, 90, 2).mean(axis=(2, 4)).transpose(1, 2, 0)
    assert np.abs(decoded(page)[0] - 255 * blocks).max() <= 1


def test_a_failure_leaves_the_page_before(
    evaluation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_page(evaluation)
    before = path.read_bytes()
    good = (evaluation / "pgd20.json").read_bytes()
    (evaluation / "pgd20.json").write_bytes(b"{")
    with pytest.raises(UserError):
        write_page(evaluation)
    assert path.read_bytes() == before

    (evaluation / "pgd20.json").write_bytes(good)
    change(evaluation, "pgd20.json", note="new")
    with (
        full_disk(monkeypatch),
        pytest.raises(UserError, match=r"index\.html could not be written"),
    ):
        write_page(evaluation)
    assert path.read_bytes() == before
    there = {file.name for file in evaluation.iterdir()}
    write_page(evaluation)
    assert path.read_bytes() != before
    assert {file.name for file in evaluation.iterdir()} == there


def test_without_matplotlib_it_says_what_to_install(
    evaluation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'btrain\[report\]'"):
        write_page(evaluation)
    assert not (evaluation / "index.html").exists()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.034, "0.034 s"),
        (9.94, "9.9 s"),
        (42, "42 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (600, "10 min"),
        (3599, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (7800, "2 h 10 min"),
        (302400, "3.5 days"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert lasting(seconds) == words


def test_verified_shares_are_a_curve_and_no_attack(tmp_path: Path) -> None:
    labels = np.arange(8) % 2
    facts = {"classes": ["a", "b"], "epsilon": 0.1}
    for name, right, own in (
        ("clean", 7, {}),
        ("pgd20", 5, {}),
        ("verified-ibp", 2, {"shares": [[0.05, 37.5], [0.1, 25.0]]}),
    ):
        Result(name, np.arange(8) < right, labels, ("a", "b"), 1.0, facts | own).write(tmp_path)
    page = Page(write_page(tmp_path))
    assert "at the lowest, under pgd20" in page.words
    assert "verified at the most, by ibp" in page.words
    assert "verified, ibp" in page.source and "87.5 % at 0, " in page.source
    table = describe(Evaluation.read(tmp_path), None).splitlines()
    rows = [line.split()[:2] + line.split()[-2:-1] for line in table if "verified-ibp" in line]
    assert rows == [["verified-ibp", "25.00", "0.1"], ["verified-ibp", "37.50", "0.05"]]
    damaged = tmp_path / "verified-ibp.json"
    damaged.write_text(damaged.read_text().replace("37.5", "137.5"))
    with pytest.raises(UserError, match="shares"):
        write_page(tmp_path)
