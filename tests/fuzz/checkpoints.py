"""Checkpoints and weights: whole zip files, the pickles in them, the old format, safetensors."""

from __future__ import annotations

import argparse
import io
import pickle
import pickletools
import struct
import zipfile
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from btrain import models
from btrain.data import Data, Split
from btrain.errors import UserError
from btrain.exchange.from_run import load_run
from btrain.exchange.read import load_weights
from btrain.runs import checkpoint
from btrain.settings.compose import compose, to_dict
from btrain.training.setup import make_state
from fuzz.mutations import damaged, damaged_pickle, number, random_pickle

_SETTINGS = ["dataset=digits", "model=small_cnn", "model.width=1", "train.epochs=3", "device=cpu"]
_KEYS = ("state_dict", "model", "mu", "sigma", "config", "state", "format", "optimizer", "memory",
         "epoch", "train_seconds", "param_groups", "dataset", "width", "depth")  # fmt: skip


class Checkpoint:
    """A run's checkpoint and others' weights, read by each function that takes such files."""

    def __init__(self, folder: Path) -> None:
        self._canary = str(folder / "canary")
        self._folder = folder
        self._config = compose(_SETTINGS)
        split = Split(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4))
        data = Data(split, None, split, tuple("0123456789"))
        self._fresh = lambda: make_state(self._config, data, torch.device("cpu"))
        state = self._fresh()
        for parameter in state.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        state.optimizer.step()
        state.epoch, state.train_seconds = 1, 2.5
        self._run = {
            "format": checkpoint.FORMAT,
            "state": state.state_dict(),
            "config": to_dict(self._config),
        }
        weights = state.model.state_dict()
        self._theirs: list[Any] = [
            weights,
            {"state_dict": {f"module.{key}": value for key, value in weights.items()}},
            {"net": {**weights, "mu": torch.zeros(1, 1, 1), "sigma": torch.ones(1, 1, 1)}},
            {
                "ema_state_dict": weights,
                "args": argparse.Namespace(lr=0.1, out=Path("a")),
                "best": np.float64(3),
                "losses": np.zeros(2),
                "counts": defaultdict(list, a=[1]),
            },
        ]

    def write(self, rng: Random) -> None:
        for old in self._folder.glob("file.*"):
            old.unlink()
        kind = rng.randrange(8)
        suffix = "pt"
        if kind < 4:
            content = self._zip(rng)
        elif kind == 4:
            content = self._values(rng)
        elif kind == 5:
            content = damaged(_saved(self._theirs[0], zipped=False), rng)
        elif kind == 6:
            content = self._legacy(rng)
        else:
            suffix, content = self._safetensors(rng)
        self.file = self._folder / f"file.{suffix}"
        self.file.write_bytes(content)

    def _zip(self, rng: Random) -> bytes:
        """The members written anew, so that only what was meant to be damaged is."""
        content = _saved(rng.choice([self._run, *self._theirs]))
        if rng.random() < 0.2:
            return damaged(content, rng)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [[info.filename, archive.read(info)] for info in archive.infolist()]
        pickled = next(member for member in members if member[0].endswith("data.pkl"))
        match rng.randrange(6):
            case 0 | 1:
                pickled[1] = damaged_pickle(pickled[1], rng, self._canary)
            case 2:
                pickled[1] = damaged(pickled[1], rng)
            case 3:
                pickled[1] = random_pickle(rng, self._canary)
            case 4:
                chosen = rng.choice(members)
                chosen[rng.randrange(2)] = rng.choice(members)[0] if rng.random() < 0.3 else ""
                if isinstance(chosen[1], str):
                    chosen[1] = rng.randbytes(rng.choice((0, 1, 4, 400)))
            case _:
                chosen = rng.choice(members)
                chosen[1] = damaged(chosen[1], rng)
        buffer = io.BytesIO()
        compression = rng.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))
        with zipfile.ZipFile(buffer, "w", compression) as archive:
            for name, body in members:
                archive.writestr(zipfile.ZipInfo(name or "x"), body, compression)
        content = buffer.getvalue()
        return damaged(content, rng) if rng.random() < 0.1 else content

    def _values(self, rng: Random) -> bytes:
        """A sound file that holds something else than it should at one or two places."""
        content: Any = pickle.loads(pickle.dumps(rng.choice([self._run, *self._theirs])))
        for _ in range(rng.choice((1, 1, 2))):
            node = content
            while True:
                key = rng.choice([*node.keys()]) if isinstance(node, dict) else 0
                inner = node[key]
                if not isinstance(inner, dict) or not inner or rng.random() < 0.2:
                    break
                node = inner
            match rng.randrange(4):
                case 0:
                    del node[key]
                case 1:
                    node[rng.choice(_KEYS)] = _value(rng)
                case _:
                    node[key] = _value(rng)
            if not content:
                break
        return _saved(content)

    def _legacy(self, rng: Random) -> bytes:
        content = _saved(rng.choice(self._theirs), zipped=False)
        pickles = []
        file = io.BytesIO(content)
        for _ in range(5):
            start = file.tell()
            _skip(file)
            pickles.append(content[start : file.tell()])
        at = rng.randrange(5)
        pickles[at] = damaged_pickle(pickles[at], rng, self._canary)
        return b"".join(pickles) + content[file.tell() :]

    def _safetensors(self, rng: Random) -> tuple[str, bytes]:
        if find_spec("safetensors") is None:
            return "pt", random_pickle(rng, self._canary)
        from safetensors.torch import save

        content = save(dict(self._theirs[0]))
        (length,) = struct.unpack("<Q", content[:8])
        header = content[8 : 8 + length]
        if rng.random() < 0.5:
            header = header.replace(b"[0,", f"[{number(rng)},".encode(), 1)
            header = header.replace(b'"F32"', rng.choice((b'"F64"', b'"BF16"', b'"X"', b"1")), 1)
            return "safetensors", struct.pack("<Q", len(header)) + header + content[8 + length :]
        return "safetensors", damaged(content, rng)

    def read(self) -> None:
        errors = []
        for read in (self._resume, self._load_weights, load_run):
            try:
                read(self.file)
            except UserError as error:
                errors.append(error)
        if len(errors) == 3:
            raise errors[0]

    def _resume(self, path: Path) -> None:
        """What a run does with its own checkpoint."""
        state = self._fresh()
        state.load_state_dict(checkpoint.load(path)["state"])
        for parameter in state.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        state.optimizer.step()
        assert state.epoch >= 0
        assert state.train_seconds >= 0

    def _load_weights(self, path: Path) -> None:
        model = models.build("small_cnn", width=1, depth=None, classes=10, shape=(1, 8, 8))
        load_weights(model, path)


