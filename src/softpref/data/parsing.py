"""Parse one raw row, in any common preference format, into the fields of a pair.

An ambiguous row is rejected, unless one reading is almost certain. Then it is parsed that way, and
a note is counted.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softpref.columns import STANDARD, Columns
from softpref.data.label_columns import read_label_columns
from softpref.data.messages import (
    Message,
    Text,
    is_empty,
    is_given,
    parse_context,
    parse_text,
    refuse_media,
    require_json,
    texts_of,
)
from softpref.data.readers import RowError

ParsedPair = dict[str, Any]

ANNOTATOR = "annotator"
OPTIONAL = ("uid", "is_flipped", "soft_label", ANNOTATOR)
PROMPT_NAMES = (
    "question", "instruction", "query", "input", "inputs", "context", "history", "problem", "task",
    "system", "user", "human", "message", "messages", "conversation",
    "conversations", "dialogue",
)  # fmt: skip
"""Column names that often hold a prompt, the most likely first."""

TURN = re.compile(
    r"(?:^|\n)[ \t]*(?:human|assistant|user|system|prompter|ai|bot|model)[ \t]?:"
    r"|###[ \t]*(?:human|assistant|user|instruction|input|response)[ \t]?:[ \t]*\n?"
    r"|<\|im_start\|>\w+\n|<start_of_turn>\w+\n|<\|start_header_id\|>\w+<\|end_header_id\|>\n*"
    r"|<\|(?:user|assistant|system|prompter|human)\|>\n?|\[/INST\]",
    re.IGNORECASE,
)
"""Marks of a new turn in a conversation that is written as one text."""

OTHERS_TURN = re.compile(r"human|user|prompter|system|instruction|input", re.IGNORECASE)
"""What a mark of a turn that is not the assistant's contains."""
INSTRUCTING = ("system", "developer")
ASKING = ("user", *INSTRUCTING)
"""Roles of messages that belong to the prompt, where a response begins with them."""
MIN_PROMPT_CHARACTERS = 8
"""Length of a prompt that responses do not begin with by chance."""
REPEATED = "both responses repeat the prompt, which was read once"
REPEATED_TEXT = "both responses begin with the prompt, which appears twice in each sequence"
WRITTEN = "messages were written as text and read as messages"
USER_TURN = "the prompt is text beside messages and was read as the user's turn"
SYSTEM_READ = "system and prompt were read as the first two turns of a conversation"
IMPLICIT = "there is no prompt column: the common start of both responses was read as the prompt"
CUT = "the responses have a common start beyond the prompt, and no turn marker ends the prompt"


@dataclass(frozen=True)
class Parsed:
    """A pair's fields, without `row`, and notes on how they were read."""

    fields: ParsedPair
    notes: tuple[str, ...]


def parse_pair(raw: object, columns: Columns = STANDARD) -> Parsed:
    """Return the fields of a pair.

    A missing prompt is the common start of chosen and rejected, up to the last turn marker if there
    is one. A missing `uid` stays missing.

    Raises:
        RowError: the row is not a valid pair.
    """
    if isinstance(raw, RowError):
        raise raw
    if not isinstance(raw, Mapping):
        raise RowError("not an object with the columns prompt, chosen and rejected")
    refuse_media(raw)
    named, columns = columns, columns.of(raw)
    notes = [
        f"there is no column {getattr(named, side)!r}: `{side}` was read"
        for side in ("prompt", "chosen", "rejected")
        if getattr(columns, side) == side != getattr(named, side)
    ]
    chosen = _side(raw, columns.chosen, notes)
    rejected = _side(raw, columns.rejected, notes)
    if columns.prompt in raw or columns.prompt != STANDARD.prompt:
        prompt = _side(raw, columns.prompt, notes)
        prompt, chosen, rejected = _explicit(prompt, chosen, rejected, notes)
    else:
        prompt, chosen, rejected = _implicit(raw, chosen, rejected, notes)
    if columns.system:
        prompt, chosen, rejected = _with_system(raw, columns, prompt, chosen, rejected)
        if raw.get(columns.system):
            notes.append(SYSTEM_READ)
    if not type(prompt) is type(chosen) is type(rejected):
        raise RowError("prompt, chosen and rejected must be all text or all messages")
    texts = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for side, text in texts.items():
        if is_empty(text):
            raise RowError(f"{getattr(columns, side)} is empty")
    if chosen == rejected:
        raise RowError("chosen and rejected are identical")
    context = parse_context(raw) if isinstance(prompt, list) else {}
    fields = texts | context | _optional(raw) | read_label_columns(raw, columns)
    for name, value in fields.items():
        require_json(value, getattr(columns, name) if name in texts else name)
    return Parsed(fields, tuple(dict.fromkeys(notes)))


