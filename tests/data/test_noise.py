import csv
import json
import math
import random
import re
from datetime import date, time, timedelta
from decimal import Decimal

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softpref.columns import Columns
from softpref.data.noise import inject
from softpref.data.sources import load_pairs
from softpref.errors import UsageError

TEXTS = {"prompt": "p", "chosen": "c", "rejected": "r"}
ENDINGS = ["jsonl", "json", "csv", "parquet"]
ROWS = [
    {
        "note": f'n{n}, "é"\r\n',
        "prompt": f"p{n}",
        "chosen": f"c{n}",
        "rejected": f"r{n}",
        "z": f"{n}",
    }
    for n in range(300)
]


def write(path, rows):
    """Writes rows by other means than the code under test."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = path.read_bytes().decode()
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix == ".csv":
        rows = list(csv.DictReader(text.splitlines(keepends=True)))
        return [row | {"is_flipped": json.loads(row["is_flipped"])} for row in rows]
    return [json.loads(line) for line in text.split("\n")[:-1]]


@pytest.mark.parametrize("source_ending", ENDINGS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_flip_swaps_the_responses_and_nothing_else(tmp_path, source_ending, ending):
    source = write(tmp_path / f"in.{source_ending}", ROWS)
    output = tmp_path / f"out.{ending}"
    result = inject(source, str(output), 0.4, seed=3)
    rows = read(output)
    assert len(rows) == result.pairs == 300
    for before, after in zip(ROWS, rows, strict=True):
        responses = [before["chosen"], before["rejected"]]
        flipped = after["is_flipped"]
        assert [after["chosen"], after["rejected"]] == responses[:: -1 if flipped else 1]
        assert list(after) == [*before, "is_flipped"]
        assert all(after[column] == before[column] for column in ("note", "prompt", "z"))
    assert result.flipped == sum(row["is_flipped"] for row in rows)
    assert result.realised_rate == result.flipped / 300
    assert 90 <= result.flipped <= 150
    assert (result.rate, result.output) == (0.4, str(output))
    assert {path.name for path in tmp_path.iterdir()} == {f"in.{source_ending}", f"out.{ending}"}
    before, after = load_pairs(source).pairs, load_pairs(str(output)).pairs
    assert before["uid"][:] == after["uid"][:]


def test_flips_are_independent_draws_in_file_order(tmp_path):
    source = write(tmp_path / "in.jsonl", ROWS)
    flips = {}
    for name, rate, seed in [("a", 0.2, 0), ("b", 0.2, 0), ("c", 0.2, 1), ("d", 0.6, 0)]:
        inject(source, str(tmp_path / f"{name}.jsonl"), rate, seed)
        flips[name] = [row["is_flipped"] for row in read(tmp_path / f"{name}.jsonl")]
    assert flips["a"] == flips["b"] != flips["c"]
    assert all(high or not low for low, high in zip(flips["a"], flips["d"], strict=True))
    shorter = write(tmp_path / "short.jsonl", ROWS[:100])
    inject(shorter, str(tmp_path / "e.jsonl"), 0.2, 0)
    assert [row["is_flipped"] for row in read(tmp_path / "e.jsonl")] == flips["a"][:100]
    assert inject(source, str(tmp_path / "f.jsonl"), 0, 0).flipped == 0
    assert not any(row["is_flipped"] for row in read(tmp_path / "f.jsonl"))


def test_the_draws_are_those_of_the_seed_alone(tmp_path):
    """What a seed flips must not change from one version to the next."""
    source, draw = write(tmp_path / "in.jsonl", ROWS), random.Random(7)
    expected = tuple(draw.random() < 0.3 for _ in ROWS)
    assert inject(source, str(tmp_path / "a.jsonl"), 0.3, 7).flips == expected
    one_each = inject(source, str(tmp_path / "b.jsonl"), [0.3] * 300, 7)
    assert (one_each.flips, one_each.rate) == (expected, pytest.approx(0.3))
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "b.jsonl")


def test_every_pair_may_have_its_own_rate(tmp_path):
    source = write(tmp_path / "in.jsonl", ROWS)
    rates = [0.9 if n % 3 == 0 else 0.05 for n in range(300)]
    result = inject(source, str(tmp_path / "out.jsonl"), rates, 3)
    often = result.among([n % 3 == 0 for n in range(300)], 0.9)
    seldom = result.among([n % 3 != 0 for n in range(300)], 0.05)
    assert (often.pairs, seldom.pairs) == (100, 200)
    assert often.flipped + seldom.flipped == result.flipped
    assert result.rate == pytest.approx(1 / 3)
    assert 80 <= often.flipped <= 98  # within 3.3 standard deviations, as is the next
    assert 1 <= seldom.flipped <= 20
    rows = read(tmp_path / "out.jsonl")
    assert tuple(row["is_flipped"] for row in rows) == result.flips
    assert tuple(row["chosen"][0] == "r" for row in rows) == result.flips
    evenly = inject(source, str(tmp_path / "evenly.jsonl"), 0.9, 3)
    assert evenly.among([rate == 0.9 for rate in rates], 0.9).flips == often.flips
    assert math.isnan(result.among([False] * 300, 0.5).realised_rate)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("rates", "part"),
    [
        ([0.1] * 299, "299 rates for the 300 pairs"),
        ([0.1] * 301, "301 rates for the 300 pairs"),
        ([], "0 rates for the 300 pairs"),
        ([0.1] * 299 + [1.0], "--rate 1.0: give a share"),
        ([-0.1] + [0.1] * 299, "--rate -0.1"),
        ([0.1] * 299 + [float("nan")], "--rate nan"),
    ],
)
def test_rates_that_do_not_fit_the_pairs_leave_no_output(tmp_path, ending, rates, part):
    source = write(tmp_path / "in.jsonl", ROWS)
    with pytest.raises(UsageError, match=re.escape(part)):
        inject(source, str(tmp_path / f"out.{ending}"), rates, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


USER, YES, NO = (
    {"role": role, "content": content, "extra": {"a": [1]}}
    for role, content in [("user", "sky?"), ("assistant", "yes"), ("assistant", "no")]
)


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"chosen": "Q: yes", "rejected": "Q: no"},
    ],
)
def test_every_format_comes_back_from_two_injections(tmp_path, ending, row):
    rows = [row | {"number": n, "deep": {"x": [n, 1.5]}} for n in range(20)]
    source = write(tmp_path / f"in.{ending}", rows)
    once, twice = tmp_path / f"once.{ending}", tmp_path / f"twice.{ending}"
    assert 0 < inject(source, str(once), 0.5, 1).flipped < 20
    inject(str(once), str(twice), 0.5, 1)
    expected = [row | {"is_flipped": False} for row in read(tmp_path / f"in.{ending}")]
    assert read(once) != expected
    assert read(twice) == expected


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    responses=st.lists(
        st.tuples(*[st.text(st.characters(exclude_categories=["Cs"]), max_size=5)] * 2), min_size=1
    ),
    rate=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 9),
    ending=st.sampled_from(ENDINGS),
)
def test_twice_with_one_seed_restores_texts_and_truth(tmp_path, responses, rate, seed, ending):
    rows = [{"prompt": "p", "chosen": f"c{a}", "rejected": f"r{b}"} for a, b in responses]
    once, twice = tmp_path / f"once.{ending}", tmp_path / f"twice.{ending}"
    once.unlink(missing_ok=True)
    twice.unlink(missing_ok=True)
    inject(write(tmp_path / "in.jsonl", rows), str(once), rate, seed)
    inject(str(once), str(twice), rate, seed)
    restored = load_pairs(str(twice)).pairs
    for row, back in zip(rows, restored, strict=True):
        assert back["is_flipped"] is False
        assert all(back[column] == text for column, text in row.items())


def test_known_flips_stay_known(tmp_path):
    rows = [ROWS[n] | {"is_flipped": n % 2 == 0} for n in range(100)]
    inject(write(tmp_path / "in.jsonl", rows), str(tmp_path / "out.jsonl"), 0.5, 0)
    after = read(tmp_path / "out.jsonl")
    for row, new in zip(rows, after, strict=True):
        swapped = new["chosen"] == row["rejected"]
        assert new["is_flipped"] == (row["is_flipped"] != swapped)
    assert {
        (row["is_flipped"], new["is_flipped"]) for row, new in zip(rows, after, strict=True)
    } == {(False, False), (False, True), (True, False), (True, True)}


def test_messages_never_lose_a_field_unseen(tmp_path):
    bare = {"role": "assistant", "content": "yes"}
    row = {"prompt": [USER], "chosen": [bare], "rejected": [NO]}
    source = write(tmp_path / "in.parquet", [row])
    with pytest.raises(UsageError, match="different fields.*jsonl for messages"):
        inject(source, str(tmp_path / "out.parquet"), 0.5, 0)
    inject(source, str(tmp_path / "out.jsonl"), 0.999, 0)
    (flipped,) = read(tmp_path / "out.jsonl")
    assert flipped == row | {"chosen": [NO], "rejected": [bare], "is_flipped": True}


@pytest.mark.parametrize("as_chat", [False, True])
def test_named_columns_of_parquet_keep_their_fields_and_get_the_truth(tmp_path, as_chat):
    columns = Columns("q", "better", "worse")
    rows = [{"q": f"p{n}", "better": f"c{n}", "worse": f"r{n}"} for n in range(6)]
    if as_chat:
        rows = [{"q": [USER], "better": [NO], "worse": [NO | {"content": f"{n}"}]}
                for n in range(6)]  # fmt: skip
    source = write(tmp_path / "in.parquet", rows)
    found = inject(source, str(tmp_path / "out.parquet"), 0.5, 0, columns)
    after = read(tmp_path / "out.parquet")
    assert after == [
        (columns.swapped(row) if flip else row) | {"is_flipped": flip}
        for row, flip in zip(rows, found.flips, strict=True)
    ]
    bare = [row | {"better": [{"role": "assistant", "content": "x"}]} for row in rows]
    if as_chat:
        source = write(tmp_path / "bare.parquet", bare)
        with pytest.raises(UsageError, match="messages of better and worse have different fields"):
            inject(source, str(tmp_path / "no.parquet"), 0.5, 0, columns)


def test_rows_with_columns_of_their_own(tmp_path):
    rows = [ROWS[0] | {"first": 1}, ROWS[1] | {"second": [2.5, None]}]
    source = write(tmp_path / "in.jsonl", rows)
    inject(source, str(tmp_path / "out.jsonl"), 0, 0)
    assert read(tmp_path / "out.jsonl") == [row | {"is_flipped": False} for row in rows]
    inject(source, str(tmp_path / "out.parquet"), 0, 0)
    assert [row["first"] for row in read(tmp_path / "out.parquet")] == [1, None]
    assert [row["second"] for row in read(tmp_path / "out.parquet")] == [None, [2.5, None]]


def test_parquet_keeps_its_types(tmp_path):
    types = {"prompt": pa.large_string(), "chosen": pa.string(), "rejected": pa.string()}
    types |= {"small": pa.int8(), "when": pa.timestamp("us"), "is_flipped": pa.null()}
    row = {column: column for column in ("prompt", "chosen", "rejected")} | {"small": 3}
    table = pa.Table.from_pylist([row], schema=pa.schema(types))
    pq.write_table(table, tmp_path / "in.parquet")
    inject(str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet"), 0, 0)
    types["is_flipped"] = pa.bool_()
    assert pq.read_schema(tmp_path / "out.parquet") == pa.schema(types)


@pytest.mark.parametrize(
    ("output", "rate", "part"),
    [
        ("out.jsonl", 1, "--rate 1: give a share"),
        ("out.jsonl", -0.1, "--rate -0.1"),
        ("out.jsonl", float("nan"), "--rate nan"),
        ("out.txt", 0.1, "unknown extension. Use one of .jsonl"),
        ("sub/../in.jsonl", 0.1, "is the input"),
        ("there.jsonl", 0.1, "exists"),
        ("absent/out.jsonl", 0.1, "cannot be written: there is no folder"),
        ("ragged.csv", 0.1, "cannot be written"),
        ("ragged.parquet", 0.1, "cannot be written"),
    ],
)
def test_refusals_leave_everything_as_it_was(tmp_path, output, rate, part):
    (tmp_path / "sub").mkdir()
    rows = [ROWS[0], ROWS[1] | {"z": {"k": 1}, "more": 2}]
    source = write(tmp_path / "in.jsonl", rows)
    (tmp_path / "there.jsonl").write_text("precious")
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UsageError) as caught:
        inject(source, str(tmp_path / output), rate, 0)
    assert part in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "there.jsonl").read_text() == "precious"
    assert read(tmp_path / "in.jsonl") == rows


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_bad_row_or_file_leaves_no_output(tmp_path, ending):
    source = write(tmp_path / "in.jsonl", [*ROWS, ROWS[0] | {"chosen": " "}])
    with pytest.raises(
        UsageError, match=r"in\.jsonl, line 301: chosen is empty\. Fix or remove it\.$"
    ):
        inject(source, str(tmp_path / f"out.{ending}"), 0.4, 0)
    two = write(tmp_path / "in.jsonl", [ROWS[0] | {"chosen": ""}, *ROWS, {"prompt": "p"}])
    with pytest.raises(UsageError, match=r"line 1: chosen is empty; line 302: chosen is missing"):
        inject(two, str(tmp_path / f"out.{ending}"), 0.4, 0)
    junk = tmp_path / f"junk.{ending}"
    junk.write_bytes(b"\x00\xff junk")
    with pytest.raises(UsageError, match=f"junk.{ending}"):
        inject(str(junk), str(tmp_path / f"out.{ending}"), 0.4, 0)
    with pytest.raises(UsageError, match="absent"):
        inject(str(tmp_path / "absent.parquet"), str(tmp_path / f"out.{ending}"), 0.4, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", junk.name}


RICH = {
    "when": (pa.timestamp("ns", "Europe/Berlin"), pd.Timestamp("2024-01-02 03:04:05.000000006Z")),
    "day": (pa.date32(), date(2024, 1, 2)),
    "hour": (pa.time64("us"), time(3, 4)),
    "price": (pa.decimal128(10, 2), Decimal("1.50")),
    "raw": (pa.binary(), b"\x00\xff"),
    "took": (pa.duration("us"), timedelta(seconds=1)),
    "kind": (pa.dictionary(pa.int8(), pa.string()), "a"),
    "half": (pa.float16(), 0.5),
    "deep": (pa.list_(pa.struct([("at", pa.date32())])), [{"at": date(2024, 1, 2)}, None]),
    "pairs": (pa.map_(pa.string(), pa.float64()), [("k", 1.5)]),
    "score": (pa.float64(), math.inf),
}
"""Columns that JSON cannot hold as they are, or only just."""


@pytest.fixture
def rich(tmp_path):
    """A Parquet file of one pair with those columns and metadata."""
    types = {column: kind for column, (kind, _) in RICH.items()}
    row = {column: value for column, (_, value) in RICH.items()}
    schema = pa.schema(dict.fromkeys(("prompt", "chosen", "rejected"), pa.string()) | types)
    table = pa.Table.from_pylist([{**TEXTS, **row}], schema=schema)
    pq.write_table(table.replace_schema_metadata({"made": "by hand"}), tmp_path / "rich.parquet")
    return tmp_path / "rich.parquet"


def test_parquet_keeps_values_types_and_metadata_that_it_does_not_read(rich, tmp_path, caplog):
    inject(str(rich), str(tmp_path / "out.parquet"), 0, 0)
    before, after = pq.read_table(rich), pq.read_table(tmp_path / "out.parquet")
    assert after.schema.metadata[b"made"] == b"by hand"
    assert after.column_names == [*before.column_names, "is_flipped"]
    assert after.drop_columns("is_flipped").equals(before)
    assert caplog.messages == []


def test_names_of_classes_survive(tmp_path):
    dataset = datasets.Dataset.from_list([TEXTS | {"label": 1}, TEXTS | {"label": 0}])
    names = datasets.ClassLabel(names=["bad", "good"])
    dataset = dataset.cast_column("label", names)
    dataset.to_parquet(tmp_path / "in.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for source in ("in.parquet", "saved"):
        output = tmp_path / f"{source}-out.parquet"
        inject(str(tmp_path / source), str(output), 0.5, 0)
        back = datasets.Dataset.from_parquet(str(output), cache_dir=str(tmp_path / "cache"))
        assert back.features["label"] == names
        assert back["label"][:] == [1, 0]
        assert back.features["is_flipped"] == datasets.Value("bool")


def test_a_frame_of_pandas_comes_back_with_its_index(tmp_path):
    frame = pd.DataFrame([TEXTS, TEXTS], index=pd.Index(["x", "y"], name="key"))
    frame["kind"] = pd.Categorical(["u", "v"])
    frame.to_parquet(tmp_path / "in.parquet")
    inject(str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet"), 0, 0)
    back = pd.read_parquet(tmp_path / "out.parquet")
    pd.testing.assert_frame_equal(back.drop(columns="is_flipped"), frame)


PLAIN = {
    "when": "2024-01-02T04:04:05.000000006+01:00", "day": "2024-01-02", "hour": "03:04:00",
    "price": "1.50", "raw": "AP8=", "took": "0:00:01", "kind": "a", "half": 0.5,
    "deep": [{"at": "2024-01-02"}, None], "pairs": [["k", 1.5]], "score": None,
}  # fmt: skip
SAID = (
    "converted for JSON: when as ISO 8601 text, day as ISO 8601 text, hour as ISO 8601 text, "
    "price as decimal text, raw as base64 text, took (timedelta) as text, deep as ISO 8601 text, "
    "score NaN or infinite as null"
)


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_what_json_cannot_hold_is_written_as_text_and_said_once(rich, tmp_path, caplog, ending):
    caplog.set_level("INFO", "softpref")
    output = tmp_path / f"out.{ending}"
    inject(str(rich), str(output), 0, 0)
    assert read(output) == [TEXTS | PLAIN | {"is_flipped": False}]
    assert caplog.messages == [f"{output}: {SAID}"]


def test_csv_has_the_same_texts(tmp_path, caplog):
    caplog.set_level("INFO", "softpref")
    row = TEXTS | {"day": date(2024, 1, 2), "raw": b"a", "score": math.nan, "n": 1}
    inject(write(tmp_path / "in.parquet", [row]), str(tmp_path / "out.csv"), 0, 0)
    expected = TEXTS | {"day": "2024-01-02", "raw": "YQ==", "score": "", "n": "1"}
    assert read(tmp_path / "out.csv") == [expected | {"is_flipped": False}]
    assert len(caplog.messages) == 1


def test_json_without_a_word_for_nan_is_never_written(tmp_path, caplog):
    caplog.set_level("INFO", "softpref")
    rows = [TEXTS | {"n": n, "s": s} for n, s in enumerate([math.nan, 1.5, -math.inf])]
    source = write(tmp_path / "in.jsonl", [row | {"deep": {"s": [row["s"]]}} for row in rows])
    output = tmp_path / "out.jsonl"
    inject(source, str(output), 0, 0)
    strict = [
        json.loads(line, parse_constant=pytest.fail) for line in output.read_text().splitlines()
    ]
    assert [row["s"] for row in strict] == [None, 1.5, None]
    assert [row["deep"] for row in strict] == [{"s": [None]}, {"s": [1.5]}, {"s": [None]}]
    how = "NaN or infinite as null"
    assert caplog.messages == [f"{output}: converted for JSON: s {how}, deep {how}"]
    inject(source, str(tmp_path / "out.parquet"), 0, 0)
    kept = [row["s"] for row in read(tmp_path / "out.parquet")]
    assert (math.isnan(kept[0]), kept[1:]) == (True, [1.5, -math.inf])


def test_a_number_too_long_for_parquet_leaves_no_output(tmp_path):
    source = write(tmp_path / "in.jsonl", [TEXTS | {"n": 10**30}])
    with pytest.raises(UsageError, match="too large"):
        inject(source, str(tmp_path / "out.parquet"), 0, 0)
    inject(source, str(tmp_path / "out.jsonl"), 0, 0)
    assert read(tmp_path / "out.jsonl")[0]["n"] == 10**30
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


def test_a_damaged_source_is_what_the_message_names(tmp_path):
    (tmp_path / "in.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UsageError, match=r"in\.parquet cannot be read"):
        inject(str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet"), 0, 0)
    write(tmp_path / "other.parquet", [{"question": "q", "answer": "a"}])
    with pytest.raises(UsageError, match=r"row 1: chosen is missing \(columns of the row: quest"):
        inject(str(tmp_path / "other.parquet"), str(tmp_path / "out.parquet"), 0, 0)


OF_RESPONSES = {"score_chosen": 1.5, "score_rejected": 4.0, "votes_for": 2, "votes_against": 7}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_flip_takes_along_what_belongs_to_a_response(tmp_path, ending):
    rows = [
        TEXTS | OF_RESPONSES | {"soft_label": 0.1, "weight": 3, "uid": f"u{n}"} for n in range(40)
    ]
    source = write(tmp_path / f"in.{ending}", rows)
    assert 0 < inject(source, str(tmp_path / f"out.{ending}"), 0.5, 1).flipped < 40
    swapped = {"score_chosen": 4, "score_rejected": 1.5, "votes_for": 7, "votes_against": 2}
    for row in read(tmp_path / f"out.{ending}"):
        expected = (swapped | {"soft_label": 0.9}) if row["is_flipped"] else OF_RESPONSES
        assert {name: float(row[name]) for name in expected} == expected
        assert float(row["weight"]) == 3
    inject(str(tmp_path / f"out.{ending}"), str(tmp_path / f"back.{ending}"), 0.5, 1)
    back = [{n: float(row[n]) for n in OF_RESPONSES} for row in read(tmp_path / f"back.{ending}")]
    assert back == [OF_RESPONSES] * 40


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_lone_score_goes_with_its_response(tmp_path, ending):
    rows = [TEXTS | {"score_chosen": 1.5, "uid": f"u{n}"} for n in range(40)]
    source = write(tmp_path / f"in.{ending}", rows)
    inject(source, str(tmp_path / f"out.{ending}"), 0.5, 1)
    for row in read(tmp_path / f"out.{ending}"):
        scores = [row.get("score_chosen"), row.get("score_rejected")]
        assert scores == ([None, 1.5] if row["is_flipped"] else [1.5, None])


def test_scores_of_two_types_are_not_rounded(tmp_path):
    rows = [TEXTS | {"score_chosen": 1.5, "score_rejected": 4, "uid": f"u{n}"} for n in range(9)]
    source = write(tmp_path / "in.parquet", rows)
    with pytest.raises(UsageError, match="score_chosen and score_rejected have different types"):
        inject(source, str(tmp_path / "out.parquet"), 0.5, 1)
    inject(source, str(tmp_path / "out.jsonl"), 0.5, 1)
    assert {row["score_rejected"] for row in read(tmp_path / "out.jsonl")} == {1.5, 4}


def test_ties_are_not_flipped_and_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [row | {"label": "Tie" if n % 2 else "A"} for n, row in enumerate(ROWS)]
    source = write(tmp_path / "in.jsonl", rows)
    plain = inject(write(tmp_path / "plain.jsonl", ROWS), str(tmp_path / "p.jsonl"), 0.5, 1)
    found = inject(source, str(tmp_path / "out.jsonl"), 0.5, 1)
    assert found.flips == tuple(flip and n % 2 == 0 for n, flip in enumerate(plain.flips))
    assert f"{source}: 150 ties are not flipped" in caplog.text


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_target_margin_is_refused_before_anything_is_written(tmp_path, ending):
    rows = [row | {"margin": 0.5 if n == 7 else None} for n, row in enumerate(ROWS)]
    source = write(tmp_path / f"in.{ending}", rows)
    with pytest.raises(UsageError, match=r"(line|row) \d+: has a `margin`.* Remove the column"):
        inject(source, str(tmp_path / "out.jsonl"), 0.5, 1)
    assert [path.name for path in tmp_path.iterdir()] == [f"in.{ending}"]