def _saved(content: object, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _skip(file: io.BytesIO) -> None:
    for _ in pickletools.genops(file):
        pass


def _value(rng: Random) -> Any:
    shared: Any = 0
    for _ in range(12):
        shared = [shared] * 10
    wide = torch.zeros(1).expand(10**6, 10**6)
    return rng.choice((
        None, True, 0, -1, 1.5, float("nan"), float("inf"), "", "x" * 5000, "${oc.env:HOME}",
        number(rng), -number(rng), 10**400, [], {}, (), [1, 2], {"a": 1}, {1: 2}, {(): ()},
        {None: 1}, {"name": "trades"}, {"_target_": "os.system"}, b"bytes", {1, 2}, shared,
        wide,
        torch.zeros(0), torch.zeros(3), torch.zeros(2, 2, dtype=torch.long),
        torch.zeros(1, dtype=torch.bool), torch.zeros(3, dtype=torch.complex64),
        torch.full((10,), float("nan")), torch.zeros(5)[::2],
        torch.zeros(10, dtype=torch.float16), torch.zeros(2).to_sparse(),
        torch.zeros(5, device="meta"), torch.nn.Parameter(torch.zeros(2)), torch.Size([1]),
        torch.float32, torch.device("cuda:7"),
    ))  # fmt: skip
