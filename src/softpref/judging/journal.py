"""The journal of batches: which calls are in which batch, and how far each has come."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softpref.errors import UsageError
from softpref.judging.log import Lines, VerdictLog


def journal_path(log: Path) -> Path:
    """Return the path of the journal of a verdict log, beside it."""
    return log.with_name(f"{log.name}.batches")


def has_journal(log: VerdictLog | None) -> bool:
    """Return whether batches were made for a verdict log."""
    return log is not None and journal_path(log.path).exists()


@dataclass
class Part:
    """Calls that one batch makes.

    Attributes:
        name: random; the batch carries it, so that a batch whose id was lost is found again.
        judge: hash of the judge's identity.
        keys: of the questions; the number of their lines in the verdict log before this batch.
        file: id of the uploaded file; empty before the upload.
        batch: id of the batch; empty before it is created.
        is_done: whether all its answers are in the verdict log.
    """

    name: str
    judge: str
    keys: Mapping[str, int]
    file: str = ""
    batch: str = ""
    is_done: bool = False


@dataclass
class Journal:
    """Parts of batches, in a file beside the verdict log.

    Each step is on disk before the next one is made.

    Raises:
        UsageError: the file is damaged other than at its end.
    """

    path: Path
    parts: dict[str, Part] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lines = Lines(self.path)
        try:
            for number, line in enumerate(self._lines.read(), start=1):
                self._read_line(line, number)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def new_part(self, judge: str, keys: Mapping[str, int]) -> Part:
        """Return a new part."""
        part = Part(secrets.token_hex(12), judge, keys)
        self._write({"part": part.name, "judge": judge, "keys": dict(keys)})
        return self.parts[part.name]

    def note(self, part: Part, **changed: Any) -> None:
        """Store a part's new `file`, `batch` or `is_done`."""
        self._write({"part": part.name, **changed})

    def _write(self, row: Mapping[str, Any]) -> None:
        self._lines.add(row)
        self._take(row)

    def _read_line(self, line: bytes, number: int) -> None:
        try:
            self._take(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(
                f"{self.path}, line {number}: not a step of a batch ({type(error).__name__}); the "
                "file was changed by something else: choose another --output."
            ) from None

    def _take(self, row: Mapping[str, Any]) -> None:
        name = row["part"]
        if "keys" in row:
            keys = {str(key): int(lines) for key, lines in row["keys"].items()}
            self.parts[name] = Part(name, str(row["judge"]), keys)
        part = self.parts[name]
        part.file = str(row.get("file", part.file))
        part.batch = str(row.get("batch", part.batch))
        part.is_done = bool(row.get("is_done", part.is_done))
