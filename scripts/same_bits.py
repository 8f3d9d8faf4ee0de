#!/usr/bin/env python3
"""A comparison of this checkout with an earlier commit: the same trainings, the same bits?

    scripts/same_bits.py [COMMIT] [--only WORD] [--keep FOLDER]

Both train every case of the table below, on one thread of the CPU and in float32. Equal must be
every line of metrics.jsonl and the whole state in checkpoints/last.pt, but for what is a time.
Some runs are cut in the middle of their second epoch by the earlier commit, and continued by both.
With --keep the earlier commit's runs stay and are not repeated; keep them only for one machine and
one installation of torch, whose bits they are.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parents[1]
TIMES = {"train_seconds", "epoch_seconds", "speedup_measured"}
NEW = {"torch_generators"}
"""The keys that a checkpoint has gained since."""
COMMON = """dataset=digits dataset.train_examples=250 dataset.test_examples=100 model=small_cnn
    train.epochs=2 train.batch_size=32 eval.steps=2 device=cpu seed=1"""
WEAK = "attack.epsilon=0.03 recipe.optimizer=adam recipe.lr=0.01"
"""An attack that the network soon resists in part, so that all three classes of examples occur."""
WATCHED = frozenset({"pgd_acc_train_batch", "watched_acc", "watched_images"})
"""Measured by the earlier commit on a batch, now on 128 images where a collapse ends the run."""
RESNET = "model=preact_resnet18 model.width=4 dataset.train_examples=150"


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        settings: what differs from COMMON.
        cut: whether the earlier commit cuts the run, for both to continue.
        other: what has another meaning now, by its key.
    """

    name: str
    settings: str
    cut: bool = False
    other: frozenset[str] = frozenset()


ALLOCATORS = ("uniform", "bullettrain", "random", "gaussian", "early_exit", "oracle")
RIVALS = ("fast", "yopo", "gradalign", "free", "mma")
LEFT_OUT = {"trades_gradalign", *(f"{d}_{r}" for d in ("trades", "mart") for r in ("free", "mma"))}
CUT = {"trades_bullettrain", "mart_uniform", "pgd_free", "pgd_mma", "augmix_bullettrain"}
METHODS = {
    f"{defense}_{choice}": f"{WEAK} defense={defense} {group}={choice}"
    for defense in ("trades", "mart", "pgd")
    for group, choices in (("bt", ALLOCATORS), ("rival", RIVALS))
    for choice in choices
} | {f"augmix_{bt}": f"defense=augmix bt={bt}" for bt in ALLOCATORS[:3]}

CASES = [
    *(Case(m, METHODS[m], cut=m in CUT) for m in METHODS if m not in LEFT_OUT),
    Case("trades_random_equal", f"{WEAK} bt=random bt.fractions=[.34,.51,.15]"),
    Case("trades_fast3", f"{WEAK} rival=fast bt.n_b=3"),
    Case("trades_gradalign", f"{WEAK} rival=gradalign attack.start=uniform"),
    Case("augmix_no_jsd", "defense=augmix bt=uniform defense.jsd=false"),
    Case("pool", f"{WEAK} bt.pool=2", cut=True),
    Case("pool_mart_gaussian", f"{WEAK} defense=mart bt=gaussian bt.pool=2"),
    Case("pool_pgd_early_exit", f"{WEAK} defense=pgd bt=early_exit bt.pool=3"),
    Case("ema", f"{WEAK} recipe.ema=0.99 dataset.val_examples=50", cut=True),
    Case("shared", f"{WEAK} bt.share_clean_forward=true"),
    Case("shared_mart", f"{WEAK} defense=mart bt.share_clean_forward=true"),
    Case("all_forward", f"{WEAK} bt.forward_unperturbed=true"),
    Case("all_forward_mart", f"{WEAK} defense=mart bt.forward_unperturbed=true"),
    Case("skip", f"{WEAK} train.on_nonfinite=skip bt=gaussian"),
    Case("skip_pool", f"{WEAK} train.on_nonfinite=skip bt.pool=2"),
    Case("no_collapse", f"{WEAK} rival=fast recipe.early_stop_on_collapse=true",
         other=WATCHED),
    Case("collapse", f"{WEAK} train.epochs=3 recipe.epochs=3 recipe.milestones=[2]"
         " recipe.lr_factors=[100] recipe.early_stop_on_collapse=true",
         other=WATCHED | {"total_sums"}),  # which count the epoch that is undone, too
    Case("held_out", f"{WEAK} dataset.val_examples=50 eval.every_epochs=2 train.epochs=3"),
    Case("held_out_augmix", "defense=augmix dataset.val_examples=50"),
    Case("growing_epsilon", f"{WEAK} attack.epsilon_warmup_epochs=1"),
    Case("bt_warmup", f"{WEAK} bt.warmup_epochs=1"),
    Case("bt_warmup_mart", f"{WEAK} defense=mart bt=early_exit bt.warmup_epochs=1"),
    Case("train_mode", f"{WEAK} {RESNET} bt=uniform attack.mode=train"),
    Case("cross_entropy", f"{WEAK} bt.metric=cross_entropy"),
    Case("grad_norm", f"{WEAK} bt.metric=grad_norm"),
    Case("margin", f"{WEAK} defense=mart bt.metric=margin"),
    Case("n_o", f"{WEAK} bt.n_r=1 bt.n_o=1 bt.gamma=0.5 bt.momentum=0.5"),
    Case("n_r0", f"{WEAK} bt.n_r=0"),
    Case("patience", f"{WEAK} bt=early_exit bt.patience=3"),
    Case("short_oracle", f"{WEAK} bt=oracle bt.oracle_steps=3"),
    Case("uniform_start", f"{WEAK} attack.start=uniform"),
    Case("clean_start", f"{WEAK} defense=mart attack.start=clean"),
    Case("sgd_crop_flip", "attack.epsilon=0.03 recipe.crop_padding=1 recipe.flip=true"),
    Case("scores", f"{WEAK} train.score_every=2 train.deterministic=true"),
    Case("fastest", "experiment=fastest attack.epsilon=0.03"),
    Case("resnet_trades_bt", f"{WEAK} {RESNET}", cut=True),
    Case("resnet_pool", f"{WEAK} {RESNET} bt.pool=2"),
    Case("resnet_shared", f"{WEAK} {RESNET} bt.share_clean_forward=true"),
    Case("resnet_channels_last", f"{WEAK} {RESNET} train.channels_last=true"),
    Case("resnet_mart_bt", f"{WEAK} {RESNET} defense=mart"),
    Case("resnet_fast", f"{WEAK} {RESNET} rival=fast"),
    Case("resnet_gradalign", f"{WEAK} {RESNET} defense=pgd rival=gradalign"),
    Case("resnet_mma", f"{WEAK} {RESNET} defense=pgd rival=mma"),
    Case("resnet_pgd_free", f"{WEAK} {RESNET} defense=pgd rival=free"),
    Case("resnet_augmix_bt", f"{RESNET} defense=augmix"),
    Case("wide_resnet_ema", f"{WEAK} {RESNET} model=wrn_40_2 model.width=1 model.depth=10"
         " recipe.ema=0.9 train.on_nonfinite=skip"),
]  # fmt: skip


