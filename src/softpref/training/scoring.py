"""One pass of a policy over tokenized pairs, without learning.

Shapes: n pairs of a data set, in its order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn

from softpref.algorithm.likelihood import Measured, PplScope, measure
from softpref.algorithm.policy import evaluating
from softpref.algorithm.ranks import ALONE, Ranks
from softpref.algorithm.rows import PairBatch
from softpref.algorithm.signals import STARTING_PPL_DIFF, Signal
from softpref.data.batches import PARTS, Collate
from softpref.data.readers import column
from softpref.progress import Progress


def mixed_precision(device: torch.device, bf16: bool) -> torch.autocast:
    """Return the autocast region of one forward pass; off unless training runs in bfloat16."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def pair_lengths(pairs: Dataset) -> torch.Tensor:
    """Return how many tokens each pair has in all, shape (n,)."""
    lengths = token_counts(pairs, PARTS[0])
    for part in PARTS[1:]:
        lengths += token_counts(pairs, part)
    return lengths


def token_counts(pairs: Dataset, part: str) -> torch.Tensor:
    """Return how many tokens one part of each pair has, shape (n,), int32."""
    return torch.tensor(pc.list_value_length(column(pairs, part)).to_numpy())


def starting_ppl_diff(pairs: Dataset) -> Tensor:
    """Return PPLDiff under the starting policy, (n,), nats per token."""
    return starting_signals(pairs, [STARTING_PPL_DIFF]).squeeze(-1)


def starting_signals(pairs: Dataset, signals: Sequence[Signal]) -> Tensor:
    """Return what the signals are under the starting policy, (n, F)."""
    return torch.stack(
        [
            torch.tensor(column(pairs, signal.column).cast(pa.float32()).to_numpy())
            if signal.column
            else torch.zeros(len(pairs))
            for signal in signals
        ],
        -1,
    )


def score_pairs(
    policy: nn.Module,
    pairs: Dataset,
    *,
    ppl_scope: PplScope,
    batch_size: int,
    bf16: bool,
    collate: Collate,
    what: str,
    ranks: Ranks = ALONE,
) -> Measured:
    """Measure every pair under the policy; returns CPU tensors of shape (n,), in data-set order.

    Margins are NaN where the data set has no reference log-probabilities yet.
    """

    def measured(batch: PairBatch) -> dict[str, Tensor]:
        return vars(measure(policy, batch, ppl_scope))

    columns = pass_over(
        policy, pairs, measured, batch_size=batch_size, bf16=bf16, collate=collate, what=what,
        ranks=ranks,
    )  # fmt: skip
    return Measured(**columns)


def pass_over(
    policy: nn.Module,
    pairs: Dataset,
    read: Callable[[PairBatch], dict[str, Tensor]],
    *,
    batch_size: int,
    bf16: bool,
    collate: Collate,
    what: str,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Return what `read` says of every pair, CPU tensors (n, ...), in data-set order.

    Pairs of like length share a batch, and ranks deal the batches among them: the numbers are those
    of one process.
    """
    order = pair_lengths(pairs).argsort(descending=True, stable=True)
    device = next(policy.parameters()).device
    batches = order.split(batch_size)
    mine, rounds = ranks.share(batches), ranks.share_evenly(batches)
    parts = []
    own_pairs = sum(map(len, rounds))
    bar = Progress(what, own_pairs, "pair", is_silent=not ranks.is_first)
    with evaluating(policy), torch.no_grad(), bar:
        for positions in rounds:
            # Not `select`, which hashes what was asked for: a tenth of the whole pass's time.
            columns = pairs[positions.tolist()]
            rows = [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ]
            batch = collate(rows).to(device)
            with mixed_precision(device, bf16):
                parts.append(read(batch))
            bar.update(len(positions))
    places = torch.cat(list(mine))
    own = parts[: len(mine)]
    values = [torch.cat([part[name] for part in own]) for name in own[0]]
    if ranks.count > 1 and len(places) < len(pairs):  # else each rank has scored all
        *values, places = ranks.gather([*values, places.to(device)])
    back = places.cpu().argsort()
    return {name: each.cpu()[back] for name, each in zip(own[0], values, strict=True)}
