"""Asking: what a judge is asked, and what it costs."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from softpref.judging.account import Account
from softpref.judging.ask import JUDGES, ask_judge
from softpref.judging.log import VerdictLog
from softpref.judging.options import JudgeKind, JudgeOptions
from softpref.judging.questions import Answer, Comparison


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
