import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from softpref.data.readers import dataset_rows
from softpref.data.sources import content_key, in_sorted_order, load_pairs
from softpref.data.splits import hold_out_clean
from softpref.errors import UsageError
from softpref.training.output import write_lines
from tests.toy import pairs_from_dataset

GOOD = {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No."}
USER = {"role": "user", "content": "Say hello."}
HELLO = {"role": "assistant", "content": "Hello!"}
NO = {"role": "assistant", "content": "No."}


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered(count: int) -> list[dict]:
    return [{"prompt": f"p{n}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(count)]


def test_responses_that_differ_in_the_order_of_their_keys_are_the_same():
    one, same = (
        {"name": "f", "arguments": {"a": 1, "b": 2}},
        {"arguments": {"b": 2, "a": 1}, "name": "f"},
    )
    other = {"name": "g", "arguments": {}}
    assert content_key("p", [one], [other]) == content_key("p", [same], [other])
    assert in_sorted_order([one], [other]) == in_sorted_order([same], [other])
    assert in_sorted_order([one], [other]) != in_sorted_order([other], [same])


def test_numbers_in_messages_and_tools_stay_what_they_are(tmp_path):
    numbers = {"a": 0.7, "b": 37.77492951234567, "c": 1e-12, "d": 2**80, "e": [0.3, None]}
    tools = [{"type": "function", "function": {"name": "f", "default": 0.7}}]
    call = HELLO | {"tool_calls": [{"function": {"name": "f", "arguments": numbers}}]}
    rows = [
        {"prompt": [USER | {"id": n}], "chosen": [NO], "rejected": [call], "tools": tools,
         "is_flipped": True}
        for n in range(3)
    ]  # fmt: skip
    pairs = load_pairs(jsonl(tmp_path / "p.jsonl", rows)).pairs
    for row in (*dataset_rows(pairs), *dataset_rows(pairs.select([2, 0]))):
        assert (row["rejected"], row["tools"]) == ([call], tools)
    for row in dataset_rows(hold_out_clean(pairs, 2, 0)[1]):  # swapped back
        assert (row["chosen"], row["tools"]) == ([call], tools)


def texts(pairs: datasets.Dataset) -> list[tuple]:
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in pairs]


def test_the_same_rows_in_every_format_give_the_same_pairs(tmp_path):
    rows = [
        GOOD | {"uid": "a", "is_flipped": True, "soft_label": 0.25, "other": "x"},
        {"prompt": 'Comma, "quote"', "chosen": "two\r\nlines", "rejected": "ünï \u2028 \r code"}
        | {"uid": "b", "is_flipped": False, "soft_label": 1.0, "other": "y"},
    ]
    jsonl(tmp_path / "p.jsonl", rows)
    (tmp_path / "p.json").write_text(json.dumps(rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    (tmp_path / "p.csv").write_bytes(
        "\ufeffprompt,chosen,rejected,uid,is_flipped,soft_label,other\r\n"
        "Say hello.,Hello!,No.,a,True,0.25,x\r\n"
        '"Comma, ""quote""","two\r\nlines","ünï \u2028 \r code",b,false,1,y\r\n'.encode()
    )
    loaded = [load_pairs(str(tmp_path / f"p.{end}")) for end in ("jsonl", "json", "parquet", "csv")]
    loaded.append(pairs_from_dataset(datasets.Dataset.from_list(rows), "memory"))
    expected = [{key: row[key] for key in row if key != "other"} for row in rows]
    for result in loaded:
        kept = [{key: row[key] for key in expected[0]} for row in result.pairs]
        assert kept == expected
        assert set(result.pairs.column_names) == {*expected[0], "row"}
        assert result.fingerprint == loaded[0].fingerprint
        assert result.bad_rows == ()
    assert loaded[0].pairs["row"][:] == [1, 2]
    assert loaded[3].pairs["row"][:] == [2, 3]  # the header is line 1


def test_row_is_the_line_where_a_row_begins(tmp_path):
    (tmp_path / "p.jsonl").write_text(f"\n{json.dumps(GOOD)}\n\n\n{json.dumps(numbered(1)[0])}")
    assert load_pairs(str(tmp_path / "p.jsonl")).pairs["row"][:] == [2, 5]
    (tmp_path / "p.csv").write_text('prompt,chosen,rejected\n"a\nb",c,d\n"e",f,g\n')
    assert load_pairs(str(tmp_path / "p.csv")).pairs["row"][:] == [2, 4]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (GOOD, tuple(GOOD.values())),
        (
            {"chosen": "Q: sky? A: blue", "rejected": "Q: sky? A: green"},
            ("Q: sky? A:", " blue", " green"),
        ),
        ({"prompt": [USER], "chosen": [HELLO], "rejected": [NO]}, ([USER], [HELLO], [NO])),
        ({"chosen": [USER, HELLO], "rejected": [USER, NO]}, ([USER], [HELLO], [NO])),
        (
            {"prompt": "Say hello.", "chosen": [USER, HELLO], "rejected": [USER, NO]},
            ([USER], [HELLO], [NO]),
        ),
        (
            {
                "chosen": [USER, NO | {"name": "x"}, USER, HELLO],
                "rejected": [USER, NO | {"name": "x"}, USER, NO],
            },
            ([USER, NO | {"name": "x"}, USER], [HELLO], [NO]),
        ),
    ],
)
def test_formats_of_trl(tmp_path, row, expected):
    loaded = load_pairs(jsonl(tmp_path / "p.jsonl", [row | {"tags": ["x"]}]))
    assert texts(loaded.pairs) == [expected]
    in_memory = pairs_from_dataset(datasets.Dataset.from_list([row]), "memory")
    assert texts(in_memory.pairs) == [expected]
    assert in_memory.fingerprint == loaded.fingerprint


def test_implicit_prompt_is_what_trl_extracts():
    data_utils = pytest.importorskip("trl.data_utils")
    for chosen, rejected in [
        ("Q: sky? A: blue", "Q: sky? A: green"),
        ("Q: sky?  blue", "Q: sky?  green"),
        ("Q blue", "Q bloom"),
        ([USER, HELLO], [USER, NO]),
    ]:
        implicit = {"chosen": chosen, "rejected": rejected}
        loaded = pairs_from_dataset(datasets.Dataset.from_list([implicit]), "memory")
        extracted = data_utils.extract_prompt(implicit)
        assert texts(loaded.pairs) == [
            (extracted["prompt"], extracted["chosen"], extracted["rejected"])
        ]


BAD_ROWS = [
    ("not json", "not JSON"),
    ("[1, 2]", "not an object"),
    ('{"prompt": "p", "chosen": "\\ud800", "rejected": "r"}', "not JSON"),
    ({"prompt": "p", "rejected": "r", "answer": "c"}, "chosen is missing (columns of the row: pro"),
    (GOOD | {"rejected": None}, "rejected is null"),
    (GOOD | {"prompt": None}, "prompt is null"),
    (GOOD | {"chosen": 7}, "chosen is neither text nor a list of messages"),
    (GOOD | {"chosen": ["x"]}, "chosen is neither text nor a list of messages"),
    ({"prompt": [USER], "chosen": [{"role": "user"}], "rejected": [NO]}, "chosen has a message"),
    (
        {"prompt": [USER | {"content": [1]}], "chosen": [HELLO], "rejected": [NO]},
        "prompt has a part of type None",
    ),
    (GOOD | {"prompt": [USER]}, "must be all text or all messages"),
    (GOOD | {"rejected": [NO]}, "must be all text or all messages"),
    (GOOD | {"prompt": " \n"}, "prompt is empty"),
    (GOOD | {"chosen": ""}, "chosen is empty"),
    (GOOD | {"rejected": "\t"}, "rejected is empty"),
    ({"prompt": [USER], "chosen": [HELLO], "rejected": [NO | {"content": " "}]}, "rejected is em"),
    ({"prompt": [], "chosen": [HELLO], "rejected": [NO]}, "prompt is empty"),
    ({"chosen": "Q: yes", "rejected": "Q: yes indeed"}, "the end of the prompt is unknown"),
    ({"chosen": "yes", "rejected": "no"}, "prompt is missing"),
    ({"chosen": [HELLO], "rejected": [NO]}, "prompt is missing"),
    ({"chosen": [USER, HELLO], "rejected": [USER]}, "rejected does not end with an assistant"),
    ({"chosen": [USER, HELLO], "rejected": [USER, USER, NO]}, "no common prompt"),
    (GOOD | {"rejected": "Hello!"}, "identical"),
    (GOOD | {"is_flipped": 1}, "is_flipped is not a boolean"),
    (GOOD | {"is_flipped": "true"}, "is_flipped is not a boolean"),
    (GOOD | {"soft_label": 1.01}, "soft_label is not a number in [0, 1]"),
    (GOOD | {"soft_label": -0.01}, "soft_label is not a number in [0, 1]"),
    (GOOD | {"soft_label": True}, "soft_label is not a number in [0, 1]"),
    (GOOD | {"soft_label": "0.5"}, "soft_label is not a number in [0, 1]"),
    (GOOD | {"soft_label": float("nan")}, "soft_label is not a number in [0, 1]"),
    (GOOD | {"uid": 1.5}, "uid is neither text nor an integer"),
    (GOOD | {"uid": True}, "uid is neither text nor an integer"),
    (GOOD | {"uid": " "}, "uid is neither text nor an integer"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_bad_rows_are_named_and_skipped(tmp_path, row, reason):
    line = row if isinstance(row, str) else json.dumps(row)
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{line}\n{json.dumps(numbered(1)[0])}\n{line}\n", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_pairs(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}, line 1: ")
    assert reason in message
    assert "(and 1 more like it). Fix them, or pass --on_bad_row skip." in message

    loaded = load_pairs(str(path), on_bad_row="skip")
    assert [bad.row for bad in loaded.bad_rows] == [1, 3]
    assert all(reason in bad.reason for bad in loaded.bad_rows)
    assert loaded.pairs["row"][:] == [2]
    only_good = load_pairs(jsonl(tmp_path / "good.jsonl", numbered(1)))
    assert loaded.fingerprint == only_good.fingerprint
    path.write_text(f"{line}\n")
    with pytest.raises(UsageError, match="No good row is left"):
        load_pairs(str(path), on_bad_row="skip")


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({"prompt": [USER], "chosen": [HELLO], "rejected": [NO]}, "the row has messages, the rows"),
        (GOOD | {"is_flipped": False}, "the row has text and is_flipped, the rows before it text"),
        (GOOD | {"soft_label": 0}, "the row has text and soft_label, the rows before it text"),
    ],
)
def test_rows_of_one_source_have_one_form(tmp_path, second, reason):
    source = jsonl(tmp_path / "p.jsonl", [numbered(1)[0], second])
    (bad,) = load_pairs(source, on_bad_row="skip").bad_rows
    assert bad.row == 2
    assert reason in bad.reason


def test_bad_csv_rows(tmp_path):
    (tmp_path / "p.csv").write_text(
        "prompt,chosen,rejected,is_flipped,soft_label\n"
        "a,b,c,FALSE,0.5\na,b\na,b,d,true,0.5,more\na,b,e,yes,0.5\na,b,f,true,half\na,b,g,true,2\n"
    )
    loaded = load_pairs(str(tmp_path / "p.csv"), on_bad_row="skip")
    reasons = ["rejected is null", "more cells", "is_flipped is", "soft_label", "soft_label"]
    assert [bad.row for bad in loaded.bad_rows] == [3, 4, 5, 6, 7]
    assert all(part in bad.reason for part, bad in zip(reasons, loaded.bad_rows, strict=True))
    (tmp_path / "p.csv").write_text("prompt,chosen,rejected,is_flipped\na,b,c,\n")
    assert "is_flipped" not in load_pairs(str(tmp_path / "p.csv")).pairs.column_names


def test_rows_of_a_table_are_called_rows(tmp_path):
    pq.write_table(pa.Table.from_pylist([GOOD | {"chosen": ""}]), tmp_path / "p.parquet")
    with pytest.raises(UsageError, match=r"p\.parquet, row 1: chosen is empty\. Fix"):
        load_pairs(str(tmp_path / "p.parquet"))
    with pytest.raises(UsageError, match="my pairs, row 1: chosen is empty"):
        pairs_from_dataset(datasets.Dataset.from_list([GOOD | {"chosen": ""}]), "my pairs")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("absent.jsonl", None, "does not exist"),
        ("empty.jsonl", b"", "holds no rows"),
        ("blank.jsonl", b"\n \n", "holds no rows"),
        ("empty.json", b"", "holds no rows"),
        ("list.json", b"[]", "holds no rows"),
        ("object.json", b'{"prompt": "p"}', "not a list"),
        ("lines.json", b"{}\n{}\n", "is missing"),
        ("deep.json", b"[" * 100_000, "cannot be read"),
        ("empty.csv", b"", "holds no rows"),
        ("header.csv", b"prompt,chosen,rejected\n", "holds no rows"),
        ("latin.csv", "prompt,chosen,rejected\n\xe9,a,b\n".encode("latin-1"), "cannot be read"),
        ("open.csv", b'prompt,chosen,rejected\na,"b,c\n', "line 2: not CSV (unexpected end"),
        ("empty.parquet", b"", "cannot be read"),
        ("junk.parquet", b"PAR1 junk PAR1", "cannot be read"),
        ("binary.jsonl", bytes(range(256)), "not JSON"),
        ("deep.jsonl", b"[" * 100_000, "not JSON"),
        ("pairs.txt", b"hello", "unknown extension. Use one of .jsonl"),
        ("folder.jsonl", "folder", "is a directory. Name one file"),
    ],
)
@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_unreadable_sources(tmp_path, name, content, part, on_bad_row):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_pairs(str(path), on_bad_row=on_bad_row)
    assert part in str(caught.value)
    assert name in str(caught.value)


