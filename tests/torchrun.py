"""Starting commands on several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--no-python"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def torchrun(processes: int, *command: str, **how: Any) -> subprocess.Popen[str]:
    start = [*TORCHRUN, "--standalone", f"--nproc-per-node={processes}", sys.executable]
    return subprocess.Popen([*start, *command], text=True, env=ENVIRONMENT, **how)
