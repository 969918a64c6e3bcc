"""Pair rows from JSONL, JSON, Parquet, CSV or a hub id, in any of TRL's preference formats.

A pair row is a dict with `uid`, `row` (1-based line or row number in its source), `prompt`,
`chosen` and `rejected`. These are text, or lists of messages with `tools` and
`chat_template_kwargs`, which may be None. `is_flipped`, `soft_label` and the columns of numbers
that were asked for are in all rows or in none; `label` is there if a pair is a tie. `annotator` is
None where it is unknown, and no column if it always is. If several sources are read, each row has
its `source`. Rows are streamed into an Arrow file, never held in a Python list.
"""

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import datasets
import pyarrow.compute as pc
from tqdm import tqdm

from softpref.columns import LABEL_NUMBERS, STANDARD, Columns
from softpref.data.bad_rows import BadRow, BadRows, OnBadRow, place
from softpref.data.given import Given, sources_of
from softpref.data.label_columns import LABEL, is_tie
from softpref.data.messages import CONTEXT, Text
from softpref.data.parsing import ANNOTATOR, REPEATED_TEXT, ParsedPair, parse_pair, unread_columns
from softpref.data.readers import RowError, column, dataset_rows, store
from softpref.data.seen_pairs import SeenPairs
from softpref.errors import UsageError

logger = logging.getLogger(__name__)

MAX_REPEATED_SHARE = 0.9
"""Share of pairs whose responses repeat the prompt, from which on the source is rejected."""
_SIDES = ("prompt", "chosen", "rejected")
CONTENT = (*_SIDES, *CONTEXT)
"""The columns that identify a pair: the arguments of `content_key`."""
MAX_UNREAD = 20


@dataclass(frozen=True)
class LoadedPairs:
    """The pairs of one or several sources.

    Attributes:
        pairs: The pair rows, backed by an Arrow file that lasts as long as the process.
        source: The path, hub id or name of the source, or of all sources.
        bad_rows: The rows skipped under `on_bad_row="skip"`.
        fingerprint: SHA-256 over the content of the kept rows, in order.
        contradicting: Number of distinct pairs that are labelled both ways.
        duplicates: Number of rows that repeat an earlier row, label included.
        fingerprints: The fingerprint of each source, by its name.
        shares: The share of each source in a mix.
        also_clean: Number of removed clean pairs.
        where: These three counts by the file, or the two files, that contain the pairs.
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


def names_of(given: Any, argument: str = "the data") -> list[str]:
    """Return the names of one or several sources; `argument` names objects in memory.

    Raises:
        UsageError: A name is given twice.
    """
    names = [source.name for source in sources_of(given, argument)]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"{repeated[0]} is given twice: give each file once.")
    return names


def load_pairs(
    source: Given,
    *,
    on_bad_row: OnBadRow = "stop",
    columns: Columns = STANDARD,
    argument: str = "source",
) -> LoadedPairs:
    """Read the pairs of one or several files or hub data sets, or of an object in memory.

    With several sources, each pair row has the name of its source in `source`.

    Args:
        source: A file, a `save_to_disk` directory or, where no such path exists, a hub id
            `org/name` or `org/name:split` (split `train` by default); or a Dataset, a list of
            rows or a DataFrame.
        on_bad_row: Whether a bad row is an error or is skipped and listed.
        columns: Its column names.
        argument: What messages call an object in memory.

    Raises:
        UsageError: If a source cannot be read, holds a bad row (under `stop`) or no good one.
    """
    seen = SeenPairs()
    several = len(names_of(source, argument)) > 1
    parts = [
        (each.read(), RowValidator(each.name, on_bad_row, columns, seen))
        for each in sources_of(source, argument)
    ]
    return _collect(parts, several=several)


def subset(loaded: LoadedPairs, pairs: datasets.Dataset, source: str) -> LoadedPairs:
    """Return a selection of pairs with counts of its own; rows keep their numbers."""
    seen = SeenPairs()
    parts = [
        (((row["row"], row) for row in dataset_rows(part)), _Recount(name, "stop", seen=seen))
        for name, part in by_source(pairs, source)
    ]
    kept = _collect(parts, several="source" in pairs.column_names)
    return replace(
        kept,
        source=source,
        bad_rows=loaded.bad_rows,
        shares=loaded.shares,
        also_clean=loaded.also_clean,
        where=loaded.where | kept.where,
    )


def by_source(pairs: datasets.Dataset, name: str) -> Iterator[tuple[str, datasets.Dataset]]:
    """Yield each source with its pairs, in order; a single source is called `name`."""
    if "source" not in pairs.column_names:
        yield name, pairs
        return
    start, rest = 0, pairs.remove_columns("source")
    for found in pc.value_counts(column(pairs, "source")).to_pylist():
        end = start + found["counts"]  # a source's pairs are consecutive
        yield found["values"], rest.select(range(start, end))
        start = end


def content_key(
    prompt: Text, chosen: Text, rejected: Text, tools: Any = None, chat_template_kwargs: Any = None
) -> str:
    """Hash a pair's content, whichever of its responses is labelled chosen."""
    responses = sorted(map(_canonical, (chosen, rejected)))
    content = [prompt, responses, *filter(None, (tools, chat_template_kwargs))]
    return _hash(json.dumps(content, sort_keys=True))


