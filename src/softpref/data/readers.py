"""Raw rows of a file or hub data set, and rows into an Arrow file.

Rows stream through: they live on disk, never in a Python list.
"""

from __future__ import annotations

import atexit
import contextlib
import csv
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from softpref.errors import UsageError

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>[\w.-]+))?")
_CHUNK = 1000  # rows held in memory at a time
_STORED = 4000  # rows written at a time: what each batch costs to have open, a million pairs feel
_UNREADABLE = (
    *(OSError, ValueError, RecursionError, csv.Error),
    *(pa.ArrowException, datasets.exceptions.DatasetsError),
)


class RowError(ValueError):
    """Why one row cannot be used."""


def read_rows(source: str) -> Iterator[tuple[int, object]]:
    """Yields the raw rows of a source with their numbers; unparsable lines come as a RowError.

    Raises:
        UsageError: If the source as a whole cannot be read.
    """
    try:
        yield from _open(source)
    except UsageError:
        raise
    except _UNREADABLE as error:
        remedy = "Give JSONL, JSON (a list of objects) or CSV in UTF-8, Parquet, or a hub id."
        raise UsageError(f"{source} cannot be read: {error}. {remedy}") from error


def dataset_rows(dataset: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """Yields the rows of a data set as plain Python values, whatever its format is set to."""
    for batch in dataset.with_format(None).iter(batch_size=_CHUNK):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def column(dataset: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """One column as Arrow holds it, on disk where the data set is; never a Python list."""
    return dataset.select_columns([name]).with_format("arrow")[:].column(name)


def store(rows: Iterator[Any], schema: pa.Schema) -> datasets.Dataset:
    """Stream rows into an Arrow file that lasts as long as the process."""
    # Always a new file: `Dataset.from_generator` has a cache that knows only its arguments.
    folder = tempfile.mkdtemp(prefix="softpref-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = os.path.join(folder, "rows.arrow")
    features = datasets.Features.from_arrow_schema(schema)
    written = pa.schema([(field.name, _stored(field.type)) for field in schema])
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while chunk := list(itertools.islice(rows, _STORED)):
            if written != schema:
                chunk = [features.encode_example(row) for row in chunk]
            batch = pa.RecordBatch.from_pylist(chunk, schema=written)
            writer.write_batch(batch if written == schema else batch.cast(schema))
    return datasets.Dataset.from_file(path)


def _stored(kind: pa.DataType) -> pa.DataType:
    """Return the type that values are written in: Arrow makes no JSON of Python objects."""
    if pa.types.is_list(kind):
        return pa.list_(_stored(kind.value_type))
    return pa.string() if isinstance(kind, pa.JsonType) else kind


def _open(source: str) -> Iterator[tuple[int, object]]:
    path = Path(source)
    if path.is_dir():
        raise UsageError(f"{source} is a directory. Name one file in it.")
    ending = path.suffix.lower()
    if not path.exists():
        hub = _HUB_ID.fullmatch(source)
        if hub is None or ending in _READERS:
            raise UsageError(f"{source} does not exist. Check the path.")
        dataset = datasets.load_dataset(hub["name"], split=hub["split"] or "train")
        return enumerate(dataset_rows(dataset), start=1)
    if ending not in _READERS:
        raise UsageError(f"{source}: unknown ending. Use one of {', '.join(_READERS)}.")
    return _READERS[ending](path)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, object]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    yield number, _parse_json(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield number, RowError(f"not JSON ({error})")


def _parse_json(text: str) -> object:
    value = json.loads(text)
    if "\\ud" in text.lower():  # half a surrogate pair is JSON, but no UTF-8 file can hold it
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _json_rows(path: Path) -> Iterator[tuple[int, object]]:
    text = path.read_text(encoding="utf-8-sig")
    rows = _parse_json(text) if text.strip() else []
    if not isinstance(rows, list):
        raise ValueError("it is JSON, but not a list of objects")
    return enumerate(rows, start=1)


def _csv_rows(path: Path) -> Iterator[tuple[int, object]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        line = 1 + (reader.line_num if reader.fieldnames else 0)
        for cells in reader:
            yield line, _csv_row(cells)
            line = reader.line_num + 1


def _csv_row(cells: dict[str, str | None]) -> object:
    """CSV is all text: the two optional columns that are not are read as JSON, in any case."""
    row: dict[str, Any] = {**cells}
    for column in {"is_flipped", "soft_label"} & row.keys():
        with contextlib.suppress(ValueError):
            row[column] = json.loads(row[column].lower()) if row[column] else None
    return RowError("more cells than the header") if None in row else row


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    with pq.ParquetFile(path) as file:
        batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=_CHUNK))
        yield from enumerate(itertools.chain.from_iterable(batches), start=1)


_READERS = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
