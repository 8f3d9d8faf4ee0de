"""A run with the real wandb and a server on this machine that goes away under way."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from btrain.runs import tracking
from torchrun import command, in_a_fork

KEY = "0123456789abcdef" * 2 + "01234567"
TINY = [
    "dataset=digits", "dataset.train_examples=64", "dataset.test_examples=20", "model=small_cnn",
    "model.width=2", "bt=uniform", "attack.steps=1", "train.epochs=2", "device=cpu",
]  # fmt: skip
# What wandb asks for when a run begins, by the name of the query.
ANSWERS: dict[str, Any] = {
    "Viewer": {
        "viewer": {"id": "v", "entity": "me", "flags": "{}", "teams": {"edges": []}},
    },
    "UpsertBucket": {
        "upsertBucket": {
            "bucket": {
                "id": "b",
                "name": "run",
                "displayName": "run",
                "config": "{}",
                "project": {"id": "p", "name": "btrain", "entity": {"id": "e", "name": "me"}},
            },
            "inserted": True,
        }
    },
}


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """Lets a run begin; with its first numbers it is gone."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != "/graphql":
                here.shutdown()
                here.server_close()
                return
            query = json.loads(body).get("operationName")
            answer = json.dumps({"data": ANSWERS.get(query, {})}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    here = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here.daemon_threads = True
    Thread(target=here.serve_forever, daemon=True).start()
    yield here
    here.shutdown()
    here.server_close()


def test_a_server_that_is_gone_at_the_end_does_not_keep_the_run(
    tmp_path: Path, server: ThreadingHTTPServer
) -> None:
    place = {
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
        "WANDB_API_KEY": KEY,
        "WANDB_CONFIG_DIR": str(tmp_path / "settings"),
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
    }
    said = tmp_path / "said"
    words = ("train", *TINY, "logger=wandb", f"run.dir={tmp_path / 'run'}")
    process = in_a_fork(impatient, place, words, said=said)
    process.join(300)
    told = said.read_text()
    assert process.exitcode == 0, told
    assert server.fileno() == -1  # it was there and went away
    assert told.count("logger=wandb failed (Timed out") == 1, told
    assert (tmp_path / "run" / "train.log").read_text().count("logger=wandb failed") == 1
    assert "Traceback" not in told
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text())["epochs"] == 2
    assert [*run.glob("wandb/run-*/*.wandb")], "nothing is left to be synced"
    for file in run.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
    assert KEY not in told


def impatient(variables: dict[str, str], arguments: tuple[str, ...]) -> None:
    """Run `btrain …` with these variables; it waits for wandb's end for two seconds."""
    os.environ.update(variables)
    os.environ.pop("WANDB_SERVICE", None)  # of another test in this process
    tracking.FINISH_SECONDS = 2.0
    command(arguments)
