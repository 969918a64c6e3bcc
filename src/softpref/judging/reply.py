"""Read an endpoint's reply as untrusted input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_TOKENS = 10**9
"""Of one call; a larger number is not a valid count."""


@dataclass(frozen=True)
class Reply:
    """What came of a call.

    Attributes:
        text: of the reply; empty if the call failed.
        failure: the kind of failure; None for a reply.
        is_cut: whether the reply ended at its maximum of tokens.
        counted: input and output tokens as counted by the endpoint; zeros without a count.
        billed: tokens that may be billed: the count, or an upper bound without one.
    """

    text: str
    failure: str | None = None
    is_cut: bool = False
    counted: tuple[int, int] = (0, 0)
    billed: tuple[int, int] = (0, 0)


def read_completion(completion: Any, limits: tuple[int, int]) -> Reply:
    """Return the reply in a completion.

    Args:
        completion: parsed JSON of the endpoint, of any shape, as objects or dicts.
        limits: upper bounds of input and output tokens, used without a valid count.
    """
    text, failure, is_cut = _content(completion)
    counted = _usage(completion)
    return Reply(encodable(text), failure, is_cut, counted or (0, 0), counted or limits)


def encodable(text: str) -> str:
    """Return text that UTF-8 can hold: half a surrogate pair becomes a replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _content(completion: Any) -> tuple[str, str | None, bool]:
    """Return text, failure, and whether the text was cut off."""
    try:
        choice = _field(completion, "choices")[0]
        message, finish = _field(choice, "message"), _field(choice, "finish_reason")
        if message is None:  # a completion of text
            text = _field(choice, "text")
            is_text = isinstance(text, str)
            return text if is_text else "", None if is_text else "broken reply", finish == "length"
        refusal = _field(message, "refusal")
        content = _text(_field(message, "content"))
        has_content = isinstance(message, dict) or hasattr(message, "content")
    except (AttributeError, IndexError, KeyError, TypeError):
        return "", "broken reply", False
    if refusal or finish == "content_filter":
        return refusal if isinstance(refusal, str) else content, "refusal", False
    if _field(message, "tool_calls") and not content:
        return "", "tool call", False
    return content, None if has_content else "broken reply", finish == "length"


def _field(of: Any, name: str) -> Any:
    return of.get(name) if isinstance(of, dict) else getattr(of, name, None)


def _text(content: Any) -> str:
    """Return a message's content: text, or the text of its parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content if part.get("type") == "text")


def _usage(completion: Any) -> tuple[int, int] | None:
    """Return the reported input and output tokens, or None if they are not valid counts."""
    usage = _field(completion, "usage")
    sent, received = (_field(usage, name) for name in ("prompt_tokens", "completion_tokens"))
    if not isinstance(sent, int) or not isinstance(received, int):
        return None
    is_count = min(sent, received) >= 0 and max(sent, received) <= MAX_TOKENS
    return (sent, received) if is_count else None
