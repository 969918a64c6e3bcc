"""`cleaned.jsonl`: the audited data in its own format, with what the audit found.

Rows keep their order and all of their columns.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from softpref.auditing.beliefs import SUSPECT
from softpref.columns import STANDARD, Columns
from softpref.data.bad_rows import BadRow, summarize_bad_rows
from softpref.data.given import Source, sources_of
from softpref.data.readers import column, dataset_rows
from softpref.data.seen_pairs import SeenPairs
from softpref.data.sources import CONTENT, RowValidator, by_source, content_key, contents
from softpref.data.writers import json_rows
from softpref.training.output import write_lines

logger = logging.getLogger(__name__)

CLEANED = "cleaned.jsonl"
EXPORTS = {
    "soft": "cleaned.jsonl carries `soft_label`, which TRL ignores: methods gdpo and cdpo of "
    "softpref train read it; for TRL use --export drop",
    "keep": "cleaned.jsonl marks suspects by `is_suspect` and changes no label",
    "drop": "cleaned.jsonl drops the suspects; TRL can train on it without changes",
    "flip": "cleaned.jsonl flips the suspects; review some of them before you train on it",
}
"""What the log says about each way to write it."""
SUSPECTED, MARKED = "suspect", "marked wrong by --marks"
TIED = "ties, which TRL would take for labels"
CONTRADICTED = "trusted pairs that the data label the other way"
NOT_DRAWN = "not audited (not drawn by --mix, or held out and not usable)"


@dataclass
class DroppedRows:
    """The rows of the data that are not in `cleaned.jsonl`.

    Attributes:
        rows: number of rows in the data.
        why: number of dropped rows by reason.
        unused: rows that the audit could not use.
        margins: number of target margins that were dropped, beside a flipped or soft label.
    """

    rows: int = 0
    why: Counter[str] = field(default_factory=Counter)
    unused: tuple[BadRow, ...] = ()
    margins: int = 0

    def __str__(self) -> str:
        reasons = [f"{count} {why}" for why, count in self.why.items() if count]
        if self.unused:
            reasons.append(f"{len(self.unused)} not usable ({summarize_bad_rows(self.unused)})")
        count = self.why.total() + len(self.unused)
        text = f"{CLEANED}: {self.rows - count} of {self.rows} rows"
        return text + (f"; {count} are dropped: {', '.join(reasons)}" if count else "")


@dataclass(frozen=True)
class TrustedLabels:
    """The better response of each trusted pair, by a key that ignores the order of responses."""

    better: dict[str, str]

    @classmethod
    def of(cls, clean: Dataset) -> TrustedLabels:
        """Return the labels of a trusted set."""
        rows = dataset_rows(contents(clean))
        return cls({content_key(**row): _text(row["chosen"]) for row in rows})

    def p_correct(self, pair: dict[str, Any]) -> float | None:
        """Return 1 if the trusted set agrees with the label, 0 if not, None for other pairs."""
        key = content_key(**{name: pair[name] for name in CONTENT if name in pair})
        better = self.better.get(key)
        return None if better is None else float(better == _text(pair["chosen"]))


def write_cleaned(
    data: Any,
    output: Path,
    audited: Dataset,
    trusted: TrustedLabels,
    export: str,
    marks: Mapping[str, float | None],
    columns: Columns = STANDARD,
    unused: Sequence[BadRow] = (),
    ties: Collection[tuple[str, int]] = (),
) -> DroppedRows:
    """Write the data's rows with `is_suspect`, and return the rows that were dropped.

    Only `soft` also writes `soft_label`, which holds `p_correct`. Labels of trusted pairs and of
    pairs that a reviewer has marked are certain. Ties stay as they are, with 1/2, but not with
    `drop`. Rows that the audit did not use are dropped; `soft` and `flip` drop the column `margin`.

    Args:
        data: the audited files in order, or an object in memory.
        output: the audit's directory.
        audited: the rows of the audit.
        trusted: the labels of the trusted pairs.
        export: one of `EXPORTS`.
        marks: a reviewer's verdicts, by uid.
        columns: names of the data's columns.
        unused: rows that the audit could not use, with reasons.
        ties: source and row of the ties.
    """
    sources = sources_of(data, "data")
    by_name = {
        name: [column(part, key).to_numpy() for key in ("row", "p_correct")]
        for name, part in by_source(audited, sources[0].name)
    }

    def belief(source: str, number: int, pair: dict[str, Any]) -> tuple[float | None, str]:
        if (source, number) in ties:
            return 0.5, TIED
        verdicts = ((trusted.p_correct(pair), CONTRADICTED), (marks.get(pair["uid"]), MARKED))
        for certain, why in verdicts:
            if certain is not None:
                return certain, why
        if source not in by_name:  # all its pairs are trusted
            return None, NOT_DRAWN
        rows, p_correct = by_name[source]
        at = rows.searchsorted(number)  # an audit's rows are in the data's order
        is_audited = at < len(rows) and rows[at] == number
        return (float(p_correct[at]), SUSPECTED) if is_audited else (None, NOT_DRAWN)

    dropped = DroppedRows(unused=tuple(unused))
    rows = _cleaned_rows(sources, belief, export, columns, dropped)
    write_lines(output / CLEANED, json_rows(rows, CLEANED))
    if dropped.margins:
        logger.warning(
            f"{CLEANED}: margin is dropped from {dropped.margins:,} rows: it is a target for a "
            "label taken at its word, not for a flipped or a soft one"
        )
    return dropped


def _cleaned_rows(
    sources: Sequence[Source],
    belief: Callable[[str, int, dict[str, Any]], tuple[float | None, str]],
    export: str,
    columns: Columns,
    dropped: DroppedRows,
) -> Iterator[dict[str, Any]]:
    seen = SeenPairs()
    validators = {each.name: RowValidator(each.name, "skip", columns, seen) for each in sources}
    rows = ((each.name, *row) for each in sources for row in each.read())
    unused = {(bad.source, bad.row) for bad in dropped.unused}
    for name, number, raw in rows:
        dropped.rows += 1
        pair = validators[name].validate(number, raw)
        if pair is None or not isinstance(raw, dict):  # it is in `unused`
            continue
        p, why = belief(name, number, pair)
        is_suspect = p is not None and p < SUSPECT
        if p is None or (export == "drop" and (is_suspect or why == TIED)):
            dropped.why[why] += (name, number) not in unused
            continue
        row: dict[str, Any] = {**raw, "is_suspect": is_suspect}
        if export == "soft":
            row["soft_label"] = p
        if export in ("soft", "flip") and row.pop("margin", None) is not None:
            dropped.margins += 1
        if export == "flip" and is_suspect:
            row = columns.swapped(row)
            if raw.get("is_flipped") is not None:
                row["is_flipped"] = not raw["is_flipped"]
        yield row


def _text(response: Any) -> str:
    return json.dumps(response, sort_keys=True)
