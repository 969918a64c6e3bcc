"""Verdicts to outcomes: a verdict that changes with the order is a tie, a failure is counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from softpref.data.messages import as_text
from softpref.judging.questions import Answer, Comparison, Question
from softpref.judging.style import Style, style_difference
from softpref.judging.template import shown_prompt

Result = Literal["win", "loss", "tie", "failed"]
_SCORE = {"win": 1.0, "loss": -1.0}


@dataclass(frozen=True)
class Outcome:
    """The outcome of a comparison.

    Attributes:
        uid: of the comparison.
        prompt: as shown to a judge; comparisons with the same prompt are correlated.
        result: from the response's side.
        flipped: whether the verdict changed with the order.
        failure: the first failure, if any.
        length_difference: response minus baseline, characters.
        style_difference: of characters, headers, list items and bold texts, by `style_difference`.
        is_strong: whether all its verdicts say that one response is much better, and the same one.
    """

    uid: str
    prompt: str
    result: Result
    flipped: bool
    failure: str | None
    length_difference: int
    style_difference: Style = (0.0, 0.0, 0.0, 0.0)
    is_strong: bool = False


def outcomes_of(
    comparisons: Iterable[Comparison],
    questions: Mapping[str, Sequence[Question]],
    answers: Mapping[str, Sequence[Answer]],
) -> list[Outcome]:
    """Return the outcome of every comparison.

    Args:
        comparisons: the comparisons.
        questions: their questions, by uid.
        answers: the answers to these questions, in the same order.
    """
    return [
        _outcome(comparison, questions[comparison.uid], answers[comparison.uid])
        for comparison in comparisons
    ]


def mean_verdict(questions: Sequence[Question], answers: Sequence[Answer]) -> float:
    """Return the mean verdict on a response, 1 for a win and −1 for a loss; 0 if a call failed."""
    verdicts = [answer.verdict for answer in answers if answer.verdict is not None]
    if len(verdicts) < len(answers):
        return 0.0
    results = map(_from_response, verdicts, (question.is_swapped for question in questions))
    return fmean(_SCORE.get(result, 0.0) for result in results)


def _outcome(
    comparison: Comparison, questions: Sequence[Question], answers: Sequence[Answer]
) -> Outcome:
    response, baseline = as_text(comparison.response), as_text(comparison.baseline)
    about: dict[str, Any] = {
        "uid": comparison.uid,
        "prompt": shown_prompt(comparison),
        "length_difference": len(response) - len(baseline),
        "style_difference": style_difference(response, baseline),
    }
    verdicts = [answer.verdict for answer in answers if answer.verdict is not None]
    failures = [answer.failure for answer in answers if answer.failure is not None]
    if failures:
        return Outcome(result="failed", flipped=False, failure=failures[0], **about)
    results = {
        _from_response(verdict, question.is_swapped)
        for verdict, question in zip(verdicts, questions, strict=True)
    }
    flipped = len(results) > 1
    is_strong = not flipped and all(">>" in verdict for verdict in verdicts)
    result = "tie" if flipped else results.pop()
    return Outcome(result=result, flipped=flipped, failure=None, is_strong=is_strong, **about)


def _from_response(verdict: str, is_swapped: bool) -> Result:
    if verdict == "tie":
        return "tie"
    return "win" if verdict.startswith("A") != is_swapped else "loss"
