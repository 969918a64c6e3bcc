"""What a source has shown so far, and columns that stay on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset

from softpref.data.books import Books
from softpref.data.readers import column, store


def test_uids_and_orders_are_remembered():
    books = Books()
    assert books.place_of("a") is None
    books.enter_uid("a", "p", 7)
    assert books.place_of("a") == ("p", 7)
    assert books.orders("x") == (0, 0)
    for source, ahead in (("a", True), ("b", False), ("c", True)):
        books.enter_order("x", source, ahead=ahead)
    assert (books.first_source("x", ahead=True), books.first_source("x", ahead=False)) == ("a", "b")
    assert books.orders("x") == (2, 1)
    assert books.orders("y") == (0, 0)


@pytest.mark.parametrize("uid", ["", "a\0b", "a\0c", "'; DROP TABLE uids; --", "\u202e\U0001f600"])
def test_any_text_is_a_uid(uid):
    books = Books()
    books.enter_uid("a", "p", 1)
    books.enter_uid(uid, "q", 2)
    assert (books.place_of("a"), books.place_of(uid)) == (("p", 1), ("q", 2))


def test_books_lie_in_the_temporary_directory_and_go_with_their_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    books = Books()
    books.enter_uid("a", "p", 1)
    assert [path.name for path in Path(tmp_path).rglob("*.sqlite")] == ["books.sqlite"]
    del books
    assert not list(Path(tmp_path).rglob("*"))


def test_a_column_is_read_without_copying_it_off_the_disk():
    rows = ({"x": i, "y": float(i)} for i in range(2500))
    dataset = store(rows, pa.schema([("x", pa.int64()), ("y", pa.float64())]))
    before = pa.total_allocated_bytes()
    found = column(dataset, "y")
    assert pa.total_allocated_bytes() == before
    assert found.to_pylist() == [float(i) for i in range(2500)]


def test_a_column_follows_a_selection_whatever_the_format():
    dataset = Dataset.from_dict({"x": [1, 2, 3], "y": [4, None, 6]}).with_format("torch")
    assert column(dataset.select([2, 1]), "y").to_pylist() == [6, None]
