"""What a judge is asked: two anonymous responses to a prompt, in one order or in both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from softpref.data.messages import Text

Orders = Literal["both", "one"]
VERDICTS = ("A", "B", "tie")


@dataclass(frozen=True)
class Comparison:
    """A response against a baseline's to the same prompt.

    Attributes:
        uid: names it; comparisons of one prompt may differ in their responses alone.
        prompt: text or messages.
        response: whose win is counted; text, or messages where one turn of text does not say it.
        baseline: what it is compared with, likewise.
        context: the row's `tools` and `chat_template_kwargs`, as far as it has them.
    """

    uid: str
    prompt: Text
    response: Text
    baseline: Text
    context: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """One call: is `first` (A) or `second` (B) the better answer?

    Attributes:
        uid: of the comparison.
        prompt: text or messages.
        first: shown as A.
        second: shown as B.
        is_swapped: whether A is the baseline's.
        context: of the comparison.
    """

    uid: str
    prompt: Text
    first: Text
    second: Text
    is_swapped: bool
    context: Mapping[str, Any] = field(default_factory=dict)

    def key(self, judge: str) -> str:
        """Return a hash of all that the answer depends on: texts, their order, and the judge."""
        asked = [self.prompt, self.first, self.second, judge]
        text = json.dumps([*asked, self.context] if self.context else asked)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        verdict: "A", "B" or "tie"; None where the call failed.
        failure: why it failed, in a word or two; None where there is a verdict.
        justification: the judge's.
        input_tokens: of what was sent, as the endpoint counts; 0 where it does not say.
        output_tokens: of what it wrote, likewise.
        billed_input_tokens: what may have to be paid: as counted, or a bound where it was not.
        billed_output_tokens: likewise.
    """

    verdict: str | None
    failure: str | None = None
    justification: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    billed_input_tokens: int = 0
    billed_output_tokens: int = 0


class Judge(Protocol):
    """Answers questions; `identity` says who it is, in all that changes its answers.

    `sees_order` is whether A and B might be told apart by their place: a judge that scores each
    response for itself is asked once.
    """

    identity: Mapping[str, Any]
    sees_order: bool

    def ask(self, questions: Sequence[Question]) -> Iterable[tuple[Question, Answer]]:
        """Yield every question with its answer, in the order in which they come."""


def judge_hash(judge: Judge) -> str:
    """Return a short name of the judge as it is set up."""
    return hashlib.sha256(json.dumps(judge.identity, sort_keys=True).encode()).hexdigest()[:16]


def questions_of(
    comparisons: Iterable[Comparison], orders: Orders, seed: int
) -> dict[str, list[Question]]:
    """Return each comparison's questions by its uid: both orders, or one drawn by seed and uid."""
    return {
        comparison.uid: [
            _question(comparison, is_swapped)
            for is_swapped in (
                (False, True) if orders == "both" else (_drawn(comparison.uid, seed),)
            )
        ]
        for comparison in comparisons
    }


def _drawn(uid: str, seed: int) -> bool:
    return hashlib.sha256(f"{seed}/{uid}".encode()).digest()[0] % 2 == 1


def _question(comparison: Comparison, is_swapped: bool) -> Question:
    texts = (comparison.response, comparison.baseline)
    first, second = reversed(texts) if is_swapped else texts
    return Question(
        comparison.uid, comparison.prompt, first, second, is_swapped, comparison.context
    )


def as_row(question: Question, answer: Answer, judge: str) -> dict[str, Any]:
    """Return what the verdict log keeps."""
    about = {"uid": question.uid, "is_swapped": question.is_swapped, "judge": judge}
    return {"key": question.key(judge)} | about | asdict(answer)
