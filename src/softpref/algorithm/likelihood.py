"""Token log-probabilities to what the method needs of a pair: its margin and its PPLDiff.

Shapes: B pairs; 2B sequences, the chosen ones first and the rejected ones after them; T response
tokens of them all. Log-probabilities are in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from softpref.algorithm.gradients.head import (
    LogpsOf,
    Tokens,
    all_logits,
    linear_logps,
    response_head,
)
from softpref.algorithm.gradients.shards import put_away_after_pass
from softpref.algorithm.rows import OF_THE_PAIR, PairBatch

PplScope = Literal["response", "sequence", "sequence_per_response_token"]


@dataclass(frozen=True)
class Measured:
    """What one forward pass says of B pairs; every field has shape (B,).

    What pairs may bring is None where none of them brings it: a step then does nothing with it.

    Attributes:
        chosen_logp: log π_θ(y1 | x), nats, summed over the response tokens.
        rejected_logp: log π_θ(y2 | x), nats.
        chosen_logratio: log π_θ(y1 | x) − log π_ref(y1 | x), nats; DPO's reward is β times it.
        rejected_logratio: the same of y2.
        margin: h of Eq. 1, nats.
        ppl_diff: PPLDiff of Eq. 4 and 5 under this policy, nats per token; never differentiated.
        starting_ppl_diff: the same under the policy training started from.
        evidence: g of the label before training, nats; NaN where nobody fitted it.
        given_label: the soft label that came with the pair, NaN where none did.
        weight: how much the pair counts.
        target_margin: what h should exceed, nats.
        annotator_index: the number of who labelled the pair, NaN where unknown.
    """

    chosen_logp: Tensor
    rejected_logp: Tensor
    chosen_logratio: Tensor
    rejected_logratio: Tensor
    margin: Tensor
    ppl_diff: Tensor
    starting_ppl_diff: Tensor
    evidence: Tensor
    given_label: Tensor | None = None
    weight: Tensor | None = None
    target_margin: Tensor | None = None
    annotator_index: Tensor | None = None

    def columns(self) -> dict[str, Tensor]:
        """Return the fields by name, without those that no pair brings."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def detach(self) -> Measured:
        """Return the same numbers without the graph that made them."""
        return Measured(**{name: value.detach() for name, value in self.columns().items()})

    @staticmethod
    def concatenate(parts: Sequence[Measured]) -> Measured:
        """Join the measurements of micro-batches into those of the whole batch."""
        names = dict.fromkeys(name for part in parts for name in part.columns())
        return Measured(**{name: joined([part.filled(name) for part in parts]) for name in names})

    def filled(self, name: str) -> Tensor:
        """Return a field, with what counts for pairs that do not bring it."""
        value: Tensor | None = getattr(self, name)
        return torch.full_like(self.margin, OF_THE_PAIR[name]) if value is None else value


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the columns of micro-batches as those of the whole batch; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def log_perplexity(
    response_logp: Tensor,
    response_tokens: Tensor,
    prompt_logp: Tensor,
    prompt_tokens: Tensor,
    scope: PplScope,
) -> Tensor:
    """Return log PPL([x; y]), nats per token: the mean negative log-probability over `scope`.

    `response` is the response's own mean; `sequence` is over prompt and response (Kong et al.
    2024); `sequence_per_response_token` divides the whole sequence's sum by the number of response
    tokens (the paper's Appendix C, to the letter). The first token of a row has no prediction and
    never counts.

    Args:
        response_logp: (2B,) sums over the response tokens, nats.
        response_tokens: (2B,) how many these are.
        prompt_logp: (2B,) sums over the predicted prompt tokens, nats; not read under `response`.
        prompt_tokens: (2B,) how many these are.
        scope: which tokens count.

    Returns:
        Shape (2B,).
    """
    if scope not in get_args(PplScope):
        raise ValueError(f"ppl_scope must be one of {get_args(PplScope)}, not {scope!r}")
    if scope == "response":
        return -response_logp / response_tokens
    counted = response_tokens + prompt_tokens if scope == "sequence" else response_tokens
    return -(response_logp + prompt_logp) / counted


def measure(
    policy: nn.Module, batch: PairBatch, ppl_scope: PplScope, logps: LogpsOf = linear_logps
) -> Measured:
    """Return margin (Eq. 1) and PPLDiff (Eq. 4, 5) of every pair in one forward pass.

        h = [log π_θ(y1|x) − log π_ref(y1|x)] − [log π_θ(y2|x) − log π_ref(y2|x)]
        PPLDiff = log PPL([x; y1]) − log PPL([x; y2])

    The margin can be differentiated with respect to the policy, PPLDiff cannot: a label says how
    far to believe a pair and must not be a way to lower the loss. Prompt tokens are scored only
    where `ppl_scope` counts them. `logps` reads log-probabilities off the head.
    """
    return summed(batch, token_logps(policy, batch, ppl_scope, logps), ppl_scope)


def token_logps(
    policy: nn.Module, batch: PairBatch, ppl_scope: PplScope, logps: LogpsOf = linear_logps
) -> list[Tensor]:
    """Run the policy; return log-probabilities of the response tokens, and of prompts if scored."""
    groups = [batch.responses] if ppl_scope == "response" else [batch.responses, batch.prompts]
    inputs = batch.inputs(policy)
    if batch.head_positions == "scored":
        read = response_head(policy, inputs, groups, logps)
    else:
        read = all_logits(policy, inputs, groups)
    put_away_after_pass(policy, read[0])
    return read


def summed(batch: PairBatch, token_logps: Sequence[Tensor], ppl_scope: PplScope) -> Measured:
    """Return what `measure` does, from the log-probabilities of single tokens."""
    logps, *of_prompts = token_logps
    response_logp = sums_by(logps, batch.responses.sequence, 2 * len(batch))
    of_response = response_logp.detach(), _lengths(batch.responses, 2 * len(batch))
    of_prompt = of_response  # not read without scored prompts
    for prompt_logps in of_prompts:
        sums = sums_by(prompt_logps, batch.prompts.sequence, len(batch))
        of_prompt = sums.repeat(2), _lengths(batch.prompts, len(batch)).repeat(2)
    log_ppl = log_perplexity(*of_response, *of_prompt, ppl_scope)
    chosen_log_ppl, rejected_log_ppl = log_ppl.chunk(2)
    chosen_logp, rejected_logp = response_logp.chunk(2)
    known = {**batch.columns}
    chosen_logratio = chosen_logp - known.pop("ref_chosen_logp").to(chosen_logp)
    rejected_logratio = rejected_logp - known.pop("ref_rejected_logp").to(rejected_logp)
    return Measured(
        chosen_logp=chosen_logp,
        rejected_logp=rejected_logp,
        chosen_logratio=chosen_logratio,
        rejected_logratio=rejected_logratio,
        margin=chosen_logratio - rejected_logratio,
        ppl_diff=chosen_log_ppl - rejected_log_ppl,
        **known,
    )


def _lengths(tokens: Tokens, sequences: int) -> Tensor:
    """Return how many tokens each sequence has; `bincount` would make the host wait."""
    return sums_by(torch.ones_like(tokens.sequence), tokens.sequence, sequences)


def sums_by(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Return the sums of values (T,) by their group (T,), (count,)."""
    return values.new_zeros(count).index_add(0, group, values)
