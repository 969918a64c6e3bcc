"""Read files of prompts and responses, and join two files of responses into comparisons."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from softpref.data.bad_rows import place
from softpref.data.messages import (
    CONTEXT,
    Text,
    is_empty,
    parse_context,
    parse_text,
    refuse_media,
    require_json,
)
from softpref.data.parsing import parse_pair
from softpref.data.readers import RowError, read_rows
from softpref.errors import UsageError
from softpref.judging.benchmarks import from_benchmark
from softpref.judging.questions import Comparison, plain_prompt

logger = logging.getLogger(__name__)

PromptFormat = Literal["auto", "chat", "plain"]


@dataclass(frozen=True)
class Prompt:
    """A prompt of a file.

    Attributes:
        prompt: text, or messages with all their fields.
        context: further arguments of the chat template, if any: `tools` and
            `chat_template_kwargs`.
        row: its row number in the file.
        uid: the row's `uid`, if it has one, such as a benchmark's.
    """

    prompt: Text
    context: Mapping[str, Any] = field(default_factory=dict)
    row: int = 0
    uid: str | None = None


def prompt_uid(prompt: Text, occurrence: int, context: Mapping[str, Any] | None = None) -> str:
    """Return the uid of the `occurrence`-th row, from 0, of a prompt with its context.

    A text and one user's message of that text are the same prompt.
    """
    prompt = plain_prompt(prompt)
    text = json.dumps([prompt, context] if context else prompt, sort_keys=True).encode()
    return f"{hashlib.sha256(text).hexdigest()[:24]}-{occurrence}"


def comparison_of_pair(uid: str, row: Mapping[str, Any]) -> Comparison:
    """Return a pair row as a comparison whose response is the chosen one."""
    chosen, rejected = plain_reply(row["chosen"]), plain_reply(row["rejected"])
    return Comparison(uid, row["prompt"], chosen, rejected, context_of(row))


def plain_reply(response: Text) -> Text:
    """Return a response in the form of `generate`: a single text turn becomes its text."""
    if len(response) == 1 and not isinstance(response, str):
        (turn,) = response
        is_plain = turn.keys() == {"role", "content"} and turn["role"] == "assistant"
        if is_plain and isinstance(turn["content"], str):
            return turn["content"]
    return response


def context_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pair row's further arguments of the chat template, if any."""
    return {name: row[name] for name in CONTEXT if row.get(name) is not None}


def text_to_continue(given: Prompt, source: str, prompt_format: PromptFormat) -> Text:
    """Return what a policy continues: text as it is, or messages for the chat template.

    Raises:
        UsageError: the prompt does not have the format.
    """
    prompt = given.prompt
    if prompt_format == "plain" and not isinstance(prompt, str):
        raise UsageError("--prompt_format plain: the prompts are conversations; use auto or chat.")
    if prompt_format == "chat" and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str) and given.context:
        raise UsageError(
            f"{place(source, given.row)}: has {' and '.join(given.context)}, which only a chat "
            "template reads; give --prompt_format chat, or remove them."
        )
    return prompt


