"""The verdict log: one line per verdict or failure, on disk before the next call."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from softpref.errors import UsageError
from softpref.judging.account import BATCH_SHARE
from softpref.judging.failures import CUT_ONCE
from softpref.judging.questions import FIVE_VERDICTS, VERDICTS, Answer, Question, as_row
from softpref.training.output import one_writer, write_text


class Lines:
    """A file of JSON objects, one per line, each on disk before `add` returns.

    After a kill, an incomplete last line is dropped. One process writes it at a time.

    Raises:
        UsageError: another process is writing it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = ExitStack()
        self._lock.enter_context(one_writer(path))

    def read(self) -> list[bytes]:
        """Return the lines of earlier runs, and open the file for more."""
        end, lines = 0, []
        if self.path.exists():
            content = self.path.read_bytes()
            end = content.rfind(b"\n") + 1
            lines = content[:end].splitlines()
        self._file = self.path.open("ab")
        if self._file.tell() != end:
            self._file.truncate(end)
            self._file.seek(end)
        return lines

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a line."""
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, and leave it to other processes."""
        if hasattr(self, "_file"):
            self._file.close()
        self._lock.close()


def resume_from(progress: Path, record: Mapping[str, Any]) -> list[Any]:
    """Return the rows that an interrupted command has written; create the file if needed.

    The first line holds the command's settings.

    Raises:
        UsageError: the file is damaged or belongs to other settings.
    """
    header = json.dumps(record) + "\n"
    if not progress.exists():
        write_text(progress, header)
        return []
    content = progress.read_bytes()
    end = content.rfind(b"\n") + 1  # a kill may cut the last line
    lines = content[:end].splitlines(keepends=True)
    if not lines or lines[0] != header.encode():
        raise UsageError(
            f"{progress}: was started with other settings, another model or other prompts; delete "
            "it, or choose another --output."
        )
    try:
        done = [json.loads(line) for line in lines[1:]]
    except (ValueError, RecursionError):
        raise UsageError(f"{progress}: is damaged; delete it to start over.") from None
    os.truncate(progress, end)  # in place, since a kill must not lose what was paid
    return done


class VerdictLog:
    """Answers by key, read from a file and appended to it.

    After a kill, calls in flight are repeated. If a key has several lines, the last one counts.

    Attributes:
        answers: by key.
        lines: number of lines by key.
        fresh: keys added since the file was opened.
        known: hashes of the judges that have given a verdict.
        cut: keys of questions with a reply that was cut off: the next one gets more room.

    Raises:
        UsageError: the file is not a verdict log, is damaged other than at its end, or another
            process is writing it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Answer] = {}
        self.lines: Counter[str] = Counter()
        self.fresh: set[str] = set()
        self.known: set[str] = set()
        self.cut: set[str] = set()
        self._billed: dict[tuple[str, str], float] = defaultdict(float)
        self._counted: dict[tuple[str, str], Any] = defaultdict(int)
        self._lines = Lines(path)
        try:
            for number, line in enumerate(self._lines.read(), start=1):
                self._read_line(line, number)
        except BaseException:
            self._lines.close()
            raise

    def __enter__(self) -> VerdictLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def add(self, question: Question, answer: Answer, judge: str) -> None:
        """Store a judge's answer; it is on disk when this returns."""
        key = question.key(judge)
        self._lines.add(as_row(question, answer, judge))
        self.fresh.add(key)
        self._store(key, judge, answer)

    def billed(self, judge: str) -> tuple[float, float]:
        """Return the input and output tokens that a judge may have billed, at the full price.

        Repeated questions count each time.
        """
        return self._billed[judge, "input"], self._billed[judge, "output"]

    def counted(self, keys: Iterable[str]) -> tuple[int, int]:
        """Return the input and output tokens of questions as counted by the endpoint.

        Repeated questions count each time.
        """
        keys = list(keys)
        kinds = ("input", "output")
        sent, received = (sum(self._counted[k, kind] for k in keys) for kind in kinds)
        return sent, received

    def _read_line(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line)
            row.setdefault("in_batch", False)  # a log from before there were batches
            answer = Answer(**{field.name: row[field.name] for field in fields(Answer)})
            _check(row, answer)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(
                f"{self.path}, line {number}: not a verdict ({type(error).__name__}); the file was "
                "changed by something else: remove the line, or choose another --output."
            ) from None
        self._store(row["key"], row["judge"], answer)

    def paid(self, keys: Iterable[str]) -> tuple[float, float]:
        """Return the tokens of `counted`, those of batches by their share of the price."""
        keys = list(keys)
        sent, received = (sum(self._counted[k, kind] for k in keys) for kind in ("sent", "got"))
        return sent, received

    def _store(self, key: str, judge: str, answer: Answer) -> None:
        self.answers[key] = answer
        self.lines[key] += 1
        if answer.verdict:
            self.known.add(judge)
        if answer.failure == CUT_ONCE:
            self.cut.add(key)
        share = BATCH_SHARE if answer.in_batch else 1
        self._counted[key, "input"] += answer.input_tokens
        self._counted[key, "output"] += answer.output_tokens
        self._counted[key, "sent"] += share * answer.input_tokens
        self._counted[key, "got"] += share * answer.output_tokens
        self._billed[judge, "input"] += share * answer.billed_input_tokens
        self._billed[judge, "output"] += share * answer.billed_output_tokens


def _check(row: Mapping[str, Any], answer: Answer) -> None:
    is_verdict = answer.verdict in (*VERDICTS, *FIVE_VERDICTS) and answer.failure is None
    is_failure = answer.verdict is None and isinstance(answer.failure, str)
    counts = [value for name, value in vars(answer).items() if name.endswith("_tokens")]
    if not (is_verdict or is_failure) or not all(isinstance(n, int) and n >= 0 for n in counts):
        raise ValueError("neither verdict nor failure")
    if not isinstance(answer.in_batch, bool):
        raise TypeError("neither in a batch nor not")
    if not isinstance(row["key"], str) or not isinstance(row["judge"], str):
        raise TypeError("no key")
