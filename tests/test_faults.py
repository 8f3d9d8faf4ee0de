"""Writes that fail: a full disk, a broken one, missing rights, a folder that is gone."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from btrain.cli import main
from btrain.durable import append_line, write_file
from btrain.errors import UserError
from btrain.runs import checkpoint
from btrain.runs.folder import RunFolder
from btrain.training import train
from btrain.training.resume import load_newest
from disks import full_disk
from test_training import TINY, metrics, same, tiny, untimed, weights

ERRORS = [errno.ENOSPC, errno.EIO, errno.EACCES]


class Disk:
    """Stands between the program and the files below a folder; its n-th write, fsync, rename or
    opening for writing fails. A write that fails writes half of what it was given.
    """

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.calls, self._failing, self._error = 0, 0, 0
        replaced, synced = Path.replace, os.fsync
        disk = self

        class Faulty(io.FileIO):
            def __init__(self, path: Path, mode: str, **named: Any) -> None:
                self._counts = folder in path.parents
                if self._counts:
                    disk.call()
                super().__init__(path, mode, **named)

            def write(self, content: Any) -> int:
                half = memoryview(content)[: len(content) // 2]
                if self._counts:
                    disk.call(lambda: super(Faulty, self).write(half))
                return super().write(content)

        def replace(path: Path, target: Path) -> Path:
            disk.call()
            return replaced(path, target)

        def fsync(file: int) -> None:
            disk.call()
            synced(file)

        patch.setattr(io, "FileIO", Faulty)
        patch.setattr(Path, "replace", replace)
        patch.setattr(os, "fsync", fsync)

    def fail(self, call: int, error: int) -> None:
        """From this call on; 0 for never."""
        self.calls, self._failing, self._error = 0, call, error

    def call(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.calls += 1
        if self._failing and self.calls >= self._failing:
            meanwhile()
            raise OSError(self._error, os.strerror(self._error))


EPOCHS = ["train.epochs=2", "dataset.val_examples=50", "dataset.train_examples=100"]


def test_a_fault_at_any_write_leaves_a_checkpoint_that_loads_and_a_run_that_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny(tmp_path / "whole", *EPOCHS))
    disk = Disk(monkeypatch, tmp_path)
    train(tiny(tmp_path / "counted", *EPOCHS))
    calls = disk.calls
    assert calls > 35
    begun = 0
    for call in range(1, calls + 1):
        folder = tmp_path / str(call)
        error = ERRORS[call % 3]
        disk.fail(call, error)
        with pytest.raises(UserError, match=r"^\S+ could not be written \(.+\)\.$") as caught:
            train(tiny(folder, *EPOCHS))
        assert str(folder) in str(caught.value)
        assert os.strerror(error) in str(caught.value)
        disk.fail(0, 0)
        saved, _ = load_newest(RunFolder(folder))
        epoch = 0 if saved is None else saved["state"]["epoch"]
        assert epoch >= begun  # what was saved once is never lost by a later fault
        begun = epoch
        if call % 9 == 0:
            train(tiny(folder, *EPOCHS))
            assert untimed(metrics(folder)) == untimed(metrics(tmp_path / "whole"))
            assert same(weights(folder), weights(tmp_path / "whole"))
        shutil.rmtree(folder, ignore_errors=True)
    assert begun == 2


@pytest.mark.parametrize("error", ERRORS)
def test_each_fault_while_saving_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    disk = Disk(monkeypatch, tmp_path)
    checkpoint.save(last, {"state": {"n": 0}}, previous=previous)
    checkpoint.save(last, {"state": {"n": 1}}, previous=previous)
    calls, n = disk.calls // 2 + 1, 1
    for call in range(1, calls + 1):
        disk.fail(call, error)
        with pytest.raises(UserError, match="could not be written"):
            checkpoint.save(last, {"state": {"n": n + 1}}, previous=previous)
        disk.fail(0, 0)
        newest = checkpoint.load(last if last.is_file() else previous)["state"]["n"]
        assert newest in (n, n + 1)
        checkpoint.save(last, {"state": {"n": n + 2}}, previous=previous)
        assert checkpoint.load(last)["state"]["n"] == n + 2
        n += 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_really_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / "last.pt", {"state": {"n": 1}})
    with (
        full_disk(monkeypatch),
        pytest.raises(UserError, match=r"last\.pt could not be written \(No space left"),
    ):
        checkpoint.save(tmp_path / "last.pt", {"state": {"n": 2, "x": torch.zeros(100000)}})
    assert checkpoint.load(tmp_path / "last.pt")["state"]["n"] == 1
    with (
        full_disk(monkeypatch),
        pytest.raises(UserError, match=r"metrics\.jsonl could not be written \(No space left"),
    ):
        append_line(tmp_path / "metrics.jsonl", "{}")


@pytest.mark.parametrize("limit", [0, 100, 5000])
def test_a_limit_of_the_system_on_file_sizes(tmp_path: Path, limit: int) -> None:
    resource = pytest.importorskip("resource")
    checkpoint.save(tmp_path / "last.pt", {"state": {"n": 1}})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match=r"last\.pt could not be written \(File too large\)"):
            checkpoint.save(tmp_path / "last.pt", {"state": {"n": 2, "x": torch.zeros(100000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.load(tmp_path / "last.pt")["state"]["n"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_write_replaces_the_file_and_keeps_the_one_before(tmp_path: Path) -> None:
    for text in (b"1", b"2", b"3"):
        write_file(tmp_path / "a", text, previous=tmp_path / "b")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"3", "b": b"2"}


def test_a_folder_deleted_under_way_ends_the_run_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    append = RunFolder.append_metrics

    def append_and_delete(folder: RunFolder, line: dict[str, Any]) -> None:
        append(folder, line)
        shutil.rmtree(folder.path)

    monkeypatch.setattr(RunFolder, "append_metrics", append_and_delete)
    assert main(["train", *TINY, f"run.dir={tmp_path / 'run'}"]) == 1
    err = capsys.readouterr().err
    assert f"{tmp_path / 'run'} was deleted or taken over by another process" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_log_that_cannot_be_written_costs_its_lines_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "run").mkdir()
    train(tiny(tmp_path / "run", "train.epochs=1"))
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "train.log").unlink()
    (tmp_path / "run" / "train.log").symlink_to("/dev/full")
    assert train(tiny(tmp_path / "run", "train.epochs=1"))["epochs"] == 1
    err = capsys.readouterr().err
    assert err.count("train.log could not be written") == 1
    assert "Traceback" not in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_ends_in_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="could not be written"):
        train(tiny(tmp_path / "run"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_folder_that_cannot_be_made_ends_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"run\.dir=/proc/self/run could not be written"):
        train(tiny(Path("/proc/self/run")))
