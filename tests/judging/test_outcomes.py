"""From verdicts in two orders to wins, ties and failures."""

from __future__ import annotations

import itertools

import pytest

from softpref.judging.outcomes import mean_verdict, outcomes_of
from softpref.judging.questions import Answer, Comparison, questions_of

COMPARISON = Comparison("u", "prompt", "longer response", "baseline")


def answers_of(verdicts):
    return [
        Answer(verdict) if verdict in ("A", "B", "tie") else Answer(None, verdict)
        for verdict in verdicts
    ]


def outcome(*verdicts, orders="both", seed=0):
    questions, answers = questions_of([COMPARISON], orders, seed), answers_of(verdicts)
    return outcomes_of([COMPARISON], questions, {"u": answers})[0]


@pytest.mark.parametrize(
    ("first", "second"), list(itertools.product(["A", "B", "tie", "timeout"], repeat=2))
)
def test_two_orders_against_the_rule_written_out(first, second):
    found = outcome(first, second)
    # In the second order A is the baseline's.
    for_response = [first, {"A": "B", "B": "A"}.get(second, second)]
    if "timeout" in for_response:
        expected, flipped = "failed", False
    elif for_response[0] == for_response[1]:
        expected, flipped = {"A": "win", "B": "loss", "tie": "tie"}[for_response[0]], False
    else:
        expected, flipped = "tie", True
    assert (found.result, found.flipped) == (expected, flipped)
    assert found.failure == ("timeout" if expected == "failed" else None)
    assert found.length_difference == len("longer response") - len("baseline")


@pytest.mark.parametrize(
    ("verdicts", "mean"),
    [
        (("A", "B"), 1.0), (("B", "A"), -1.0), (("tie", "tie"), 0.0), (("A", "A"), 0.0),
        (("A", "tie"), 0.5), (("tie", "A"), -0.5), (("A", "timeout"), 0.0),
    ],
)  # fmt: skip
def test_the_mean_verdict_is_0_where_a_call_failed(verdicts, mean):
    questions = questions_of([COMPARISON], "both", 0)["u"]
    assert mean_verdict(questions, answers_of(verdicts)) == mean


def test_one_order_is_drawn_by_seed_and_uid_and_means_the_same_response():
    comparisons = [Comparison(str(i), "p", "r", "b") for i in range(400)]
    drawn = questions_of(comparisons, "one", seed=3)
    swapped = [questions[0].is_swapped for questions in drawn.values()]
    assert 150 < sum(swapped) < 250
    again = questions_of(comparisons[::-1], "one", seed=3)
    assert all(again[uid] == questions for uid, questions in drawn.items())
    assert swapped != [q[0].is_swapped for q in questions_of(comparisons, "one", 4).values()]
    for questions in drawn.values():
        shown = "b" if questions[0].is_swapped else "r"
        assert questions[0].first == shown
        verdict = {"r": "A", "b": "B"}[shown]
        answers = {questions[0].uid: [Answer(verdict)]}
        comparison = next(c for c in comparisons if c.uid == questions[0].uid)
        found = outcomes_of([comparison], {comparison.uid: questions}, answers)[0]
        assert (found.result, found.flipped) == ("win", False)


def test_a_key_depends_on_all_that_the_answer_depends_on():
    one, other = questions_of([COMPARISON], "both", 0)["u"]
    changed = questions_of([Comparison("u", "prompt", "longer response", "other")], "both", 0)["u"]
    keys = [one.key("j"), other.key("j"), one.key("k"), changed[0].key("j")]
    assert len(set(keys)) == 4
    same_texts = Comparison("v", "prompt", "longer response", "baseline")
    assert questions_of([same_texts], "both", 0)["v"][0].key("j") == one.key("j")
