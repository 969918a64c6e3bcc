"""Pairs as rows of tokens, in one of two layouts.

Shapes: B pairs; R rows of N tokens, padded on the right; T response tokens of all pairs.

*Padded*: a pair is two rows, [x, y1] and [x, y2], and R = 2B. *Shared*: a pair is one stretch
[x, y1, y2] in which y1 and y2 both continue x and neither sees the other, and a row holds several
pairs that do not see each other. The prompt is then run once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from math import nan
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from softpref.algorithm.gradients.head import HeadPositions, Tokens

PADDING = -1
PROMPT, CHOSEN, REJECTED = 0, 1, 2
OF_THE_PAIR = {"given_label": nan, "weight": 1.0, "target_margin": 0.0, "annotator_index": nan}
"""What a pair may bring of its own, and what counts where it does not.

A soft label; how much it counts; what h should exceed, nats; the number of who labelled it.
"""
COLUMNS = {
    **dict.fromkeys(("ref_chosen_logp", "ref_rejected_logp", "starting_ppl_diff", "evidence"), nan),
    **OF_THE_PAIR,
}
"""What is known of a pair before a step, and what counts where it is not.

log π_ref(y1 | x) and log π_ref(y2 | x), nats; PPLDiff under the policy training started from, nats
per token; g of the label before training, nats; and what the pair brings.
"""


def skips_masked(policy: nn.Module) -> bool:
    """Return whether the policy's attention is FlexAttention, which skips what is masked."""
    return getattr(policy.config, "_attn_implementation", None) == "flex_attention"


@dataclass(frozen=True)
class PairBatch:
    """Pairs as the policy reads them; `softpref.data` makes them in either layout.

    Attributes:
        input_ids: (R, N) token ids.
        position_ids: (R, N) places counted from each prompt's first token where the layout is
            shared; None where it is padded.
        pair: (R, N) which pair a token belongs to, −1 on padding.
        branch: (R, N) which part of its pair: 0 prompt, 1 chosen, 2 rejected response.
        responses: the response tokens, of sequence i for pair i's chosen and B + i for its rejected
            response.
        prompts: the prompt tokens that are predicted (all but the first), of sequence i for pair i.
        spans: where each pair's tokens lie in the flattened (R · N), as (start, stop).
        columns: what was known of the pairs before, (B,) by the names in `COLUMNS`; of what pairs
            may bring, what one of them does.
        index: (B,) the pair's position in its data set; always on the host.
        head_positions: where the policy's output head is run.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    pair: Tensor
    branch: Tensor
    responses: Tokens
    prompts: Tokens
    spans: tuple[tuple[int, int], ...]
    columns: Mapping[str, Tensor]
    index: Tensor
    head_positions: HeadPositions = "all"

    def __len__(self) -> int:
        return len(self.spans)

    def to(self, device: torch.device | str) -> Self:
        """Move every tensor but `index` to `device`."""

        def place(value: Any) -> Any:
            if isinstance(value, Tensor) and torch.device(device).type == "mps":
                value = value.float() if value.dtype == torch.float64 else value  # it knows none
            if isinstance(value, Mapping):
                return {name: place(each) for name, each in value.items()}
            return value.to(device) if isinstance(value, (Tensor, Tokens)) else value

        moved = (f.name for f in fields(self) if f.name != "index")
        return replace(self, **{name: place(getattr(self, name)) for name in moved})

    def inputs(self, policy: nn.Module) -> dict[str, Any]:
        """Return what the policy's forward pass is called with."""
        if self.position_ids is None:
            mask = (self.pair != PADDING).long()
            return dict(input_ids=self.input_ids, attention_mask=mask, use_cache=False)
        return dict(
            input_ids=self.input_ids,
            position_ids=self.position_ids,
            attention_mask=self._block_mask(policy),
            use_cache=False,
        )

    def _block_mask(self, policy: nn.Module) -> Tensor | BlockMask:
        """Return who may attend to whom: (R, 1, N, N), causal, in one's own pair and branch.

        FlexAttention skips what is masked. Else the mask is a number to be added, which every
        attention function understands; eager attention would misread a boolean one.
        """
        pair, branch = self.pair, self.branch

        def may_attend(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same_pair = pair[row, query] == pair[row, key]
            visible = (branch[row, key] == PROMPT) | (branch[row, key] == branch[row, query])
            return (key <= query) & same_pair & visible

        rows, length = self.input_ids.shape
        device = self.input_ids.device
        if skips_masked(policy):
            return create_block_mask(may_attend, rows, None, length, length, device)
        place = torch.arange(length, device=device)
        row = torch.arange(rows, device=device)[:, None, None]
        allowed = may_attend(row, row, place[:, None], place[None, :])[:, None]
        dtype = cast(Any, policy).get_input_embeddings().weight.dtype
        mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
        return mask.masked_fill_(~allowed, torch.finfo(dtype).min)

    def single_pairs(self) -> Iterator[PairBatch]:
        """Yield each pair as a batch of its own, without the padding its batch mates needed."""
        return (self._alone(i) for i in range(len(self)))

    def _alone(self, i: int) -> PairBatch:
        rows, at = 2 if self.position_ids is None else 1, slice(*self.spans[i])
        is_token = self.pair.flatten()[at].view(rows, -1) == i
        width, length = is_token.shape[1], int(is_token.sum(-1).max())

        def cut(of_positions: Tensor) -> Tensor:
            return of_positions.flatten()[at].view(rows, -1)[:, :length]

        def pick(tokens: Tokens) -> Tokens:
            mine = tokens.sequence % len(self) == i
            place = tokens.predictor[mine] - at.start
            return Tokens(
                predictor=place // width * length + place % width,
                target=tokens.target[mine],
                sequence=tokens.sequence[mine] // len(self),
            )

        return PairBatch(
            input_ids=cut(self.input_ids),
            position_ids=None if self.position_ids is None else cut(self.position_ids),
            pair=torch.where(is_token[:, :length], 0, PADDING),
            branch=cut(self.branch),
            responses=pick(self.responses),
            prompts=pick(self.prompts),
            spans=((0, rows * length),),
            columns={name: values[i : i + 1] for name, values in self.columns.items()},
            index=self.index[i : i + 1],
            head_positions=self.head_positions,
        )
