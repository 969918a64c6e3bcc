"""Pair rows to token ids, as in TRL's DPO trainer.

Shapes: `prompt_ids` (P,), `chosen_ids` (C,), `rejected_ids` (R,), in tokens; the two sequences of a
pair are prompt_ids + chosen_ids and prompt_ids + rejected_ids.
"""

import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Protocol, TypeVar

import datasets
import pyarrow as pa
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from softpref.data.bad_rows import BadRow, BadRows, OnBadRow, summarize_bad_rows
from softpref.data.messages import Text, template_context, texts_of
from softpref.data.readers import RowError, dataset_rows, store
from softpref.data.remarks import Remarks
from softpref.data.templates import render
from softpref.errors import UsageError

logger = logging.getLogger(__name__)

_EOS_WINDOW = 4  # tokens at the end of a conversation that may contain its EOS
PARTS = ("prompt_ids", "chosen_ids", "rejected_ids")
_NOTED = {name: name for name in ("truncated", "ends_without_eos")}
_NOTED["split_boundary"] = "split_boundaries"


class MayDropText(Protocol):
    """Token ids with a flag for response text that the chat template dropped."""

    @property
    def drops_text(self) -> bool:
        """Whether the chat template dropped text of a response."""


Tokenized = TypeVar("Tokenized", bound=MayDropText)


class TooLongError(RowError):
    """A valid row is too long."""


@dataclass(frozen=True)
class TokenizedPair:
    """The token ids of one pair.

    Attributes:
        prompt_ids: Shape (P,), the common start of both sequences.
        chosen_ids: Shape (C,).
        rejected_ids: Shape (R,).
        split_boundary: Whether the prompt alone has more tokens than `prompt_ids`, because one of
            its last tokens extends into a response or the chat template renders it differently.
        truncated: Whether a response was cut at `max_length`.
        ends_without_eos: How many of the two responses did not end with EOS, before any cut.
        drops_text: Whether the chat template drops text of a response.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    split_boundary: bool
    truncated: bool
    ends_without_eos: int
    drops_text: bool


@dataclass(frozen=True)
class TokenizedPairs:
    """The pair rows with their ids, and the counts of `TokenizedPair`'s flags by source."""

    pairs: datasets.Dataset
    where: dict[str, Counter[str]]
    bad_rows: tuple[BadRow, ...]


def prompt_ids(
    prompt: Text, tokenizer: PreTrainedTokenizerBase, context: Mapping[str, Any] | None = None
) -> list[int]:
    """Return the token ids that a response continues.

    For messages, the ids of the rendered chat template, with the assistant's turn opened. For text,
    the ids of the tokenizer, with one BOS and without an appended EOS.

    Args:
        prompt: Text or messages.
        tokenizer: The policy's tokenizer.
        context: Further arguments of the chat template: `tools` and those of the row.

    Raises:
        UsageError: The tokenizer lacks a chat template that is needed.
        RowError: The chat template rejects the messages.
    """
    text = render(prompt, tokenizer, context or {}, open_turn=True)
    return _prompt_alone(_encode([text], tokenizer, prompt)[0], tokenizer, prompt)


def sequence_ids(
    prompt: Text, response: Text, tokenizer: PreTrainedTokenizerBase, context: Mapping[str, Any]
) -> list[int]:
    """Return the untruncated ids of a prompt with a response, as in `tokenize_pair`.

    Raises:
        UsageError, RowError: As in `prompt_ids`.
    """
    pair = {**context, "prompt": prompt, "response": response}
    return _encode(_render_pair(pair, tokenizer, ("response",))[1:], tokenizer, prompt)[0]


