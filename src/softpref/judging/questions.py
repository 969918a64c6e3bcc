"""Questions to a judge: two anonymous responses to a prompt, in one order or in both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from softpref.data.messages import Text, texts_of

if TYPE_CHECKING:
    from softpref.judging.account import Account

Orders = Literal["both", "one"]
VERDICTS = ("A", "B", "tie")
FIVE_VERDICTS = ("A>>B", "A>B", "tie", "B>A", "B>>A")
Grades = Literal["three", "five"]


@dataclass(frozen=True)
class Comparison:
    """A response and a baseline response to the same prompt.

    Attributes:
        uid: unique name; several comparisons may have the same prompt.
        prompt: text or messages.
        response: the response whose wins are counted; text, or messages if it is not one text turn.
        baseline: the response to compare with, likewise.
        context: the row's `tools` and `chat_template_kwargs`, if any.
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
        attempt: 1 if an earlier reply was cut off, so that this one gets more room.
    """

    uid: str
    prompt: Text
    first: Text
    second: Text
    is_swapped: bool
    context: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 0

    def key(self, judge: str) -> str:
        """Return a hash of everything that the answer depends on: texts, order and judge."""
        asked = [self.prompt, self.first, self.second, judge]
        text = json.dumps([*asked, self.context] if self.context else asked)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Answer:
    """A judge's answer.

    Attributes:
        verdict: one of `VERDICTS` or `FIVE_VERDICTS`; None if the call failed.
        failure: the kind of failure; None if there is a verdict.
        justification: the judge's justification.
        input_tokens: tokens sent, as counted by the endpoint; 0 without a count.
        output_tokens: tokens received, likewise.
        billed_input_tokens: tokens that may be billed: the count, or an upper bound without one.
        billed_output_tokens: likewise.
        in_batch: whether a batch made the call, at its lower price.
    """

    verdict: str | None
    failure: str | None = None
    justification: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    billed_input_tokens: int = 0
    billed_output_tokens: int = 0
    in_batch: bool = False


class Judge(Protocol):
    """Answers questions; `identity` holds everything that changes its answers.

    `sees_order` is whether the order of A and B can affect the verdict. A judge that scores each
    response by itself is asked only once. `account` is None for a judge whose calls cost nothing.
    """

    identity: Mapping[str, Any]
    sees_order: bool

    @property
    def account(self) -> Account | None:
        """What its calls cost, and have cost so far."""

    def ask(self, questions: Sequence[Question]) -> Iterable[tuple[Question, Answer]]:
        """Yield every question with its answer, in order of arrival.

        Once its account is stopped, make no further call, and yield what earlier ones bring.
        """


def plain_prompt(prompt: Text) -> Text:
    """Return a prompt as text if it is text or one user's message, else the messages."""
    if isinstance(prompt, str) or len(prompt) != 1:
        return prompt
    (turn,) = prompt
    is_plain = turn.keys() == {"role", "content"} and turn["role"] == "user"
    return "\n".join(texts_of(prompt)) if is_plain else prompt


def judge_hash(judge: Judge) -> str:
    """Return a short hash of the judge's identity."""
    return hashlib.sha256(json.dumps(judge.identity, sort_keys=True).encode()).hexdigest()[:16]


def questions_of(
    comparisons: Iterable[Comparison], orders: Orders, seed: int
) -> dict[str, list[Question]]:
    """Return the questions of each comparison by uid: both orders, or a random one."""
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
    """Return a row of the verdict log."""
    about = {"uid": question.uid, "is_swapped": question.is_swapped, "judge": judge}
    return {"key": question.key(judge)} | about | asdict(answer)
