"""`cleaned.jsonl` holds every column of the data, whatever its type."""

import json
import math
from datetime import datetime
from decimal import Decimal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softpref.auditing.export import EXPORTS, TrustedLabels, write_cleaned
from softpref.data.bad_rows import BadRow
from softpref.training.output import write_lines


@pytest.mark.parametrize("export", EXPORTS)
def test_columns_that_json_cannot_hold_are_written_as_text(tmp_path, caplog, export):
    caplog.set_level("INFO", "softpref")
    when = datetime(2024, 1, 2, 3, 4)
    foreign = {"when": when, "price": Decimal("1.50"), "score": math.nan, "raw": b"a"}
    rows = [{"prompt": f"p{n}", "chosen": "c", "rejected": "r", **foreign} for n in range(3)]
    rows = [row | {"is_flipped": flag} for row, flag in zip(rows, (None, None, None), strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    audited = datasets.Dataset.from_dict({"row": [1, 2, 3], "p_correct": [0.9, 0.2, 0.8]})
    left_out = write_cleaned(
        str(tmp_path / "in.parquet"), tmp_path, audited, TrustedLabels({}), export, marks={}
    )
    path = tmp_path / "cleaned.jsonl"
    cleaned = [json.loads(line, parse_constant=pytest.fail) for line in path.open()]
    plain = {"when": "2024-01-02T03:04:00", "price": "1.50", "score": None, "raw": "YQ=="}
    assert len(cleaned) == (2 if export == "drop" else 3)
    dropped = "2 of 3 rows; 1 are dropped: 1 suspect"
    assert str(left_out) == f"cleaned.jsonl: {dropped if export == 'drop' else '3 of 3 rows'}"
    assert all(row | plain == row for row in cleaned)
    assert all(row["is_flipped"] is None for row in cleaned)
    (said,) = caplog.messages
    assert said.startswith("cleaned.jsonl: converted for JSON: when as ISO 8601 text, price")


def test_rows_that_are_left_out_are_counted_by_reason(tmp_path):
    rows = [{"prompt": f"p{n}", "chosen": "c", "rejected": "r"} for n in range(7)]
    rows[0]["rejected"] = "c"
    write_lines(tmp_path / "in.jsonl", [row | {"uid": f"u{n}"} for n, row in enumerate(rows)])
    source = str(tmp_path / "in.jsonl")
    audited = datasets.Dataset.from_dict({"row": [3, 4, 5], "p_correct": [0.9, 0.2, 0.8]})
    trusted = TrustedLabels.of(datasets.Dataset.from_list([{"prompt": "p1", "chosen": "r",
                                                      "rejected": "c"}]))  # fmt: skip
    unused = [BadRow(1, "chosen and rejected are identical", source),
              BadRow(6, "longer than --max_length", source)]  # fmt: skip
    left_out = write_cleaned(source, tmp_path, audited, trusted, "drop", {"u4": 0.0}, unused=unused)
    assert len((tmp_path / "cleaned.jsonl").read_text().splitlines()) == 1
    assert str(left_out) == (
        "cleaned.jsonl: 1 of 7 rows; 6 are dropped: 1 trusted pairs that the data label the other "
        "way, 1 suspect, 1 marked wrong by --marks, 1 not audited (not drawn by --mix, "
        "or held out and not usable), 2 not usable ("
        f"{source}, line 1: chosen and rejected are identical; line 6: longer than --max_length)"
    )
