"""Several processes share one study: each run is done once, and what a dead one held is done."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path

import pytest

from softpref.errors import UsageError
from softpref.study.claims import claimed
from tests.forked import Forked
from tests.progress import finished, wait_for

CELLS = 8


def start(output: Path, seconds: float, together: int = 1) -> Forked:
    return Forked("tests.study.claimant", str(output), str(seconds), str(together))


def ran(output: Path) -> list[str]:
    log = output / "log"
    return log.read_text().split() if log.is_file() else []


def test_of_two_claimants_one_gets_it(tmp_path):
    with claimed(tmp_path, "cell") as first, claimed(tmp_path, "cell") as second:
        assert first
        assert not second
        with claimed(tmp_path, "other") as other:
            assert other
    with claimed(tmp_path, "cell") as again:
        assert again


@pytest.mark.parametrize(
    ("number", "refusal", "words"),
    [
        (errno.ENOLCK, UsageError, "its file system has no locks"),
        (errno.EROFS, OSError, "Read-only"),
    ],
)
def test_only_missing_locks_are_called_that(number, refusal, words, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.raises(refusal, match=words), claimed(tmp_path, "x"):
        pass


def test_three_processes_do_every_run_once_and_the_table_holds_all(tmp_path):
    started = [start(tmp_path, 0.1, together=3) for _ in range(3)]
    codes, said = zip(*map(finished, started), strict=True)
    assert codes == (0, 0, 0), said
    assert sorted(ran(tmp_path)) == sorted(set(ran(tmp_path)))
    assert len(ran(tmp_path)) == CELLS
    assert len(json.loads((tmp_path / "table1.json").read_text())["cells"]) == CELLS
    assert sum("other processes are running" in words for words in said) >= 1


def test_what_a_dead_process_had_claimed_is_taken_over(tmp_path):
    dead = start(tmp_path, 60)
    wait_for(lambda: ran(tmp_path), dead)
    os.kill(dead.pid, signal.SIGKILL)  # its worker ends with it
    dead.communicate()
    held = ran(tmp_path)[0]
    time.sleep(1)
    other = start(tmp_path, 0)
    code, said = finished(other)
    assert code == 0, said
    assert ran(tmp_path).count(held) == 2
    assert len(json.loads((tmp_path / "table1.json").read_text())["cells"]) == CELLS


def test_a_lock_that_would_outlive_its_process_is_no_claim(tmp_path, monkeypatch):
    """Where flock is missing filelock falls back to files that stay when their owner dies."""

    def missing(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", missing)
    with pytest.raises(UsageError, match="its file system has no locks"), claimed(tmp_path, "x"):
        pass
