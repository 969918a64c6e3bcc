"""Pair rows from JSONL, JSON, Parquet, CSV or a hub id, in any of TRL's preference formats.

A pair row is a dict with `uid`, `row` (1-based line or row number in its source), `prompt`,
`chosen`, `rejected` (each text, or a list of messages, then with `tools` and
`chat_template_kwargs`, which may be None) and, in every row or in none, `is_flipped` and
`soft_label`; of several sources also `source`, its own. Rows stream through: they live in an Arrow
file, never in a Python list, and a bad row is named by its place.
"""

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import pyarrow.compute as pc
from tqdm import tqdm

from softpref.columns import STANDARD, Columns
from softpref.data.bad_rows import BadRow, BadRows, OnBadRow, place
from softpref.data.books import Books
from softpref.data.messages import CONTEXT, Text
from softpref.data.parsing import OPTIONAL, REPEATED_TEXT, ParsedPair, parse_pair, unread
from softpref.data.readers import RowError, column, dataset_rows, read_rows, store
from softpref.errors import UsageError

logger = logging.getLogger(__name__)

SURELY = 0.9
"""Share of a source's pairs from which on a prompt that responses begin with is a mistake."""
_SIDES = ("prompt", "chosen", "rejected")
CONTENT = (*_SIDES, *CONTEXT)
"""Columns that say what a pair is about: the arguments of `content_key`."""
UNREAD_NAMED = 20


@dataclass(frozen=True)
class LoadedPairs:
    """What a source gave, or several.

    Attributes:
        pairs: The pair rows, backed by an Arrow file that lasts as long as the process.
        source: The path, hub id or name the rows came from; of several, all of them.
        bad_rows: The rows left out under `on_bad_row="skip"`.
        fingerprint: SHA-256 over the content of the kept rows, in order.
        contradicting: Number of distinct pairs that are labelled both ways.
        duplicates: Number of rows that repeat an earlier row, label included.
        fingerprints: The fingerprint of each source by itself, by its name.
        shares: Of a mix, the share of each source in the pairs.
        also_clean: Number of clean pairs that were taken out.
        where: Each of these three numbers by the file, or the two, that its pairs stand in.
    """

    pairs: datasets.Dataset
    bad_rows: tuple[BadRow, ...]
    source: str
    fingerprint: str
    contradicting: int
    duplicates: int
    fingerprints: dict[str, str]
    shares: tuple[float, ...] = ()
    also_clean: int = 0
    where: dict[str, Counter[str]] = field(default_factory=dict)


def names_of(given: str | Sequence[str]) -> list[str]:
    """Return the names of one source or of several.

    Raises:
        UsageError: One is there twice.
    """
    names = [given] if isinstance(given, str) else list(given)
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"{repeated[0]} is given twice: give each file once.")
    return names


def load_pairs(
    source: str | Sequence[str], *, on_bad_row: OnBadRow = "stop", columns: Columns = STANDARD
) -> LoadedPairs:
    """Reads the pairs of a file or of a hub data set, or of several, one after the other.

    Of several, a pair row says in `source` which of them it is from, as it was named.

    Args:
        source: A path ending in .jsonl, .json (a list of objects), .parquet or .csv or, where no
            such path exists, a hub id `org/name` or `org/name:split` (split `train` by default).
        on_bad_row: Whether a bad row is an error or is left out and listed.
        columns: What its columns are called.

    Raises:
        UsageError: If a source cannot be read, holds a bad row (under `stop`) or no good one.
    """
    books = Books()
    return _collect(
        [(read_rows(name), Intake(name, on_bad_row, columns, books)) for name in names_of(source)]
    )


def pairs_from_dataset(
    dataset: datasets.Dataset, name: str, *, on_bad_row: OnBadRow = "stop"
) -> LoadedPairs:
    """Reads the pairs of a data set as `load_pairs` does; messages call it `name`.

    Raises:
        UsageError: If there is a bad row (under `stop`) or no good one.
    """
    return _collect([(enumerate(dataset_rows(dataset), start=1), Intake(name, on_bad_row))])