def test_hub_ids(monkeypatch, tmp_path):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "org/absent":
            raise datasets.exceptions.DatasetNotFoundError("no such data set on the hub")
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert texts(load_pairs("org/name").pairs) == [tuple(GOOD.values())]
    assert len(load_pairs("org/na.me-2:test_prefs").pairs) == 1
    assert asked == [("org/name", "train"), ("org/na.me-2", "test_prefs")]
    with pytest.raises(UsageError, match="org/absent cannot be read: no such data set on the hub"):
        load_pairs("org/absent")
    for path in ("org/name.jsonl", "deep/org/name", "/org/name", "name"):
        with pytest.raises(UsageError, match="does not exist"):
            load_pairs(path)
    assert len(asked) == 3


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "p.jsonl"
    first = load_pairs(jsonl(path, numbered(2)))
    second = load_pairs(jsonl(path, numbered(3)[::-1]))
    assert len(first.pairs) == 2
    assert second.pairs["prompt"][:] == ["p2", "p1", "p0"]
    assert first.fingerprint != second.fingerprint
    assert first.pairs["prompt"][:] == ["p0", "p1"]


def test_fingerprint_follows_content_and_order(tmp_path):
    rows = numbered(3)
    reference = load_pairs(jsonl(tmp_path / "a.jsonl", rows)).fingerprint
    for changed in (
        rows[::-1],
        rows[:2],
        [*rows[:2], rows[2] | {"chosen": "other"}],
        [*rows[:2], rows[2] | {"uid": "x"}],
    ):
        assert load_pairs(jsonl(tmp_path / "b.jsonl", changed)).fingerprint != reference
    spaced = [row | {"unknown": 1} for row in rows]
    assert load_pairs(jsonl(tmp_path / "c.jsonl", spaced)).fingerprint == reference


