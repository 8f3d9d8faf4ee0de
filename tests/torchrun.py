"""Starting commands on several processes: by torchrun itself, or by forks of what torch is in.

A process that imports torch and btrain takes two seconds of a core, and `torchrun` starts three
for two. `forked` hands a function to torchrun's own agent in a process that has imported all of it,
computed nothing, and forks: the same supervision, signals and exit statuses for no start.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--no-python"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
PRELOADED = ["torch._dynamo", "torch.distributed.run", "torch.distributed.nn.functional",
             "torch.utils.flop_counter", "hydra.main", "hydra._internal.hydra",
             "hydra.core.override_parser.overrides_parser", "omegaconf.grammar_parser",
             "tqdm.contrib.logging", "btrain.cli", "btrain.training",
             "btrain.data.digits", "pytest"]  # fmt: skip
"""`pytest` as it is the main module of who starts."""


def torchrun(processes: int, *command: str, **how: Any) -> subprocess.Popen[str]:
    start = [*TORCHRUN, "--standalone", f"--nproc-per-node={processes}", sys.executable]
    return subprocess.Popen([*start, *command], text=True, env=ENVIRONMENT, **how)


def in_a_fork(work: Callable[..., None], *args: Any, said: Path) -> ForkServerProcess:
    """Start a function of a module in a process of its own that has imported all it needs.

    It runs in the working directory of now, and what it prints is added to the file.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_speaking_to, args=(said, work, *args))
    process.start()
    return process


def launched(processes: int, work: Callable[..., None], *args: Any) -> None:
    """Do the same in so many forks of this process, under torchrun's agent; end as torchrun does.

    Raises:
        SystemExit: one has failed.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=0, start_method="fork",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=str(os.getpid()),
    )  # fmt: skip
    try:
        elastic_launch(config, _finished)(work, *args)
    except ChildFailedError as failed:
        raise SystemExit(1) from failed


def forked(processes: int, *arguments: str, said: Path) -> ForkServerProcess:
    """Start the command `btrain …` on so many processes, as torchrun does."""
    return in_a_fork(launched, processes, command, arguments, said=said)


def command(arguments: tuple[str, ...]) -> None:
    """Run `btrain …` to the end of this process."""
    from btrain.cli import run_command

    sys.argv = ["btrain", *arguments]
    run_command()


def with_forked_jobs(arguments: tuple[str, ...]) -> None:
    """Run `btrain …` in a session of its own; joblib's jobs need not import torch anew either."""
    from joblib.externals.loky.backend import context

    os.setsid()
    context.set_start_method("fork")
    command(arguments)


def unasked_for(arguments: tuple[str, ...]) -> None:
    """Do the same without the signal that torch asks for at the end of an agent that has forked.

    Linux sends it then, and not to the commands that torchrun starts.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
    command(arguments)


def unasked_for_in_python(arguments: tuple[str, ...]) -> None:
    """Do the same by btrain's function, as a program of the user's would."""
    from btrain.settings.compose import compose
    from btrain.training import train

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
    train(compose(arguments[1:]))


_PR_SET_PDEATHSIG = 1


def _speaking_to(said: Path, work: Callable[..., None], *args: Any) -> None:
    with said.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    work(*args)


def _finished(work: Callable[..., None], *args: Any) -> bool:
    """Do the work; the agent waits for a value of each process that does not fail."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the agent's, which come with the fork
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work(*args)
    except SystemExit as end:
        if end.code:
            raise
    return True
