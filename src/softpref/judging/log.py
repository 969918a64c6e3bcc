"""The verdict log: one line per verdict or failure, on disk before the next call."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from softpref.errors import UsageError
from softpref.judging.questions import FIVE_VERDICTS, VERDICTS, Answer, Question, as_row
from softpref.training.output import one_writer


class VerdictLog:
    """Answers by key, read from a file and appended to it.

    After a kill, an incomplete last line is dropped and calls in flight are repeated. If a key has
    several lines, the last one counts.

    Attributes:
        answers: by key.
        fresh: keys added since the file was opened.
        known: hashes of the judges that have given a verdict.

    Raises:
        UsageError: the file is not a verdict log, is damaged other than at its end, or another
            process is writing it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Answer] = {}
        self.fresh: set[str] = set()
        self.known: set[str] = set()
        self._billed: Counter[tuple[str, str]] = Counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = ExitStack()
        self._lock.enter_context(one_writer(path))
        try:
            self._open(path)
        except BaseException:
            self._lock.close()
            raise

    def _open(self, path: Path) -> None:
        end = 0
        if path.exists():
            content = path.read_bytes()
            end = content.rfind(b"\n") + 1
            for number, line in enumerate(content[:end].splitlines(), start=1):
                self._read_line(line, number)
        self._file = path.open("ab")
        if self._file.tell() != end:
            self._file.truncate(end)
            self._file.seek(end)

    def __enter__(self) -> VerdictLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.close()

    def add(self, question: Question, answer: Answer, judge: str) -> None:
        """Store a judge's answer; it is on disk when this returns."""
        key = question.key(judge)
        row = json.dumps(as_row(question, answer, judge))
        self._file.write(row.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.fresh.add(key)
        self._store(key, judge, answer)

    def billed(self, judge: str) -> tuple[int, int]:
        """Return the input and output tokens that a judge may have billed.

        Repeated questions count each time.
        """
        return self._billed[judge, "input"], self._billed[judge, "output"]

    def _read_line(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line)
            answer = Answer(**{field.name: row[field.name] for field in fields(Answer)})
            _check(row, answer)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(
                f"{self.path}, line {number}: not a verdict ({type(error).__name__}); the file was "
                "changed by something else: remove the line, or choose another --output."
            ) from None
        self._store(row["key"], row["judge"], answer)

    def _store(self, key: str, judge: str, answer: Answer) -> None:
        self.answers[key] = answer
        if answer.verdict:
            self.known.add(judge)
        self._billed[judge, "input"] += answer.billed_input_tokens
        self._billed[judge, "output"] += answer.billed_output_tokens


def _check(row: Mapping[str, Any], answer: Answer) -> None:
    is_verdict = answer.verdict in (*VERDICTS, *FIVE_VERDICTS) and answer.failure is None
    is_failure = answer.verdict is None and isinstance(answer.failure, str)
    counts = [value for name, value in vars(answer).items() if name.endswith("_tokens")]
    if not (is_verdict or is_failure) or not all(isinstance(n, int) and n >= 0 for n in counts):
        raise ValueError("neither verdict nor failure")
    if not isinstance(row["key"], str) or not isinstance(row["judge"], str):
        raise TypeError("no key")
