"""Raw rows of JSON Lines, JSON, CSV and TSV, compressed or not."""

from __future__ import annotations

import codecs
import contextlib
import csv
import functools
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from softpref.errors import UsageError

COMPRESSION = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
"""Compression by file extension."""

_NOT_UTF8 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # 32 LE starts as 16 LE
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_LONGEST_CELL = 2**31 - 1  # characters; the largest limit that csv accepts on every platform


class RowError(ValueError):
    """One row cannot be used; the message is the reason."""


@contextlib.contextmanager
def _open(path: Path) -> Iterator[io.BufferedReader]:
    with path.open("rb") as file:
        if compression := COMPRESSION.get(path.suffix.lower()):
            stream = pa.CompressedInputStream(file, compression)
            file = io.BufferedReader(stream)
        if file.peek(2).startswith(_NOT_UTF8):
            raise UsageError(f"{path} is in UTF-16 or UTF-32. Save it in UTF-8.")
        yield file


def _jsonl_rows(path: Path) -> Iterator[tuple[int, object]]:
    with _open(path) as file:
        yield from _lines(file)


def _lines(lines: Iterable[bytes]) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                text = line.decode("utf-8-sig")
                value = json.loads(text, object_pairs_hook=_object)
                row = _encodable(value) if _HALF_PAIR.search(text) else value
            except (ValueError, RecursionError) as error:
                row = RowError(f"not JSON ({error})")
            yield number, row


def _json_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield the items of a list, or of JSON Lines if the first two lines begin with an object."""
    with _open(path) as file:
        head: list[bytes] = []
        filled: list[bytes] = []
        while len(filled) < 2 and (line := file.readline()):
            head.append(line)
            if stripped := line.removeprefix(codecs.BOM_UTF8).strip():
                filled.append(stripped)
        if len(filled) == 2 and all(line.startswith(b"{") for line in filled):
            yield from _lines(itertools.chain(head, file))
            return
        text = (b"".join(head) + file.read()).decode("utf-8-sig")
    rows = json.loads(text, object_pairs_hook=_object) if text.strip() else []
    if not isinstance(rows, list):
        raise ValueError(
            "it is JSON, but not a list (a single line of JSON Lines goes in a .jsonl)"
        )
    if _HALF_PAIR.search(text):
        rows = map(_encodable, rows)
    yield from enumerate(rows, start=1)


def _object(items: list[tuple[str, object]]) -> object:
    """Return a JSON object, or a RowError if it, or an object in it, has a duplicate key.

    Objects are built from the inside out, so the error propagates to the row.
    """
    found = dict(items)
    if len(found) < len(items):
        return RowError(f"the key {_duplicate([key for key, _ in items])!r} appears twice")
    return next(filter(None, map(_error_in, found.values())), found)


def _error_in(value: object) -> RowError | None:
    if isinstance(value, list):
        return next(filter(None, map(_error_in, value)), None)
    return value if isinstance(value, RowError) else None


def _encodable(value: object) -> object:
    """Refuse lone surrogates, which are valid JSON but cannot be encoded in UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        return RowError(f"not JSON ({error})")
    return value


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[int, object]]:
    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        # Strict, so that an unclosed quote does not silently consume the rest of the file.
        rows = _cells(csv.reader(text, delimiter=delimiter, strict=True))
        _, header = next(rows, (0, []))
        if isinstance(header, RowError):
            raise header
        refuse_duplicate_columns(path, header)
        for line, cells in rows:
            yield line, cells if isinstance(cells, RowError) else _csv_row(header, cells)


def _cells(reader: Any) -> Iterator[tuple[int, list[str] | RowError]]:
    """Yield the cells of every non-empty row, with its first line."""
    while True:
        line = cast(int, reader.line_num) + 1
        limit = csv.field_size_limit(_LONGEST_CELL)  # a global setting: raised for one row only
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells = RowError(f"not CSV ({error})")
        finally:
            csv.field_size_limit(limit)
        if cells:
            yield line, cells


def _csv_row(header: Sequence[str], cells: Sequence[str]) -> object:
    """Return a CSV row; parse the two optional columns that are not text as JSON, in any case."""
    if len(cells) > len(header):
        return RowError("more cells than the header")
    row: dict[str, Any] = dict(itertools.zip_longest(header, cells))
    for column in {"is_flipped", "soft_label"} & row.keys():
        with contextlib.suppress(ValueError, RecursionError):
            row[column] = json.loads(row[column].lower()) if row[column] else None
    return row


def refuse_duplicate_columns(path: Path, names: Sequence[str]) -> None:
    """Refuse a table with two columns of one name, since a row can hold only the last.

    Raises:
        UsageError: Two columns have the same name.
    """
    if (name := _duplicate(names)) is not None:
        raise UsageError(f"{path}: the column {name!r} appears twice. Rename or remove one.")


def _duplicate(names: Sequence[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


TEXT_READERS: dict[str, Callable[[Path], Iterator[tuple[int, object]]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": functools.partial(_csv_rows, delimiter=","),
    ".tsv": functools.partial(_csv_rows, delimiter="\t"),
}