def test_repeated_and_contradicting_pairs_are_kept_and_counted(tmp_path):
    pair, other = numbered(2)
    swapped = pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}
    source = jsonl(tmp_path / "p.jsonl", [pair, swapped, other, pair, swapped, swapped])
    loaded = load_pairs(source)
    assert len(loaded.pairs) == 6
    assert loaded.contradicting == 1
    assert loaded.duplicates == 3
    assert len(set(loaded.pairs["uid"])) == 6
    again = load_pairs(jsonl(tmp_path / "q.jsonl", [pair, pair, other]))
    assert (again.contradicting, again.duplicates) == (0, 1)


def test_a_uid_names_one_row(tmp_path):
    first, second = numbered(2)
    missing = load_pairs(jsonl(tmp_path / "m.jsonl", [first])).pairs["uid"][0]
    rows = [first | {"uid": "a"}, second | {"uid": "a"}, first, second | {"uid": missing}]
    loaded = load_pairs(jsonl(tmp_path / "p.jsonl", rows), on_bad_row="skip")
    assert [bad.row for bad in loaded.bad_rows] == [2]
    assert "uid 'a' is already used by" in loaded.bad_rows[0].reason
    assert loaded.bad_rows[0].reason.endswith("p.jsonl, line 1")
    clash = load_pairs(
        jsonl(tmp_path / "c.jsonl", [first, second | {"uid": missing}]), on_bad_row="skip"
    )
    assert [bad.row for bad in clash.bad_rows] == [2]


