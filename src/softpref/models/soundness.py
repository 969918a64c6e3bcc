"""Whether model, tokenizer and rows fit together, before anything is scored or trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, cast

import pyarrow.compute as pc
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from softpref.algorithm.gradients.shards import is_sharded
from softpref.algorithm.policy import evaluating
from softpref.data.bad_rows import place
from softpref.data.readers import column, dataset_rows
from softpref.data.sources import by_source
from softpref.data.tokens import PARTS
from softpref.errors import UsageError
from softpref.models.library_errors import in_one_sentence
from softpref.models.loading import context_length
from softpref.models.quantized import is_settled, quantization_constants

TRIAL_TOKENS = 16
"""Of the trial of causality; the latter half of them is changed."""
LARGEST_CHANGE, LARGEST_CHANGE_16_BIT = 1e-4, 1e-2
"""Of `prefix_change`: rounding. A causal model's two passes over rows of one length agree to the
last bit, but where later tokens change the size of an expert's batch. An encoder as its initializer
leaves it, which changes least, is at 1.4e-3; one that was trained is at tenths."""
LEAST_DISTANCE = 1e-3
"""Between predictions, where they are all but alike and the change is rounding's."""


def require_sound(policy: nn.Module) -> None:
    """Refuse weights that are not finite, and a model that reads ahead.

    Raises:
        UsageError: the message names the tensor, or the kind of model that is needed; or the model
            cannot be run at all.
    """
    require_finite_weights(policy)
    if not is_settled(policy):
        raise UsageError(
            f"{_name(policy)}: its 8-bit layers round activations by the largest of a batch, so a "
            "pair's score would depend on its neighbours: give the model's directory or hub id, "
            "with load_in_8bit."
        )
    if is_sharded(policy):  # a trial would leave its weights gathered; those with a plan are causal
        return
    name = _name(policy)
    with in_one_sentence(name, "the model cannot be run", name):
        change, largest = prefix_change(policy), _largest_change(policy)
    if change > largest:
        raise UsageError(
            f"{name}: what it predicts after a prefix changes with the tokens that come "
            f"later, by {change:.2g} of what one token more changes: it reads ahead, as an encoder "
            "such as BERT does, and gives no log-probabilities of responses. Give a causal "
            "language model."
        )


def require_finite_weights(policy: nn.Module) -> None:
    """Refuse weights that are NaN or infinite, by one pass over them.

    Raises:
        UsageError: the message names the first such tensor.
    """
    for name, parameter in chain(policy.named_parameters(), quantization_constants(policy)):
        numbers = parameter.detach()
        if isinstance(numbers, DTensor):  # every process looks at its own shard
            numbers = numbers.to_local()
        # Packed weights are integers, or too narrow to be compared.
        compares = numbers.is_floating_point() and numbers.element_size() > 1 and numbers.numel()
        if compares and not torch.stack(numbers.aminmax()).isfinite().all():
            raise UsageError(
                f"{_name(policy)}: the tensor {name} holds NaN or infinite values: take the model "
                "from before the training that diverged, or save it again."
            )