def arguments(settings: str) -> list[str]:
    """Return the command of a case, whose settings replace the common ones."""
    pairs = (setting.split("=", 1) for setting in f"{COMMON} {settings}".split())
    return ["train", *(f"{key}={value}" for key, value in dict(pairs).items())]


def run_jobs(tree: Path) -> None:
    """Train what stdin asks for with the btrain of one checkout; note how each run ended."""
    import btrain.cli

    if not Path(btrain.cli.__file__).is_relative_to(tree):
        sys.exit(f"{btrain.cli.__file__} is not in {tree}.")
    for job in json.load(sys.stdin):
        folder, begun, command = Path(job["folder"]), job["begun"], job["arguments"]
        shutil.rmtree(folder, ignore_errors=True)
        said, status = io.StringIO(), 1
        with redirect_stdout(said), redirect_stderr(said):
            try:
                if begun and job["cut"]:
                    cut(Path(begun), command)
                if begun:
                    shutil.copytree(begun, folder)
                status = btrain.cli.main([*command, f"run.dir={folder}"])
            except Exception as error:
                print(f"{type(error).__name__}: {error}")
        end = said.getvalue().strip().splitlines()[-1:]
        note(folder).write_text(json.dumps({"arguments": command, "status": status, "said": end}))


def cut(folder: Path, command: list[str]) -> None:
    """Train batch by batch, by tiny time limits, as far as the middle of the second epoch."""
    import btrain.cli

    spent = allowed = 0.0
    for _ in range(200):
        if not spent:
            shutil.rmtree(folder, ignore_errors=True)
        allowed = 2 * allowed or 0.002
        limit = f"train.max_seconds={spent + allowed}"
        if btrain.cli.main([*command, limit, f"run.dir={folder}"]):
            break
        state = load(folder) if last(folder).exists() else {"epoch": 0, "batch": 0}
        if state["epoch"] == 1 and state["batch"]:
            return
        if state["epoch"] > 1:  # too far: from the beginning
            spent = allowed = 0.0
        elif state.get("train_seconds", 0.0) > spent:  # else the time was up ahead of a batch
            spent, allowed = state["train_seconds"], 0.0
    raise RuntimeError(f"{folder} could not be cut")


def last(folder: Path) -> Path:
    """Return the path of a run's newest checkpoint."""
    return folder / "checkpoints" / "last.pt"


def note(folder: Path) -> Path:
    """Return the file, beside a run's folder, that says how the run ended."""
    return folder.with_name(f"{folder.name}.json")


def read_note(folder: Path) -> dict[str, Any]:
    """Return what that file says; nothing where there is none."""
    return dict(json.loads(note(folder).read_text())) if note(folder).exists() else {}


