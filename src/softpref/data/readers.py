"""Read raw rows of a file, saved data set or hub data set, and write rows to an Arrow file.

Rows are streamed to disk, never held in a Python list.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from softpref.data.temporary import temporary_folder
from softpref.data.text_files import COMPRESSION, TEXT_READERS, refuse_duplicate_columns
from softpref.data.text_files import RowError as RowError
from softpref.errors import UsageError, refuse_streams

logger = logging.getLogger(__name__)

_PART = r"(?::(?P<{}>[\w.-]+))?"
_HUB_ID = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)"
    + _PART.format("first")
    + _PART.format("second")
    + r"(?:@(?P<revision>[\w./-]+))?"
)
_SAVED = ("dataset_dict.json", "state.json")  # `save_to_disk` writes one of them
_CHUNK = 1000  # rows held in memory at a time
_STORED = 4000  # rows per written batch; each batch of an open file takes memory
_UNREADABLE = (
    *(OSError, ValueError, OverflowError, RecursionError),
    *(pa.ArrowException, datasets.exceptions.DatasetsError),
)


def read_rows(source: str) -> Iterator[tuple[int, object]]:
    """Yield the raw rows of a source with their numbers, and a RowError for an unparsable line.

    A source is one of

    - a file ending in .jsonl, .json (a list of objects, or JSON Lines), .csv or .tsv, each also
      followed by .gz, .bz2 or .zst, or in .parquet; text is UTF-8;
    - a directory that `Dataset.save_to_disk` wrote, or `DIRECTORY:SPLIT` of a `DatasetDict`;
    - if no such path exists, a hub id: `org/name`, `org/name:split`, `org/name:config` or
      `org/name:config:split`, each optionally with `@revision` (a branch, tag or commit). A
      single part after the name is a split if the default config has such a split, else a
      config. The default split is `train`.

    Numbers are 1-based: lines of JSON Lines, CSV and TSV, rows of all other formats.

    Raises:
        UsageError: If the source as a whole cannot be read.
    """
    with _reading(source):
        found = _find(source)
        if isinstance(found, datasets.Dataset):
            yield from enumerate(dataset_rows(found), start=1)
        else:
            yield from _READERS[_ending(found)](found)


def schema_of(source: str) -> pa.Schema | None:
    """Return the schema of a source with its metadata, or None for text.

    Raises:
        UsageError: If the source cannot be read.
    """
    with _reading(source):
        found = _find(source)
        if isinstance(found, datasets.Dataset):
            return found.features.arrow_schema
        if _ending(found) != ".parquet":
            return None
        with _parquet(found) as file:
            return file.schema_arrow


def dataset_rows(dataset: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set as plain Python values, whatever its format.

    Numbers in JSON are exact, where `datasets` would round them to ten decimals.
    """
    for batch in dataset.with_format("arrow").iter(batch_size=_CHUNK):
        columns = [
            _plain(values, batch.schema.field(at).type) for at, values in enumerate(batch.columns)
        ]
        for values in zip(*columns, strict=True):
            yield dict(zip(batch.column_names, values, strict=True))


def _plain(values: pa.ChunkedArray, kind: pa.DataType) -> list[Any]:
    plain = values.to_pylist()
    if isinstance(kind, pa.JsonType):
        return [text and json.loads(text) for text in plain]
    if pa.types.is_list(kind) and isinstance(kind.value_type, pa.JsonType):
        return [texts and [text and json.loads(text) for text in texts] for texts in plain]
    return plain


