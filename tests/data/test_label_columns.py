"""Columns that say more of a label than one bit: read where asked for, in every format."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softpref.columns import LABEL_NUMBERS, STANDARD, Columns
from softpref.data.label_columns import is_tie, labelled, read_label_columns, ties
from softpref.data.readers import RowError
from softpref.data.sources import load_pairs, subset
from softpref.data.splits import hold_out_clean, without_ties
from softpref.errors import UsageError
from softpref.training.output import write_lines

TRAINING = STANDARD.of_training()
ALL = Columns(optional=LABEL_NUMBERS)


def rows(count: int, **columns) -> list[dict]:
    """Rows with one value of each column by row, or one for all."""
    return [
        {"prompt": f"p{n}", "chosen": f"c{n}", "rejected": f"r{n}"}
        | {name: of[n] if isinstance(of, list) else of for name, of in columns.items()}
        for n in range(count)
    ]


def jsonl(path: Path, given: list[dict]) -> str:
    write_lines(path, given)
    return str(path)


def test_the_same_numbers_in_every_format(tmp_path):
    given = rows(3, weight=[0, 1, 2.5], margin=[0.0, 0.5, 7.0], votes_for=[0, 3, 12])
    given = [row | {"score_chosen": -1.5 * n, "label": "tie"} for n, row in enumerate(given)]
    jsonl(tmp_path / "p.jsonl", given)
    (tmp_path / "p.json").write_text(json.dumps(given))
    pq.write_table(pa.Table.from_pylist(given), tmp_path / "p.parquet")
    (tmp_path / "p.csv").write_text(
        "prompt,chosen,rejected,weight,margin,votes_for,score_chosen,label\n"
        "p0,c0,r0,0,0.0,0,-0.0,tie\np1,c1,r1,1,0.5,3,-1.5,Tie\np2,c2,r2,2.5,7,12.0,-3e0, TIE \n"
    )
    sources = [str(tmp_path / f"p.{end}") for end in ("jsonl", "json", "parquet", "csv")]
    for source in (*sources, datasets.Dataset.from_list(given)):
        pairs = load_pairs(source, columns=ALL).pairs
        for name in ("weight", "margin", "votes_for", "score_chosen", "label"):
            assert pairs[name][:] == [row[name] for row in given]
        assert pairs.features["weight"] == datasets.Value("float64")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("weight", -1e-9, "weight is not a finite number of at least 0"),
        ("weight", float("inf"), "weight is not a finite"),
        ("weight", float("nan"), "weight is not a finite"),
        ("weight", True, "weight is not a finite"),
        ("weight", "heavy", "weight is not a finite"),
        ("weight", [1], "weight is not a finite"),
        ("weight", 10**400, "weight is not a finite"),
        ("margin", -0.5, "margin is not a finite number of at least 0"),
        ("margin", "1e999", "margin is not a finite"),
        ("score_chosen", float("-inf"), "score_chosen is not a finite number"),
        ("score_rejected", {"a": 1}, "score_rejected is not a finite number"),
        ("votes_for", 1.5, "votes_for is not a whole number of at least 0"),
        ("votes_against", -1, "votes_against is not a whole number of at least 0"),
        ("votes_against", False, "votes_against is not a whole"),
    ],
)
def test_numbers_out_of_range_make_a_bad_row_where_they_are_read(name, value, reason):
    with pytest.raises(RowError, match=reason):
        read_label_columns({name: value}, ALL)
    assert read_label_columns({name: value}, STANDARD) == {}


@pytest.mark.parametrize("absent", [None, "", "  "])
def test_an_empty_cell_is_no_number(absent):
    assert read_label_columns({"weight": absent}, ALL) == {}


def test_weights_are_in_all_rows_or_in_none(tmp_path):
    given = rows(4, weight=[1, None, 2, None])
    with pytest.raises(UsageError, match="the row has text, the rows before it text and weight"):
        load_pairs(jsonl(tmp_path / "p.jsonl", given), columns=TRAINING)
    assert len(load_pairs(str(tmp_path / "p.jsonl")).pairs) == 4  # where they are not read


def test_what_is_not_asked_for_is_listed_as_unread(tmp_path, caplog):
    caplog.set_level("INFO")
    given = rows(2, weight=1, margin="wide", score_chosen="A", votes_for=-1, label="good")
    source = jsonl(tmp_path / "p.jsonl", given)
    plain = load_pairs(jsonl(tmp_path / "q.jsonl", rows(2)))
    loaded = load_pairs(source)
    assert loaded.fingerprint == plain.fingerprint
    assert loaded.pairs.column_names == plain.pairs.column_names
    unread = "columns that were not read: weight, margin, score_chosen, votes_for, label"
    assert unread in caplog.text
    caplog.clear()
    load_pairs(jsonl(tmp_path / "r.jsonl", rows(2, weight=2, score_chosen=1)), columns=TRAINING)
    assert "not read: score_chosen\n" in caplog.text


def test_labels_beside_ties_that_are_not_read_are_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    labels = ["tie", "rejected", "", None, float("nan"), 0, "rejected", "chosen", "A", "B"]
    source = jsonl(tmp_path / "p.jsonl", rows(10, label=labels))
    load_pairs(source)
    said = "6 values other than a tie, such as 'rejected', '0', 'chosen', were not read"
    assert f"{source}: label: {said}" in caplog.text
    assert "columns that were not read" not in caplog.text
    caplog.clear()
    load_pairs(jsonl(tmp_path / "q.jsonl", rows(2, label=["tie", ""])))
    assert "not read" not in caplog.text


def test_weights_and_ties_are_part_of_the_fingerprint(tmp_path):
    def fingerprint(**columns):
        return load_pairs(jsonl(tmp_path / "p.jsonl", rows(2, **columns)), columns=ALL).fingerprint

    found = [fingerprint(), fingerprint(weight=1), fingerprint(weight=2), fingerprint(label="tie")]
    assert len(set(found)) == 4
    assert fingerprint(label="other") == found[0]


@pytest.mark.parametrize(
    ("source", "given"),
    [("votes", {"votes_for": 1}), ("scores", {"score_chosen": 1, "score_rejected": None})],
)
def test_columns_that_were_asked_for_are_in_every_row(tmp_path, source, given):
    path = jsonl(tmp_path / "p.jsonl", rows(3, **given))
    missing = "votes_against" if source == "votes" else "score_rejected"
    with pytest.raises(UsageError) as caught:
        load_pairs(path, columns=STANDARD.of_training(source))
    text = str(caught.value)
    assert f"line 1: has no {missing}, which --soft_label_from {source} reads" in text
    assert "(and 2 more like it). Fix them." in text
    assert "--prompt_column" not in text


def test_a_later_row_may_be_the_first_tie(tmp_path):
    given = rows(5)
    given[3]["label"], given[1]["label"] = "TIE", "chosen"
    loaded = load_pairs(jsonl(tmp_path / "p.jsonl", given))
    assert ties(loaded.pairs) == [False, False, False, True, False]
    assert [is_tie(pair) for pair in loaded.pairs] == ties(loaded.pairs)
    assert labelled(loaded.pairs)["prompt"][:] == ["p0", "p1", "p2", "p4"]
    messages = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "label": row.get("label")}
        | {s: [{"role": "assistant", "content": row[s]}] for s in ("chosen", "rejected")}
        for row in given
    ]
    assert ties(load_pairs(messages, argument="rows").pairs) == ties(loaded.pairs)


def test_a_column_of_texts_that_is_called_label_is_a_response(tmp_path):
    given = [{"prompt": "p", "label": "tie", "rejected": "bow"}]
    loaded = load_pairs(jsonl(tmp_path / "p.jsonl", given), columns=Columns(chosen="label"))
    assert not any(ties(loaded.pairs))


def test_subsets_keep_the_columns(tmp_path):
    given = rows(6, weight=[1, 2, 3, 4, 5, 6], label=["tie", "", "tie", "", "", ""])
    loaded = load_pairs(jsonl(tmp_path / "p.jsonl", given), columns=TRAINING)
    some = subset(loaded, loaded.pairs.select([2, 4]), "some").pairs
    assert some["weight"][:] == [3, 5]
    assert ties(some) == [True, False]


def test_a_subset_of_several_files_keeps_their_names_where_one_is_left(tmp_path, caplog):
    paths = [
        jsonl(tmp_path / "ties.jsonl", rows(3, label="tie")),
        jsonl(
            tmp_path / "pairs.jsonl", [row | {"prompt": f"q {n}"} for n, row in enumerate(rows(3))]
        ),
    ]
    kept = without_ties(load_pairs(paths), "and are dropped")
    assert kept.pairs["source"][:] == [paths[1]] * 3
    assert kept.fingerprints.keys() == {*paths}


def test_a_subset_equals_the_pairs_read_alone_and_repeats_no_note(tmp_path, caplog):
    given = [
        {
            "prompt": f"Question {n % 4}?",
            "chosen": f"Question {n % 4}? a",
            "rejected": f"Question {n % 4}? b",
        }
        for n in range(5)
    ] + rows(5)
    loaded = load_pairs(jsonl(tmp_path / "p.jsonl", given))
    notes = caplog.text
    assert "both responses begin with the prompt" in notes
    some = subset(loaded, loaded.pairs.select([0, 3, 4, 7]), "some")
    assert caplog.text == notes
    alone = load_pairs(jsonl(tmp_path / "q.jsonl", [given[at] for at in (0, 3, 4, 7)]))
    assert (some.duplicates, some.fingerprint) == (alone.duplicates, alone.fingerprint)
    assert some.duplicates == 1


def test_without_ties(tmp_path, caplog):
    caplog.set_level("INFO")
    given = rows(6, weight=[1, 2, 3, 4, 5, 6], label=["tie", "", "tie", "", "", ""])
    loaded = load_pairs(jsonl(tmp_path / "p.jsonl", given), columns=TRAINING)
    kept = without_ties(loaded, "and are dropped")
    assert f"{tmp_path / 'p.jsonl'}: 2 of 6 pairs are ties, and are dropped" in caplog.text
    assert kept.pairs["row"][:] == [2, 4, 5, 6]
    assert kept.pairs["weight"][:] == [2, 4, 5, 6]
    assert "label" not in kept.pairs.column_names
    assert kept.fingerprint == loaded.fingerprint
    assert without_ties(kept, "again") is kept
    with pytest.raises(UsageError, match="every pair is a tie"):
        without_ties(load_pairs(jsonl(tmp_path / "q.jsonl", rows(2, label="tie"))), "")


def test_no_tie_is_held_out_as_a_trusted_pair(tmp_path):
    given = rows(20, label=["tie" if n % 2 else "" for n in range(20)])
    pairs = load_pairs(jsonl(tmp_path / "p.jsonl", given)).pairs
    rest, clean, _ = hold_out_clean(pairs, 6, seed=0)
    assert not any(ties(clean))
    assert sum(ties(rest)) == 10
    with pytest.raises(UsageError, match="from 1 to 9 .* 10 pairs to hold out from, without ties"):
        hold_out_clean(pairs, 10, seed=0)


def test_restored_pairs_take_their_scores_and_votes_along(tmp_path):
    columns = {"score_chosen": 1, "score_rejected": 4, "votes_for": 2, "votes_against": 7}
    given = rows(8, is_flipped=[n % 2 == 0 for n in range(8)], **columns)
    pairs = load_pairs(jsonl(tmp_path / "p.jsonl", given), columns=ALL).pairs
    for pair in hold_out_clean(pairs, 7, seed=0)[1]:
        was_flipped = pair["chosen"].startswith("r")
        expected = [1, 4, 2, 7] if not was_flipped else [4, 1, 7, 2]
        assert [pair[name] for name in columns] == expected


def test_a_swap_moves_what_belongs_to_a_response():
    columns = Columns(chosen="a", rejected="b")
    scores, votes = {"score_chosen": 1, "score_rejected": 2}, {"votes_for": 3, "votes_against": 4}
    raw = {"a": "x", "b": "y", "soft_label": 0.1, "margin": 5, "weight": 6, **scores, **votes}
    swapped = columns.swapped(raw)
    assert {**swapped} == raw | {
        "a": "y",
        "b": "x",
        "soft_label": 0.9,
        **dict(zip(scores, (2, 1), strict=True)),
        **dict(zip(votes, (4, 3), strict=True)),
    }
    assert columns.swapped(swapped) == raw
    alone = {"a": "x", "b": "y", "score_chosen": 1, "soft_label": None}
    moved = {name: of for name, of in alone.items() if name != "score_chosen"}
    assert columns.swapped(alone) == moved | {"a": "y", "b": "x", "score_rejected": 1}
    assert columns.swapped(columns.swapped(alone)) == alone


def test_implied_roles_do_not_depend_on_what_else_is_read(tmp_path):
    given = [{"system": "s", "question": "q", "chosen": "c", "rejected": "r", "weight": 2}]
    source = jsonl(tmp_path / "p.jsonl", given)
    (pair,) = load_pairs(source, columns=TRAINING).pairs
    assert [turn["content"] for turn in pair["prompt"]] == ["s", "q"]
    assert pair["weight"] == 2
    (trusted,) = load_pairs(source, columns=TRAINING.beside_training()).pairs
    assert trusted["prompt"] == pair["prompt"]
    assert "weight" not in trusted
