"""`cleaned.jsonl` holds every column of the data, whatever its type."""

import json
import math
from datetime import datetime
from decimal import Decimal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softpref.auditing.export import EXPORTS, Trusted, write_cleaned


@pytest.mark.parametrize("export", EXPORTS)
def test_columns_that_json_cannot_hold_are_written_as_text(tmp_path, caplog, export):
    caplog.set_level("INFO", "softpref")
    when = datetime(2024, 1, 2, 3, 4)
    foreign = {"when": when, "price": Decimal("1.50"), "score": math.nan, "raw": b"a"}
    rows = [{"prompt": f"p{n}", "chosen": "c", "rejected": "r", **foreign} for n in range(3)]
    rows = [row | {"is_flipped": flag} for row, flag in zip(rows, (None, None, None), strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    audited = datasets.Dataset.from_dict({"row": [1, 2, 3], "p_correct": [0.9, 0.2, 0.8]})
    path = write_cleaned(
        str(tmp_path / "in.parquet"), tmp_path, audited, Trusted({}), export, marks={}
    )
    cleaned = [json.loads(line, parse_constant=pytest.fail) for line in path.open()]
    plain = {"when": "2024-01-02T03:04:00", "price": "1.50", "score": None, "raw": "YQ=="}
    assert len(cleaned) == (2 if export == "drop" else 3)
    assert all(row | plain == row for row in cleaned)
    assert all(row["is_flipped"] is None for row in cleaned)
    (said,) = caplog.messages
    assert said.startswith("cleaned.jsonl: written in another form: when as ISO 8601 text, price")