def contents(pairs: datasets.Dataset) -> datasets.Dataset:
    """Return the columns that `content_key` takes."""
    return pairs.select_columns([name for name in CONTENT if name in pairs.features])


def in_sorted_order(chosen: Text, rejected: Text) -> bool:
    """Return whether the responses are in sorted order."""
    return _canonical(chosen) < _canonical(rejected)


def _canonical(response: Text) -> str:
    """Return text that is the same for equal responses, whatever the order of their keys."""
    return json.dumps(response, sort_keys=True)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class RowValidator:
    """Validates the rows of one source and counts duplicates and contradictions.

    Sources that are read together share `seen`.
    """

    def __init__(
        self,
        source: str,
        on_bad_row: OnBadRow,
        columns: Columns = STANDARD,
        seen: SeenPairs | None = None,
    ) -> None:
        self.bad = BadRows(source, on_bad_row)
        self.kept = self.ties = self.annotated = 0
        self.contradicting: Counter[str] = Counter()
        self.duplicates: Counter[str] = Counter()
        self._columns = columns
        self._notes: Counter[str] = Counter()
        self._unread: dict[str, None] = {}
        self._labels: Counter[str] = Counter()  # values of `label` that are not read
        self._seen = seen or SeenPairs()
        self.digest = hashlib.sha256()  # of the kept rows' content

    def validate(self, row: int, raw: object) -> ParsedPair | None:
        """Return the row as a pair, or None if it is bad or follows a bad row under `stop`."""
        try:
            parsed = parse_pair(raw, self._columns)
            pair = self._enter(row, parsed.fields)
        except RowError as error:
            self.bad.add(row, str(error))
            return None
        self._notes.update(parsed.notes)
        if isinstance(raw, dict):
            unread = unread_columns(raw, self._columns, pair)
            if len(self._unread) < MAX_UNREAD:
                self._unread |= dict.fromkeys(unread)
            if LABEL in unread:
                self._count_label(raw[LABEL])
        return None if self.bad.stopped else pair

    def log_notes(self) -> None:
        """Log how ambiguous rows were read.

        Raises:
            UsageError: nearly all responses begin with their prompt.
        """
        source, repeated = self.bad.source, self._notes[REPEATED_TEXT]
        if self.kept and repeated >= MAX_REPEATED_SHARE * self.kept:
            raise UsageError(
                f"{source}: in {repeated} of {self.kept} pairs both responses begin with the "
                "prompt, which would appear twice in every sequence. Remove it from the "
                "responses, or remove the prompt column."
            )
        for note, count in self._notes.items():
            logger.warning(f"{source}: in {count} of {self.kept} pairs {note}")

    def log_unread(self) -> None:
        """Log which columns were not read."""
        source = self.bad.source
        if self.ties:
            self._unread.pop(LABEL, None)
            if self._labels:
                first = ", ".join(map(repr, itertools.islice(self._labels, 3)))
                count = self._labels.total()
                said = f"{count} values other than a tie, such as {first}, were not read"
                logger.info(f"{source}: {LABEL}: {said}")
        if self._unread:
            names = ", ".join(self._unread)
            logger.info(f"{source}: columns that were not read: {names}")

    def _count_label(self, label: object) -> None:
        text = str(label).strip()
        if isinstance(label, str | int | float) and text not in ("", "nan"):
            is_shown = text in self._labels or len(self._labels) < MAX_UNREAD
            self._labels[text if is_shown else "…"] += 1

    def _enter(self, row: int, fields: ParsedPair) -> ParsedPair:
        form = _form(fields)
        if form != (self._seen.form or form):
            raise RowError(f"the row has {form}, the rows before it {self._seen.form}")
        key = content_key(**{name: fields[name] for name in CONTENT if name in fields})
        in_sorted, in_reversed = self._seen.orders(key)
        count = in_sorted + in_reversed
        uid = fields.pop("uid", None) or (_hash(f"{key} {count}") if count else key)
        if (first := self._seen.place_of(uid)) is not None:
            raise RowError(f"uid {uid!r} is already used by {place(*first)}")
        is_sorted = in_sorted_order(fields["chosen"], fields["rejected"])
        same, opposite = (in_sorted, in_reversed) if is_sorted else (in_reversed, in_sorted)
        if same:
            self.duplicates[self._with_first(key, is_sorted=is_sorted)] += 1
        elif opposite:
            self.contradicting[self._with_first(key, is_sorted=not is_sorted)] += 1
        self._seen.add_order(key, self.bad.source, is_sorted=is_sorted)
        self._seen.add_uid(uid, self.bad.source, row)
        self._seen.form = form
        self.kept += 1
        self.ties += is_tie(fields)
        self.annotated += ANNOTATOR in fields
        self.digest.update(json.dumps([uid, fields], default=str).encode() + b"\n")
        return {"uid": uid, "row": row, **fields}

    def _with_first(self, key: str, *, is_sorted: bool) -> str:
        """Return this source with the one where the content first appeared in that order."""
        first = self._seen.first_source(key, is_sorted=is_sorted)
        return " and ".join(dict.fromkeys([first, self.bad.source]))


