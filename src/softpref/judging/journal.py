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


@dataclass
class Part:
    """Calls that one batch makes.

    Attributes:
        name: random; the batch carries it, so that a batch whose id was lost is found again.
        judge: hash of the judge's identity.
        keys: of the questions; the number of their lines in the verdict log before this batch.
        bounds: upper bounds of the tokens that each call sends and receives.
        file: id of the uploaded file; empty before the upload.
        batch: id of the batch; empty before it is created.
        is_done: whether all its answers are in the verdict log.
    """

    name: str
    judge: str
    keys: Mapping[str, int]
    bounds: Mapping[str, tuple[int, int]]
    file: str = ""
    batch: str = ""
    is_done: bool = False

    def pending(self, log: VerdictLog) -> list[str]:
        """Return the keys whose answers are not yet in the log."""
        return [key for key, before in self.keys.items() if log.lines[key] == before]

    def outstanding(self, log: VerdictLog) -> tuple[int, int]:
        """Return upper bounds of the tokens of the answers that are not yet in the log."""
        bounds = [self.bounds[key] for key in self.pending(log)]
        return sum(sent for sent, _ in bounds), sum(received for _, received in bounds)


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

    def unfinished(self, judge: str, log: VerdictLog) -> list[Part]:
        """Return a judge's parts that may have been paid, and have answers still to come."""
        parts = (part for part in self.parts.values() if part.judge == judge and part.file)
        return [part for part in parts if not part.is_done and part.pending(log)]

    def new_part(
        self, judge: str, keys: Mapping[str, int], bounds: Mapping[str, tuple[int, int]]
    ) -> Part:
        """Return a new part."""
        name = secrets.token_hex(12)
        calls = {key: [before, *bounds[key]] for key, before in keys.items()}
        self._write({"part": name, "judge": judge, "keys": calls})
        return self.parts[name]

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
            keys, bounds = {}, {}
            for key, (before, sent, received) in row["keys"].items():
                keys[key], bounds[key] = int(before), (int(sent), int(received))
            self.parts[name] = Part(name, str(row["judge"]), keys, bounds)
        part = self.parts[name]
        part.file = str(row.get("file", part.file))
        part.batch = str(row.get("batch", part.batch))
        part.is_done = bool(row.get("is_done", part.is_done))
