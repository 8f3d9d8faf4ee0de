"""A folder from a stranger: links, pipes and devices at the names that btrain writes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from btrain import durable
from btrain.durable import (
    append_line,
    check_places,
    check_within,
    folder_made,
    make_folder,
    replacing,
    write_file,
    write_files,
)
from btrain.errors import UserError
from btrain.evaluation.run import evaluate_checkpoint
from btrain.paper.command import check_folders
from btrain.paper.sheets.files import show_sheets
from btrain.runs.folder import RunFolder
from btrain.runs.lock import locked
from btrain.settings.evaluation import EvalSettings
from btrain.training import train
from sheets import plan, row
from test_training import tiny
from torchrun import command, in_a_fork

pytestmark = pytest.mark.skipif(os.name != "posix", reason="no pipes, no links")

SECRET = b"the user's own"

Plant = Callable[[Path], None]


@pytest.fixture
def secret(tmp_path: Path) -> Iterator[Path]:
    """A file of the user's elsewhere, which is the same afterwards."""
    file = tmp_path / "elsewhere" / "secret"
    file.parent.mkdir()
    file.write_bytes(SECRET)
    yield file
    assert file.read_bytes() == SECRET
    assert [*file.parent.iterdir()] == [file]


IN_PLACE = ["symbolic link", "dangling link", "hard link", "pipe", "folder", "socket", "device"]


def plant(kind: str, path: Path, secret: Path) -> None:
    """Put something that is no file of its own at a name."""
    match kind:
        case "symbolic link":
            path.symlink_to(secret)
        case "dangling link":
            path.symlink_to(secret.with_name("new"))
        case "hard link":
            path.hardlink_to(secret)
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "socket":
            import socket

            with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as listening:
                listening.bind(path.name)
        case _:
            path.symlink_to("/dev/null")


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_file_that_is_appended_to_is_a_plain_one(tmp_path: Path, secret: Path, kind: str) -> None:
    plant(kind, path := tmp_path / "metrics.jsonl", secret)
    with pytest.raises(UserError, match=r"metrics\.jsonl could not be written \(.+\)\.$"):
        append_line(path, "{}")


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_lock_is_a_plain_file(tmp_path: Path, secret: Path, kind: str) -> None:
    plant(kind, path := tmp_path / "run.lock", secret)
    with pytest.raises(UserError, match=r"run\.lock could not be written \(.+\)\.$"):
        locked(path).__enter__()


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_replaced_file_is_never_written_through(tmp_path: Path, secret: Path, kind: str) -> None:
    plant(kind, path := tmp_path / "summary.json", secret)
    if "link" in kind:  # whose name the new file takes
        write_file(path, b"new")
        assert (path.read_bytes(), path.is_symlink()) == (b"new", False)
        return
    with pytest.raises(UserError, match=r"summary\.json could not be written \(.+ordinary file\)"):
        write_file(path, b"new")
    with pytest.raises(UserError, match=r"summary\.json could not be written \(.+ordinary file\)"):
        check_places([tmp_path / "other", path])


