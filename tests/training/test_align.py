"""What a run records of its files, and how `--clean` is read."""

from __future__ import annotations

import pytest

from softpref.training.align import AlignFiles, _located_files
from softpref.training.sets import held_out_count


def test_a_column_is_no_path_even_where_a_folder_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("chosen", "sft"):
        (tmp_path / name).mkdir()
    files = AlignFiles(model="sft", train=["org/pairs"], output="run")
    found = _located_files(files)
    assert (found["chosen_column"], found["model"]) == ("chosen", str(tmp_path / "sft"))
    assert (found["train"], found["output"]) == ("org/pairs", "run")


@pytest.mark.parametrize(
    ("clean", "count"),
    [
        ("150", 150),
        (150, 150),
        ("-5", -5),
        ("--5", None),
        ("²", None),
        ("5.jsonl", None),
        (None, None),
    ],
)
def test_trusted_pairs_are_held_out_by_a_number(clean, count):
    assert held_out_count(clean) == count