def unread_columns(raw: Mapping[str, Any], columns: Columns, pair: Mapping[str, Any]) -> list[str]:
    """Return the columns of a raw row that were not read."""
    read = {*columns.of(raw).names, *OPTIONAL, *pair}
    return [str(name) for name in raw if name not in read and raw[name] is not None]


def _side(raw: Mapping[str, Any], column: str, notes: list[str]) -> Text:
    if column not in raw:
        raise RowError(f"{column} is missing ({_names(raw)})")
    if raw[column] is None:
        raise RowError(f"{column} is null ({_names(raw)})")
    text = parse_text(raw[column], column)
    if isinstance(text, list) and isinstance(raw[column], str):
        notes.append(WRITTEN)
    return text


def _names(raw: Mapping[str, Any]) -> str:
    return f"columns of the row: {', '.join(map(str, itertools.islice(raw, 8))) or 'none'}"


def _explicit(
    prompt: Text, chosen: Text, rejected: Text, notes: list[str]
) -> tuple[Text, Text, Text]:
    """Return prompt and responses, without a prompt that the responses repeat."""
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        asked = prompt.strip()
        repeats = [side.lstrip().startswith(asked) for side in (chosen, rejected)]
        if len(asked) >= MIN_PROMPT_CHARACTERS and all(repeats):
            notes.append(REPEATED_TEXT)
        return prompt, chosen, rejected
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        return prompt, chosen, rejected
    if isinstance(prompt, list):
        repeats = [bool(prompt) and side[: len(prompt)] == prompt for side in (chosen, rejected)]
        if repeats == [True, True]:
            notes.append(REPEATED)
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        elif any(repeats):
            raise RowError("one of the responses repeats the prompt, and the other does not")
        if any(side and side[0]["role"] in ASKING for side in (chosen, rejected)):
            raise RowError(
                "a response begins with a user's or system message: give the assistant's turns "
                "alone, or the whole prompt again"
            )
        return prompt, chosen, rejected
    if all(message["role"] == "assistant" for message in (*chosen, *rejected)):
        notes.append(USER_TURN)
        return [{"role": "user", "content": prompt}], chosen, rejected
    common, chosen, rejected = _split_messages(chosen, rejected)
    if prompt.strip() not in (text.strip() for text in texts_of(common)):
        raise RowError("prompt is text that is not among the messages before the responses")
    return common, chosen, rejected


