"""Rows in the shapes that other people's data have: read in one way, or refused."""

from __future__ import annotations

import json
import logging
import sys
from datetime import date

import numpy as np
import pandas
import pytest

from softpref.columns import Columns
from softpref.data import parsing
from softpref.data.bad_rows import place
from softpref.data.messages import as_text, texts_of
from softpref.data.parsing import parse_pair, unread_columns
from softpref.data.readers import RowError
from softpref.data.sources import load_pairs
from softpref.errors import UsageError

CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "dog"}}}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {}}}]


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


CHAT = {"prompt": [user("q?")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}


def read(row, columns=parsing.STANDARD):
    parsed = parse_pair(row, columns)
    return tuple(parsed.fields[name] for name in ("prompt", "chosen", "rejected")), parsed.notes


def refused(row, words, columns=parsing.STANDARD):
    with pytest.raises(RowError, match=words):
        parse_pair(row, columns)


def written(tmp_path, rows):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_all_that_a_template_reads_is_kept(tmp_path):
    row = {
        "prompt": [
            user("find it", name="ann"),
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "here", "tool_call_id": "1"},
            user([{"type": "text", "text": "and"}, {"type": "text", "text": " then?"}]),
        ],
        "chosen": [assistant("yes", reasoning_content="so")],
        "rejected": [assistant("yes", reasoning_content="hm")],
        "tools": TOOLS,
        "chat_template_kwargs": {"enable_thinking": True},
    }
    others = {"prompt": [user("x")], "chosen": CHAT["chosen"], "rejected": CHAT["rejected"]}
    pairs = load_pairs(written(tmp_path, [others, row])).pairs
    for name, value in row.items():
        assert pairs[1][name] == value, name
    assert pairs[0]["tools"] is None
    same = {**row, "tools": json.dumps(TOOLS)}
    other = {**row, "tools": None}
    uids = [load_pairs(written(tmp_path, [r])).pairs["uid"][0] for r in (row, same, other)]
    assert uids[0] == uids[1] == pairs[1]["uid"] != uids[2]


def test_nulls_that_a_table_fills_in_are_absent():
    filled = {**CHAT, "prompt": [user("q?", tool_calls=None, name=None)]}
    assert read(filled) == read(CHAT)


def test_a_tree_too_deep_to_be_read_is_a_bad_row():
    tree = {}
    for _ in range(sys.getrecursionlimit()):
        tree = {"a": tree}
    refused(CHAT | {"tools": [tree]}, "tools is nested too deeply")
    refused(CHAT | {"prompt": [user("q?", tool_calls=[tree])]}, "prompt is nested too deeply")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": [user([{"type": "image"}])]}, "part of type 'image': softpref reads text only"),
        ({"images": ["a.png"]}, "it has images"),
        ({"prompt": [{"role": "user"}]}, "message without content"),
        ({"prompt": [user(7)]}, "content is not text"),
        ({"chosen": [assistant("a", reasoning_content={"x": 1})]}, "reasoning_content is not text"),
        ({"chosen": [assistant("a", reasoning_content=[{"type": "thinking", "thinking": "x"}])]},
         "chosen has a part of type 'thinking'"),
        ({"chosen": [assistant("a", reasoning_content=[{"type": "text", "text": 1}])]},
         "chosen has a part of type 'text'"),
        ({"tools": "[1"}, "tools is text, but not JSON"),
        ({"tools": {"a": 1}}, "tools is not a list"),
        ({"chat_template_kwargs": {"tokenize": False}}, "may not set tokenize"),
        ({"chosen": [user("q?"), assistant("yes")]}, "one of the responses repeats the prompt"),
        ({"prompt": "else", "chosen": [user("q?"), assistant("yes")],
          "rejected": [user("q?"), assistant("no")]}, "not among the messages before the"),
    ],
)  # fmt: skip
def test_messages_that_are_refused(change, words):
    refused(CHAT | change, words)


def test_a_prompt_in_the_responses_too_is_read_once():
    doubled = CHAT | {side: CHAT["prompt"] + CHAT[side] for side in ("chosen", "rejected")}
    assert read(doubled) == (read(CHAT)[0], (parsing.REPEATED,))


HALF = json.dumps([{"role": "user", "content": "caf\ud83d"}])
NOT_JSON = "cannot be written as JSON .Object of type {} is not JSON serializable.: make it text"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": [user("q?", at=date(2024, 1, 2))]}, "^q " + NOT_JSON.format("date")),
        ({"q": [user("q?", raw=b"x")]}, "^q " + NOT_JSON.format("bytes")),
        ({"chosen": [assistant("a", n=np.float32(1))]}, "^chosen " + NOT_JSON.format("float32")),
        ({"q": HALF}, "^q has half of a surrogate pair"),
        ({"tools": '[{"name": "\\ud83d"}]'}, "^tools has half of a surrogate pair"),
        ({"uid": "\ud83d"}, "^uid has half of a surrogate pair"),
    ],
)
def test_what_json_cannot_hold_is_named_by_its_column(change, words):
    row = {"q": CHAT["prompt"], "chosen": CHAT["chosen"], "rejected": CHAT["rejected"]}
    refused(row | change, words, Columns(prompt="q"))


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("prompt", "repeated"),
    [
        ([SYSTEM, user("q?")], [user("q?")]),
        ([user("q?")], [SYSTEM, user("q?")]),
        ([user("q?")], [user("q? ")]),
        ([user("q?")], [{"role": "developer", "content": "Be brief."}]),
        ([SYSTEM], [SYSTEM, user("q?")]),
    ],
)
def test_a_prompt_that_is_repeated_in_part_is_refused(prompt, repeated):
    row = {side: repeated + CHAT[side] for side in ("chosen", "rejected")}
    refused({"prompt": prompt, **row}, "begins with a user's or system message: give the assista")
    assert read(row)[0] == (repeated, CHAT["chosen"], CHAT["rejected"])


