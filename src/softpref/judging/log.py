"""The verdict log: one line a verdict or failure, on disk before the next is asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from softpref.errors import UsageError
from softpref.judging.questions import VERDICTS, Answer, Question, as_row


class VerdictLog:
    """Answers by key, read from a file and appended to it.

    What a kill left of a last line is dropped; calls in flight at that moment are repeated. Of two
    lines of one key the later counts.

    Raises:
        UsageError: the file is not a verdict log, is damaged other than at its end, or another
            process is writing it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Answer] = {}
        self._judges: dict[str, str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{path}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(f"{path}: another process is writing it; wait for it.") from None
        whole = 0
        if path.exists():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            for number, line in enumerate(content[:whole].splitlines(), start=1):
                self._take(line, number)
        self._file = path.open("ab")
        if self._file.tell() != whole:
            self._file.truncate(whole)
            self._file.seek(whole)

    def __enter__(self) -> VerdictLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._lock.release()

    def add(self, question: Question, answer: Answer, judge: str) -> None:
        """Keep a judge's answer; it is on disk when this returns."""
        key = question.key(judge)
        row = json.dumps(as_row(question, answer, judge))
        self._file.write(row.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.answers[key], self._judges[key] = answer, judge

    def tokens(self, judge: str) -> tuple[int, int]:
        """Return the input and output tokens of all of a judge's answers."""
        answers = [a for key, a in self.answers.items() if self._judges[key] == judge]
        return sum(a.input_tokens for a in answers), sum(a.output_tokens for a in answers)

    def _take(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line)
            answer = Answer(**{field.name: row[field.name] for field in fields(Answer)})
            _check(row, answer)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(
                f"{self.path}, line {number}: not a verdict ({type(error).__name__}); the file was "
                "changed by something else: take the line out, or choose another --output."
            ) from None
        self.answers[row["key"]], self._judges[row["key"]] = answer, row["judge"]


def _check(row: Mapping[str, Any], answer: Answer) -> None:
    is_verdict = answer.verdict in VERDICTS and answer.failure is None
    is_failure = answer.verdict is None and isinstance(answer.failure, str)
    counts = (answer.input_tokens, answer.output_tokens)
    if not (is_verdict or is_failure) or not all(isinstance(n, int) and n >= 0 for n in counts):
        raise ValueError("neither verdict nor failure")
    if not isinstance(row["key"], str) or not isinstance(row["judge"], str):
        raise TypeError("no key")