def response_rows(
    prompts: Sequence[Prompt], samples: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """Return the rows of a file of responses, from lists with one response per prompt."""
    seen: dict[str, int] = {}
    rows = []
    for i, given in enumerate(prompts):
        for responses in samples:
            name = prompt_uid(given.prompt, 0, given.context)
            uid = prompt_uid(given.prompt, seen.get(name, 0), given.context)
            seen[name] = seen.get(name, 0) + 1
            row = {"uid": uid, "prompt": given.prompt, **given.context, "response": responses[i]}
            rows.append(row)
    return rows


def load_prompts(source: str) -> list[Prompt]:
    """Return the prompts of a file, in its order; other columns are not read.

    The prompt of a pair without that column is what its responses have in common, as in training.

    Raises:
        UsageError: it cannot be read, a prompt is invalid, or there is no prompt.
    """
    found, pairs = list[Prompt](), 0
    for row, values in rows_of(source):
        is_pair = values.get("prompt") is None and {"chosen", "rejected"} <= values.keys()
        given = _with_common_prompt(source, row, values) if is_pair else values
        found.append(prompt_of(source, row, given))
        pairs += is_pair
    if pairs:
        logger.info(f"{source}: {pairs:,} prompts are what chosen and rejected have in common")
    return found


def _with_common_prompt(source: str, row: int, pair: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the row of a pair without a prompt with the one that its responses begin with.

    Raises:
        UsageError: they have none in common.
    """
    given = {name: value for name, value in pair.items() if name != "prompt"}
    try:
        return given | {"prompt": parse_pair(given).fields["prompt"]}
    except RowError as error:
        why = str(error).partition("; did you mean --prompt_column")[0]  # an option of training
        raise UsageError(f"{place(source, row)}: {why}; fix or remove it.") from None


def load_responses(source: str) -> dict[str, tuple[Prompt, str]]:
    """Return prompt and response of each row by uid; rows of one prompt are numbered in order.

    Raises:
        UsageError: it cannot be read, a row lacks `prompt` or `response`, or there is no row.
    """
    seen: Counter[str] = Counter()
    found = {}
    for row, values in rows_of(source):
        given = prompt_of(source, row, values)
        response = values.get("response")
        if not isinstance(response, str):
            raise UsageError(
                f"{place(source, row)}: has no text under `response`; give rows of prompt and "
                "response, as softpref generate writes them."
            )
        name = prompt_uid(given.prompt, 0, given.context)
        uid = prompt_uid(given.prompt, seen[name], given.context)
        seen[name] += 1
        found[uid] = given, response
    return found


def join(source: str, baseline: str) -> list[Comparison]:
    """Return comparisons of two files of responses to the same prompts.

    Raises:
        UsageError: as in `load_responses`, or the prompts differ.
    """
    responses, theirs = load_responses(source), load_responses(baseline)
    for one, other, name, where in (
        (responses, theirs, source, baseline),
        (theirs, responses, baseline, source),
    ):
        unmatched = [given for uid, (given, _) in one.items() if uid not in other]
        if unmatched:
            raise UsageError(
                f"{place(name, unmatched[0].row)}: its prompt has fewer answers in {where} "
                f"({len(unmatched)} such rows): make both files from the same prompts."
            )
    return [
        Comparison(uid, given.prompt, response, theirs[uid][1], given.context)
        for uid, (given, response) in responses.items()
    ]


def benchmark_uids(source: str) -> dict[str, str]:
    """Return the `uid` that rows have in their file, by the uid of their comparison.

    Raises:
        UsageError: as in `load_responses`.
    """
    return {
        uid: given.uid
        for uid, (given, _) in load_responses(source).items()
        if given.uid and given.uid != uid
    }


def rows_of(source: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield number and values of every row of a file; those of benchmarks get a `prompt`.

    Raises:
        UsageError: it cannot be read, a row is not an object, or there is no row.
    """
    count, benchmarks = 0, set()
    for row, values in read_rows(source):
        if isinstance(values, RowError):
            raise UsageError(f"{place(source, row)}: {values}; fix or remove it.")
        if not isinstance(values, dict):
            raise UsageError(f"{place(source, row)}: not an object; fix or remove it.")
        try:
            found, benchmark = from_benchmark(values)
        except RowError as error:
            raise UsageError(f"{place(source, row)}: {error}.") from None
        count += 1
        if benchmark and benchmark not in benchmarks:
            benchmarks.add(benchmark)
            logger.info(f"{place(source, row)}: read as a row of {benchmark}")
        yield row, found
    if not count:
        raise UsageError(f"{source}: contains no rows.")


def prompt_of(source: str, row: int, values: Mapping[str, Any]) -> Prompt:
    """Return the prompt of a row with its context.

    Raises:
        UsageError: the prompt is invalid.
    """
    try:
        refuse_media(values)
        if values.get("prompt") is None:
            raise RowError("prompt is missing")
        prompt, context = parse_text(values["prompt"], "prompt"), parse_context(values)
        if is_empty(prompt):
            raise RowError("prompt is empty")
        for column, value in {"prompt": prompt, **context}.items():
            require_json(value, column)
    except RowError as error:
        raise UsageError(f"{place(source, row)}: {error}; fix or remove it.") from None
    return Prompt(prompt, context, row, uid if isinstance(uid := values.get("uid"), str) else None)
