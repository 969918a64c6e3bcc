"""Asking: what a judge is asked, and what it costs."""

from __future__ import annotations

import re
from threading import Barrier
from time import sleep
from typing import get_args

import pytest

from softpref.errors import UsageError
from softpref.judging.account import Account
from softpref.judging.ask import JUDGES, ask_judge
from softpref.judging.calls import make_calls
from softpref.judging.log import VerdictLog
from softpref.judging.options import JudgeKind, JudgeOptions
from softpref.judging.questions import Answer, Comparison
from softpref.judging.scored import ScoringJudge


class Dearest:
    """A judge that is paid, and no `Endpoint`: it prefers A, for 10 tokens in and 1 out."""

    identity = {"judge": "dearest"}
    sees_order = True

    def __init__(self):
        self.account = Account(1e5, 1e6)

    def ask(self, questions):
        for question in questions:
            yield question, Answer("A", None, "", 10, 1, 10, 1)


def test_a_new_judge_is_one_class(tmp_path, caplog):
    """What it costs is said before and counted after, by its account alone."""
    caplog.set_level("INFO", "softpref")
    judge, pair = Dearest(), Comparison("0", "p", "a", "b")
    with VerdictLog(tmp_path / "verdicts.jsonl") as log:
        found = ask_judge([pair], judge, JudgeOptions(), log)
        assert (found.dollars, found.input_tokens) == (pytest.approx(4), 20)
        assert found.outcomes[0].flipped
        estimate = r"8,192 output tokens, 8\d+\.\d\d dollars, if each reply takes --max_reply_tok"
        assert re.search(estimate, caplog.text)
        assert "at most" not in caplog.text  # a reply that is cut off is asked for once more
        ask_judge([pair], judge, JudgeOptions(), log)
    assert judge.account.spent == pytest.approx(4)  # as an earlier run spent
    assert judge.account.has_answered


def test_every_kind_of_judge_has_a_row():
    assert set(JUDGES) == set(get_args(JudgeKind))


class Unfit(ScoringJudge):
    """A local judge that cannot read the first 30 questions."""

    identity = {"judge": "unfit"}

    def answers(self, batch):
        unread = Answer(None, "does not fit the context")
        return [unread if int(question.uid) < 30 else Answer("A") for question in batch]


def test_a_local_judge_s_failures_are_counted_and_it_goes_on(tmp_path):
    pairs = [Comparison(str(i), f"p{i}", "a", "b") for i in range(60)]
    with VerdictLog(tmp_path / "verdicts.jsonl") as log:
        found = ask_judge(pairs, Unfit(), JudgeOptions(), log)
    assert found.failures == {"does not fit the context": 30}
    assert found.calls == 60


class Refusing:
    """Makes calls of which one raises while others are in flight."""

    concurrency = 4

    def __init__(self):
        self.account = Account()
        self.together = Barrier(4)

    def call(self, item):
        if item < 4:
            self.together.wait()
        if item == 0:
            raise UsageError("refused")
        sleep(0.05)
        return item

    def again(self, item, result):
        return None

    def billed(self, result):
        return 0, 0

    most_tokens = billed

    def longest_call(self):
        return 60.0


def test_calls_in_flight_when_one_raises_are_yielded_first():
    made = make_calls(Refusing(), range(50))
    assert {next(made)[0] for _ in range(3)} == {1, 2, 3}
    with pytest.raises(UsageError, match="refused"):
        next(made)