def load(folder: Path) -> dict[str, Any]:
    """Return the state in a run's newest checkpoint."""
    state: dict[str, Any] = torch.load(last(folder), weights_only=True)["state"]
    return state


def lines(folder: Path) -> dict[str, Any]:
    """Return the lines of a run's metrics.jsonl, by epoch."""
    read = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {f"epoch {line['epoch']}": line for line in read}


def first_difference(before: Any, now: Any, place: str, other: Collection[str] = ()) -> str | None:
    """Return the first place where two trees of values differ; NaN equals NaN, times anything."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(now.keys() - before.keys())]:
            if key in TIMES or key in other or (key in NEW and key not in before):
                continue
            if key not in before or key not in now:
                return f"{place}, {key}: only {'before' if key in before else 'now'}"
            if found := first_difference(before[key], now[key], f"{place}, {key}", other):
                return found
        return None
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        differences = (first_difference(a, b, f"{place}, {i}", other) for i, (a, b) in pairs)
        return next((difference for difference in differences if difference), None)
    if isinstance(before, torch.Tensor) and isinstance(now, torch.Tensor):
        if (before.dtype, before.shape) != (now.dtype, now.shape):
            kinds = [f"{t.dtype} {tuple(t.shape)}" for t in (before, now)]
            return f"{place}: {kinds[0]} before, {kinds[1]} now"
        if bool(((before == now) | ((before != before) & (now != now))).all()):
            return None
        most = (before.double() - now.double()).abs().max()
        return f"{place}: tensors differ by up to {most:.3g}"
    if before == now or (before != before and now != now):
        return None
    numbers = [value for value in (before, now) if isinstance(value, int | float)]
    by = f", a difference of {abs(numbers[0] - numbers[1]):.3g}" if len(numbers) == 2 else ""
    return f"{place}: {before} before, {now} now{by}"


def compare(before: Path, now: Path, other: Collection[str]) -> str | None:
    """Return the first difference of two runs, or None; `other` are keys that may differ."""
    for folder, words in ((before, "the earlier commit"), (now, "this checkout")):
        ended = read_note(folder)
        if ended.get("status") != 0:
            return f"{words} did not train it: {' '.join(ended.get('said', []))}"
    return first_difference(lines(before), lines(now), "metrics", other) or first_difference(
        load(before), load(now), "state", other
    )


def train_all(name: str, tree: Path, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Train jobs with a checkout's btrain, in one process, and say what that cost."""
    print(f"{name}: training {len(jobs)} cases …", flush=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--jobs-of", str(tree)]
    subprocess.run(command, input=json.dumps(jobs), text=True, env=env, cwd=folder, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{name}: {seconds:.0f} s of CPU time", flush=True)


def git(*args: str) -> str:
    """Return git's answer about this checkout; its own message ends the script."""
    done = subprocess.run(["git", "-C", str(HERE), *args], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(1)
    return done.stdout.strip()


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Lend a folder with the files of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "tree"
        git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def main() -> int:
    """Train, compare, and return the exit status: 1 if anything differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commit", nargs="?", default="47634f9")
    parser.add_argument("--only", default="", metavar="WORD", help="cases with WORD in their name")
    parser.add_argument("--keep", type=Path, metavar="FOLDER",
                        help="where the earlier commit's runs stay, for the next call")  # fmt: skip
    parser.add_argument("--jobs-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.jobs_of:
        run_jobs(args.jobs_of)
        return 0
    commit = git("rev-parse", "--verify", f"{args.commit}^{{commit}}")
    cases = [case for case in CASES if args.only in case.name]
    with tempfile.TemporaryDirectory() as scratch:
        old, new = (args.keep or Path(scratch)).resolve() / commit, Path(scratch).resolve() / "now"
        old.mkdir(parents=True, exist_ok=True)
        new.mkdir()

        def job(case: Case, folder: Path) -> dict[str, Any]:
            begun = str(old / f"{case.name}.cut") if case.cut else None
            return {"folder": str(folder / case.name), "arguments": arguments(case.settings),
                    "begun": begun, "cut": folder == old}  # fmt: skip

        def is_kept(job: dict[str, Any]) -> bool:
            ended = read_note(Path(job["folder"]))
            return ended.get("status") == 0 and bool(ended["arguments"] == job["arguments"])

        left = [wanted for case in cases if not is_kept(wanted := job(case, old))]
        if left:
            with checkout(commit) as tree:
                train_all(commit[:7], tree, left, old)
        jobs = [job(case, new) for case in cases]
        train_all("this checkout", HERE, jobs, new)
        found = {case.name: compare(old / case.name, new / case.name, case.other) for case in cases}
        for name, difference in found.items():
            print(f"{name}: {difference or 'same'}")
        differ = sum(difference is not None for difference in found.values())
        print(f"{differ} of {len(found)} cases differ")
        return int(differ > 0 or not found)


if __name__ == "__main__":
    sys.exit(main())
