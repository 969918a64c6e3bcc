"""Starts `main` of a module in a process that is forked from one that has imported everything.

It does what a command of its own does, seconds sooner: imports are most of a short command's time.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["softpref.training.align", "softpref.training.sft", "softpref.study.study",
     "softpref.judging.judge", "tests.distributed.work", "tests.study.test_study"]
)  # fmt: skip


class Forked:
    """A started process; what it writes to stdout and stderr is in `said`."""

    def __init__(
        self,
        module: str,
        *arguments: str,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._log = tempfile.NamedTemporaryFile("r", prefix="softpref-test-")  # noqa: SIM115
        environment = os.environ | (variables or {})
        self._process = CONTEXT.Process(
            target=_run, args=(module, arguments, str(cwd or Path.cwd()), environment,
                               self._log.name)
        )  # fmt: skip
        self._process.start()
        self.pid = self._process.pid

    @property
    def said(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self.said, None


def _run(module: str, arguments: tuple[str, ...], cwd: str, environment: dict[str, str],
         log: str) -> None:  # fmt: skip
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(cwd)
    sys.argv = [module, *arguments]
    importlib.import_module(module).main()
