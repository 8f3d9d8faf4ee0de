"""A run with the real wandb and a server on this machine that goes away under way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

KEY = "0123456789abcdef" * 2 + "01234567"
TINY = [
    "dataset=digits", "dataset.train_examples=64", "dataset.test_examples=20", "model=small_cnn",
    "model.width=2", "bt=uniform", "attack.steps=1", "train.epochs=2", "device=cpu",
]  # fmt: skip
IMPATIENT = """
import sys
from btrain import cli
from btrain.runs import tracking
tracking.FINISH_SECONDS = 2.0
sys.exit(cli.main(sys.argv[1:]))
"""
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: ThreadingHTTPServer
) -> None:
    place = {
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
        "WANDB_API_KEY": KEY,
        "WANDB_CONFIG_DIR": str(tmp_path / "settings"),
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
    }
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # of another test in this process
    result = subprocess.run(
        [sys.executable, "-c", IMPATIENT, "train", *TINY, "logger=wandb", "run.dir=run"],
        cwd=tmp_path,
        env={**os.environ, **place},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert server.fileno() == -1  # it was there and went away
    assert result.stderr.count("logger=wandb failed (Timed out") == 1, result.stderr
    assert (tmp_path / "run" / "train.log").read_text().count("logger=wandb failed") == 1
    assert "Traceback" not in result.stderr
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text())["epochs"] == 2
    assert [*run.glob("wandb/run-*/*.wandb")], "nothing is left to be synced"
    for file in run.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
    assert KEY not in result.stdout + result.stderr