def tokenize_pair(
    pair: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    context_length: int = sys.maxsize,
) -> TokenizedPair:
    """Tokenize prompt and responses jointly and split them where the sequences diverge.

    The prompt is the longest common prefix of the tokenized prompt, prompt + chosen and prompt +
    rejected. Plain text ends with EOS, conversations as their chat template does. The only
    difference from TRL: a BOS or closing EOS from both text and tokenizer is kept only once.

    Args:
        pair: A pair row: `prompt`, `chosen`, `rejected`, all text or all messages.
        tokenizer: The policy's tokenizer.
        max_length: Maximum tokens in prompt plus response; responses are truncated at the end.
        context_length: Maximum tokens that the model reads; responses are truncated there too.

    Raises:
        UsageError: If the tokenizer lacks an EOS token, or a chat template that is needed.
        TooLongError: If truncation leaves no response token, or equal responses.
        RowError: If the tokens form no valid pair, or the chat template rejects it.
    """
    _require_eos(tokenizer)
    prompt, sides = pair["prompt"], (pair["chosen"], pair["rejected"])
    rendered = _render_pair(pair, tokenizer)
    alone, *sequences = _encode(rendered, tokenizer, prompt)
    alone = _prompt_alone(alone, tokenizer, prompt)
    common = list(os.path.commonprefix([alone, *sequences]))
    limit = min(max_length, context_length)
    start, room = len(common), limit - len(common)
    responses = [ids[start:] for ids in sequences]
    chosen_ids, rejected_ids = (response[:room] for response in responses)
    truncated = max(map(len, responses)) > room
    limit_text = _limit_text(max_length, context_length)

    if start == 0:
        raise RowError("the prompt and the two sequences have no common first token")
    if room <= 0:
        raise TooLongError(f"longer than {limit_text}: the prompt alone has {start} tokens")
    if not chosen_ids or not rejected_ids:
        raise RowError("the chat template drops a whole response")
    if chosen_ids == rejected_ids:
        if truncated:
            raise TooLongError(f"longer than {limit_text}: the responses differ only beyond it")
        raise RowError("chosen and rejected have the same tokens")
    return TokenizedPair(
        common,
        chosen_ids,
        rejected_ids,
        split_boundary=start < len(alone),
        truncated=truncated,
        ends_without_eos=sum(tokenizer.eos_token_id not in ids[-_EOS_WINDOW:] for ids in responses),
        drops_text=any(map(_drops_text, rendered[1:], sides)),
    )


def tokenize_pairs(
    pairs: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    name: str,
    on_bad_row: OnBadRow = "stop",
    context_length: int = sys.maxsize,
) -> TokenizedPairs:
    """Add the columns `prompt_ids`, `chosen_ids` and `rejected_ids` to pair rows, and `index`.

    `index` is the position among the kept pairs, from 0. A pair that is too long is dropped and
    counted regardless of `on_bad_row`.

    Args:
        pairs: Pair rows, as `load_pairs` gives them.
        tokenizer: The policy's tokenizer.
        max_length: Maximum tokens in prompt plus response.
        name: The name of the pairs in messages: their file.
        on_bad_row: Whether a bad pair is an error or is skipped.
        context_length: Maximum tokens that the model reads.

    Raises:
        UsageError: As in `tokenize_pair`; if there is a bad row (under `stop`) or no good one.
    """
    bad = BadRows(name, on_bad_row)
    where = {what: Counter[str]() for what in _NOTED.values()}
    remarks = Remarks(name, tokenizer)
    kept = count()

    def tokenized() -> Iterator[dict[str, Any]]:
        make = partial(
            tokenize_pair, tokenizer=tokenizer, max_length=max_length, context_length=context_length
        )
        for _, row, ids in _usable(pairs, make, ("chosen", "rejected"), bad, remarks):
            for note, what in _NOTED.items():
                where[what][row.get("source", name)] += getattr(ids, note)
            if not bad.stopped:
                tokens = {column: getattr(ids, column) for column in PARTS}
                yield row | tokens | {"index": next(kept)}

    added = pa.schema([*((name, pa.list_(pa.int32())) for name in PARTS), ("index", pa.int64())])
    columns = [field for field in pairs.features.arrow_schema if field.name not in added.names]
    schema = pa.schema([*columns, *added])
    dataset, bad_rows = _stored(tokenized(), schema, len(pairs), bad, remarks)
    return TokenizedPairs(dataset, where, bad_rows)


@dataclass(frozen=True)
class TokenizedChosen:
    """Prompt and chosen response: `ids` (P + C,), of which the first `start` are the prompt."""

    ids: list[int]
    start: int
    drops_text: bool


def tokenize_chosen(
    pairs: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    name: str,
    on_bad_row: OnBadRow = "stop",
    context_length: int = sys.maxsize,
) -> datasets.Dataset:
    """Return `input_ids`, `completion_mask` and `index` of prompt and chosen response.

    Arguments, ids, truncation and skipped rows are as in `tokenize_pairs`; `index` is the position
    in `pairs`, whose rows need prompt and chosen only, and may have their number in `row`.

    Raises:
        UsageError: As in `tokenize_pairs`.
    """
    bad = BadRows(name, on_bad_row)
    remarks = Remarks(name, tokenizer)
    _require_eos(tokenizer)
    limit = min(max_length, context_length)
    limit_text = _limit_text(max_length, context_length)

    def make(row: dict[str, Any]) -> TokenizedChosen:
        rendered = _render_pair(row, tokenizer, ("chosen",))
        alone, ids = _encode(rendered, tokenizer, row["prompt"])
        alone = _prompt_alone(alone, tokenizer, row["prompt"])
        start = len(os.path.commonprefix([alone, ids]))
        if start >= limit:
            raise TooLongError(f"longer than {limit_text}: the prompt alone has {start} tokens")
        if start == len(ids):
            raise RowError("the chat template drops a whole response")
        return TokenizedChosen(ids[:limit], start, _drops_text(rendered[1], row["chosen"]))

    def tokenized() -> Iterator[dict[str, Any]]:
        for index, _, made in _usable(pairs, make, ("chosen",), bad, remarks):
            if not bad.stopped:
                learned = len(made.ids) - made.start
                mask = [0] * made.start + [1] * learned
                yield {"input_ids": made.ids, "completion_mask": mask, "index": index}

    mask = pa.list_(pa.int8())
    schema = pa.schema(
        [("input_ids", pa.list_(pa.int32())), ("completion_mask", mask), ("index", pa.int64())]
    )
    dataset, bad_rows = _stored(tokenized(), schema, len(pairs), bad, remarks)
    if named := [row for row in bad_rows if row not in remarks.too_long]:
        logger.warning(f"{name}: {len(named)} rows are skipped: {summarize_bad_rows(named)}")
    return dataset