def prefix_change(policy: nn.Module) -> float:
    """Return how far later tokens change what is predicted after the tokens of a prefix.

    That is the mean distance of two passes over rows of equal length whose latter halves differ,
    over the mean distance of what is predicted after one token and after the next. A distance is
    the total variation of two distributions.
    """
    device = next(policy.parameters()).device
    later = min(TRIAL_TOKENS, context_length(policy)) // 2
    tokens = 2 * later
    if later < 2:
        return 0.0
    rows = embedding_rows(policy)
    first = torch.randint(rows, (1, tokens), generator=torch.Generator().manual_seed(0))
    second = first.clone()
    second[:, tokens - later :] = (second[:, tokens - later :] + 1 + rows // 2) % rows

    def predicted(ids: Tensor) -> Tensor:
        logits = policy(input_ids=ids.to(device), use_cache=False).logits
        return logits[:, : logits.shape[1] - later].float().softmax(-1)

    with evaluating(policy), torch.no_grad():
        one, other = predicted(first), predicted(second)
    change = (one - other).abs().sum(-1).mean() / 2
    scale = (one[:, 1:] - one[:, :-1]).abs().sum(-1).mean() / 2
    return float(change / scale.clamp(min=LEAST_DISTANCE))


def _largest_change(policy: nn.Module) -> float:
    dtype = cast(Any, policy).get_input_embeddings().weight.dtype
    is_16_bit = dtype in (torch.bfloat16, torch.float16)
    return LARGEST_CHANGE_16_BIT if is_16_bit else LARGEST_CHANGE


def embedding_rows(policy: nn.Module) -> int:
    """Return how many token ids a model both reads and predicts."""
    model = cast(Any, policy)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(end.weight.shape[0] for end in ends if end is not None)


def require_known_padding(policy: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a padding token beyond the embedding: trained and saved, such a model never loads.

    Raises:
        UsageError: the message names token, id, embedding and remedy.
    """
    if (tokenizer.pad_token_id or 0) >= (rows := embedding_rows(policy)):
        raise UsageError(
            f"{_name(policy)}: the padding token {tokenizer.pad_token!r} has the id "
            f"{tokenizer.pad_token_id}, but the embedding has {rows} rows: set pad_token in "
            f"tokenizer_config.json to a token with a row, such as {tokenizer.eos_token!r}, or "
            f"give the model the rows (model.resize_token_embeddings({len(tokenizer)}), then "
            "save_pretrained)."
        )


def require_known_tokens_of_pairs(
    policy: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Dataset, source: str
) -> None:
    """Refuse tokenized pairs with an id beyond the embedding; where it stands is looked up then.

    Raises:
        UsageError: as in `require_known_tokens`.
    """
    largest = max(
        pc.max(chunk.flatten()).as_py() or 0
        for part in PARTS
        for chunk in column(pairs, part).chunks
    )
    if largest >= embedding_rows(policy):
        for name, part in by_source(pairs, source):
            for row in dataset_rows(part.select_columns(["row", *PARTS])):
                ids = [token_id for part in PARTS for token_id in row[part]]
                _require_known(policy, tokenizer, place(name, row["row"]), ids)


def require_known_tokens(
    policy: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Iterable[tuple[str, Sequence[int]]]
) -> None:
    """Refuse token ids beyond the embedding.

    Rows are asked for where the tokenizer has such ids at all.

    Args:
        policy: the model that is to read them.
        tokenizer: whose ids they are.
        rows: where each stands, for the message, and its ids.

    Raises:
        UsageError: the message names token, id, embedding, place and remedy.
    """
    if max(tokenizer.get_vocab().values()) >= embedding_rows(policy):
        for where, ids in rows:
            _require_known(policy, tokenizer, where, ids)


def _require_known(
    policy: nn.Module, tokenizer: PreTrainedTokenizerBase, where: str, ids: Sequence[int]
) -> None:
    rows = embedding_rows(policy)
    for token_id in ids:
        if token_id >= rows:
            raise UsageError(
                f"{where}: the token {tokenizer.convert_ids_to_tokens(token_id)!r} has the id "
                f"{token_id}, but the embedding of {_name(policy)} has {rows} rows (ids 0 to "
                f"{rows - 1}): use the tokenizer that the model was trained with, or give the "
                f"model the rows (model.resize_token_embeddings({len(tokenizer)}), then "
                "save_pretrained) and fine-tune it."
            )


def _name(policy: nn.Module) -> str:
    """Return where the policy was loaded from: an adapter's own place where it is known."""
    if own := vars(policy).get("name_or_path"):
        return str(own)
    name = getattr(cast(Any, policy).config, "name_or_path", "") or "the model"
    return f"{name} with its adapter" if isinstance(policy, PeftModel) else name