def test_a_response_may_begin_with_a_tools_answer_and_go_on_after_the_user():
    def turns(answer):
        called = [{"role": "tool", "content": "7"}, assistant("so")]
        return [*called, user("and?"), assistant(answer)]

    prompt = [user("q?"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    row = {"prompt": prompt, "chosen": turns("a"), "rejected": turns("b")}
    assert read(row) == ((prompt, turns("a"), turns("b")), ())


def test_a_text_prompt_in_nearly_all_responses_is_refused(tmp_path, caplog):
    def row(n, lead=""):
        return {"prompt": f"Question {n}?", "chosen": f"{lead}yes", "rejected": f"{lead}no"}

    doubled = [row(n, lead=f"Question {n}?") for n in range(10)]
    with pytest.raises(UsageError, match="in 10 of 10 pairs both responses begin with the prompt"):
        load_pairs(written(tmp_path, doubled))
    with caplog.at_level(logging.WARNING, "softpref"):
        load_pairs(written(tmp_path, [*doubled[:2], *(row(n) for n in range(10, 20))]))
    assert f"in 2 of 12 pairs {parsing.REPEATED_TEXT}" in caplog.text
    assert read(row(1, lead="\nQuestion 1? ") | {"prompt": "Question 1?\n"})[1] == (
        parsing.REPEATED_TEXT,
    )


def test_a_text_prompt_beside_messages_is_the_users_turn_or_said_before():
    answers = {"prompt": "q?", "chosen": CHAT["chosen"], "rejected": CHAT["rejected"]}
    assert read(answers) == (read(CHAT)[0], (parsing.USER_TURN,))
    whole = {side: CHAT["prompt"] + CHAT[side] for side in ("chosen", "rejected")}
    assert read({"prompt": " q?\n", **whole})[0] == read(CHAT)[0]


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_messages_written_as_text_are_read(write):
    cells = {name: write(value) for name, value in CHAT.items()}
    assert read(cells) == (read(CHAT)[0], (parsing.WRITTEN,))
    long = CHAT | {"prompt": [{"content": "q " * 200, "role": "user"}]}
    assert read({name: write(value) for name, value in long.items()})[0] == read(long)[0]
    refused({**cells, "chosen": cells["chosen"][:-2]}, "looks like messages written as")
    for text in ("[{1}]", '[{"job": {"role": "cook"}}]'):
        assert read({"prompt": "p", "chosen": text, "rejected": "x"})[0] == ("p", text, "x")


@pytest.mark.parametrize(
    ("name", "value"), [("question", "Sky?"), ("instruction", "Do"), ("Input", "x")]
)
def test_a_row_with_another_prompt_is_refused_with_its_name(name, value):
    row = {name: value, "chosen": "The sky is blue", "rejected": "The sky is green"}
    refused(row, f"prompt is missing .*did you mean --prompt_column {name}")
    found = read(row, Columns(prompt=name))[0]
    assert found == (value, row["chosen"], row["rejected"])


@pytest.mark.parametrize(
    ("empty", "full"),
    [(np.array([]), np.array([1, 2])), (pandas.NA, np.array(["a"])), (float("nan"), [{}])],
)
def test_cells_of_a_frame_say_whether_they_hold_anything(empty, full):
    answers = {"chosen": "The sky is blue", "rejected": "The sky is green"}
    assert read({**answers, "prompt": "Sky?", "images": empty})[0][0] == "Sky?"
    refused({**answers, "prompt": "Sky?", "images": full}, "it has images")
    assert read({**answers, "conversations": empty})[0][0] == "The sky is"
    refused({**answers, "conversations": full}, "did you mean --prompt_column conversations")


def test_columns_are_mapped_and_standard_names_do_without():
    row = {"q": "p", "good": "a", "bad": "b"}
    columns = Columns("q", "good", "bad", or_standard=True)
    standard = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert read(row, columns)[0] == read(standard, columns)[0] == read(standard)[0]
    assert columns.swapped(row) == {"q": "p", "good": "b", "bad": "a"}
    refused({"good": "a", "bad": "b"}, "q is missing", columns)
    refused({"q": " ", "good": "a", "bad": "b"}, "q is empty", columns)


def test_a_named_column_that_is_missing_is_refused_or_noted():
    row = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    refused(row, "better is missing", Columns(chosen="better"))
    found, notes = read(row, Columns(chosen="better", or_standard=True))
    assert found == ("p", "good", "bad")
    assert notes == ("there is no column 'better': `chosen` was read",)
    assert (
        read({"prompt": "p", "better": "good", "rejected": "bad"}, Columns(chosen="better"))[1]
        == ()
    )


@pytest.mark.parametrize("system", ["Be brief.", "", None])
def test_system_and_question_make_a_conversation(system):
    row = {"system": system, "question": "q?", "chosen": "yes", "rejected": "no"}
    first = [{"role": "system", "content": system}] if system else []
    expected = (first + CHAT["prompt"], CHAT["chosen"], CHAT["rejected"])
    notes = (parsing.SYSTEM_READ,) if system else ()
    assert read(row) == (expected, notes)
    named = {"s": system, "prompt": "q?", "chosen": "yes", "rejected": "no"}
    assert read(named, Columns(system="s")) == (expected, notes)
    assert read({**CHAT, "s": system}, Columns(system="s")) == (expected, notes)


def test_a_named_system_column_is_there_and_the_only_system_message():
    row = {"prompt": "q?", "chosen": "yes", "rejected": "no"}
    refused({**row, "system": "s"}, "systm is missing .columns of", Columns(system="systm"))
    export = Columns(system="s", or_standard=True)  # the report's export has it in the prompt
    assert read(row, export) == (read(CHAT)[0], ())
    twice = CHAT | {"prompt": [SYSTEM, user("q?")], "s": "Be kind."}
    refused(twice, "s stands beside a prompt that begins with a system", Columns(system="s"))
    assert read(twice | {"s": None}, Columns(system="s"))[0][0] == twice["prompt"]


@pytest.mark.parametrize(
    "marked",
    [
        "\n\nHuman: hi\n\nAssistant:", "Human: hi\nAssistant:",
        "### Instruction:\nhi\n\n### Response:\n",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "[INST] hi [/INST]",
        "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("lead", ["", " The same"])
def test_a_transcripts_prompt_ends_at_the_last_turn_that_both_share(marked, lead):
    row = {"chosen": f"{marked}{lead} words", "rejected": f"{marked}{lead} wordless", "input": "x"}
    found, notes = read(row)
    assert found == (marked, f"{lead} words", f"{lead} wordless")
    assert notes == (parsing.IMPLICIT,)
    longer = {"chosen": f"{marked} yes", "rejected": f"{marked} yes indeed"}
    assert read(longer)[0] == (marked, " yes", " yes indeed")


@pytest.mark.parametrize(
    ("turn", "mark"),
    [
        ("\n\nHuman:", "Human:"), ("\nprompter :", "prompter :"), ("\nSYSTEM:", "SYSTEM:"),
        ("\n### Input:\n", "### Input:"), ("<|im_start|>user\n", "<.im_start.>user"),
    ],
)  # fmt: skip
def test_a_transcript_that_differs_before_its_last_turn_is_refused(turn, mark):
    start = f"\n\nHuman: hi\n\nAssistant: hello{turn}"
    row = {"chosen": f"{start} a joke\n\nAssistant: ok", "rejected": f"{start} a rhyme\n\nAI: no"}
    refused(row, f"differ before their last turn: the last mark that both share is '{mark}'")


def test_without_a_turn_what_begins_alike_is_said():
    assert read({"chosen": "Q. blue", "rejected": "Q. green"})[1] == (parsing.IMPLICIT,)
    assert read({"chosen": "Q. bloom", "rejected": "Q. blue"})[1] == (parsing.CUT, parsing.IMPLICIT)


def test_columns_that_were_not_read_are_said_once(tmp_path, caplog):
    rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b", "score": n, "tags": None}
            for n in range(3)]  # fmt: skip
    with caplog.at_level(logging.INFO, "softpref"):
        load_pairs(written(tmp_path, rows))
    assert caplog.text.count("columns that were not read: score") == 1
    assert unread_columns(rows[0], parsing.STANDARD, {}) == ["score"]


def test_all_kinds_of_bad_rows_are_named_at_once(tmp_path):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    rows = [good, good | {"chosen": ""}, good | {"prompt": None}, good | {"chosen": " "}]
    with pytest.raises(UsageError) as caught:
        load_pairs(written(tmp_path, rows))
    said = str(caught.value)
    assert "line 2: chosen is empty (and 1 more like it); line 3: prompt is null" in said


def test_what_people_read_of_messages():
    message = assistant("found", reasoning_content="so", tool_calls=[CALL])
    assert list(texts_of([message])) == ["so", "found"]
    assert as_text([user("q"), message]).startswith("user: q\n\nassistant: so\nfound\n{")


@pytest.mark.parametrize(
    ("source", "unit"),
    [("a.jsonl", "line"), ("a.CSV", "line"), ("a.tsv.zst", "line"), ("a.jsonl.bz2", "line"),
     ("a.json", "row"), ("a.parquet", "row"), ("org/name", "row"), ("a.json.gz", "row")],
)  # fmt: skip
def test_rows_are_named_as_their_source_counts_them(source, unit):
    assert place(source, 3) == f"{source}, {unit} 3"
