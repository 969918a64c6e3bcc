"""What a source has shown so far, and columns that stay on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset

from softpref.data.readers import column, store
from softpref.data.seen_pairs import SeenPairs


def test_uids_and_orders_are_remembered():
    seen = SeenPairs()
    assert seen.place_of("a") is None
    seen.add_uid("a", "p", 7)
    assert seen.place_of("a") == ("p", 7)
    assert seen.orders("x") == (0, 0)
    for source, ahead in (("a", True), ("b", False), ("c", True)):
        seen.add_order("x", source, is_sorted=ahead)
    assert seen.first_source("x", is_sorted=True) == "a"
    assert seen.first_source("x", is_sorted=False) == "b"
    assert seen.orders("x") == (2, 1)
    assert seen.orders("y") == (0, 0)


@pytest.mark.parametrize("uid", ["", "a\0b", "a\0c", "'; DROP TABLE uids; --", "\u202e\U0001f600"])
def test_any_text_is_a_uid(uid):
    seen = SeenPairs()
    seen.add_uid("a", "p", 1)
    seen.add_uid(uid, "q", 2)
    assert (seen.place_of("a"), seen.place_of(uid)) == (("p", 1), ("q", 2))


def test_the_database_lives_in_the_temporary_directory_as_long_as_its_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = SeenPairs()
    seen.add_uid("a", "p", 1)
    assert [path.name for path in Path(tmp_path).rglob("*.sqlite")] == ["pairs.sqlite"]
    del seen
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
