"""Write rows to JSON Lines, JSON, CSV and Parquet, with all their columns."""

from __future__ import annotations

import base64
import csv
import itertools
import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]
_CHUNK = 1000  # rows per Arrow table

logger = logging.getLogger(__name__)


def json_rows(rows: Iterable[Row], output: str) -> Iterator[Row]:
    """Yield rows as JSON values, and log at the end which columns were converted.

    NaN and infinity become null, since they are not valid JSON. Dates and times become ISO 8601
    text, decimals text with all digits, bytes base64.
    """
    changes: dict[str, dict[str, None]] = defaultdict(dict)  # by column, in order
    for row in rows:
        yield {column: _plain(value, changes[column]) for column, value in row.items()}
    converted = [f"{column} {how}" for column, hows in changes.items() for how in hows]
    if converted:
        logger.info(f"{output}: converted for JSON: {', '.join(converted)}")


def _plain(value: Any, changes: dict[str, None]) -> Any:
    """Return a value that JSON can hold, and record a conversion in `changes`."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, changes) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item, changes) for key, item in value.items()}
    if isinstance(value, float) and math.isfinite(value):
        return value
    how, plain = _converted(value)
    changes[how] = None
    return plain


def _converted(value: Any) -> tuple[str, object]:
    if isinstance(value, float):
        return "NaN or infinite as null", None
    if isinstance(value, date | time):  # datetimes are dates
        return "as ISO 8601 text", value.isoformat()
    if isinstance(value, Decimal):
        return "as decimal text", str(value)
    if isinstance(value, bytes):
        return "as base64 text", base64.b64encode(value).decode()
    return f"({type(value).__name__}) as text", str(value)


def write_rows(path: Path, rows: Iterator[Row], output: str, schema: pa.Schema | None) -> None:
    """Write rows to a path.

    Args:
        path: The file.
        rows: The rows.
        output: Its final name, which sets the format and is used in messages.
        schema: The Parquet schema with metadata; inferred if None.
    """
    ending = Path(output).suffix.lower()
    if ending == ".parquet":
        _write_parquet(path, rows, schema)
    else:
        _TEXT_WRITERS[ending](path, json_rows(rows, output))


def _write_jsonl(path: Path, rows: Iterator[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_json(path: Path, rows: Iterator[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for index, row in enumerate(rows):
            file.write((",\n" if index else "[\n") + json.dumps(row, ensure_ascii=False))
        file.write("\n]\n")


def _write_csv(path: Path, rows: Iterator[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, fieldnames=list(row))
                writer.writeheader()
            writer.writerow({column: _cell(value) for column, value in row.items()})


def _cell(value: object) -> object:
    if isinstance(value, list | dict):
        raise ValueError("a CSV cell holds text, not lists or objects")
    return str(value).lower() if isinstance(value, bool) else value


def _write_parquet(path: Path, rows: Iterator[Row], schema: pa.Schema | None) -> None:
    tables = []
    while chunk := list(itertools.islice(rows, _CHUNK)):
        columns = dict.fromkeys(column for row in chunk for column in row)
        values = {column: [row.get(column) for row in chunk] for column in columns}
        tables.append(pa.table(values, schema=schema))
    pq.write_table(pa.concat_tables(tables, promote_options="permissive"), path)


_TEXT_WRITERS = {".jsonl": _write_jsonl, ".json": _write_json, ".csv": _write_csv}
ENDINGS = (*_TEXT_WRITERS, ".parquet")
"""The extensions that `write_rows` supports."""
