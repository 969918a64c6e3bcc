"""The verdict log survives what kills its writer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from softpref.errors import UsageError
from softpref.judging.log import VerdictLog, resume_from
from softpref.judging.questions import Answer, Question

QUESTION = Question("u", "prompt", "first", "second", False)
ANSWER = Answer("A", None, "because \u2028 of this", 10, 2, 10, 2)
FAILED = Answer(None, "timeout")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "deep" / "verdicts.jsonl"
    with VerdictLog(path) as log:
        log.add(QUESTION, ANSWER, "one")
        log.add(QUESTION, FAILED, "two")
    return path


ONE, TWO, THREE = (QUESTION.key(judge) for judge in ("one", "two", "three"))


def test_what_was_written_is_read(path):
    with VerdictLog(path) as log:
        assert log.answers == {ONE: ANSWER, TWO: FAILED}
        assert (log.billed("one"), log.billed("two")) == ((10, 2), (0, 0))


def test_a_torn_last_line_is_dropped_wherever_it_is_torn(path):
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        with VerdictLog(path) as log:
            assert log.answers == {ONE: ANSWER}
            log.add(QUESTION, ANSWER, "three")
        with VerdictLog(path) as log:
            assert log.answers == {ONE: ANSWER, THREE: ANSWER}


def test_the_later_of_two_lines_counts(path):
    with VerdictLog(path) as log:
        log.add(QUESTION, ANSWER, "two")
    with VerdictLog(path) as log:
        assert log.answers[TWO] == ANSWER
        log.add(QUESTION, ANSWER, "two")
        assert log.billed("two") == (20, 4)  # what is asked again is paid again


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "C"}, {"verdict": None}, {"failure": "x"}, {"input_tokens": -1},
        {"input_tokens": "1"}, {"key": 5}, {"key": None}, {"judge": 1},
    ],
)  # fmt: skip
def test_a_line_that_is_no_verdict_is_named(path, change):
    lines = path.read_text().splitlines()
    changed = json.dumps(json.loads(lines[0]) | change)
    path.write_text("\n".join([lines[1], changed, lines[1]]) + "\n")
    with pytest.raises(UsageError, match="verdicts.jsonl, line 2: not a verdict"):
        VerdictLog(path)
    path.write_text("\n".join(lines) + "\n")
    with VerdictLog(path):  # the refusal left it free
        pass


@pytest.mark.parametrize("line", [b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b"{}"])
def test_damage_in_the_middle_is_named(path, line):
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], line, lines[1]]) + b"\n")
    with pytest.raises(UsageError, match="line 2: not a verdict"):
        VerdictLog(path)


def test_one_writer_at_a_time(path):
    with VerdictLog(path), pytest.raises(UsageError, match="another process is writing it"):
        VerdictLog(path)


class Killed(BaseException):
    """A kill."""


def killed_writing(path, content):
    """Be killed after the file was opened for writing, and before anything is in it."""
    path.open("wb").close()
    raise Killed


def test_what_was_paid_is_not_written_again(tmp_path, monkeypatch):
    progress = tmp_path / "progress"
    assert resume_from(progress, {"seed": 1}) == []
    whole = progress.read_bytes() + b'{"text": "paid"}\n'
    progress.write_bytes(whole + b'{"text": "to')
    monkeypatch.setattr(Path, "write_bytes", killed_writing)
    assert resume_from(progress, {"seed": 1}) == [{"text": "paid"}]
    assert progress.read_bytes() == whole
