"""Folders of killed processes go at the next start; those of living ones, and others', stay."""

from __future__ import annotations

import gc
import os
import signal
from contextlib import suppress

import psutil
import pyarrow as pa
import pytest

from softpref.data.readers import store
from softpref.data.seen_pairs import SeenPairs
from softpref.data.temporary import (
    OWNER,
    PARTIAL_FILE,
    PREFIX,
    collect_partials,
    remove_leftovers,
    replacing,
    temporary_folder,
)
from softpref.training.output import one_writer, run_directory


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    remove_leftovers.cache_clear()
    return tmp_path


def in_child(work):
    """Fork a process that does the work and waits to be killed; return its id."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        work()
        os.write(write, b".")
        signal.pause()
    os.read(read, 1)
    return child


def kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize(
    "work",
    [SeenPairs, lambda: store(iter([{"a": 1}]), pa.schema([("a", pa.int64())]))],
    ids=["seen pairs", "rows"],
)
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(home, work):
    kept = []
    child = in_child(lambda: kept.append(work()))
    before = set(home.iterdir())
    assert len(before) == 1
    mine, remove = temporary_folder()
    assert before < set(home.iterdir())
    kill(child)
    remove_leftovers.cache_clear()  # as another process
    other, remove_other = temporary_folder()
    assert {str(path) for path in home.iterdir()} == {mine, other}
    remove()
    remove_other()
    assert list(home.iterdir()) == []


def test_what_only_looks_like_it_stays(home):
    (home / f"{PREFIX}notes").mkdir()
    (home / "elsewhere").mkdir()
    (home / "elsewhere" / OWNER).write_text("")
    (home / f"{PREFIX}link").symlink_to(home / "elsewhere")
    (home / f"{PREFIX}file").write_text("mine")
    (home / f"{PREFIX}odd").mkdir()
    (home / f"{PREFIX}odd" / OWNER).symlink_to(home / "elsewhere" / OWNER)
    before = set(home.rglob("*"))
    _, remove = temporary_folder()
    remove()
    assert set(home.rglob("*")) == before


def test_seen_pairs_go_with_their_last_reference(home):
    seen = SeenPairs()
    seen.add_uid("u", "s", 1)
    assert len(list(home.iterdir())) == 1
    del seen
    gc.collect()
    assert list(home.iterdir()) == []


def begun(path):
    """Begin to write a file, and stop half-way."""
    writing = replacing(path)
    writing.__enter__().write_text("half")
    return writing


def test_a_half_written_file_of_a_killed_process_goes_and_that_of_a_living_one_stays(tmp_path):
    path, kept = tmp_path / "labels.jsonl", []
    (tmp_path / "own.partial").write_text("a user's")
    child = in_child(lambda: kept.append(begun(path)))
    (half,) = tmp_path.glob(PARTIAL_FILE)
    collect_partials(tmp_path)
    assert half.read_text() == "half"
    kill(child)
    with replacing(path) as partial:
        partial.write_text("whole")
        assert not half.exists()
    assert sorted(os.listdir(tmp_path)) == ["labels.jsonl", "own.partial"]
    assert path.read_text() == "whole"


def test_a_start_collects_what_the_last_one_left(tmp_path):
    output, kept = tmp_path / "run", []
    output.mkdir()
    kill(in_child(lambda: kept.append(begun(output / "run.json"))))
    assert list(output.glob(PARTIAL_FILE))
    with one_writer(output):
        assert run_directory(str(output), None, finished="run.json") == (output, None)
        assert list(output.iterdir()) == []


def test_a_file_is_on_disk_before_it_has_its_name_and_errors_leave_none(tmp_path, monkeypatch):
    path, synced = tmp_path / "a", []
    monkeypatch.setattr(os, "fsync", lambda d: synced.append((os.fstat(d).st_ino, path.exists())))
    with replacing(path) as partial:
        partial.write_text("whole")
    assert synced == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
    with suppress(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a"]
    assert path.read_text() == "whole"


def umask():
    os.umask(mask := os.umask(0))
    return mask


def test_many_stored_sets_keep_one_file_open(home):
    def stored(number):
        return store(iter([{"a": number}]), pa.schema([("a", pa.int64())]))

    first = stored(0)
    before = psutil.Process().num_fds()
    sets = [first, *(stored(number) for number in range(1, 9))]
    assert psutil.Process().num_fds() == before
    assert [of["a"][:] for of in sets] == [[number] for number in range(9)]
    assert len(list(home.iterdir())) == 1
