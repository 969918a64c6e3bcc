"""Pair rows from JSONL, JSON, Parquet, CSV or a hub id, in any of TRL's preference formats.

A pair row is a dict with `uid`, `row` (1-based line or row number in its source), `prompt`,
`chosen`, `rejected` (each text, or a list of {"role", "content"} messages) and, in every row or in
none, `is_flipped` and `soft_label`. Rows stream through: they live in an Arrow file, never in a
Python list, and a bad row is named by its place.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import datasets
import pyarrow as pa
from tqdm import tqdm

from softpref.data.books import Books
from softpref.data.readers import RowError, dataset_rows, read_rows, store
from softpref.errors import UsageError

Text = str | list[dict[str, str]]
Pair = dict[str, Any]  # a pair row, as above
OnBadRow = Literal["stop", "skip"]

_OPTIONAL = ("uid", "is_flipped", "soft_label")


@dataclass(frozen=True)
class BadRow:
    """A row that was left out: its 1-based number and the reason."""

    row: int
    reason: str


@dataclass(frozen=True)
class LoadedPairs:
    """What a source gave.

    Attributes:
        pairs: The pair rows, backed by an Arrow file that lasts as long as the process.
        source: The path, hub id or name the rows came from.
        bad_rows: The rows left out under `on_bad_row="skip"`.
        fingerprint: SHA-256 over the content of the kept rows, in order.
        contradicting: Number of distinct pairs that are labelled both ways.
        duplicates: Number of rows that repeat an earlier row, label included.
    """

    pairs: datasets.Dataset
    bad_rows: tuple[BadRow, ...]
    source: str
    fingerprint: str
    contradicting: int
    duplicates: int


def load_pairs(source: str, *, on_bad_row: OnBadRow = "stop") -> LoadedPairs:
    """Reads the pairs of a file or of a hub data set.

    Args:
        source: A path ending in .jsonl, .json (a list of objects), .parquet or .csv or, where no
            such path exists, a hub id `org/name` or `org/name:split` (split `train` by default).
        on_bad_row: Whether a bad row is an error or is left out and listed.

    Raises:
        UsageError: If the source cannot be read, holds a bad row (under `stop`) or no good one.
    """
    return _collect(read_rows(source), Intake(source, on_bad_row))


def pairs_from_dataset(
    dataset: datasets.Dataset, name: str, *, on_bad_row: OnBadRow = "stop"
) -> LoadedPairs:
    """Reads the pairs of a data set as `load_pairs` does; messages call it `name`.

    Raises:
        UsageError: If there is a bad row (under `stop`) or no good one.
    """
    return _collect(enumerate(dataset_rows(dataset), start=1), Intake(name, on_bad_row))


def subset(loaded: LoadedPairs, pairs: datasets.Dataset, source: str) -> LoadedPairs:
    """Keeps the books anew for pairs taken out of a source; their rows keep their numbers."""
    rows = ((row["row"], row) for row in dataset_rows(pairs))
    kept = _collect(rows, Intake(source, "stop"))
    return replace(kept, bad_rows=loaded.bad_rows)


def content_key(prompt: Text, chosen: Text, rejected: Text) -> str:
    """Hashes what a pair is about, whichever of its responses is labelled chosen."""
    responses = sorted(json.dumps(response, sort_keys=True) for response in (chosen, rejected))
    return _hash(json.dumps([prompt, responses], sort_keys=True))


def in_sorted_order(chosen: Text, rejected: Text) -> bool:
    """Says which of the two ways to label one content this is."""
    return json.dumps(chosen) < json.dumps(rejected)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def place(source: str, row: int) -> str:
    """Names a row as its source counts it: a line of a text file, else a row."""
    return f"{source}, {'line' if source.lower().endswith(('.jsonl', '.csv')) else 'row'} {row}"


class BadRows:
    """The bad rows of one source; under `stop` only the first is kept, the rest are counted."""

    def __init__(self, source: str, on_bad_row: OnBadRow) -> None:
        self.source = source
        self._on_bad_row = on_bad_row
        self._rows: list[BadRow] = []
        self._count = 0

    @property
    def stopped(self) -> bool:
        """Whether nothing more needs keeping, because the source will be refused."""
        return self._on_bad_row == "stop" and self._count > 0

    def add(self, row: int, reason: str) -> None:
        """Notes one bad row."""
        if not self.stopped:
            self._rows.append(BadRow(row, reason))
        self._count += 1

    def settle(self, kept: int) -> tuple[BadRow, ...]:
        """Returns the rows left out, after the last row, `kept` of which were good.

        Raises:
            UsageError: If there are bad rows under `stop`, or no good row.
        """
        if kept and not self.stopped:
            return tuple(self._rows)
        if not self._rows:
            raise UsageError(f"{self.source} holds no rows. Give a source with at least one pair.")
        more = f" (and {self._count - 1} more bad rows)" if self._count > 1 else ""
        remedy = "Mend it or pass --on-bad-row skip" if self.stopped else "No good row is left"
        first = self._rows[0]
        raise UsageError(f"{place(self.source, first.row)}: {first.reason}{more}. {remedy}.")


class Intake:
    """Checks the rows of one source one by one and keeps the books about them."""

    def __init__(self, source: str, on_bad_row: OnBadRow) -> None:
        self.bad = BadRows(source, on_bad_row)
        self.kept = 0
        self.contradicting = 0
        self.duplicates = 0
        self._form = ""
        self._books = Books()
        self.digest = hashlib.sha256()  # of the kept rows' content

    def admit(self, row: int, raw: object) -> Pair | None:
        """Returns the row as a pair, or None if it is bad or follows a bad row under `stop`."""
        try:
            pair = self._enter(row, parse_pair(raw))
        except RowError as error:
            self.bad.add(row, str(error))
            return None
        return None if self.bad.stopped else pair

    def _enter(self, row: int, fields: Pair) -> Pair:
        form = _form(fields)
        if form != (self._form or form):
            raise RowError(f"the row has {form}, the rows before it {self._form}")
        key = content_key(fields["prompt"], fields["chosen"], fields["rejected"])
        ahead, reverse = self._books.orders(key)
        seen = ahead + reverse
        uid = fields.pop("uid", None) or (_hash(f"{key} {seen}") if seen else key)
        if (first := self._books.row_of(uid)) is not None:
            raise RowError(f"uid {uid!r} is already that of {place(self.bad.source, first)}")
        in_order = in_sorted_order(fields["chosen"], fields["rejected"])
        self.duplicates += (ahead if in_order else reverse) > 0
        ahead, reverse = ahead + in_order, reverse + (not in_order)
        self.contradicting += (ahead if in_order else reverse) == 1 and ahead * reverse > 0
        self._books.enter_order(key, ahead=in_order)
        self._books.enter_uid(uid, row)
        self._form = form
        self.kept += 1
        self.digest.update(json.dumps([uid, fields]).encode() + b"\n")
        return {"uid": uid, "row": row, **fields}


def parse_pair(raw: object) -> Pair:
    """Brings one raw row of any of TRL's formats to the fields of a pair, without `row`.

    A missing prompt is what chosen and rejected have in common at the beginning; so, as in TRL, is
    a prompt of text beside responses of messages. A missing `uid` stays missing.

    Raises:
        RowError: If the row is not a usable pair.
    """
    if isinstance(raw, RowError):
        raise raw
    if not isinstance(raw, Mapping):
        raise RowError("not an object with the columns prompt, chosen and rejected")
    # Not with TRL's `extract_prompt`: importing trl takes seconds, and where one response begins
    # with all of the other it takes the last common letter for the response.
    chosen, rejected = _text(raw, "chosen"), _text(raw, "rejected")
    prompt = _text(raw, "prompt") if raw.get("prompt") is not None else None
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
        prompt, chosen, rejected = _split_messages(chosen, rejected)
    elif isinstance(chosen, str) and isinstance(rejected, str) and prompt is None:
        prompt = os.path.commonprefix([chosen, rejected]).removesuffix(" ")  # the space as in TRL
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not type(prompt) is type(chosen) is type(rejected):
        raise RowError("prompt, chosen and rejected must be all text or all messages")
    fields = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for column, value in fields.items():
        contents = [value] if isinstance(value, str) else [m["content"] for m in value or ()]
        if not "".join(contents).strip():
            raise RowError(f"{column} is empty")
    if chosen == rejected:
        raise RowError("chosen and rejected are identical")
    return fields | _optional(raw)


def _collect(rows: Iterable[tuple[int, object]], intake: Intake) -> LoadedPairs:
    source = intake.bad.source
    bar = tqdm(rows, desc=f"reading {source}", unit=" rows", delay=3, leave=False, disable=None)
    admitted = (pair for row, raw in bar if (pair := intake.admit(row, raw)) is not None)
    first = next(admitted, None)
    pairs = store(itertools.chain([first], admitted), _schema(first)) if first else None
    bad_rows = intake.bad.settle(intake.kept)
    counts = intake.contradicting, intake.duplicates
    return LoadedPairs(pairs, bad_rows, source, intake.digest.hexdigest(), *counts)


def _schema(pair: Pair) -> pa.Schema:
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    text = pa.string() if isinstance(pair["prompt"], str) else pa.list_(message)
    types = {"row": pa.int64(), "prompt": text, "chosen": text, "rejected": text}
    types |= {"uid": pa.string(), "is_flipped": pa.bool_(), "soft_label": pa.float64()}
    return pa.schema([(column, types[column]) for column in pair])


def _form(fields: Pair) -> str:
    """What must be alike in all rows of a source, in words."""
    form = "text" if isinstance(fields["prompt"], str) else "messages"
    return " and ".join([form, *(column for column in _OPTIONAL[1:] if column in fields)])


def _text(raw: Mapping[str, Any], column: str) -> Text:
    """A column as text, or as messages reduced to role and content."""
    value = raw.get(column)
    if value is None:
        names = ", ".join(map(str, itertools.islice(raw, 8))) or "none"
        raise RowError(f"{column} is missing (columns of the row: {names})")
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise RowError(f"{column} is neither text nor a list of messages")
    messages = [{key: message.get(key) for key in ("role", "content")} for message in value]
    if not all(isinstance(part, str) for message in messages for part in message.values()):
        raise RowError(f"{column} has a message whose role or content is not text")
    return messages


def _split_messages(
    chosen: list[dict[str, str]], rejected: list[dict[str, str]]
) -> tuple[Text, Text, Text]:
    for column, messages in {"chosen": chosen, "rejected": rejected}.items():
        if not messages or messages[-1]["role"] != "assistant":
            raise RowError(f"{column} does not end with a message of the assistant")
    if chosen[:-1] != rejected[:-1]:
        raise RowError("chosen and rejected differ before their last message: no common prompt")
    return chosen[:-1], chosen[-1:], rejected[-1:]


def _optional(raw: Mapping[str, Any]) -> dict[str, Any]:
    fields = {column: raw[column] for column in _OPTIONAL if raw.get(column) is not None}
    if not isinstance(uid := fields.get("uid", "-"), str) or not uid.strip():
        raise RowError("uid is not text")
    if not isinstance(fields.get("is_flipped", False), bool):
        raise RowError("is_flipped is not a boolean")
    label = fields.get("soft_label", 0.5)
    if isinstance(label, bool) or not isinstance(label, int | float) or not 0 <= label <= 1:
        raise RowError("soft_label is not a number in [0, 1]")
    return fields | ({"soft_label": float(label)} if "soft_label" in fields else {})
