"""Log-probabilities of chosen tokens: from all logits, or from a head that sees no others.

Shapes: R rows of N tokens; T tokens whose log-probability is asked for; D hidden size; V words.
Log-probabilities are in nats, in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_ENTRIES = 2**22
"""Most entries of a tokens × vocabulary tensor: 16 MiB in float32."""


@dataclass(frozen=True)
class Tokens:
    """Tokens whose log-probability is asked for.

    Attributes:
        predictor: (T,) where each is predicted: the place, in the flattened (R · N), of the token
            before it.
        target: (T,) its id.
        sequence: (T,) which sum it belongs to.
    """

    predictor: Tensor
    target: Tensor
    sequence: Tensor

    def to(self, device: torch.device | str) -> Tokens:
        """Move every tensor to `device`."""
        return Tokens(self.predictor.to(device), self.target.to(device), self.sequence.to(device))


Reader = Callable[[nn.Module, Mapping[str, Any], Sequence[Tokens]], list[Tensor]]
"""Runs a policy on its inputs and reads off the log-probabilities (T,) of each group of tokens.

Those of the first group can be differentiated, those of the others cannot.
"""


def all_logits(
    policy: nn.Module, inputs: Mapping[str, Any], groups: Sequence[Tokens]
) -> list[Tensor]:
    """Read from the logits of every position: right for every policy, twice differentiable."""
    logits = policy(**inputs).logits.flatten(0, 1)
    first, *others = groups
    read = [_log_softmax_at(logits[first.predictor], first.target)]
    with torch.no_grad():
        read += [_log_softmax_at(logits[group.predictor], group.target) for group in others]
    return read


def response_head(
    policy: nn.Module, inputs: Mapping[str, Any], groups: Sequence[Tokens]
) -> list[Tensor]:
    """Read by giving the output head only the positions asked for, a chunk of them at a time.

    No tokens × vocabulary tensor outlives its chunk of `CHUNK_ENTRIES`. Hooks on the head do it
    inside the policy's own forward pass, so that whatever wraps that (mixed precision, say) holds
    for the head too; the head itself is run for one position a row, to keep its caller content.

    Right where the head is a plain linear layer whose output nothing changes; see
    `refuse_response_head`. Differentiable once; twice raises.
    """
    head = cast(Any, policy).get_output_embeddings()
    hidden: list[Tensor] = []
    read: list[Tensor] = []

    def take(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden.append(arguments[0].flatten(0, 1))
        return (arguments[0][:, :1],)

    def give(module: nn.Module, arguments: Any, output: Tensor) -> None:
        first, *others = groups
        read.append(linear_logps(hidden[0][first.predictor], head, first.target))
        with torch.no_grad():
            read.extend(
                linear_logps(hidden[0][group.predictor], head, group.target) for group in others
            )
        hidden.clear()

    hooks = head.register_forward_pre_hook(take), head.register_forward_hook(give)
    try:
        policy(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return read


def refuse_response_head(policy: nn.Module) -> str | None:
    """Return why `response_head` cannot be right for this policy, or None where it may be.

    What happens to logits behind the head does not show in its structure: compare the numbers too.
    """
    head = getattr(policy, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear:  # an adapted head is a module around a linear layer
        return f"its output head is no plain linear layer ({type(head).__name__})"
    return None


def linear_logps(hidden: Tensor, head: nn.Linear, target: Tensor) -> Tensor:
    """Return log softmax(W h + b)[target], shape (T,), for hidden states (T, D), in chunks.

    Where the head is frozen each log-probability's gradient with respect to its hidden state is
    made along with it (one vector a token), so that logits are never made twice. Where it trains,
    they are made again in the backward pass.
    """
    if not torch.is_grad_enabled() or not hidden.requires_grad:
        chunks = _chunks(len(hidden), head.weight)
        return torch.cat([_logps_at(hidden[rows], head, target[rows]) for rows in chunks])
    if not head.weight.requires_grad:
        return _FrozenHead.apply(hidden, head, target)
    return torch.cat(
        [
            checkpoint(_logps_at, hidden[rows], head, target[rows], use_reentrant=False)
            for rows in _chunks(len(hidden), head.weight)
        ]
    )


class _FrozenHead(torch.autograd.Function):
    """log softmax(W h_t + b)[y_t] and, made along with it, its gradient Wᵀ(e_{y_t} − p) in h_t."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: nn.Linear, target: Tensor) -> Tensor:
        slope = torch.empty_like(hidden)
        parts = []
        for rows in _chunks(len(hidden), head.weight):
            logits = _wide(F.linear(hidden[rows], head.weight, head.bias))
            normaliser = logits.logsumexp(-1, keepdim=True)
            at_target = target[rows, None]
            parts.append((logits.gather(-1, at_target) - normaliser).squeeze(-1))
            pull = logits.sub_(normaliser).exp_().neg_()
            pull.scatter_add_(-1, at_target, torch.ones_like(normaliser))
            slope[rows] = (pull.to(head.weight.dtype) @ head.weight).to(slope)
        ctx.save_for_backward(slope)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logp: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (by_logp[:, None] * slope).to(slope), None, None


def _logps_at(hidden: Tensor, head: nn.Linear, target: Tensor) -> Tensor:
    return _log_softmax_at(F.linear(hidden, head.weight, head.bias), target)


def _log_softmax_at(logits: Tensor, target: Tensor) -> Tensor:
    logits = _wide(logits)
    return logits.gather(-1, target[:, None]).squeeze(-1) - logits.logsumexp(-1)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _chunks(tokens: int, weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_ENTRIES // len(weight))
    return [slice(start, start + size) for start in range(0, tokens, size)]
