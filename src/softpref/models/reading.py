"""What a policy says about pairs beyond their log-probabilities, in the same forward pass.

Shapes: B pairs; R rows of N tokens; D hidden size; S numbers kept of a state, at most 128.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softpref.algorithm.likelihood import Measured, PplScope, summed, sums_by, token_logps
from softpref.algorithm.rows import PROMPT, REJECTED, PairBatch
from softpref.errors import UsageError

LARGEST_STATE = 128
_PROJECTION_SEED = 0


@contextmanager
def half_depth(policy: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list to which every forward pass adds the states at half depth, (R, N, D).

    Middle layers say more about a response than the last one, which prepares the next token.
    """
    states: list[Tensor] = []

    def keep(layer: nn.Module, arguments: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        states.append((output[0] if isinstance(output, tuple) else output).detach())

    hook = middle_layer(policy).register_forward_hook(keep)
    try:
        yield states
    finally:
        hook.remove()


def middle_layer(policy: nn.Module) -> nn.Module:
    """Return the decoder layer whose output is the hidden state at half depth.

    It is found in the outermost list of as many modules as the config has layers, else in the
    outermost list.

    Raises:
        UsageError: the policy has no list of modules.
    """
    depth = getattr(cast(Any, policy).config.get_text_config(), "num_hidden_layers", None)
    stacks = [module for module in policy.modules() if isinstance(module, nn.ModuleList)]
    for stack in sorted(stacks, key=lambda stack: len(stack) != depth):  # the outermost first
        if len(stack):
            return stack[max(len(stack) // 2 - 1, 0)]
    raise UsageError(
        f"the model ({type(policy).__name__}) does not keep its layers in a list, so softpref "
        "cannot read its hidden states."
    )


def read_pairs(
    policy: nn.Module, batch: PairBatch, ppl_scope: PplScope, states: list[Tensor]
) -> tuple[Measured, dict[str, Tensor]]:
    """Return what `measure` does, and the pairs' further signals, (B,) each but the first.

    `state`, (B, S): the difference of the responses' mean states at half depth, chosen less
    rejected; `likeness`, their cosine; `distance`, the difference's norm; `chosen_spread` and
    `rejected_spread`, the standard deviation of token log-probabilities, nats; `overlap`, the share
    of the distinct tokens of both that both have.

    Args:
        policy: any causal language model of transformers, plain or PEFT.
        batch: the pairs.
        ppl_scope: which tokens count in PPLDiff.
        states: what `half_depth` yields, in force.
    """
    states.clear()
    logps = token_logps(policy, batch, ppl_scope)
    chosen, rejected = mean_states(batch, states.pop())
    difference = chosen - rejected
    chosen_spread, rejected_spread = spreads(batch, logps[0])
    signals = {
        "state": project(difference).half(),
        "likeness": F.cosine_similarity(chosen, rejected),
        "distance": difference.norm(dim=1),
        "chosen_spread": chosen_spread,
        "rejected_spread": rejected_spread,
        "overlap": overlap(batch),
    }
    return summed(batch, logps, ppl_scope), signals


def mean_states(batch: PairBatch, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean states of chosen and of rejected responses, (B, D) float32 each."""
    count = len(batch)
    states, pair, branch = states.flatten(0, 1), batch.pair.flatten(), batch.branch.flatten()
    of_response = (pair >= 0) & (branch != PROMPT)
    sequence = pair[of_response] + count * (branch[of_response] == REJECTED)
    total = states.new_zeros(2 * count, states.shape[1], dtype=torch.float32)
    total.index_add_(0, sequence, states[of_response].float())
    means = total / sequence.bincount(minlength=2 * count)[:, None]
    return means[:count], means[count:]


def spreads(batch: PairBatch, logps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the standard deviation of the tokens' log-probabilities (T,), nats, (B,) each."""
    sequence, count = batch.responses.sequence, 2 * len(batch)
    tokens = sequence.bincount(minlength=count)
    mean = sums_by(logps, sequence, count) / tokens
    variance = sums_by((logps - mean[sequence]).square(), sequence, count) / tokens
    chosen, rejected = variance.sqrt().chunk(2)
    return chosen, rejected


def overlap(batch: PairBatch) -> Tensor:
    """Return the share of a pair's distinct response tokens that both responses have, (B,)."""
    sequence, count = batch.responses.sequence, len(batch)
    words = int(batch.responses.target.max()) + 1
    token = sequence % count * words + batch.responses.target
    chosen, rejected = (token[these].unique() for these in (sequence < count, sequence >= count))
    both = chosen[torch.isin(chosen, rejected)]
    either = torch.cat([chosen, rejected]).unique()
    shared, all_tokens = ((t // words).bincount(minlength=count) for t in (both, either))
    return shared / all_tokens


def project(states: Tensor) -> Tensor:
    """Return states (B, D) in fixed random directions where D is larger than 128, (B, S).

    Random directions keep lengths and angles (Johnson and Lindenstrauss 1984), and need no data:
    what a pair's numbers are does not depend on the pairs beside it.
    """
    size = states.shape[1]
    if size <= LARGEST_STATE:
        return states
    generator = torch.Generator().manual_seed(_PROJECTION_SEED)
    directions = torch.randn(size, LARGEST_STATE, generator=generator) / LARGEST_STATE**0.5
    return states @ directions.to(states)
