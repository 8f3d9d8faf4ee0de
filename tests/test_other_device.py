"""What a GPU would refuse or wait for, found without one."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils import backend_registration

import other_device
from torchrun import in_a_fork

ATTACK = "model=small_cnn model.width=4 attack.steps=4 bt.n_b=4"
COPIES = {
    f"{ATTACK} defense=trades recipe.crop_padding=1 recipe.flip=true": 1,
    f"{ATTACK} defense=mart bt.metric=margin train.score_every=1": 1,
    f"{ATTACK} defense=pgd bt.metric=grad_norm bt=random": 1,
    f"{ATTACK} bt=gaussian train.on_nonfinite=skip recipe.optimizer=adam": 1,
    f"{ATTACK} bt=oracle recipe.ema=0.9": 1,
    f"{ATTACK} bt=early_exit": 2,  # and where the batch has shrunk, after two steps of four
    f"{ATTACK} bt.pool=3": 1,
    "model=preact_resnet18 model.width=4 bt.score=shared attack.steps=2 bt.n_b=2": 1,
    "model=small_cnn defense=augmix": 2,  # and which operations the views' chains drew
    "model=small_cnn defense=augmix bt=uniform defense.jsd=false": 1,
    "model=small_cnn defense=pgd bt=uniform rival=free": 0,
    "model=small_cnn defense=pgd bt=uniform rival=mma": 1,
    "model=small_cnn defense=pgd bt=uniform rival=gradalign": 1,
}
"""How often a step copies to the host, by the settings."""


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="needs a torch in which a device can be made in Python",
)
def test_no_step_mixes_devices_or_waits_for_one_without_need(tmp_path: Path) -> None:
    said = tmp_path / "said"
    process = in_a_fork(other_device.main, [*COPIES], said=said)
    process.join(300)
    assert process.exitcode == 0, said.read_text()
    lines = [line.split("\t") for line in said.read_text().splitlines()]
    assert {words: int(copies) for words, copies in lines} == COPIES