def _usable(
    pairs: datasets.Dataset,
    tokenize: Callable[[dict[str, Any]], Tokenized],
    sides: Sequence[str],
    bad: BadRows,
    remarks: Remarks,
) -> Iterator[tuple[int, dict[str, Any], Tokenized]]:
    """Yield position, row and ids of every usable pair; record the others and the warnings."""
    for index, row in enumerate(dataset_rows(pairs)):
        number, source = index + 1, bad.source
        if "row" in row:  # a pair row; in other rows `source` may be an unrelated column
            number, source = row["row"], row.get("source", source)
        try:
            ids = tokenize(row)
        except TooLongError as error:
            remarks.skip(bad, number, str(error), source)
            continue
        except RowError as error:
            bad.add(number, str(error), source)
            continue
        remarks.add(source, number, [row[side] for side in sides], drops_text=ids.drops_text)
        yield index, row, ids


def _stored(
    rows: Iterator[dict[str, Any]], schema: pa.Schema, total: int, bad: BadRows, remarks: Remarks
) -> tuple[datasets.Dataset, tuple[BadRow, ...]]:
    """Return the usable of `total` rows as a data set, and the skipped ones; log the warnings."""
    # Not `Dataset.map`: its progress bar can only be silenced for the whole process.
    bar = tqdm(rows, f"tokenizing {bad.source}", total, delay=3, leave=False, disable=None)
    dataset = store(iter(bar), schema)
    bad_rows = bad.finish(len(dataset))
    remarks.log(total)
    return dataset, bad_rows


def _require_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token is None:
        raise UsageError(
            f"--model {tokenizer.name_or_path}: its tokenizer has no EOS token, so no response "
            "would ever end. Set eos_token in tokenizer_config.json."
        )


def _drops_text(rendered: str, response: Text) -> bool:
    """Return whether text of the response is missing from its rendering."""
    return any(part.strip() not in rendered for part in texts_of(response))


def _limit_text(max_length: int, context_length: int) -> str:
    if context_length <= max_length:
        return f"the model's context of {context_length} tokens"
    return f"--max_length {max_length}"


def _render_pair(
    pair: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    sides: Sequence[str] = ("chosen", "rejected"),
) -> list[str]:
    """Return the prompt, and the prompt with each response; plain text ends with EOS."""
    prompt, context = pair["prompt"], template_context(pair)
    if isinstance(prompt, str):
        return [prompt, *(f"{prompt}{pair[side]}{tokenizer.eos_token or ''}" for side in sides)]
    return [
        render(prompt, tokenizer, context, open_turn=True),
        *(render(prompt + pair[side], tokenizer, context, open_turn=False) for side in sides),
    ]


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, prompt: Text) -> list[list[int]]:
    """Return the ids of rendered texts; only plain text needs added special tokens."""
    is_text = isinstance(prompt, str)
    encoded = tokenizer(texts, add_special_tokens=is_text, verbose=False)["input_ids"]
    return [_single(ids, tokenizer) if is_text else list(ids) for ids in encoded]


def _prompt_alone(ids: list[int], tokenizer: PreTrainedTokenizerBase, prompt: Text) -> list[int]:
    """Drop the EOS that a tokenizer appends to a plain prompt."""
    ends = ids[-1:] == [tokenizer.eos_token_id]
    if isinstance(prompt, str) and ends and not prompt.endswith(str(tokenizer.eos_token)):
        return ids[:-1]
    return ids


def _single(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Keep one BOS and one closing EOS if both text and tokenizer add them."""
    while tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    while ids[-2:] == [tokenizer.eos_token_id] * 2:
        ids = ids[:-1]
    return ids
