"""Token log-probabilities to what the method needs of a pair: its margin and its PPLDiff.

Shapes: B pairs; 2B rows, the chosen responses first and the rejected ones after them; N tokens a
row, padded on the right. Log-probabilities are in nats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

PplScope = Literal["response", "sequence", "sequence_per_response_token"]


@dataclass(frozen=True)
class PairBatch:
    """Pairs as the policy reads them; `softpref.data.make_batch` makes it.

    Attributes:
        input_ids: (2B, N) token ids; row i is pair i's chosen response behind its prompt, row B + i
            its rejected one.
        attention_mask: (2B, N), 1 on tokens and 0 on padding.
        response_mask: (2B, N), True on response tokens.
        ref_chosen_logp: (B,) log π_ref(y1 | x), nats.
        ref_rejected_logp: (B,) log π_ref(y2 | x), nats.
        starting_ppl_diff: (B,) PPLDiff under the policy training started from, nats per token; NaN
            where nobody computed it.
        index: (B,) the pair's position in its data set.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    ref_chosen_logp: Tensor
    ref_rejected_logp: Tensor
    starting_ppl_diff: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.ref_chosen_logp)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Move every tensor to `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        if torch.device(device).type == "mps":  # knows no float64
            tensors = {n: t.float() if t.dtype == torch.float64 else t for n, t in tensors.items()}
        return replace(
            self, **{n: t.to(device, non_blocking=non_blocking) for n, t in tensors.items()}
        )

    def single_pairs(self) -> Iterator[PairBatch]:
        """Yield each pair as a batch of its own, without the padding its batch mates needed."""
        for i in range(len(self)):
            rows = [i, len(self) + i]
            length = int(self.attention_mask[rows].sum(-1).max())
            yield PairBatch(
                input_ids=self.input_ids[rows, :length],
                attention_mask=self.attention_mask[rows, :length],
                response_mask=self.response_mask[rows, :length],
                ref_chosen_logp=self.ref_chosen_logp[i : i + 1],
                ref_rejected_logp=self.ref_rejected_logp[i : i + 1],
                starting_ppl_diff=self.starting_ppl_diff[i : i + 1],
                index=self.index[i : i + 1],
            )


@dataclass(frozen=True)
class Measured:
    """What one forward pass says of B pairs; every field has shape (B,).

    Attributes:
        chosen_logp: log π_θ(y1 | x), nats, summed over the response tokens.
        rejected_logp: log π_θ(y2 | x), nats.
        chosen_logratio: log π_θ(y1 | x) − log π_ref(y1 | x), nats; DPO's reward is β times it.
        rejected_logratio: the same of y2.
        margin: h of Eq. 1, nats.
        ppl_diff: PPLDiff of Eq. 4 and 5 under this policy, nats per token; never differentiated.
        starting_ppl_diff: the same under the policy training started from.
    """

    chosen_logp: Tensor
    rejected_logp: Tensor
    chosen_logratio: Tensor
    rejected_logratio: Tensor
    margin: Tensor
    ppl_diff: Tensor
    starting_ppl_diff: Tensor

    def detach(self) -> Measured:
        """Return the same numbers without the graph that made them."""
        return Measured(*(getattr(self, f.name).detach() for f in fields(self)))

    @staticmethod
    def concatenate(parts: Sequence[Measured]) -> Measured:
        """Join the measurements of micro-batches into those of the whole batch."""
        return Measured(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Measured)))


def token_logps(policy: nn.Module, batch: PairBatch) -> Tensor:
    """Return log π_θ(token | all tokens before it), shape (2B, N − 1), in float32 or wider."""
    logits = policy(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = batch.input_ids[:, 1:, None]
    return logits.gather(-1, targets).squeeze(-1) - logits.logsumexp(-1)


def log_perplexity(logps: Tensor, is_token: Tensor, is_response: Tensor, scope: PplScope) -> Tensor:
    """Return log PPL([x; y]), nats per token: the mean negative log-probability over `scope`.

    `response` is the response's own mean; `sequence` is over prompt and response (Kong et al.
    2024); `sequence_per_response_token` divides the whole sequence's sum by the number of response
    tokens (the paper's Appendix C, to the letter). The first token of a row has no prediction and
    never counts.

    Args:
        logps: (R, N − 1) log-probabilities of the tokens from the second on.
        is_token: (R, N − 1), True where there is no padding.
        is_response: (R, N − 1), True on response tokens.
        scope: which tokens count.

    Returns:
        Shape (R,).
    """
    if scope not in get_args(PplScope):
        raise ValueError(f"ppl_scope must be one of {get_args(PplScope)}, not {scope!r}")
    summed = is_response if scope == "response" else is_token
    counted = is_token if scope == "sequence" else is_response
    return -(logps * summed).sum(-1) / counted.sum(-1)


def measure(policy: nn.Module, batch: PairBatch, ppl_scope: PplScope) -> Measured:
    """Return margin (Eq. 1) and PPLDiff (Eq. 4, 5) of every pair in one forward pass.

        h = [log π_θ(y1|x) − log π_ref(y1|x)] − [log π_θ(y2|x) − log π_ref(y2|x)]
        PPLDiff = log PPL([x; y1]) − log PPL([x; y2])

    The margin can be differentiated with respect to the policy, PPLDiff cannot: a label says how
    far to believe a pair and must not be a way to lower the loss.
    """
    logps = token_logps(policy, batch)
    is_token, is_response = batch.attention_mask[:, 1:].bool(), batch.response_mask[:, 1:]
    chosen_logp, rejected_logp = (logps * is_response).sum(-1).chunk(2)
    chosen_log_ppl, rejected_log_ppl = log_perplexity(
        logps.detach(), is_token, is_response, ppl_scope
    ).chunk(2)
    chosen_logratio = chosen_logp - batch.ref_chosen_logp.to(chosen_logp)
    rejected_logratio = rejected_logp - batch.ref_rejected_logp.to(rejected_logp)
    return Measured(
        chosen_logp=chosen_logp,
        rejected_logp=rejected_logp,
        chosen_logratio=chosen_logratio,
        rejected_logratio=rejected_logratio,
        margin=chosen_logratio - rejected_logratio,
        ppl_diff=chosen_log_ppl - rejected_log_ppl,
        starting_ppl_diff=batch.starting_ppl_diff,
    )
