"""Raw rows: every format gives the same ones, and a file that cannot be read is named."""

import bz2
import csv
import gzip
import json
import os
import socket
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softpref.data import readers
from softpref.data.readers import RowError, read_rows
from softpref.errors import UsageError

ROWS = [{"prompt": f"p{n}", "chosen": f'c{n} "ü"', "rejected": f"r{n}"} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLE = b"prompt,chosen,rejected\n" + b"".join(
    f'p{n},"c{n} ""ü""",r{n}\n'.encode() for n in range(3)
)
BOM = b"\xef\xbb\xbf"


def zstd(content):
    return pa.Codec("zstd").compress(content, asbytes=True)


def rows_of(path):
    return list(read_rows(str(path)))


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", LINES),
        ("a.json", BOM + LINES),
        ("a.json", b"\n \n" + LINES.replace(b"\n", b"\r\n\r\n")),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", BOM + json.dumps(ROWS, indent=1).encode()),
        ("a.json", b"[\n" + LINES.strip().replace(b"\n", b",\n") + b"]"),
        ("a.jsonl", BOM + LINES),
        ("a.tsv", TABLE.replace(b",", b"\t")),
        ("a.csv", BOM + b"\n" + TABLE),
        ("A.JSONL.GZ", gzip.compress(LINES)),
        ("a.jsonl.gz", gzip.compress(LINES[:70]) + gzip.compress(LINES[70:])),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.jsonl.zst", zstd(LINES[:70]) + zstd(LINES[70:])),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("a.json.zst", zstd(BOM + LINES)),
        ("a.csv.gz", gzip.compress(BOM + TABLE)),
        ("a.tsv.zst", zstd(TABLE.replace(b",", b"\t"))),
    ],
    ids=lambda part: part if isinstance(part, str) else "",  # what is packed holds the time
)
def test_every_text_format_gives_the_same_rows(tmp_path, name, content):
    assert [row for _, row in rows_of(written(tmp_path / name, content))] == ROWS


def test_json_lines_in_a_json_file_are_read_one_by_one(tmp_path):
    path = written(tmp_path / "a.json", b'\n{"n": 1}\n{"n": 2}\n\nnot json\n{"n": 3}\xff\n{"n": 4}')
    found = rows_of(path)
    assert [number for number, _ in found] == [2, 3, 5, 6, 7]
    assert [row for _, row in found if not isinstance(row, RowError)] == [
        {"n": 1},
        {"n": 2},
        {"n": 4},
    ]
    rows = read_rows(str(path))
    assert next(rows) == (2, {"n": 1})
    rows.close()
    with pytest.raises(UsageError, match=r"not a list \(a single line of JSON Lines goes in a"):
        rows_of(written(path, b'{"n": 1}\n'))


@pytest.mark.parametrize(
    "text", ['{"a": "\\ud83d"}', '{"a": ["\\uD83D\\ud83d"]}', '{"\\uDE00": 1}']
)
def test_half_a_surrogate_pair_is_one_bad_row(tmp_path, text):
    whole = '{"a": "\\ud83d\\ude00"}'
    for name, content in (("a.jsonl", f"{text}\n{whole}"), ("a.json", f"[{text}, {whole}]")):
        (_, bad), (_, good) = rows_of(written(tmp_path / name, content.encode()))
        assert "surrogates not allowed" in str(bad)
        assert good == {"a": "\U0001f600"}


