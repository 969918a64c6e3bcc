"""Read an endpoint's reply as untrusted input."""

from __future__ import annotations

from typing import Any

from softpref.judging.questions import Answer, Grades
from softpref.judging.template import read_reply

MAX_TOKENS = 10**9
"""Of one call; a larger number is not a valid count."""


def read_completion(completion: Any, limits: tuple[int, int], grades: Grades = "three") -> Answer:
    """Return the answer in a chat completion, or its failure.

    Args:
        completion: the parsed JSON of the endpoint, of any shape.
        limits: upper bounds of input and output tokens, used without a valid count.
        grades: the number of verdicts that were to choose from.
    """
    verdict, failure, justification = _verdict(completion, grades)
    counted = _usage(completion)
    return Answer(verdict, failure, justification, *(counted or (0, 0)), *(counted or limits))


def _verdict(completion: Any, grades: Grades) -> tuple[str | None, str | None, str]:
    """Return verdict, failure and justification."""
    try:
        choice = completion.choices[0]
        message, finish = choice.message, choice.finish_reason
        refused = getattr(message, "refusal", None) or finish == "content_filter"
        content = _text(message.content)
    except (AttributeError, IndexError, KeyError, TypeError):
        return None, "broken reply", ""
    if refused:
        return None, "refusal", ""
    read = read_reply(content, grades)
    if read is None:
        return None, "cut off" if finish == "length" else "no verdict", ""
    verdict, justification = read
    return verdict, None, justification


def _text(content: Any) -> str:
    """Return a message's content: text, or the text of its parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content if part.get("type") == "text")


def _usage(completion: Any) -> tuple[int, int] | None:
    """Return the reported input and output tokens, or None if they are not valid counts."""
    usage = getattr(completion, "usage", None)
    sent, received = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    if not isinstance(sent, int) or not isinstance(received, int):
        return None
    is_count = min(sent, received) >= 0 and max(sent, received) <= MAX_TOKENS
    return (sent, received) if is_count else None
