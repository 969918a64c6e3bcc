"""How a policy's batches are laid out and read: the fastest way that a trial shows to be right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from datasets import Dataset
from torch import Tensor, nn

from softpref.algorithm.gradients.head import HeadPositions, refuse_response_head
from softpref.algorithm.gradients.jacobian import GraphPullback
from softpref.algorithm.gradients.shards import reshard_after_error
from softpref.algorithm.likelihood import token_logps
from softpref.algorithm.policy import evaluating, trainable
from softpref.algorithm.rows import PairBatch, skips_masked
from softpref.data.batches import Collate, make_batch, make_shared_batch
from softpref.data.tokens import PARTS
from softpref.models.scoring import pair_lengths, token_counts

Layout = Literal["auto", "padded"]
Candidate = tuple[str, str, Collate]

FLEX_ATTENTION = "flex_attention"
PROBE_PAIRS = 4
LONGEST_PAIRS = 2
"""Pairs in a trial; a trial costs as much as scoring many average pairs."""
_LARGEST_ERROR = 1e-4
_LARGEST_ERROR_16_BIT = 3e-2


def longest_pairs(*sets: Dataset | None) -> list[dict[str, Any]]:
    """Return the longest few pairs of all sets, the ones in which two layouts differ the most.

    A sliding window, say, shows only in sequences longer than it.
    """
    longest = [
        pairs[i]
        for pairs in sets
        if pairs is not None
        for i in pair_lengths(pairs).topk(min(LONGEST_PAIRS, len(pairs))).indices.tolist()
    ]
    return sorted(longest, key=lambda pair: -sum(len(pair[p]) for p in PARTS))[:LONGEST_PAIRS]


def shortest_pairs(pairs: Dataset) -> list[dict[str, Any]]:
    """Return the shortest few pairs, for a trial that costs little memory."""
    few = min(PROBE_PAIRS, len(pairs))
    return [pairs[i] for i in pair_lengths(pairs).topk(few, largest=False).indices.tolist()]


def mean_tokens(pairs: Dataset, *, shared: bool) -> float:
    """Return the mean tokens a pair takes in a batch, its prompt counted as often as it is run."""
    tokens = int(pair_lengths(pairs).sum())
    if not shared:
        tokens += int(token_counts(pairs, "prompt_ids").sum())
    return tokens / len(pairs)


@dataclass(frozen=True)
class LayoutChoice:
    """How to lay out and read batches for one policy.

    Attributes:
        collate: makes a batch of pairs.
        attention: the attention that it needs, by transformers' names.
        why: what was chosen and why, for the log.
        name: what was chosen, as `why` begins.
        truth: what padded rows and all logits gave in the trial, log-probabilities, nats.
    """

    collate: Collate
    attention: str
    why: str
    name: str
    truth: Tensor

    def apply(self, policy: nn.Module) -> Collate:
        """Switch the policy's attention to the one needed and return `collate`."""
        _switch(policy, self.attention)
        return self.collate

    @contextmanager
    def applied(self, policy: nn.Module) -> Iterator[Collate]:
        """Apply the layout for a while, and switch the attention back."""
        before = cast(Any, policy).config._attn_implementation
        try:
            yield self.apply(policy)
        finally:
            _switch(policy, before)


def choose_layout(
    layout: Layout, policy: nn.Module, probe: Sequence[dict[str, Any]]
) -> LayoutChoice:
    """Return the fastest way to make batches that a trial shows to be right for the policy.

    Every candidate's log-probabilities of the probe's responses are compared with those of padded
    rows read from all logits, which are right for every policy: sliding windows, position biases
    and what a model does to its logits distinguish them. The first to agree is taken. On a CUDA
    device FlexAttention is tried first. The policy is left as it was.

    Args:
        layout: `auto`, or `padded` to leave prefix sharing out.
        policy: the policy as it will be trained.
        probe: the longest pairs, tokenized.
    """
    truth = _logps(policy, make_batch(probe))
    attention = cast(Any, policy).config._attn_implementation
    chosen, turned_down = _first_right(policy, _candidates(layout, policy), probe, truth)
    if chosen:
        return chosen
    words = "padded rows, all logits"
    return LayoutChoice(make_batch, attention, _why(words, turned_down), words, truth)


