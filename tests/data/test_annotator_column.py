"""The column `annotator`: who labelled a pair."""

from __future__ import annotations

import json

import pandas
import pytest

from softpref.data.readers import dataset_rows
from softpref.data.sources import load_pairs, subset
from softpref.errors import UsageError
from softpref.training.output import write_lines


def numbered(count, **more):
    return [
        {"prompt": f"p{n}", "chosen": f"c{n}", "rejected": f"r{n}", **more} for n in range(count)
    ]


def test_text_and_integers_are_names_and_empty_ones_are_unknown(tmp_path):
    given = ["ann", 7, None, "", "  ", " bob ", "7"]
    rows = [row | {"annotator": name} for row, name in zip(numbered(7), given, strict=True)]
    del rows[2]["annotator"]
    write_lines(tmp_path / "a.jsonl", rows)
    expected = ["ann", "7", None, None, None, "bob", "7"]
    loaded = load_pairs(str(tmp_path / "a.jsonl"))
    assert loaded.pairs["annotator"][:] == expected
    assert subset(loaded, loaded.pairs, "again").pairs["annotator"][:] == expected
    frame = pandas.DataFrame({**pandas.DataFrame(numbered(2)), "annotator": ["ann", None]})
    assert load_pairs(frame).pairs["annotator"][:] == ["ann", None]
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,annotator\np,c,r,\nq,c,r,5\n")
    assert load_pairs(str(tmp_path / "a.csv")).pairs["annotator"][:] == [None, "5"]
    frame = pandas.DataFrame({**pandas.DataFrame(numbered(3)), "annotator": [5, None, 1.5]})
    frame.to_csv(tmp_path / "b.csv", index=False)
    assert load_pairs(str(tmp_path / "b.csv")).pairs["annotator"][:] == ["5", None, "1.5"]


def test_without_names_there_is_no_column_and_the_same_fingerprint(tmp_path):
    plain = load_pairs(numbered(3))
    for nobody in (None, "", " "):
        loaded = load_pairs(numbered(3, annotator=nobody))
        assert "annotator" not in loaded.pairs.column_names
        assert loaded.fingerprint == plain.fingerprint
    assert load_pairs(numbered(3, annotator="a")).fingerprint != plain.fingerprint


def test_files_without_names_can_be_read_with_files_that_have_them(tmp_path):
    write_lines(tmp_path / "a.jsonl", numbered(2))
    write_lines(tmp_path / "b.jsonl", [row | {"prompt": "q"} for row in numbered(2, annotator=3)])
    for files, expected in ((("a", "b"), [None, None, "3", "3"]), ("ba", ["3", "3", None, None])):
        loaded = load_pairs([str(tmp_path / f"{name}.jsonl") for name in files])
        assert loaded.pairs["annotator"][:] == expected
    messages = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "c"}]
    row = {"prompt": messages[0], "chosen": messages[1]}
    row |= {"rejected": [{"role": "assistant", "content": "r"}], "annotator": "ann"}
    assert next(dataset_rows(load_pairs([row]).pairs))["annotator"] == "ann"


@pytest.mark.parametrize("name", [True, 1.5, ["ann"], {"id": 1}])
def test_other_names_are_refused_with_the_remedy(tmp_path, name):
    (tmp_path / "a.jsonl").write_text(json.dumps(numbered(1)[0] | {"annotator": name}) + "\n")
    with pytest.raises(UsageError, match="line 1: annotator is neither text nor an integer: write"):
        load_pairs(str(tmp_path / "a.jsonl"))