@pytest.mark.parametrize(
    "text",
    [
        '{"chosen": 1, "b": 2, "chosen": 1}',
        '{"x": {"chosen": 1, "chosen": 2}, "b": 2}',
        '{"x": [0, [{"y": {"chosen": 1, "chosen": 2}}]]}',
    ],
)
def test_a_key_that_is_there_twice_is_a_bad_row(tmp_path, text):
    contents = {
        "a.jsonl": f'{{"n": 1}}\n{text}\n{{"n": 2}}\n',
        "a.json": f'[{{"n": 1}}, {text}, {{"n": 2}}]',
    }
    for name, content in contents.items():
        first, (number, bad), last = rows_of(written(tmp_path / name, content.encode()))
        assert (first, last) == ((1, {"n": 1}), (3, {"n": 2}))
        assert (number, isinstance(bad, RowError)) == (2, True)
        assert str(bad) == "the key 'chosen' appears twice"


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    written(tmp_path / "a.csv", b"prompt,chosen,rejected,chosen\np,c,r,d\n")
    written(tmp_path / "a.tsv", b"chosen\t\t\nc\t1\t2\n")
    columns = [pa.array(["a"])] * 3
    pq.write_table(pa.Table.from_arrays(columns, ["chosen", "b", "chosen"]), tmp_path / "a.parquet")
    for name, column in (("a.csv", "chosen"), ("a.tsv", ""), ("a.parquet", "chosen")):
        with pytest.raises(UsageError, match=f"{name}: the column '{column}' appears twice"):
            rows_of(tmp_path / name)


def test_a_cell_may_be_long_and_the_limit_of_others_stays(tmp_path):
    long = "x" * 300_000
    path = written(tmp_path / "a.csv", f"chosen,n\n{long},1\nb,2\n".encode())
    before = csv.field_size_limit(1000)
    try:
        rows = read_rows(str(path))
        assert next(rows) == (2, {"chosen": long, "n": "1"})
        assert csv.field_size_limit() == 1000
        assert list(rows) == [(3, {"chosen": "b", "n": "2"})]
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize(("ending", "between"), [("csv", ","), ("tsv", "\t")])
def test_broken_quotes_are_bad_rows_and_swallow_nothing(tmp_path, ending, between):
    text = 'a,b\n1,"x" y\n2,say "hi"\n\n3,"two\nlines"\n4,"never\nclosed\n5,6\n'
    found = rows_of(written(tmp_path / f"a.{ending}", text.replace(",", between).encode()))
    assert [number for number, _ in found] == [2, 3, 5, 7]
    assert str(found[0][1]).startswith("not CSV (")
    assert [row for _, row in found[1:3]] == [
        {"a": "2", "b": 'say "hi"'},
        {"a": "3", "b": "two\nlines"},
    ]
    assert str(found[3][1]) == "not CSV (unexpected end of data)"
    with pytest.raises(UsageError, match="not CSV"):
        rows_of(written(tmp_path / f"header.{ending}", b'"a'))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_encodings_are_told_to_be_utf_8(tmp_path, name, encoding):
    content = ("" if encoding.endswith(("16", "32")) else "\ufeff") + LINES.decode()
    path = written(tmp_path / name, content.encode(encoding))
    with pytest.raises(UsageError, match=f"{name} is in UTF-16 or UTF-32. Save it in UTF-8"):
        rows_of(path)
    packed = written(tmp_path / f"{name}.gz", gzip.compress(content.encode(encoding)))
    with pytest.raises(UsageError, match="Save it in UTF-8"):
        rows_of(packed)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, zstd])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_damaged_compressed_files_are_named(tmp_path, compress, name):
    ending = {gzip.compress: "gz", bz2.compress: "bz2", zstd: "zst"}[compress]
    path = tmp_path / f"{name}.{ending}"
    content = compress(LINES)
    for damaged in (content[:-3], content[:10], LINES):
        with pytest.raises(UsageError, match=f"{path.name} cannot be read: "):
            rows_of(written(path, damaged))
    assert rows_of(written(path, b"")) == []