def layout_with_adapter(
    chosen: LayoutChoice, layout: Layout, policy: nn.Module, probe: Sequence[dict[str, Any]]
) -> LayoutChoice:
    """Return the layout of a policy that has a fresh adapter since `chosen` was chosen for it.

    As a rule such an adapter changes nothing yet. Where one pass gives the log-probabilities of the
    first trial, its result stands; else there is another trial.

    Args:
        chosen: the layout of the policy without the adapter.
        layout: as in `choose_layout`.
        policy: the policy with its adapter.
        probe: the pairs of the first trial.
    """
    same = (of for of in _candidates(layout, policy) if of[0] == chosen.name)
    stands, _ = _first_right(policy, same, probe, chosen.truth)
    return chosen if stands else choose_layout(layout, policy, probe)


def _first_right(
    policy: nn.Module,
    candidates: Iterable[Candidate],
    probe: Sequence[dict[str, Any]],
    truth: Tensor,
) -> tuple[LayoutChoice | None, list[str]]:
    """Return the first layout that agrees with the truth, if any, and why others do not."""
    dtype = cast(Any, policy).get_input_embeddings().weight.dtype
    low = dtype in (torch.bfloat16, torch.float16)
    largest_error = _LARGEST_ERROR_16_BIT if low else _LARGEST_ERROR
    turned_down = []
    attention_before = cast(Any, policy).config._attn_implementation
    for words, attention, collate in candidates:
        try:
            _switch(policy, attention)
            error = float((_logps(policy, collate(probe)) - truth).abs().mean())
            if attention == FLEX_ATTENTION and error <= largest_error and trainable(policy):
                _go_back(policy, collate, probe)
        except Exception as reason:  # whatever a model makes of a mask it does not know
            reshard_after_error(policy)
            first = (str(reason) or type(reason).__name__).splitlines()[0]
            turned_down.append(f"{words}: {first[:120]}")
        else:
            if error <= largest_error:
                why = _why(words, turned_down)
                return LayoutChoice(collate, attention, why, words, truth), turned_down
            turned_down.append(f"{words}: off by {error:.2g} nats per token for this model")
        finally:
            _switch(policy, attention_before)
    return None, turned_down


def _why(chosen: str, turned_down: Sequence[str]) -> str:
    return "; ".join([chosen, *(f"not {why}" for why in turned_down)])


def _candidates(layout: Layout, policy: Any) -> Iterator[Candidate]:
    """Yield the ways to make batches and the attention each needs, fastest first."""
    heads: list[tuple[str, HeadPositions]] = [("all logits", "all")]
    if refuse_response_head(policy) is None:
        heads.insert(0, ("log-probabilities of responses only", "scored"))
    now = policy.config._attn_implementation
    hidden_size = None if skips_masked(policy) else policy.config.get_text_config().hidden_size
    if layout == "auto" and next(policy.parameters()).is_cuda and hidden_size:
        for words, head in heads:
            shared = partial(make_shared_batch, head_positions=head)
            yield f"prompts shared by FlexAttention, {words}", FLEX_ATTENTION, shared
    for words, head in heads:
        if layout == "auto":
            shared = partial(make_shared_batch, head_positions=head, hidden_size=hidden_size)
            yield f"prompts shared, {words}", now, shared
    for words, head in heads:
        yield f"padded rows, {words}", now, partial(make_batch, head_positions=head)


def _switch(policy: Any, attention: str) -> None:
    if policy.config._attn_implementation != attention:
        policy.set_attn_implementation(attention)


def _go_back(policy: nn.Module, collate: Collate, probe: Sequence[dict[str, Any]]) -> None:
    """Try backward passes of two shapes: FlexAttention is compiled for each, and may fail."""
    device = next(policy.parameters()).device
    for pair in probe[:2]:
        batch = collate([pair]).to(device)
        GraphPullback(policy, batch, "response").vjp(torch.ones(1, device=device))


def _logps(policy: nn.Module, batch: PairBatch) -> Tensor:
    """Return the log-probabilities of the response tokens, sequence by sequence, nats."""
    batch = batch.to(next(policy.parameters()).device)
    with evaluating(policy), torch.no_grad():
        (logps,) = token_logps(policy, batch, "response")
    return logps[batch.responses.sequence.argsort(stable=True)]
