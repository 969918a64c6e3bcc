"""Starts processes that share their work.

By torchrun, as a user does, or forked, which differs in nothing but the launcher and is sooner.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.forked import Forked
from tests.progress import POLL, Progress

ROOT = Path(__file__).parents[2]


def torchrun(processes: int, module: str, *arguments: str, cwd: Path = ROOT) -> subprocess.Popen:
    """Start a module in several processes; the output goes to a pipe, both streams as one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", module]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*command, *arguments], cwd=cwd, env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def together(processes: int, module: str, *arguments: str, cwd: Path = ROOT) -> tuple[int, str]:
    """Run a module's `main` in several processes; return the worst exit code and the output.

    Raises:
        AssertionError: one hangs; all were killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = [
        Forked(module, *arguments, cwd=cwd, variables={
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        })
        for rank in range(processes)
    ]  # fmt: skip
    watched = [Progress(one.pid) for one in started]
    why, last = "", time.monotonic()
    while not why and any(one.poll() is None for one in started):
        time.sleep(0.05)
        if any(one.poll() for one in started):
            break  # the others wait for it
        if time.monotonic() > last + POLL:
            last = time.monotonic()
            why = "".join(
                progress.hang()
                for one, progress in zip(started, watched, strict=True)
                if one.poll() is None
            )
    for one in started:
        one.kill()
        one.communicate()
    said = "".join(one.said for one in started)
    assert not why, f"{why}\n{said[-3000:]}"
    return max(abs(one.returncode) for one in started), said
