"""Passes of a policy over tokenized pairs, without learning.

Shapes: n pairs of a data set, in its order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn

from softpref.algorithm.likelihood import Measured, PplScope, measure
from softpref.algorithm.policy import evaluating
from softpref.algorithm.ranks import ALONE, Ranks
from softpref.algorithm.rows import PairBatch
from softpref.algorithm.signals import STARTING_PPL_DIFF, Signal
from softpref.data.batches import Collate, make_batch
from softpref.data.readers import column
from softpref.data.tokens import PARTS
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
    """Return the token counts of one part of every pair, shape (n,), int32."""
    return torch.tensor(pc.list_value_length(column(pairs, part)).to_numpy())


def numbers(pairs: Dataset, name: str) -> Tensor:
    """Return a column of numbers or booleans, (n,), in its own dtype; null is NaN."""
    return torch.tensor(column(pairs, name).to_numpy())


def starting_ppl_diff(pairs: Dataset) -> Tensor:
    """Return PPLDiff under the starting policy, (n,), nats per token."""
    return starting_signals(pairs, [STARTING_PPL_DIFF]).squeeze(-1)


def starting_signals(pairs: Dataset, signals: Sequence[Signal]) -> Tensor:
    """Return what the signals are under the starting policy, (n, F)."""
    return torch.stack(
        [
            numbers(pairs, signal.column).float() if signal.column else torch.zeros(len(pairs))
            for signal in signals
        ],
        -1,
    )


@dataclass(frozen=True)
class Scorer:
    """Makes passes of a policy over tokenized pairs, without learning.

    Attributes:
        policy: the model that reads.
        collate: how pairs become batches.
        ppl_scope: which tokens count in PPLDiff.
        batch_size: pairs in one forward pass.
        bf16: whether forward passes run in bfloat16.
        ranks: who shares each pass.
    """

    policy: nn.Module
    collate: Collate = make_batch
    ppl_scope: PplScope = "response"
    batch_size: int = 8
    bf16: bool = False
    ranks: Ranks = ALONE

    def measure(self, pairs: Dataset, what: str) -> Measured:
        """Measure every pair; return CPU tensors of shape (n,), in data-set order.

        Margins are NaN where the data set has no reference log-probabilities yet. `what` is for
        the progress line.
        """

        def measured(batch: PairBatch) -> dict[str, Tensor]:
            return measure(self.policy, batch, self.ppl_scope).columns()

        return Measured(**self.read(pairs, measured, what))

    def read(
        self, pairs: Dataset, read_batch: Callable[[PairBatch], dict[str, Tensor]], what: str
    ) -> dict[str, Tensor]:
        """Return what `read_batch` says of every pair, CPU tensors (n, ...), in data-set order.

        Pairs of like length share a batch, and ranks deal the batches among them: the numbers are
        those of one process.
        """
        order = pair_lengths(pairs).argsort(descending=True, stable=True)
        device = next(self.policy.parameters()).device
        batches = order.split(self.batch_size)
        mine, rounds = self.ranks.share(batches), self.ranks.share_evenly(batches)
        parts = []
        own_pairs = sum(map(len, rounds))
        bar = Progress(what, own_pairs, "pair", is_silent=not self.ranks.is_first)
        with evaluating(self.policy), torch.no_grad(), bar:
            for positions in rounds:
                # Not `select`, which hashes what was asked for: a tenth of the whole pass's time.
                columns = pairs[positions.tolist()]
                rows = [
                    dict(zip(columns, row, strict=True))
                    for row in zip(*columns.values(), strict=True)
                ]
                batch = self.collate(rows).to(device)
                with mixed_precision(device, self.bf16):
                    parts.append(read_batch(batch))
                bar.update(len(positions))
        places = torch.cat(list(mine))
        own = parts[: len(mine)]
        values = [torch.cat([part[name] for part in own]) for name in own[0]]
        if self.ranks.count > 1 and len(places) < len(pairs):  # else each rank has scored all
            *values, places = self.ranks.gather([*values, places.to(device)])
        back = places.cpu().argsort()
        return {name: each.cpu()[back] for name, each in zip(own[0], values, strict=True)}
