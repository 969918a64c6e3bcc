"""Pair rows to token ids, as TRL's DPO trainer makes them.

Shapes: `prompt_ids` (P,), `chosen_ids` (C,), `rejected_ids` (R,), in tokens; a pair's two sequences
are prompt_ids + chosen_ids and prompt_ids + rejected_ids.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from softpref.data.readers import RowError, dataset_rows, store
from softpref.data.sources import BadRow, BadRows, OnBadRow
from softpref.errors import UsageError

_LAST_FEW = 4  # tokens at the end of a conversation among which EOS counts as its end
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class TokenizedPair:
    """The token ids of one pair.

    Attributes:
        prompt_ids: Shape (P,), what both sequences begin with.
        chosen_ids: Shape (C,).
        rejected_ids: Shape (R,).
        split_boundary: Whether the prompt alone has more tokens than `prompt_ids`, because one of
            its last tokens reaches into a response or the chat template renders it differently.
        truncated: Whether a response was cut at `max_length`.
        ends_without_eos: How many of the two responses did not end with EOS, before any cut.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    split_boundary: bool
    truncated: bool
    ends_without_eos: int


@dataclass(frozen=True)
class TokenizedPairs:
    """The pair rows with their ids, and the counts of what `TokenizedPair` notes."""

    pairs: datasets.Dataset
    split_boundaries: int
    truncated: int
    ends_without_eos: int
    bad_rows: tuple[BadRow, ...]


def tokenize_pair(
    pair: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> TokenizedPair:
    """Tokenizes prompt and responses jointly and splits them where the sequences part.

    The prompt is the longest common prefix of the tokenized prompt, prompt + chosen and prompt +
    rejected. Plain text gets EOS at its end, conversations what their chat template says. Departs
    from TRL in this alone: a BOS or a closing EOS that both text and tokenizer bring stands once.

    Args:
        pair: A pair row: `prompt`, `chosen`, `rejected`, all text or all messages.
        tokenizer: The policy's tokenizer.
        max_length: Most tokens of prompt and response together; responses are cut at their end.

    Raises:
        UsageError: If the tokenizer lacks an EOS token, or a chat template that is needed.
        RowError: If no response token or no difference between the responses would be left.
    """
    if tokenizer.eos_token is None:
        raise UsageError(
            f"--model {tokenizer.name_or_path}: its tokenizer has no EOS token, so no response "
            "would ever end. Set eos_token in tokenizer_config.json."
        )
    encode = _encode_text if isinstance(pair["prompt"], str) else _encode_messages
    prompt, chosen, rejected = (_single_bos(ids, tokenizer) for ids in encode(pair, tokenizer))
    prompt_ids = list(os.path.commonprefix([prompt, chosen, rejected]))
    start, room = len(prompt_ids), max_length - len(prompt_ids)
    responses = [chosen[start:], rejected[start:]]
    chosen_ids, rejected_ids = (response[:room] for response in responses)
    truncated = max(map(len, responses)) > room

    if start == 0:
        raise RowError("no token is common to the prompt and the two sequences that begin with it")
    if room <= 0:
        raise RowError(f"the prompt has {start} tokens, --max-length is {max_length}")
    if not chosen_ids or not rejected_ids:
        raise RowError("the chat template leaves no token of a response")
    if chosen_ids == rejected_ids:
        beyond = f"only beyond --max-length {max_length}" if truncated else "in no token"
        raise RowError(f"chosen and rejected differ {beyond}")
    open_ends = sum(tokenizer.eos_token_id not in ids[-_LAST_FEW:] for ids in responses)
    split = start < len(prompt)
    return TokenizedPair(prompt_ids, chosen_ids, rejected_ids, split, truncated, open_ends)


def tokenize_pairs(
    pairs: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    name: str,
    on_bad_row: OnBadRow = "stop",
) -> TokenizedPairs:
    """Adds the columns `prompt_ids`, `chosen_ids` and `rejected_ids` to pair rows, and `index`.

    `index` is a pair's place among those kept, from 0.

    Args:
        pairs: Pair rows, as `load_pairs` gives them.
        tokenizer: The policy's tokenizer.
        max_length: Most tokens of prompt and response together.
        name: What messages call the pairs: their file.
        on_bad_row: Whether a pair that cannot be used at this length is an error or left out.

    Raises:
        UsageError: As in `tokenize_pair`; if there is a bad row (under `stop`) or no good one.
    """
    bad = BadRows(name, on_bad_row)
    counts: Counter[str] = Counter()

    def tokenized() -> Iterator[dict[str, Any]]:
        for row in dataset_rows(pairs):
            try:
                ids = tokenize_pair(row, tokenizer, max_length)
            except RowError as error:
                bad.add(row["row"], str(error))
                continue
            counts.update(
                kept=1,
                split=ids.split_boundary,
                truncated=ids.truncated,
                open_ends=ids.ends_without_eos,
            )
            if not bad.stopped:
                tokens = {column: getattr(ids, column) for column in _IDS}
                yield row | tokens | {"index": counts["kept"] - 1}

    added = pa.schema([*((name, pa.list_(pa.int32())) for name in _IDS), ("index", pa.int64())])
    columns = [field for field in pairs.features.arrow_schema if field.name not in added.names]
    schema = pa.schema([*columns, *added])
    # Not `Dataset.map`: its progress bar can only be silenced for the whole process.
    bar = tqdm(tokenized(), f"tokenizing {name}", len(pairs), delay=3, leave=False, disable=None)
    dataset = store(iter(bar), schema)
    bad_rows = bad.settle(counts["kept"])
    return TokenizedPairs(
        dataset, counts["split"], counts["truncated"], counts["open_ends"], bad_rows
    )


def _encode_text(pair: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of prompt, prompt + chosen, prompt + rejected; each response closed by one EOS."""
    prompt, eos = pair["prompt"], str(tokenizer.eos_token)
    texts = [prompt, *(prompt + pair[column] + eos for column in ("chosen", "rejected"))]
    encoded = tokenizer(texts, verbose=False)["input_ids"]
    # The text may end with EOS already, and a tokenizer may append its own: one stays.
    prompt_ids, *full_ids = (_single_eos(ids, tokenizer) for ids in encoded)
    if prompt_ids[-1:] == [tokenizer.eos_token_id] and not prompt.endswith(eos):
        prompt_ids = prompt_ids[:-1]  # appended by the tokenizer, but nothing ends here
    return [prompt_ids, *full_ids]


def _encode_messages(
    pair: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Ids of prompt, prompt + chosen, prompt + rejected as the chat template renders them."""
    if tokenizer.chat_template is None:
        raise UsageError(
            f"--model {tokenizer.name_or_path}: its tokenizer has no chat template, but the pairs "
            "are conversations. Use a chat model, or give prompt, chosen and rejected as text."
        )

    def render(messages: list[dict[str, str]], *, open_turn: bool) -> list[int]:
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=open_turn, tokenizer_kwargs={"verbose": False}
        )
        return list(encoded["input_ids"])

    prompt = pair["prompt"]
    try:
        return [
            render(prompt, open_turn=True),
            render(prompt + pair["chosen"], open_turn=False),
            render(prompt + pair["rejected"], open_turn=False),
        ]
    except Exception as error:  # a template is a program of the model's author: it may raise all
        raise RowError(f"the chat template refuses the conversation: {error}") from error


def _single_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    while tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    return ids


def _single_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    while ids[-2:] == [tokenizer.eos_token_id] * 2:
        ids = ids[:-1]
    return ids
