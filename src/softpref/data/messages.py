"""Prompts and responses: text, or messages with all fields that a chat template reads.

A message is a dict with `role`, `content` (text, parts of text, or None, as in a tool call) and any
other fields of its source, such as `tool_calls`, `tool_call_id`, `name` and `reasoning_content`.
Other fields that are null count as absent, at any depth and in every file format: Arrow gives each
row the fields of all rows, so its nulls cannot be distinguished from written ones. Items of lists
are kept. Other changes by Arrow cannot be undone: it may reorder fields and turn integers into
floats.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import pandas

from softpref.data.readers import RowError
from softpref.errors import first_line

Message = dict[str, Any]
Text = str | list[Message]

CONTEXT = ("tools", "chat_template_kwargs")
"""Columns of a row that are passed to the chat template with the messages."""
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_SHOWN = ("role", "content", "reasoning_content")
_RESERVED = {"conversation", "tokenize", "add_generation_prompt", "return_dict", *CONTEXT}


def parse_text(value: object, column: str) -> Text:
    """Return a column's value as text or messages; messages written as text are parsed.

    Raises:
        RowError: it is neither, or its content is not text.
    """
    if isinstance(value, str):
        return _written_messages(value, column) or value
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise RowError(f"{column} is neither text nor a list of messages")
    return [_message(message, column) for message in value]


def parse_context(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's `tools` and `chat_template_kwargs`, as far as they are not null.

    Raises:
        RowError: a chat template cannot take them.
    """
    found: dict[str, Any] = {}
    for column, kind in zip(CONTEXT, (list, dict), strict=True):
        value = raw.get(column)
        if isinstance(value, str):  # as in TRL
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise RowError(f"{column} is text, but not JSON") from None
        if value is None:
            continue
        if not isinstance(value, kind):
            raise RowError(f"{column} is not a {'list' if kind is list else 'dict'}")
        found[column] = _filled_fields(value, column)
    if reserved := _RESERVED & found.get("chat_template_kwargs", {}).keys():
        raise RowError(f"chat_template_kwargs may not set {', '.join(sorted(reserved))}")
    return found


def template_context(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's arguments of `apply_chat_template`, as in TRL."""
    return {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}


def texts_of(text: Text) -> Iterator[str]:
    """Yield the texts; of messages, their reasoning and content."""
    if isinstance(text, str):
        yield text
        return
    for message in text:
        for field in ("reasoning_content", "content"):
            value = message.get(field)
            for part in value if isinstance(value, list) else [value]:
                if part is not None:
                    yield part["text"] if isinstance(part, Mapping) else str(part)


def is_empty(text: Text) -> bool:
    """Return whether there is neither text nor a tool call."""
    calls = not isinstance(text, str) and any(message.get("tool_calls") for message in text)
    return not calls and not "".join(texts_of(text)).strip()


def as_text(text: Text) -> str:
    """Return readable text: the messages in order, each with its role.

    Other fields, such as tool calls, are shown as JSON.
    """
    if isinstance(text, str):
        return text
    return "\n\n".join(f"{message['role']}: {_message_text(message)}" for message in text)


def _message_text(message: Message) -> str:
    other = {
        name: value for name, value in message.items() if name not in _SHOWN and value is not None
    }
    shown = [json.dumps(other, ensure_ascii=False)] if other else []
    return "\n".join([*filter(None, texts_of([message])), *shown])


def require_json(value: object, column: str) -> None:
    """Refuse what cannot be written as JSON: Parquet and Python rows may hold dates and bytes.

    Raises:
        RowError: it holds such a value, or text with half of a surrogate pair.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        raise RowError(f"{column} has half of a surrogate pair, which is no text") from None
    except (TypeError, ValueError, RecursionError) as error:
        why = first_line(error)
        raise RowError(f"{column} cannot be written as JSON ({why}): make it text") from None


def is_given(value: object) -> bool:
    """Return whether a cell holds anything; arrays and `pandas.NA` have no truth of their own."""
    if isinstance(value, Sized):
        return len(value) > 0
    return pandas.isna(value) is not True and bool(value)


def refuse_media(raw: Mapping[str, Any]) -> None:
    """Refuse a row with images, audio or video.

    Raises:
        RowError: it has any.
    """
    if found := [name for name in MEDIA if is_given(raw.get(name))]:
        raise RowError(f"it has {found[0]}: softpref reads text only")


def _message(raw: Mapping[str, Any], column: str) -> Message:
    role = raw.get("role")
    if not isinstance(role, str):
        raise RowError(f"{column} has a message whose role is not text")
    content = _content(raw, "content", column)
    others = {str(k): v for k, v in sorted(raw.items()) if k not in ("role", "content")}
    others = _filled_fields(others, column)
    if "reasoning_content" in others:
        others["reasoning_content"] = _content(others, "reasoning_content", column)
    if content is None and not others:
        raise RowError(f"{column} has a message without content")
    return {"role": role, "content": content} | others


def _filled_fields(value: Any, column: str) -> Any:
    """Return the value without null fields, at any depth."""

    def without_nulls(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: without_nulls(v) for k, v in value.items() if v is not None}
        return [without_nulls(item) for item in value] if isinstance(value, list) else value

    try:
        return without_nulls(value)
    except RecursionError:
        raise RowError(f"{column} is nested too deeply") from None


def _content(message: Mapping[str, Any], field: str, column: str) -> Any:
    value = message.get(field)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowError(f"{column} has a message whose {field} is not text")
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RowError(f"{column} has a part of type {kind!r}: softpref reads text only")
    return [{"type": "text", "text": part["text"]} for part in value]


def _written_messages(value: str, column: str) -> list[Message] | None:
    """Return the messages that a cell holds as JSON or as a Python literal, None for other text.

    Raises:
        RowError: it begins like such a list, and cannot be parsed.
    """
    is_list = value.lstrip()[:2] == "[{"
    if not is_list or not ('"role"' in value or "'role'" in value):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and all(isinstance(message, Mapping) for message in found):
            if not any("role" in message for message in found):
                return None  # a role deeper down is other JSON, such as a response in JSON
            return [_message(message, column) for message in found]
    raise RowError(f"{column} looks like messages written as text, but cannot be parsed")