def subset(loaded: LoadedPairs, pairs: datasets.Dataset, source: str) -> LoadedPairs:
    """Keeps the books anew for pairs taken out of a source; their rows keep their numbers."""
    books = Books()
    parts = [
        (((row["row"], row) for row in dataset_rows(part)), Intake(name, "stop", books=books))
        for name, part in by_source(pairs, source)
    ]
    kept = _collect(parts)
    return replace(
        kept,
        source=source,
        bad_rows=loaded.bad_rows,
        shares=loaded.shares,
        also_clean=loaded.also_clean,
        where=loaded.where | kept.where,
    )


def by_source(pairs: datasets.Dataset, name: str) -> Iterator[tuple[str, datasets.Dataset]]:
    """Yield each source of pair rows with its pairs, in order; `name` where there is only one."""
    if "source" not in pairs.column_names:
        yield name, pairs
        return
    start, rest = 0, pairs.remove_columns("source")
    for found in pc.value_counts(column(pairs, "source")).to_pylist():
        end = start + found["counts"]  # a source's pairs stand together
        yield found["values"], rest.select(range(start, end))
        start = end


def content_key(
    prompt: Text, chosen: Text, rejected: Text, tools: Any = None, chat_template_kwargs: Any = None
) -> str:
    """Hash what a pair is about, whichever of its responses is labelled chosen."""
    responses = sorted(json.dumps(response, sort_keys=True) for response in (chosen, rejected))
    content = [prompt, responses, *filter(None, (tools, chat_template_kwargs))]
    return _hash(json.dumps(content, sort_keys=True))


def contents(pairs: datasets.Dataset) -> datasets.Dataset:
    """Return the columns that `content_key` takes."""
    return pairs.select_columns([name for name in CONTENT if name in pairs.features])


def in_sorted_order(chosen: Text, rejected: Text) -> bool:
    """Return which of the two ways to label one content this is."""
    return json.dumps(chosen) < json.dumps(rejected)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Intake:
    """Checks the rows of one source one by one and keeps the books about them.

    Sources that are read together share their books.
    """

    def __init__(
        self,
        source: str,
        on_bad_row: OnBadRow,
        columns: Columns = STANDARD,
        books: Books | None = None,
    ) -> None:
        self.bad = BadRows(source, on_bad_row)
        self.kept = 0
        self.contradicting: Counter[str] = Counter()
        self.duplicates: Counter[str] = Counter()
        self._columns = columns
        self._notes: Counter[str] = Counter()
        self._unread: dict[str, None] = {}
        self._books = books or Books()
        self.digest = hashlib.sha256()  # of the kept rows' content

    def admit(self, row: int, raw: object) -> ParsedPair | None:
        """Return the row as a pair, or None if it is bad or follows a bad row under `stop`."""
        try:
            parsed = parse_pair(raw, self._columns)
            pair = self._enter(row, parsed.fields)
        except RowError as error:
            self.bad.add(row, str(error))
            return None
        self._notes.update(parsed.notes)
        if isinstance(raw, dict) and len(self._unread) < UNREAD_NAMED:
            self._unread |= dict.fromkeys(unread(raw, self._columns, pair))
        return None if self.bad.stopped else pair

    def say(self) -> None:
        """Say how rows were read where that is not plain.

        Raises:
            UsageError: nearly all responses begin with their prompt.
        """
        source, repeated = self.bad.source, self._notes[REPEATED_TEXT]
        if self.kept and repeated >= SURELY * self.kept:
            raise UsageError(
                f"{source}: in {repeated} of {self.kept} pairs both responses begin with the "
                "prompt, which would stand twice in every sequence. Take it out of the responses, "
                "or leave the prompt column out."
            )
        for note, count in self._notes.items():
            logger.warning("%s: in %d of %d pairs %s", source, count, self.kept, note)

    def say_unread(self) -> None:
        """Say which columns were not read."""
        if self._unread:
            names = ", ".join(self._unread)
            logger.info("%s: columns that were not read: %s", self.bad.source, names)

    def _enter(self, row: int, fields: ParsedPair) -> ParsedPair:
        form = _form(fields)
        if form != (self._books.form or form):
            raise RowError(f"the row has {form}, the rows before it {self._books.form}")
        key = content_key(**{name: fields[name] for name in CONTENT if name in fields})
        ahead, reverse = self._books.orders(key)
        seen = ahead + reverse
        uid = fields.pop("uid", None) or (_hash(f"{key} {seen}") if seen else key)
        if (first := self._books.place_of(uid)) is not None:
            raise RowError(f"uid {uid!r} is already that of {place(*first)}")
        in_order = in_sorted_order(fields["chosen"], fields["rejected"])
        alike, otherwise = (ahead, reverse) if in_order else (reverse, ahead)
        if alike:
            self.duplicates[self._and_first(key, ahead=in_order)] += 1
        elif otherwise:
            self.contradicting[self._and_first(key, ahead=not in_order)] += 1
        self._books.enter_order(key, self.bad.source, ahead=in_order)
        self._books.enter_uid(uid, self.bad.source, row)
        self._books.form = form
        self.kept += 1
        self.digest.update(json.dumps([uid, fields], default=str).encode() + b"\n")
        return {"uid": uid, "row": row, **fields}

    def _and_first(self, key: str, *, ahead: bool) -> str:
        """Name this source, and the one where the content came first in that order."""
        first = self._books.first_source(key, ahead=ahead)
        return " and ".join(dict.fromkeys([first, self.bad.source]))


