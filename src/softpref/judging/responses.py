"""Files of prompts and of responses, and two of the latter joined into comparisons."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from softpref.data.readers import RowError, read_rows
from softpref.data.sources import Text, place
from softpref.errors import UsageError
from softpref.judging.questions import Comparison


@dataclass(frozen=True)
class Response:
    """A response to a prompt, and the row of its file."""

    uid: str
    prompt: Text
    response: str
    row: int


def prompt_uid(prompt: Text, occurrence: int) -> str:
    """Name the `occurrence`-th row of a prompt, from 0."""
    text = json.dumps(prompt, sort_keys=True).encode()
    return f"{hashlib.sha256(text).hexdigest()[:24]}-{occurrence}"


def load_prompts(source: str) -> list[Text]:
    """Return the prompts of a file, in its order; other columns are not read.

    Raises:
        UsageError: it cannot be read, a row has no prompt, or there is none.
    """
    return [_prompt(source, row, values) for row, values in _rows(source)]


def load_responses(source: str) -> dict[str, Response]:
    """Return the responses of a file by uid; rows of one prompt are told apart by their order.

    Raises:
        UsageError: it cannot be read, a row lacks `prompt` or `response`, or there is none.
    """
    seen: Counter[str] = Counter()
    found = {}
    for row, values in _rows(source):
        prompt = _prompt(source, row, values)
        response = values.get("response")
        if not isinstance(response, str):
            raise UsageError(
                f"{place(source, row)}: has no text under `response`; give rows of prompt and "
                "response, as softpref generate writes them."
            )
        name = prompt_uid(prompt, 0)
        uid = prompt_uid(prompt, seen[name])
        seen[name] += 1
        found[uid] = Response(uid, prompt, response, row)
    return found


def join(source: str, baseline: str) -> list[Comparison]:
    """Return the comparisons of two files' responses to the same prompts.

    Raises:
        UsageError: as in `load_responses`, or the prompts are not the same.
    """
    ours, theirs = load_responses(source), load_responses(baseline)
    for one, other, name, where in (
        (ours, theirs, source, baseline),
        (theirs, ours, baseline, source),
    ):
        alone = [response for uid, response in one.items() if uid not in other]
        if alone:
            raise UsageError(
                f"{place(name, alone[0].row)}: its prompt is answered less often in {where} "
                f"({len(alone)} such rows): make both files from the same prompts."
            )
    return [
        Comparison(uid, response.prompt, response.response, theirs[uid].response)
        for uid, response in ours.items()
    ]


def _rows(source: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    some = False
    for row, values in read_rows(source):
        if isinstance(values, RowError):
            raise UsageError(f"{place(source, row)}: {values}; mend it or take it out.")
        if not isinstance(values, dict):
            raise UsageError(f"{place(source, row)}: not an object; mend it or take it out.")
        some = True
        yield row, values
    if not some:
        raise UsageError(f"{source}: holds no row.")


def _prompt(source: str, row: int, values: Mapping[str, Any]) -> Text:
    prompt = values.get("prompt")
    is_text = isinstance(prompt, str) and bool(prompt)
    is_conversation = (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in prompt
        )
    )
    if not is_text and not is_conversation:
        raise UsageError(
            f"{place(source, row)}: has no `prompt`, text or a list of messages with role and "
            "content; mend it or take it out."
        )
    return prompt  # type: ignore[return-value]
