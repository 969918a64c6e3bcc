"""Starts processes as a user does, by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SECONDS = 120
"""After which what hangs is killed."""
ROOT = Path(__file__).parents[2]


def torchrun(processes: int, module: str, *arguments: str, cwd: Path = ROOT) -> subprocess.Popen:
    """Start a module in several processes; the output goes to a pipe, both streams as one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", module]
    return subprocess.Popen(
        [*command, *arguments], cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finished(started: subprocess.Popen) -> tuple[int, str]:
    """Wait for the end; return exit code and output."""
    try:
        output, _ = started.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, 9)
        output, _ = started.communicate()
        raise AssertionError(f"it hangs:\n{output[-3000:]}") from None
    return started.returncode, output
