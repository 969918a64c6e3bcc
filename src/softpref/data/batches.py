"""Tokenized pairs to the batches that the algorithm reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from softpref.algorithm.likelihood import PairBatch


def make_batch(pairs: Sequence[Mapping[str, Any]]) -> PairBatch:
    """Return B pairs as 2B rows, chosen first, padded on the right with token 0, masked everywhere.

    Args:
        pairs: each with `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of int),
            `ref_chosen_logp`, `ref_rejected_logp` (nats); optionally `starting_ppl_diff` (nats
            per token) and `index`.
    """
    chosen = [[*pair["prompt_ids"], *pair["chosen_ids"]] for pair in pairs]
    rejected = [[*pair["prompt_ids"], *pair["rejected_ids"]] for pair in pairs]
    prompts = [len(pair["prompt_ids"]) for pair in pairs] * 2
    rows = chosen + rejected
    length = max(map(len, rows))
    position = torch.arange(length)
    ends = torch.tensor([len(row) for row in rows])[:, None]
    is_token = position < ends

    def column(name: str, default: float) -> torch.Tensor:
        return torch.tensor([pair.get(name, default) for pair in pairs], dtype=torch.float64)

    return PairBatch(
        input_ids=torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        attention_mask=is_token.long(),
        response_mask=is_token & (position >= torch.tensor(prompts)[:, None]),
        ref_chosen_logp=column("ref_chosen_logp", math.nan),
        ref_rejected_logp=column("ref_rejected_logp", math.nan),
        starting_ppl_diff=column("starting_ppl_diff", math.nan),
        index=torch.tensor([pair.get("index", i) for i, pair in enumerate(pairs)]),
    )