def test_more_rows_than_are_held_at_a_time(tmp_path):
    rows = numbered(2501)
    loaded = load_pairs(jsonl(tmp_path / "p.jsonl", rows))
    assert loaded.pairs["prompt"][:] == [row["prompt"] for row in rows]
    assert loaded.pairs["row"][:] == list(range(1, 2502))
    assert texts(pairs_from_dataset(loaded.pairs, "again").pairs) == texts(loaded.pairs)


filled = st.text("ab \n\u00e9\U0001f600", min_size=1, max_size=6).filter(str.strip)
contents = st.tuples(filled, filled, filled).filter(lambda pair: pair[1] != pair[2])


@settings(max_examples=40)
@given(pairs=st.lists(contents, min_size=1, max_size=6), swaps=st.lists(st.booleans(), min_size=6))
def test_uid_survives_swaps(pairs, swaps):
    pairs = pairs + pairs[:2]
    straight = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs]
    swapped = [
        {"prompt": p, "chosen": r, "rejected": c} if swap else row
        for row, (p, c, r), swap in zip(straight, pairs, [*swaps, *swaps], strict=False)
    ]
    before = pairs_from_dataset(datasets.Dataset.from_list(straight), "straight").pairs
    after = pairs_from_dataset(datasets.Dataset.from_list(swapped), "swapped").pairs
    assert before["uid"][:] == after["uid"][:]
    assert len(set(before["uid"])) == len(pairs)