class _Recount(RowValidator):
    """Counts pairs that a validator has read before, and says nothing of them again."""

    def validate(self, row: int, raw: object) -> ParsedPair | None:
        fields = cast(ParsedPair, raw)
        fields = {name: of for name, of in fields.items() if name != "row" and of is not None}
        return self._enter(row, fields)


def _collect(
    parts: Sequence[tuple[Iterable[tuple[int, object]], RowValidator]], *, several: bool
) -> LoadedPairs:
    bad_rows: list[BadRow] = []

    def valid_pairs() -> Iterator[ParsedPair]:
        for rows, validator in parts:
            source = validator.bad.source
            bar = tqdm(
                rows, desc=f"reading {source}", unit=" rows", delay=3, leave=False, disable=None
            )
            own = {"source": source} if several else {}
            for row, raw in bar:
                if (pair := validator.validate(row, raw)) is not None:
                    yield pair | own
            bad_rows.extend(validator.bad.finish(validator.kept))
            validator.log_notes()
            validator.log_unread()

    kept = valid_pairs()
    first = next(kept)  # a source without pairs is rejected
    pairs = store(itertools.chain([first], kept), _features(first).arrow_schema)
    validators = [validator for _, validator in parts]
    unused = {
        LABEL: not any(each.ties for each in validators),
        ANNOTATOR: not any(each.annotated for each in validators),
    }
    pairs = pairs.remove_columns([name for name, never in unused.items() if never])
    fingerprints = {each.bad.source: each.digest.hexdigest() for each in validators}
    digests = [*fingerprints.values()]
    where = {
        "contradicting": sum((each.contradicting for each in validators), Counter[str]()),
        "duplicates": sum((each.duplicates for each in validators), Counter[str]()),
    }
    return LoadedPairs(
        pairs,
        tuple(bad_rows),
        ", ".join(fingerprints),
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
        where["contradicting"].total(),
        where["duplicates"].total(),
        fingerprints,
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
    types |= dict.fromkeys(("soft_label", *LABEL_NUMBERS), datasets.Value("float64"))
    types |= dict.fromkeys(CONTEXT, datasets.Json())
    late = dict.fromkeys((LABEL, ANNOTATOR), datasets.Value("string"))
    types |= late  # a later row may be the first tie, or the first to name an annotator
    columns = list(dict.fromkeys([*columns, *late]))
    return datasets.Features({column: types[column] for column in columns})


def _form(fields: ParsedPair) -> str:
    """Return the structure that all rows of a source must share."""
    form = "text" if isinstance(fields["prompt"], str) else "messages"
    names = ("is_flipped", "soft_label", *LABEL_NUMBERS)
    return " and ".join([form, *(name for name in names if name in fields)])