def test_data_sets_that_were_saved_to_disk(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.select([2, 0]).save_to_disk(tmp_path / "one")
    splits = datasets.DatasetDict(train=dataset, test=dataset.select([1]))
    splits.save_to_disk(tmp_path / "some")
    assert rows_of(tmp_path / "one") == [(1, ROWS[2]), (2, ROWS[0])]
    assert rows_of(f"{tmp_path}/some:test") == [(1, ROWS[1])]
    for name in ("some", "some:other"):
        with pytest.raises(UsageError, match=r"Give one of .*/some:train, .*/some:test\.$"):
            rows_of(tmp_path / name)
    with pytest.raises(UsageError, match="one has no splits. Remove :train"):
        rows_of(f"{tmp_path}/one:train")


@pytest.mark.parametrize("damage", ["[]", "{", '{"_data_files": [{"filename": "absent"}]}', None])
def test_damaged_data_sets_are_named(tmp_path, damage):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    if damage is None:
        for part in (tmp_path / "saved").glob("*.arrow"):
            part.write_bytes(part.read_bytes()[:200])
    else:
        (tmp_path / "saved" / "state.json").write_text(damage)
    with pytest.raises(UsageError, match="saved cannot be read: "):
        rows_of(tmp_path / "saved")


HUB = {None: ["train", "test"], "extra": ["train", "dev"], "test": ["train"]}
"""The splits of a data set by config."""


@pytest.mark.parametrize(
    ("source", "config", "split", "revision"),
    [
        ("org/name", None, "train", None),
        ("org/name:test", None, "test", None),
        ("org/name:extra", "extra", "train", None),
        ("org/name:extra:dev", "extra", "dev", None),
        ("org/name:test:train", "test", "train", None),
        ("org/name@v1.0", None, "train", "v1.0"),
        ("org/name:test@main", None, "test", "main"),
        ("org/name:extra@refs/pr/1", "extra", "train", "refs/pr/1"),
        ("org/name:extra:dev@0a1b", "extra", "dev", "0a1b"),
    ],
)
def test_hub_ids_with_config_split_and_revision(
    tmp_path, monkeypatch, source, config, split, revision
):
    def load_dataset(path, name=None, *, split, revision=None):
        if name not in HUB:
            raise ValueError(f"BuilderConfig {name!r} not found.")
        if split not in HUB[name]:
            raise ValueError(f"Unknown split {split!r}.")
        row = {"path": path, "name": name, "split": split, "revision": revision}
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    expected = {"path": "org/name", "name": config, "split": split, "revision": revision}
    assert rows_of(source) == [(1, expected)]
    with pytest.raises(UsageError, match="'odd' is no split .* and no config .*'odd' not found"):
        rows_of("org/name:odd")
    with pytest.raises(UsageError, match=r"org/name:extra:odd cannot be read: Unknown split"):
        rows_of("org/name:extra:odd")
    for absent in ("org/name.jsonl:test", "org/name.csv.gz", "org/name:a:b:c", "org/name:"):
        with pytest.raises(UsageError, match="does not exist"):
            rows_of(absent)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a"])
def test_pipes_sockets_and_devices_are_refused_at_once(tmp_path, monkeypatch, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UsageError, match=f"{name}: is a pipe; write it to a file first"):
        rows_of(tmp_path / name)
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"s{name}")
        with pytest.raises(UsageError, match=f"s{name}: is a socket; write it"):
            rows_of(f"s{name}")
    (tmp_path / f"z{name}").symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=f"z{name}: is a device; write it"):
        rows_of(tmp_path / f"z{name}")


def test_files_that_vanish_or_may_not_be_read_are_named(tmp_path, monkeypatch):
    path = written(tmp_path / "a.jsonl", LINES)
    monkeypatch.setattr(readers, "refuse_streams", lambda path, what: path.unlink())
    with pytest.raises(UsageError, match=r"a\.jsonl cannot be read: .*No such file"):
        rows_of(path)
    written(path, LINES)
    monkeypatch.setattr(readers, "refuse_streams", lambda path, what: None)

    def open_it(self, mode):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", open_it)
    with pytest.raises(UsageError, match=r"a\.jsonl cannot be read: .*Permission denied"):
        rows_of(path)
    (tmp_path / "b.jsonl").symlink_to("absent")
    with pytest.raises(UsageError, match="b.jsonl does not exist"):
        rows_of(tmp_path / "b.jsonl")


def test_damaged_parquet_files_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2], whole[4:], whole[:-1]):
        with pytest.raises(UsageError, match=r"a\.parquet cannot be read: .*[^.]\. Give"):
            rows_of(written(path, content))
    far = pa.table({"when": pa.array([2**60], pa.timestamp("ms"))})  # no date of Python's
    pq.write_table(far, path)
    with pytest.raises(UsageError, match=r"a\.parquet cannot be read: "):
        rows_of(path)