def _implicit(
    raw: Mapping[str, Any], chosen: Text, rejected: Text, notes: list[str]
) -> tuple[Text, Text, Text]:
    if isinstance(chosen, list) and isinstance(rejected, list):
        common, chosen, rejected = _split_messages(chosen, rejected)
        if not common:
            raise RowError(f"prompt is missing ({_names(raw)}){_hint(raw)}")
        return common, chosen, rejected
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return "", chosen, rejected
    common_text = os.path.commonprefix([chosen, rejected])
    turns = list(TURN.finditer(common_text))
    if turns and OTHERS_TURN.search(turns[-1][0]):
        raise RowError(
            "chosen and rejected differ before their last turn: the last mark that both share is "
            f"{turns[-1][0].strip()!r}"
        )
    if turns:
        prompt = common_text[: turns[-1].end()]
    else:
        if _hint(raw) or not common_text.strip():
            raise RowError(f"prompt is missing ({_names(raw)}){_hint(raw)}")
        prompt = common_text.removesuffix(" ")  # the space as in TRL
        follows = {text[len(common_text) :][:1] for text in (chosen, rejected)}
        if common_text in (chosen, rejected):
            raise RowError(
                "one response is a prefix of the other, so the end of the prompt is unknown: give "
                "a prompt column"
            )
        if common_text[-1:].isalnum() and any(map(str.isalnum, follows)):
            notes.append(CUT)
    notes.append(IMPLICIT)
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def _hint(raw: Mapping[str, Any]) -> str:
    held = [str(name) for name, value in raw.items() if is_given(value)]
    names = [name for name in held if name.lower() in PROMPT_NAMES]
    if not names:
        return ""
    likeliest = min(names, key=lambda name: PROMPT_NAMES.index(name.lower()))
    return f"; did you mean --prompt_column {likeliest}?"


def _with_system(
    raw: Mapping[str, Any], columns: Columns, prompt: Text, chosen: Text, rejected: Text
) -> tuple[Text, Text, Text]:
    """Return prompt and responses as messages, starting with the system message, if any."""
    if columns.system not in raw and not columns.or_standard:
        raise RowError(f"{columns.system} is missing ({_names(raw)})")
    system = raw.get(str(columns.system))
    if system is not None and not isinstance(system, str):
        raise RowError(f"{columns.system} is not text")
    if system and isinstance(prompt, list) and prompt and prompt[0]["role"] in INSTRUCTING:
        raise RowError(
            f"{columns.system} stands beside a prompt that begins with a system message: keep one"
        )
    first: list[Message] = [{"role": "system", "content": system}] if system else []
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    first_response, second = (
        [{"role": "assistant", "content": text}] if isinstance(text, str) else text
        for text in (chosen, rejected)
    )
    if isinstance(prompt, str) and not prompt.strip():
        raise RowError(f"{columns.prompt} is empty")
    return first + turns, first_response, second


def _split_messages(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    for column, messages in {"chosen": chosen, "rejected": rejected}.items():
        if not messages or messages[-1]["role"] != "assistant":
            raise RowError(f"{column} does not end with an assistant message")
    if chosen[:-1] != rejected[:-1]:
        raise RowError("chosen and rejected differ before their last message: no common prompt")
    return chosen[:-1], chosen[-1:], rejected[-1:]


def _optional(raw: Mapping[str, Any]) -> dict[str, Any]:
    found = {column: raw[column] for column in OPTIONAL if raw.get(column) is not None}
    if isinstance(uid := found.get("uid"), int) and not isinstance(uid, bool):
        found["uid"] = str(uid)
    if not isinstance(uid := found.get("uid", "-"), str) or not uid.strip():
        raise RowError("uid is neither text nor an integer")
    if not isinstance(found.get("is_flipped", False), bool):
        raise RowError("is_flipped is not a boolean")
    label = found.get("soft_label", 0.5)
    if isinstance(label, bool) or not isinstance(label, int | float) or not 0 <= label <= 1:
        raise RowError("soft_label is not a number in [0, 1]")
    if "soft_label" in found:
        found["soft_label"] = float(label)
    return found | _annotator(found.pop(ANNOTATOR, ""))


def _annotator(given: object) -> dict[str, str]:
    """Return who labelled the pair, or nothing where it is unknown."""
    if isinstance(given, float):  # pandas makes floats of integers beside an empty cell
        given = "" if math.isnan(given) else int(given) if given.is_integer() else given
    if isinstance(given, str):  # and writes them to CSV
        given = given.strip()
        given = given.removesuffix(".0") if re.fullmatch(r"\d+\.0", given) else given
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise RowError(
            "annotator is neither text nor an integer: write a name or a number, or leave it empty"
        )
    return {ANNOTATOR: str(given)} if given != "" else {}