def column(dataset: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """Return one column in Arrow, memory-mapped like the data set."""
    return dataset.select_columns([name]).with_format("arrow")[:].column(name)


def store(rows: Iterator[Any], schema: pa.Schema) -> datasets.Dataset:
    """Stream rows into an Arrow file that is removed when the process ends."""
    written = pa.schema([(field.name, _stored(field.type)) for field in schema])
    texts = {each.name: each.type for each in schema if _stored(each.type) != each.type}

    def batches() -> Iterator[pa.RecordBatch]:
        while chunk := list(itertools.islice(rows, _STORED)):
            if texts:
                chunk = [
                    row | {name: _as_json(row.get(name), kind) for name, kind in texts.items()}
                    for row in chunk
                ]
            batch = pa.RecordBatch.from_pylist(chunk, schema=written)
            yield batch if written == schema else batch.cast(schema)

    return store_batches(batches(), schema)


def store_batches(batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> datasets.Dataset:
    """Stream batches of columns into an Arrow file that is removed when the process ends."""
    # Not `Dataset.from_generator`: its cache depends only on the arguments.
    file, path = tempfile.mkstemp(".arrow", dir=_folder_in(tempfile.gettempdir()))
    os.close(file)
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return datasets.Dataset.from_file(path)


@functools.cache  # a lock for each set would use up the files that a process may have open
def _folder_in(_home: str) -> str:
    folder, remove = temporary_folder()
    atexit.register(remove)
    return folder


def _as_json(value: Any, kind: pa.DataType) -> Any:
    """Return the text of an object, or the texts of a list of them; None stays."""
    if value is None:
        return None
    return [json.dumps(each) for each in value] if pa.types.is_list(kind) else json.dumps(value)


def _stored(kind: pa.DataType) -> pa.DataType:
    """Return the storage type of values: Arrow cannot convert Python objects to JSON."""
    if pa.types.is_list(kind):
        return pa.list_(_stored(kind.value_type))
    return pa.string() if isinstance(kind, pa.JsonType) else kind


@contextlib.contextmanager
def _reading(source: str) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except _UNREADABLE as error:
        remedy = (
            "Give JSONL, JSON (a list of objects) or CSV in UTF-8, Parquet, a data set that was "
            "saved to disk, or a hub id."
        )
        reason = " ".join(str(error).split()).rstrip(". ")
        raise UsageError(f"{source} cannot be read: {reason}. {remedy}") from error


def _find(source: str) -> Path | datasets.Dataset:
    path = Path(source)
    if path.is_dir():
        return _saved(path, None)
    if path.exists():
        refuse_streams(path, source)
        if _ending(path) not in _READERS:
            raise UsageError(
                f"{source}: unknown extension. Use one of {', '.join(_READERS)}; all but .parquet "
                f"may be compressed ({', '.join(COMPRESSION)})."
            )
        return path
    folder, _, split = source.rpartition(":")
    if folder and _is_saved(Path(folder)):
        return _saved(Path(folder), split)
    hub = _HUB_ID.fullmatch(source)
    if hub is None or _ending(Path(hub["name"])) in _READERS:
        raise UsageError(f"{source} does not exist. Check the path.")
    return _from_hub(**hub.groupdict())


def _ending(path: Path) -> str:
    """Return the extension of the format, without that of a compression."""
    ending = path.suffix.lower()
    inner = path.with_suffix("").suffix.lower()
    return inner if ending in COMPRESSION and inner in TEXT_READERS else ending


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _SAVED)


def _saved(folder: Path, split: str | None) -> datasets.Dataset:
    if not _is_saved(folder):
        raise UsageError(f"{folder} is a directory. Name one file in it.")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the saved data set is damaged ({error!r})") from error
    if isinstance(loaded, datasets.Dataset):
        if split is not None:
            raise UsageError(f"{folder} has no splits. Remove :{split}.")
        return loaded
    if split not in loaded:
        names = ", ".join(f"{folder}:{name}" for name in loaded)
        raise UsageError(f"{folder} has several splits. Give one of {names}.")
    return loaded[split]


def _from_hub(
    name: str, first: str | None, second: str | None, revision: str | None
) -> datasets.Dataset:
    at = {"revision": revision} if revision else {}
    if second:
        return datasets.load_dataset(name, first, split=second, **at)
    try:
        return datasets.load_dataset(name, split=first or "train", **at)
    except ValueError as no_split:
        if first is None:
            raise
        try:
            loaded = datasets.load_dataset(name, first, split="train", **at)
        except ValueError as no_config:
            raise ValueError(
                f"{first!r} is no split ({no_split}) and no config ({no_config})"
            ) from None
    logger.info(f"{name}: {first!r} is read as a config, split train")
    return loaded


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    with pq.ParquetFile(path) as file:
        refuse_duplicate_columns(path, file.schema_arrow.names)
        yield file


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    with _parquet(path) as file:
        batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=_CHUNK))
        yield from enumerate(itertools.chain.from_iterable(batches), start=1)


_READERS = {**TEXT_READERS, ".parquet": _parquet_rows}
