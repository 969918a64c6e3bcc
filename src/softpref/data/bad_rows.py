"""The rows of a source that cannot be used: named by their place, kind by kind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from softpref.data.text_files import COMPRESSION
from softpref.errors import UsageError

OnBadRow = Literal["stop", "skip"]
KINDS_NAMED = 5
BY_LINE = (".jsonl", ".csv", ".tsv")
"""Endings of text whose rows are counted by lines."""
_PARTICULAR = re.compile(r"'[^']*'|\"[^\"]*\"|\([^)]*\)|\d+")


@dataclass(frozen=True)
class BadRow:
    """A row that was left out: its 1-based number, the reason, and the file it stands in."""

    row: int
    reason: str
    source: str


def place(source: str, row: int) -> str:
    """Name a row as its source counts it: a line of a text file, else a row."""
    return f"{source}, {_unit(source)} {row}"


def _unit(source: str) -> str:
    path = PurePath(source.lower())
    ending = path.with_suffix("").suffix if path.suffix in COMPRESSION else path.suffix
    return "line" if ending in BY_LINE else "row"


def in_words(rows: Sequence[BadRow]) -> str:
    """Name the first row of every kind of fault, and how many there are of it."""
    kinds: dict[str, list[BadRow]] = {}
    for row in rows:
        kinds.setdefault(_PARTICULAR.sub("", row.reason), []).append(row)
    named: list[str] = []
    for alike in list(kinds.values())[:KINDS_NAMED]:
        first = alike[0]
        where = place(first.source, first.row)
        if named and first.source == rows[0].source:
            where = f"{_unit(first.source)} {first.row}"
        more = f" (and {len(alike) - 1} more like it)" if len(alike) > 1 else ""
        named.append(f"{where}: {first.reason}{more}")
    left = len(kinds) - len(named)
    return "; ".join(named) + (f"; and {left} more kinds of bad rows" if left else "")


class BadRows:
    """The bad rows of a set; under `stop` one of them is enough to refuse it.

    Args:
        source: what messages call the set: its file, or its files.
        on_bad_row: whether a bad row is an error or left out.
    """

    def __init__(self, source: str, on_bad_row: OnBadRow) -> None:
        self.source = source
        self._on_bad_row = on_bad_row
        self._rows: list[BadRow] = []
        self.stopped = False
        """Whether nothing more needs keeping, because the source will be refused."""

    def add(self, row: int, reason: str, source: str | None = None) -> None:
        """Note a bad row, of `source` where the set has several."""
        self.leave_out(row, reason, source)
        self.stopped |= self._on_bad_row == "stop"

    def leave_out(self, row: int, reason: str, source: str | None = None) -> BadRow:
        """Note a row that is whole and left out whatever is done with bad ones."""
        self._rows.append(BadRow(row, reason, source or self.source))
        return self._rows[-1]

    def settle(self, kept: int) -> tuple[BadRow, ...]:
        """Return the rows left out, after the last row, `kept` of which were good.

        Raises:
            UsageError: there are bad rows under `stop`, or no good row.
        """
        if kept and not self.stopped:
            return tuple(self._rows)
        if not self._rows:
            raise UsageError(f"{self.source} holds no rows. Give a source with at least one pair.")
        remedy = "Fix them, or pass --on_bad_row skip" if self.stopped else "No good row is left"
        raise UsageError(f"{in_words(self._rows)}. {remedy}.")
