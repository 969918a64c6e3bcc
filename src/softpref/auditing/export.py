"""`cleaned.jsonl`: the audited data in its own format, with what the audit found.

Rows keep their order and every column that they had.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from softpref.auditing.beliefs import SUSPECT
from softpref.columns import STANDARD, Columns
from softpref.data.bad_rows import BadRow, place, summarize_bad_rows
from softpref.data.readers import column, dataset_rows, read_rows
from softpref.data.seen_pairs import SeenPairs
from softpref.data.sources import CONTENT, RowValidator, by_source, content_key, contents, names_of
from softpref.data.writers import json_rows
from softpref.errors import UsageError
from softpref.training.output import write_lines

CLEANED = "cleaned.jsonl"
EXPORTS = {
    "soft": "cleaned.jsonl carries `soft_label`, which TRL ignores: methods gdpo and cdpo of "
    "softpref train read it; for TRL use --export drop",
    "keep": "cleaned.jsonl marks suspects by `is_suspect` and changes no label",
    "drop": "cleaned.jsonl leaves the suspects out; TRL can train on it as it is",
    "flip": "cleaned.jsonl flips the suspects; review some of them before you train on it",
}
"""What is said of each way to write it."""


SUSPECTED, MARKED = "suspect", "marked wrong by --marks"
OTHERWISE = "trusted pairs that the data label the other way"
NOT_DRAWN = "not audited (not drawn by --mix, or held out and not usable)"


@dataclass
class LeftOut:
    """Which rows of the data are not in `cleaned.jsonl`.

    Attributes:
        rows: how many rows the data have.
        why: how many of them were left out for which reason.
        unused: those that the audit could not use.
    """

    rows: int = 0
    why: Counter[str] = field(default_factory=Counter)
    unused: tuple[BadRow, ...] = ()

    def __str__(self) -> str:
        reasons = [f"{count} {why}" for why, count in self.why.items() if count]
        if self.unused:
            reasons.append(f"{len(self.unused)} not usable ({summarize_bad_rows(self.unused)})")
        count = self.why.total() + len(self.unused)
        told = f"{CLEANED}: {self.rows - count} of {self.rows} rows"
        return told + (f"; {count} are left out: {', '.join(reasons)}" if count else "")


@dataclass(frozen=True)
class Trusted:
    """The trusted pairs by content, whichever way round, and which response is the better."""

    better: dict[str, str]

    @classmethod
    def of(cls, clean: Dataset) -> Trusted:
        """Take them from the trusted set."""
        rows = dataset_rows(contents(clean))
        return cls({content_key(**row): _text(row["chosen"]) for row in rows})

    def p_correct(self, pair: dict[str, Any]) -> float | None:
        """Return 1 where a pair is labelled as its trusted one is, 0 where not, None for others."""
        key = content_key(**{name: pair[name] for name in CONTENT if name in pair})
        better = self.better.get(key)
        return None if better is None else float(better == _text(pair["chosen"]))


def read_marks(path: str) -> dict[str, float | None]:
    """Return what a reviewer makes of each marked pair's label, by uid: 1 right, 0 wrong.

    The file is the report's export: a line a pair, with `uid` and `mark`. An unsure pair is None:
    it is believed as the audit believes it.

    Raises:
        UsageError: there is no such file, or a line is none of these.
    """
    value = {"right": 1.0, "wrong": 0.0, "unsure": None}
    marks: dict[str, float | None] = {}
    for number, row in read_rows(path):
        if not isinstance(row, dict) or not {"uid", "mark"} <= row.keys():
            raise UsageError(
                f"{place(path, number)}: no `uid` and `mark`; give the marks.jsonl that the report "
                "exports."
            )
        if not isinstance(row["mark"], str) or row["mark"] not in value:
            raise UsageError(
                f"{place(path, number)}: mark {row['mark']!r}; it must be one of "
                f"{', '.join(value)}."
            )
        marks[str(row["uid"])] = value[row["mark"]]
    return marks


def write_cleaned(
    data: str | Sequence[str],
    output: Path,
    audited: Dataset,
    trusted: Trusted,
    export: str,
    marks: Mapping[str, float | None],
    columns: Columns = STANDARD,
    unused: Sequence[BadRow] = (),
) -> LeftOut:
    """Write the data's rows with `soft_label` and `is_suspect`; return which are not among them.

    `soft_label` holds `p_correct` and is written under `soft` alone. Trusted pairs among the data
    are certain, and so is what a reviewer has marked. Rows that the audit did not use are left out.

    Args:
        data: what was audited, or all of it in order.
        output: the audit's directory.
        audited: the rows of the audit.
        trusted: the trusted pairs.
        export: one of `EXPORTS`.
        marks: a reviewer's, by uid.
        columns: what the data's columns are called.
        unused: rows that the audit could not use, with reasons.
    """
    names = names_of(data)
    of_source = {
        name: [column(part, of).to_numpy() for of in ("row", "p_correct")]
        for name, part in by_source(audited, names[0])
    }

    def belief(source: str, number: int, pair: dict[str, Any]) -> tuple[float | None, str]:
        by = ((trusted.p_correct(pair), OTHERWISE), (marks.get(pair["uid"]), MARKED))
        for certain, why in by:
            if certain is not None:
                return certain, why
        if source not in of_source:  # all its pairs are trusted
            return None, NOT_DRAWN
        rows, believed = of_source[source]
        at = rows.searchsorted(number)  # an audit's rows are in the data's order
        is_there = at < len(rows) and rows[at] == number
        return (float(believed[at]), SUSPECTED) if is_there else (None, NOT_DRAWN)

    left_out = LeftOut(unused=tuple(unused))
    rows = _cleaned(names, belief, export, columns, left_out)
    write_lines(output / CLEANED, json_rows(rows, CLEANED))
    return left_out


def _cleaned(
    sources: Sequence[str],
    belief: Callable[[str, int, dict[str, Any]], tuple[float | None, str]],
    export: str,
    columns: Columns,
    left_out: LeftOut,
) -> Iterator[dict[str, Any]]:
    seen = SeenPairs()
    validators = {name: RowValidator(name, "skip", columns, seen) for name in sources}
    rows = ((name, *row) for name in sources for row in read_rows(name))
    unused = {(bad.source, bad.row) for bad in left_out.unused}
    for name, number, raw in rows:
        left_out.rows += 1
        pair = validators[name].validate(number, raw)
        if pair is None or not isinstance(raw, dict):  # it is in `unused`
            continue
        p, why = belief(name, number, pair)
        is_suspect = p is not None and p < SUSPECT
        if p is None or (is_suspect and export == "drop"):
            left_out.why[why] += (name, number) not in unused
            continue
        row: dict[str, Any] = {**raw, "is_suspect": is_suspect}
        if export == "soft":
            row["soft_label"] = p
        if export == "flip" and is_suspect:
            row = columns.swapped(row)
            if raw.get("is_flipped") is not None:
                row["is_flipped"] = not raw["is_flipped"]
        yield row


def _text(response: Any) -> str:
    return json.dumps(response, sort_keys=True)