def _collect(parts: Sequence[tuple[Iterable[tuple[int, object]], Intake]]) -> LoadedPairs:
    bad_rows: list[BadRow] = []

    def admitted() -> Iterator[ParsedPair]:
        for rows, intake in parts:
            source = intake.bad.source
            bar = tqdm(
                rows, desc=f"reading {source}", unit=" rows", delay=3, leave=False, disable=None
            )
            own = {"source": source} if len(parts) > 1 else {}
            for row, raw in bar:
                if (pair := intake.admit(row, raw)) is not None:
                    yield pair | own
            bad_rows.extend(intake.bad.settle(intake.kept))
            intake.say()
            intake.say_unread()

    kept = admitted()
    first = next(kept)  # a source without a pair is refused
    pairs = store(itertools.chain([first], kept), _features(first).arrow_schema)
    intakes = [intake for _, intake in parts]
    prints = {intake.bad.source: intake.digest.hexdigest() for intake in intakes}
    digests = [*prints.values()]
    where = {
        "contradicting": sum((intake.contradicting for intake in intakes), Counter[str]()),
        "duplicates": sum((intake.duplicates for intake in intakes), Counter[str]()),
    }
    return LoadedPairs(
        pairs,
        tuple(bad_rows),
        ", ".join(prints),
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
        where["contradicting"].total(),
        where["duplicates"].total(),
        prints,
        where=where,
    )


def _features(pair: ParsedPair) -> datasets.Features:
    if isinstance(pair["prompt"], str):
        columns, text = [*pair], datasets.Value("string")
    else:
        columns, text = list(dict.fromkeys([*pair, *CONTEXT])), datasets.List(datasets.Json())
    types = {"row": datasets.Value("int64")} | dict.fromkeys(_SIDES, text)
    types |= {"source": datasets.Value("string")}
    types |= {"uid": datasets.Value("string"), "is_flipped": datasets.Value("bool")}
    types |= {"soft_label": datasets.Value("float64")} | dict.fromkeys(CONTEXT, datasets.Json())
    return datasets.Features({column: types[column] for column in columns})


def _form(fields: ParsedPair) -> str:
    """What must be alike in all rows of a source, in words."""
    form = "text" if isinstance(fields["prompt"], str) else "messages"
    return " and ".join([form, *(column for column in OPTIONAL[1:] if column in fields)])
