"""Folders of killed processes go at the next start; those of living ones, and others', stay."""

from __future__ import annotations

import gc
import os
import signal

import pyarrow as pa
import pytest

from softpref.data.books import Books
from softpref.data.readers import store
from softpref.data.temporary import OWNER, PREFIX, collect, temporary_folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    collect.cache_clear()
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
    [Books, lambda: store(iter([{"a": 1}]), pa.schema([("a", pa.int64())]))],
    ids=["books", "rows"],
)
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(home, work):
    kept = []
    child = in_child(lambda: kept.append(work()))
    before = set(home.iterdir())
    assert len(before) == 1
    mine, remove = temporary_folder()
    assert before < set(home.iterdir())
    kill(child)
    collect.cache_clear()  # as another process
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


def test_books_go_with_their_last_reference(home):
    books = Books()
    books.enter_uid("u", "s", 1)
    assert len(list(home.iterdir())) == 1
    del books
    gc.collect()
    assert list(home.iterdir()) == []
