"""Tokenized pairs to batches for the algorithm, in either layout.

Shapes: B pairs; R rows of N tokens, right-padded with token 0; padding is always masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from softpref.algorithm.gradients.head import HeadPositions, Tokens
from softpref.algorithm.ranks import ALONE, Ranks
from softpref.algorithm.rows import (
    CHOSEN,
    COLUMNS,
    OF_THE_PAIR,
    PADDING,
    PROMPT,
    REJECTED,
    PairBatch,
)
from softpref.data.tokens import PARTS

Pair = Mapping[str, Any]
Collate = Callable[[Sequence[Pair]], PairBatch]

Segment = tuple[int, Sequence[int], Sequence[int], int]


def make_batch(pairs: Sequence[Pair], head_positions: HeadPositions = "all") -> PairBatch:
    """Return B pairs as 2B padded rows; pair i is rows 2i (chosen) and 2i + 1 (rejected).

    Args:
        pairs: each with `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of int), and optionally
            any of `COLUMNS` and `index`.
        head_positions: where the policy's output head is run.
    """
    rows = _RowBuilder(len(pairs))
    for i, pair in enumerate(pairs):
        for branch, ids in ((CHOSEN, pair["chosen_ids"]), (REJECTED, pair["rejected_ids"])):
            rows.start_row()
            rows.prompt(i, pair["prompt_ids"])
            rows.response(i, branch, ids)
            if branch == CHOSEN:  # the other row repeats it
                rows.score_prompt(i, pair["prompt_ids"])
    spans = [(2 * i * rows.length, 2 * (i + 1) * rows.length) for i in range(len(pairs))]
    return replace(rows.batch(pairs, spans, head_positions), position_ids=None)


def make_shared_batch(
    pairs: Sequence[Pair], head_positions: HeadPositions = "all", hidden_size: int | None = None
) -> PairBatch:
    """Return B pairs as segments [x, y1, y2], packed into rows, so that each prompt is run once.

    Args:
        pairs: as in `make_batch`.
        head_positions: where the policy's output head is run.
        hidden_size: of a policy whose attention uses a dense mask, where long rows cost more per
            token; None if attention skips masked tokens, and one row holds all pairs.
    """
    lengths = [sum(len(pair[part]) for part in PARTS) for pair in pairs]
    rows = _RowBuilder(len(pairs))
    spans = [(0, 0)] * len(pairs)
    packed = pack(lengths, hidden_size) if hidden_size else [list(range(len(pairs)))]
    width = max(sum(lengths[i] for i in row) for row in packed)
    for r, row in enumerate(packed):
        rows.start_row()
        for i in row:
            start = r * width + len(rows.ids[-1])
            rows.prompt(i, pairs[i]["prompt_ids"])
            rows.score_prompt(i, pairs[i]["prompt_ids"])
            rows.response(i, CHOSEN, pairs[i]["chosen_ids"])
            rows.response(i, REJECTED, pairs[i]["rejected_ids"])
            spans[i] = (start, start + lengths[i])
    return rows.batch(pairs, spans, head_positions)


def length_buckets(pairs: Sequence[Pair], size: int, ranks: Ranks = ALONE) -> list[Sequence[Pair]]:
    """Return a rank's pairs of one step in nearly equal parts of `size`, grouped by length.

    A step is defined on all its pairs, so their assignment to micro-batches and ranks changes
    nothing. All ranks have the same number of parts, since each part gathers sharded weights. With
    parts of one pair and an uneven division, some parts have two.
    """
    longest_first = ranks.share(
        sorted(pairs, key=lambda pair: -sum(len(pair[part]) for part in PARTS))
    )
    parts = math.ceil(ranks.largest_share(len(pairs)) / size)
    parts = min(parts, ranks.smallest_share(len(pairs)))
    ends = [len(longest_first) * i // parts for i in range(parts + 1)]
    return [longest_first[start:end] for start, end in pairwise(ends)]


def pack(lengths: Sequence[int], hidden_size: int) -> list[list[int]]:
    """Return the cheapest packing of segments into rows of nearly equal length.

    Many short rows waste padding, few long rows waste attention: a token in a row of N costs about
    24 D² + 4 N D multiplications per layer (D hidden size, dense mask), so R rows cost in
    proportion to R N (6 D + N). Every R is tried, with the longest segments placed first, each into
    the emptiest row.

    Args:
        lengths: (B,) tokens of each segment.
        hidden_size: D.

    Returns:
        For each row, the indices of its segments in `lengths`.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best: list[list[int]] = []
    least = math.inf
    for count in range(1, len(lengths) + 1):
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for i in longest_first:
            emptiest = filled.index(min(filled))
            rows[emptiest].append(i)
            filled[emptiest] += lengths[i]
        cost = count * max(filled) * (6 * hidden_size + max(filled))
        if cost < least:
            best, least = rows, cost
    return best


class _RowBuilder:
    """Builds the rows of a batch and lists the tokens to score.

    A scored segment is a row, the columns that predict its tokens, the tokens, and their sequence.
    """

    def __init__(self, pairs: int) -> None:
        self._pairs = pairs
        self.ids: list[list[int]] = []
        self._positions: list[list[int]] = []
        self._pair: list[list[int]] = []
        self._branch: list[list[int]] = []
        self._responses: list[Segment] = []
        self._prompts: list[Segment] = []
        self._prompt_end = 0

    @property
    def length(self) -> int:
        """Length of the longest row so far, in tokens."""
        return max(map(len, self.ids))

    def start_row(self) -> None:
        """Start a row."""
        for grid in (self.ids, self._positions, self._pair, self._branch):
            grid.append([])

    def prompt(self, i: int, ids: Sequence[int]) -> None:
        """Append pair i's prompt; the next responses in this row continue it."""
        self._append(i, PROMPT, ids, first_position=0)
        self._prompt_end = len(self.ids[-1]) - 1

    def score_prompt(self, i: int, ids: Sequence[int]) -> None:
        """Score the tokens of the last appended prompt, except the first token."""
        row, start = len(self.ids) - 1, self._prompt_end - len(ids) + 1
        self._prompts.append((row, range(start, self._prompt_end), ids[1:], i))

    def response(self, i: int, branch: int, ids: Sequence[int]) -> None:
        """Append a response of pair i; the prompt's last token predicts its first token."""
        start, row = len(self.ids[-1]), len(self.ids) - 1
        self._append(i, branch, ids, self._positions[-1][self._prompt_end] + 1)
        sequence = i if branch == CHOSEN else self._pairs + i
        predictors = [self._prompt_end, *range(start, start + len(ids) - 1)]
        self._responses.append((row, predictors, ids, sequence))

    def _append(self, i: int, branch: int, ids: Sequence[int], first_position: int) -> None:
        self.ids[-1].extend(ids)
        self._positions[-1].extend(range(first_position, first_position + len(ids)))
        self._pair[-1].extend([i] * len(ids))
        self._branch[-1].extend([branch] * len(ids))

    def batch(
        self, pairs: Sequence[Pair], spans: Sequence[tuple[int, int]], head_positions: HeadPositions
    ) -> PairBatch:
        """Return the batch of all rows, with the columns of the pairs."""

        def column(name: str, otherwise: float) -> Tensor:
            return torch.tensor([pair.get(name, otherwise) for pair in pairs], dtype=torch.float64)

        return PairBatch(
            input_ids=self._grid(self.ids, 0),
            position_ids=self._grid(self._positions, 0),
            pair=self._grid(self._pair, PADDING),
            branch=self._grid(self._branch, PROMPT),
            responses=self._tokens(self._responses),
            prompts=self._tokens(self._prompts),
            spans=tuple(spans),
            columns={
                name: column(name, otherwise)
                for name, otherwise in COLUMNS.items()
                if name not in OF_THE_PAIR or any(name in pair for pair in pairs)
            },
            index=torch.tensor([pair.get("index", i) for i, pair in enumerate(pairs)]),
            head_positions=head_positions,
        )

    def _grid(self, rows: list[list[int]], padding: int) -> Tensor:
        length = self.length
        return torch.tensor([row + [padding] * (length - len(row)) for row in rows])

    def _tokens(self, segments: list[Segment]) -> Tokens:
        length = self.length
        places = [row * length + at for row, columns, _, _ in segments for at in columns]
        targets = [token for _, _, tokens, _ in segments for token in tokens]
        sequences = [sequence for _, _, tokens, sequence in segments for _ in tokens]
        return Tokens(
            *(torch.tensor(each, dtype=torch.int64) for each in (places, targets, sequences))
        )
