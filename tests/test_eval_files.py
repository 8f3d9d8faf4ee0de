"""Damaged files of an evaluation: one sentence, nothing executed, nothing written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btrain.errors import UserError
from btrain.report.evaluation import write_page
from evaluation_page import samples, write_samples

DAMAGED_JSON = [
    ("pgd20.json", b"{"),
    ("pgd20.json", b""),
    ("pgd20.json", b"\xff\xfe"),
    ("pgd20.json", b"[1]"),
    ("pgd20.json", b"[" * 100_000),
    ("pgd20.json", b'{"attack": "pgd20", "n": 5}'),
    ("pgd20.json", b'{"attack": "pgd20", "n": 5, "accuracy": NaN}'),
    ("pgd20.json", b'{"attack": "pgd20", "n": 5, "accuracy": 100.1}'),
    ("pgd20.json", b'{"attack": "pgd20", "n": 5, "accuracy": true}'),
    ("pgd20.json", b'{"attack": "pgd20", "n": 5, "accuracy": "<b>"}'),
    ("pgd20.json", b'{"attack": "pgd20", "n": 5, "accuracy": 1' + b"0" * 400 + b"}"),
    ("pgd20.json", b'{"attack": "pgd20", "n": 0, "accuracy": 1}'),
    ("pgd20.json", b'{"attack": "pgd20", "n": 1.5, "accuracy": 1}'),
    ("pgd20.json", b'{"attack": 3, "n": 5, "accuracy": 1}'),
    ("pgd20.json", b'{"attack": "a", "n": 5, "accuracy": 1, "ci95": [1]}'),
    ("pgd20.json", b'{"attack": "a", "n": 5, "accuracy": 1, "ci95": [2, 1]}'),
    ("pgd20.json", b'{"attack": "a", "n": 5, "accuracy": 1, "per_class": [1]}'),
    ("pgd20.json", b'{"attack": "a", "n": 5, "accuracy": 1, "per_class": {"0": 1}}'),
    ("pgd20.json", b'{"attack": "a", "n": 5, "accuracy": 1, "epsilon": "0.1"}'),
    ("corruptions.json", b'{"accuracy": 5}'),
    ("corruptions.json", b'{"accuracy": 5, "table": {"fog": [1, 2, 3, 4]}}'),
    ("corruptions.json", b'{"accuracy": 5, "table": {"fog": [1, 2, 3, 4, "5"]}}'),
    ("sanity.json", b'{"checks": [3]}'),
    ("sanity.json", b'{"checks": 3}'),
    ("sanity.json", b'{"checks": [{"name": "a", "passed": "yes"}]}'),
    ("sanity.json", b'{"curves": {"epsilon": [[0, 1, 2]]}}'),
    ("sanity.json", b'{"curves": {"steps": [[-1, 1]]}}'),
]


@pytest.mark.parametrize(("file", "content"), DAMAGED_JSON)
def test_damaged_json_is_one_sentence_that_names_the_file(
    evaluation: Path, file: str, content: bytes
) -> None:
    (evaluation / file).write_bytes(content)
    with pytest.raises(UserError) as caught:
        write_page(evaluation)
    sentence = str(caught.value)
    assert sentence.startswith(f"{evaluation / file} is damaged: ")
    assert "\n" not in sentence
    assert len(sentence) < len(str(evaluation)) + 150
    assert not (evaluation / "index.html").exists()


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_damaged_samples_are_one_sentence_and_never_unpickled(evaluation: Path) -> None:
    good = samples(evaluation)
    whole = (evaluation / "samples.npz").read_bytes()
    trap = np.array([Trap(evaluation / "sprung")] * 6, dtype=object)
    npy = io.BytesIO()
    np.save(npy, good["clean"])
    wrong: list[dict[str, Any] | bytes] = [
        b"",
        b"PK nonsense",
        whole[: len(whole) // 2],
        npy.getvalue(),
        {key: value for key, value in good.items() if key != "labels"},
        good | {"labels": trap},
        good | {"clean": good["clean"][:, :, 0]},
        good | {"clean": good["clean"][:5]},
        good | {"adversarial": good["adversarial"] + 1},
        good | {"adversarial": good["adversarial"] * np.nan},
        good | {"adversarial": (255 * good["adversarial"]).astype(np.uint8)},
        {
            **good,
            **{key: np.repeat(good[key], 2, axis=1) for key in ("clean", "adversarial")},
        },
        good | {"clean_prediction": good["labels"] + 10},
        good | {"labels": good["labels"].astype(float)},
        good | {"labels": good["labels"][:3]},
    ]
    for content in wrong:
        if isinstance(content, bytes):
            (evaluation / "samples.npz").write_bytes(content)
        else:
            write_samples(evaluation, **content)
        with pytest.raises(UserError, match=r"samples\.npz is damaged") as caught:
            write_page(evaluation)
        assert "\n" not in str(caught.value)
    assert not (evaluation / "sprung").exists()
    assert not (evaluation / "index.html").exists()
