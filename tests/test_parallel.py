"""Training steps on several processes: every one holds what a single one would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import parallel_steps
from btrain.errors import UserError
from btrain.processes.world import World, device_of
from btrain.training.setup import check_shares
from composing import compose
from torchrun import in_a_fork

# Steps


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each process of 1, of 2 and of 3 has after the same steps."""
    folders = {n: tmp_path_factory.mktemp(f"steps{n}") for n in (1, 2, 3)}
    said = folders[1] / "said"
    process = in_a_fork(parallel_steps.main, folders, said=said)
    process.join(300)
    assert process.exitcode == 0, said.read_text()
    return {
        n: [torch.load(folder / f"{rank}.pt") for rank in range(n)] for n, folder in folders.items()
    }


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("case", parallel_steps.CASES)
def test_all_processes_hold_the_same_after_every_step(
    steps: dict[int, list[dict[str, Any]]], case: str, processes: int
) -> None:
    first, *others = steps[processes]
    for other in others:
        for name, tensor in first[case].items():
            if not name.endswith("num_batches_tracked"):
                assert torch.equal(tensor.nan_to_num(), other[case][name].nan_to_num()), name


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize(
    "case", [name for name in parallel_steps.CASES if not name.startswith(("BatchNorm", "bf16"))]
)
def test_several_processes_learn_what_one_learns(
    steps: dict[int, list[dict[str, Any]]], case: str, processes: int
) -> None:
    one, several = steps[1][0][case], steps[processes][0][case]
    assert one.keys() == several.keys()
    least = 1e-7 if case.startswith("scores") else 1e-12  # they are remembered in float32
    for name, tensor in one.items():
        torch.testing.assert_close(several[name], tensor, rtol=least, atol=least, equal_nan=True)


@pytest.mark.parametrize(
    "case", ["BatchNorm", "BatchNorm, an empty group", "BatchNorm, shared", "bf16"]
)
def test_batch_norm_sees_each_share_by_itself_and_learns_about_the_same(
    steps: dict[int, list[dict[str, Any]]], case: str
) -> None:
    one, two = steps[1][0][case], steps[2][0][case]
    assert not torch.equal(one["model.bn.running_mean"], two["model.bn.running_mean"])
    loss = parallel_steps_loss(one["stats"]), parallel_steps_loss(two["stats"])
    torch.testing.assert_close(loss[1], loss[0], rtol=0.5, atol=0)


def parallel_steps_loss(stats: Tensor) -> Tensor:
    return stats[:, 1] / stats[:, 0]


# Shares


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_make_up_the_batch_and_every_group_is_dealt_evenly(size: int) -> None:
    drawn = torch.randint(0, 11, (37,), generator=torch.Generator().manual_seed(0))
    steps = drawn.sort(descending=True).values
    active = [int((steps > step).sum()) for step in range(10)]
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    worlds = [World(rank, size) for rank in range(size)]
    shares = [order[world.share(37)] for world in worlds]
    assert sorted(torch.cat(shares).tolist()) == list(range(37))
    dealt = [world.dealt(active) for world in worlds]
    for world, counts in zip(worlds, dealt, strict=True):
        taken = steps[world.share(37)]
        assert counts == [n for step in range(10) if (n := int((taken > step).sum()))]
    for step, n in enumerate(active):
        taking = [counts[step] if step < len(counts) else 0 for counts in dealt]
        assert sum(taking) == n
        assert max(taking) - min(taking) <= 1


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["rival=free", "defense=pgd"], "rival=free"),
        (["rival=mma", "defense=pgd"], "rival=mma"),
        (["rival=gradalign", "defense=pgd"], "rival=gradalign"),
        (["train.cuda_graphs=auto"], "train.cuda_graphs=auto"),
        (["train.batch_size=7"], "train.batch_size=7"),
    ],
)
def test_what_needs_one_process_is_named(overrides: list[str], key: str) -> None:
    config = compose(["dataset=digits", "model=small_cnn", *overrides])
    check_shares(config, 1442, World())
    with pytest.raises(UserError, match=key):
        check_shares(config, 1442, World(0, 4))


def test_every_process_takes_its_own_gpu() -> None:
    assert device_of(World(1, 2), "cpu") == "cpu"
    assert device_of(World(), "cuda:1") == "cuda:1"
    with pytest.raises(UserError, match="device=cuda:1"):
        device_of(World(1, 2), "cuda:1")
