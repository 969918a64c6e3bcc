"""Rows of a source that cannot be used, named by their location and grouped by cause."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from softpref.data.text_files import COMPRESSION
from softpref.errors import UsageError

OnBadRow = Literal["stop", "skip"]
MAX_KINDS = 5
BY_LINE = (".jsonl", ".csv", ".tsv")
"""Extensions of text files whose rows are counted by line."""
_PARTICULAR = re.compile(r"'[^']*'|\"[^\"]*\"|\([^)]*\)|\d+")


@dataclass(frozen=True)
class BadRow:
    """A skipped row: its 1-based number, the reason, and its file."""

    row: int
    reason: str
    source: str


def place(source: str, row: int) -> str:
    """Return the location of a row, by line in a text file and by row elsewhere."""
    return f"{source}, {_unit(source)} {row}"


def _unit(source: str) -> str:
    path = PurePath(source.lower())
    ending = path.with_suffix("").suffix if path.suffix in COMPRESSION else path.suffix
    return "line" if ending in BY_LINE else "row"


def summarize_bad_rows(rows: Sequence[BadRow]) -> str:
    """Return the first row of each kind of error, with the number of similar rows."""
    kinds: dict[str, list[BadRow]] = {}
    for row in rows:
        kinds.setdefault(_PARTICULAR.sub("", row.reason), []).append(row)
    named: list[str] = []
    for alike in list(kinds.values())[:MAX_KINDS]:
        first = alike[0]
        where = place(first.source, first.row)
        if named and first.source == rows[0].source:
            where = f"{_unit(first.source)} {first.row}"
        more = f" (and {len(alike) - 1} more like it)" if len(alike) > 1 else ""
        named.append(f"{where}: {first.reason}{more}")
    left = len(kinds) - len(named)
    return "; ".join(named) + (f"; and {left} more kinds of bad rows" if left else "")


class BadRows:
    """The bad rows of a set; under `stop`, one of them rejects the set.

    Args:
        source: the name of the set in messages: its file or files.
        on_bad_row: whether a bad row is an error or is skipped.
    """

    def __init__(self, source: str, on_bad_row: OnBadRow) -> None:
        self.source = source
        self._on_bad_row = on_bad_row
        self._rows: list[BadRow] = []
        self.stopped = False
        """Whether the source will be rejected, so that later rows need not be stored."""

    def add(self, row: int, reason: str, source: str | None = None) -> None:
        """Record a bad row; `source` names its file if the set has several."""
        self.skip(row, reason, source)
        self.stopped |= self._on_bad_row == "stop"

    def skip(self, row: int, reason: str, source: str | None = None) -> BadRow:
        """Record a valid row that is skipped regardless of `on_bad_row`."""
        self._rows.append(BadRow(row, reason, source or self.source))
        return self._rows[-1]

    def finish(self, kept: int) -> tuple[BadRow, ...]:
        """Return the skipped rows, once all rows are read and `kept` of them are good.

        Raises:
            UsageError: there are bad rows under `stop`, or no good row.
        """
        if kept and not self.stopped:
            return tuple(self._rows)
        if not self._rows:
            raise UsageError(f"{self.source} holds no rows. Give a source with at least one pair.")
        remedy = "Fix them, or pass --on_bad_row skip" if kept else "Fix them"
        remedy = remedy if self.stopped else "No good row is left"
        if not kept and any("is missing" in bad.reason for bad in self._rows):
            remedy += (
                ": rename the columns to prompt, chosen and rejected, or name them with "
                "--prompt_column, --chosen_column and --rejected_column"
            )
        raise UsageError(f"{summarize_bad_rows(self._rows)}. {remedy}.")
