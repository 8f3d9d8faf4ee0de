"""Run folders with links, pipes and devices at the names that btrain writes."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from random import Random

import numpy as np

from btrain.durable import check_places, check_within
from btrain.evaluation.result import Result
from btrain.runs import checkpoint
from btrain.runs.folder import RunFolder
from btrain.settings.compose import compose, to_yaml

_FOLDERS = ("checkpoints", "eval", "wandb", "tensorboard")
_FILES = (
    "config.yaml", "provenance.json", "summary.json", "metrics.jsonl", "train.log", "run.lock",
    "nonfinite.pt", "checkpoints/last.pt", "checkpoints/previous.pt", "checkpoints/best.pt",
    "eval/clean.json", "eval/clean.npz",
)  # fmt: skip
_SECRET = b"the user's own"


class Planted:
    """A run folder in which a run is begun, logged, saved, ended and evaluated."""

    writes = True

    def __init__(self, folder: Path) -> None:
        self._run, self._elsewhere = folder / "run", folder / "elsewhere"
        self._secret = self._elsewhere / "secret"
        self._elsewhere.mkdir()
        self._secret.write_bytes(_SECRET)
        self._config = compose(["dataset=digits"])
        self._text = to_yaml(self._config)
        self._result = Result("clean", np.array([True]), np.array([0]), ("a",), 1.5, {})

    def write(self, rng: Random) -> None:
        shutil.rmtree(self._run, ignore_errors=True)
        (self._run / "checkpoints").mkdir(parents=True)
        (self._run / "eval").mkdir()
        (self._run / "config.yaml").write_text(self._text)
        names = [*_FILES, *_FOLDERS, *(f"{name}.tmp" for name in _FILES)]
        for name in rng.sample(names, rng.choice((1, 1, 2, 5))):
            self._plant(self._run / name, rng)

    def _plant(self, path: Path, rng: Random) -> None:
        if not path.parent.is_dir() or path.parent.is_symlink():
            return
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        match rng.randrange(6):
            case 0 | 1:
                path.symlink_to(self._elsewhere if path.name in _FOLDERS else self._secret)
            case 2:
                path.symlink_to(self._elsewhere / rng.choice(("new", "secret", ".")))
            case 3:
                os.mkfifo(path)
            case 4:
                path.hardlink_to(self._secret)
            case _:
                path.symlink_to(rng.choice((path.name, "/dev/zero", "/dev/null", "..")))

    def read(self) -> None:
        folder = RunFolder(self._run)
        try:
            folder.check_owner(self._config)
            with folder.taken(self._config), folder.log_file():
                folder.begin(self._config, {})
                folder.keep_metrics(1)
                logging.getLogger("btrain").info("begun")
                for epoch in (1, 2):
                    folder.append_metrics({"epoch": epoch})
                    checkpoint.save(folder.last, {"state": {}}, previous=folder.previous)
                folder.write_summary({})
            inside = self._run / "eval"
            check_within(inside, self._run)
            check_places([inside / "clean.json", inside / "clean.npz"])
            self._result.write(inside)
        finally:
            if self._secret.read_bytes() != _SECRET or len([*self._elsewhere.iterdir()]) != 1:
                raise AssertionError("a file elsewhere was written")