def test_content_key_knows_no_order_of_responses_but_tells_pairs_apart():
    assert content_key("p", "a", "b") == content_key("p", "b", "a")
    assert content_key([USER], [HELLO], [NO]) == content_key([USER], [NO], [HELLO])
    others = [("p", "a", "c"), ("q", "a", "b"), ("a", "p", "b"), ("p a", "", "b")]
    assert len({content_key("p", "a", "b"), *(content_key(*other) for other in others)}) == 5


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["prompt", "chosen", "rejected", "role", "content", "uid"]), inner
            )
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode()),
    ending=st.sampled_from(["jsonl", "json", "csv", "parquet"]),
    on_bad_row=st.sampled_from(["stop", "skip"]),
)
@example(b'{"prompt": {"a": 1}, "chosen": [[]], "rejected": []}', "jsonl", "stop")
@example(b"\xff\xfe\x00", "csv", "skip")
@example(b"9" * 5000, "jsonl", "stop")
@example(b'prompt,chosen,rejected,is_flipped\na,b,c,"' + b"[" * 5000 + b'"', "csv", "stop")
def test_junk_is_never_more_than_a_usage_error(tmp_path, content, ending, on_bad_row):
    path = tmp_path / f"junk.{ending}"
    path.write_bytes(content)
    try:
        assert len(load_pairs(str(path), on_bad_row=on_bad_row).pairs) > 0
    except UsageError as error:
        assert str(path) in str(error)  # noqa: PT017


def test_where_no_row_is_good_the_remedy_is_not_to_skip_them(tmp_path):
    write_lines(tmp_path / "p.jsonl", [{"prompt": "p", "preferred": "a", "rejected": "b"}] * 3)
    with pytest.raises(UsageError, match=r"\(and 2 more like it\)\. Fix them: rename .*chosen_col"):
        load_pairs(str(tmp_path / "p.jsonl"))
    with pytest.raises(UsageError, match="No good row is left: rename"):
        load_pairs(str(tmp_path / "p.jsonl"), on_bad_row="skip")