@pytest.mark.parametrize("kind", IN_PLACE)
def test_no_name_of_a_temporary_file_can_be_taken(
    tmp_path: Path, secret: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor would it do harm if somebody foresaw one."""
    plant(kind, tmp_path / "a.tmp", secret)
    names = []
    for _ in range(3):
        with replacing(tmp_path / "a") as file:
            file.write(b"1")
            names += [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"\.[0-9a-f]{16}\.tmp", name) for name in names)
    monkeypatch.setattr(durable.secrets, "token_hex", lambda size: "0" * 16)
    plant(kind, path := tmp_path / f".{'0' * 16}.tmp", secret)
    with pytest.raises(UserError, match=r"b could not be written"):
        write_file(tmp_path / "b", b"2")
    assert os.path.lexists(path)


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    old, young, other = (tmp_path / f"{name}.tmp" for name in (f".{'0' * 16}", f".{'1' * 16}", "a"))
    for path in (old, young, other):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    write_file(tmp_path / "b", b"")
    assert {path.name for path in tmp_path.iterdir()} == {young.name, other.name, "b"}
    with replacing(tmp_path / "c") as file:  # a living one keeps its file, however slow
        file.write(b"whole")
        (written,) = (p for p in tmp_path.glob(".*.tmp") if p != young)
        os.utime(written, (0, 0))
        write_file(tmp_path / "b", b"")
        file.flush()
        assert written.read_bytes() == b"whole"
    assert (tmp_path / "c").read_bytes() == b"whole"


def test_of_several_files_none_takes_its_name_before_all_are_there(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=rf"{tmp_path} could not be written"):
        write_files({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    write_files({tmp_path / "a": b"1", tmp_path / "c": b"2"})
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "c"}


def test_a_folder_is_reached_through_no_link(tmp_path: Path, secret: Path) -> None:
    root = tmp_path / "root"
    root.symlink_to(tmp_path / "real")  # the user's own way to it
    (tmp_path / "real").mkdir()
    (root / "eval").symlink_to(secret.parent)
    for folder in (root / "eval", root / "eval" / "best"):
        with pytest.raises(UserError, match=rf"{root / 'eval'} is a link"):
            make_folder(folder, within=root)
    make_folder(root / "report" / "a", within=root)
    check_within(root / "report" / "a", root)
    assert (tmp_path / "real" / "report" / "a").is_dir()


def test_a_folder_that_stays_empty_goes_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none"), folder_made(tmp_path / "a" / "b"):
        raise ValueError("none")
    assert not (tmp_path / "a").exists()
    with folder_made(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "c").touch()
    assert (tmp_path / "a" / "b" / "c").exists()


# A run folder

FILES = [
    "config.yaml", "provenance.json", "summary.json", "metrics.jsonl", "nonfinite.pt",
    "checkpoints/last.pt", "checkpoints/previous.pt", "checkpoints/best.pt",
]  # fmt: skip


@pytest.fixture(scope="module")
def _run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    train(tiny(folder, "train.epochs=1", "dataset.train_examples=50"))
    return folder


@pytest.fixture
def run(_run: Path, tmp_path: Path) -> Path:
    """A finished run, as it came from a stranger."""
    return Path(shutil.copytree(_run, tmp_path / "run"))


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_in_a_run_folder_is_refused_ahead_of_the_work(run: Path, name: str) -> None:
    config = tiny(run, "train.epochs=1", "dataset.train_examples=50")
    (run / "summary.json").unlink()
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    folder = RunFolder(run)
    with pytest.raises(UserError, match=re.escape(str(run))):
        folder.check_owner(config)
        with folder.taken(config):
            pytest.fail("the work began")
    assert (run / name).is_fifo()


@pytest.mark.parametrize("name", ["checkpoints", "wandb", "tensorboard", "eval"])
def test_a_linked_folder_in_a_run_folder_is_refused(run: Path, secret: Path, name: str) -> None:
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).symlink_to(secret.parent)
    config = tiny(run, "train.epochs=1", "dataset.train_examples=50")
    with (
        pytest.raises(UserError, match=rf"{run / name} is a link"),
        RunFolder(run).taken(config),
    ):
        pytest.fail("the work began")


@pytest.mark.parametrize("name", ["thesis.tmp", "thesis.txt"])
def test_what_a_user_has_in_a_new_folder_stays(tmp_path: Path, name: str) -> None:
    """Named ahead of the work, or put there while it is prepared."""
    config, folder = tiny(tmp_path, "train.epochs=1"), RunFolder(tmp_path)
    folder.check_owner(config)
    (tmp_path / name).write_text("years")
    with pytest.raises(UserError, match="holds other files"), folder.taken(config):
        pytest.fail("the work began")
    with pytest.raises(UserError, match="holds other files"):
        folder.check_owner(config)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_links_at_every_name_of_a_run_folder_lead_nowhere(run: Path, secret: Path) -> None:
    """A run goes on beside them, and its log costs its lines only."""
    (run / "summary.json").unlink()
    for name in ("config.yaml", "provenance.json", "summary.json", "checkpoints/last.pt"):
        (run / f"{name}.tmp").symlink_to(secret)
    for name in ("summary.json", "provenance.json", "metrics.jsonl"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(secret.with_name("new"))
    (run / "train.log").unlink()
    (run / "train.log").symlink_to(secret)
    train(tiny(run, "train.epochs=1", "dataset.train_examples=50"))
    assert json.loads((run / "summary.json").read_text())["epochs"] == 1
    assert not (run / "summary.json").is_symlink()


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_log_is_written_to_a_plain_file_alone(
    tmp_path: Path, secret: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(kind, tmp_path / "train.log", secret)
    with RunFolder(tmp_path).log_file():
        logging.getLogger("btrain").info("one")
        logging.getLogger("btrain").info("two")
    assert capsys.readouterr().err.count("train.log could not be written") == 1


def test_a_sparse_log_of_numbers_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = b'{"epoch": 1, "a": 0.5}\n{"epoch": 2, "a": 1e308}\n'
    path.write_bytes(lines)
    os.truncate(path, 10 << 30)
    folder = RunFolder(tmp_path)
    assert folder.logged("a") == [0.5]  # no number of ours is as large as the other
    folder.keep_metrics(2)
    assert path.read_bytes() == lines
    folder.keep_metrics(1)
    assert path.read_bytes() == lines.splitlines(keepends=True)[0]


# An evaluation


def evaluation(run: Path, *attacks: str, **others: Any) -> EvalSettings:
    chosen = [*(attacks or ("pgd20",))]
    return EvalSettings(checkpoint=str(run), attacks=chosen, sanity=False, report=False, **others)


@pytest.mark.parametrize(
    "name",
    [
        *("clean.json", "clean.npz", "pgd20.json", "pgd20.partial.npz", "verified-ibp.json"),
        "verified-ibp-0.05.partial.npz",
    ],
)
def test_a_pipe_among_results_is_refused_ahead_of_the_attack(run: Path, name: str) -> None:
    (run / "eval").mkdir(exist_ok=True)
    os.mkfifo(run / "eval" / name)
    with pytest.raises(UserError, match=rf"{name} could not be written \(it is no ordinary file"):
        evaluate_checkpoint(evaluation(run, verify=["ibp"], verify_epsilon=["0.05"]))
    assert [path.name for path in (run / "eval").iterdir()] == [name]


def test_a_linked_folder_of_results_is_refused(run: Path, secret: Path) -> None:
    (run / "eval").symlink_to(secret.parent)
    with pytest.raises(UserError, match=rf"{run / 'eval'} is a link"):
        evaluate_checkpoint(evaluation(run))


def test_one_process_runs_an_attack_in_a_folder(run: Path) -> None:
    (run / "eval").mkdir(exist_ok=True)
    with locked(run / "eval" / "pgd20.lock"):
        with pytest.raises(UserError, match=rf"{run / 'eval'} is in use by process {os.getpid()}"):
            evaluate_checkpoint(evaluation(run))
        evaluate_checkpoint(evaluation(run, "clean"))  # another attack goes on beside it
    evaluate_checkpoint(evaluation(run))
    assert not list((run / "eval").glob("*.lock"))


def test_two_evaluations_at_once_end_in_a_result_and_a_sentence(run: Path) -> None:
    words = ("eval", f"checkpoint={run}", "attack=pgd100x10", "dataset.test_examples=60")
    files = [run.parent / f"said{number}" for number in range(2)]
    both = [in_a_fork(command, (*words, "sanity=false", "report=false"), said=f) for f in files]
    for process, file in zip(both, files, strict=True):
        process.join(300)
        assert process.exitcode == 0 or "is in use by process" in file.read_text()
        assert "Traceback" not in file.read_text()
    assert 0 in [process.exitcode for process in both]
    assert len([*(run / "eval").glob("*/pgd100x10.json")]) == 1


# A folder of plans


@pytest.mark.parametrize("name", ["a-seed0", "report", "corrupted", "table9.json", "allocation"])
def test_a_folder_of_plans_is_checked_ahead_of_the_training(
    tmp_path: Path, secret: Path, name: str
) -> None:
    plans = [plan([row("a")])]
    check_folders(tmp_path, plans)
    if name == "table9.json":
        os.mkfifo(tmp_path / name)
    elif name == "allocation":
        (tmp_path / "a-seed0").mkdir()
        os.mkfifo(tmp_path / "a-seed0" / "allocation.json")
    else:
        (tmp_path / name).symlink_to(secret.parent)
    with pytest.raises(UserError, match=rf"{name}.+is (a link|no ordinary file)|{name} is a link"):
        check_folders(tmp_path, plans)


def test_a_linked_folder_of_reports_is_refused(tmp_path: Path, secret: Path) -> None:
    folder = tmp_path / "plans"
    plan([row("a")]).write(folder)
    (folder / "report").symlink_to(secret.parent)
    with pytest.raises(UserError, match=r"report is a link"):
        show_sheets(folder, folder / "report", None)


@pytest.mark.skipif(os.open not in os.supports_dir_fd, reason="needs folders by descriptor")
def test_a_folder_that_is_swapped_for_a_link_again_and_again_is_not_written_through(
    tmp_path: Path,
) -> None:
    victim, run = tmp_path / "victim", tmp_path / "run"
    folder, aside = run / "checkpoints", run / "aside"
    victim.mkdir()
    (victim / "last.pt").write_text("theirs")
    make_folder(folder, within=run)
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            folder.rename(aside)
            folder.symlink_to(victim)
            over.wait(0.0005)
            folder.unlink()
            aside.rename(folder)
            over.wait(0.0005)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(300):
            with contextlib.suppress(UserError):
                write_file(folder / "last.pt", b"ours")
    finally:
        over.set()
        thread.join()
    assert (victim / "last.pt").read_text() == "theirs"
    assert all(not path.read_bytes() for path in victim.iterdir() if path.name != "last.pt")
    write_file(folder / "last.pt", b"ours")
    assert (folder / "last.pt").read_bytes() == b"ours"
    folder.rename(aside)
    folder.symlink_to(victim)
    with pytest.raises(UserError, match=r"last\.pt could not be written \(its folder is a link\)"):
        write_file(folder / "last.pt", b"ours")
    assert [path.name for path in victim.iterdir() if path.read_bytes()] == ["last.pt"]
