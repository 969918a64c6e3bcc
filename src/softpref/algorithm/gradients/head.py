"""Log-probabilities of chosen tokens: from all logits, or from a head that sees no others.

Shapes: R rows of N tokens; T tokens whose log-probability is asked for; D hidden size; V words.
Log-probabilities are in nats, in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

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


HeadPositions = Literal["all", "scored"]
"""Where the output head is run: at every position, or at those that predict scored tokens."""
LogpsOf = Callable[[Tensor, nn.Linear, Tensor], Tensor]
"""Hidden states (T, D), head and targets (T,) to log-probabilities (T,)."""


def all_logits(
    policy: nn.Module, inputs: Mapping[str, Any], groups: Sequence[Tokens]
) -> list[Tensor]:
    """Return log-probabilities (T,) of each group of tokens, from the logits of every position.

    Right for every policy, and twice differentiable in the first group; others have no gradient.
    """
    logits = policy(**inputs).logits.flatten(0, 1)
    first, *others = groups
    read = [_log_softmax_at(logits[first.predictor], first.target)]
    with torch.no_grad():
        read += [_log_softmax_at(logits[group.predictor], group.target) for group in others]
    return read


def response_head(
    policy: nn.Module, inputs: Mapping[str, Any], groups: Sequence[Tokens], logps: LogpsOf
) -> list[Tensor]:
    """Return what `all_logits` does, the output head run at the positions asked for alone.

    No tokens × vocabulary tensor outlives its chunk of `CHUNK_ENTRIES`. Hooks on the head do it
    inside the policy's own forward pass, so that whatever wraps that (mixed precision, say) holds
    for the head too; the head itself is run for one position a row, to keep its caller content.

    Right where the head is a plain linear layer whose output nothing changes; see
    `refuse_response_head`. Differentiable once; twice raises. `logps` is `linear_logps` or what
    stands in for it in the first group.
    """
    head = cast(Any, policy).get_output_embeddings()
    hidden: list[Tensor] = []
    read: list[Tensor] = []

    def take(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden.append(arguments[0].flatten(0, 1))
        return (arguments[0][:, :1],)

    def give(module: nn.Module, arguments: Any, output: Tensor) -> None:
        first, *others = groups
        read.append(logps(hidden[0][first.predictor], head, first.target))
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
    # An adapted head is a module around a linear layer, a sharded one a subclass that changes none.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return f"its output head is no plain linear layer ({type(head).__name__})"
    return None


def linear_logps(hidden: Tensor, head: nn.Linear, target: Tensor) -> Tensor:
    """Return log softmax(W h + b)[target], shape (T,), for hidden states (T, D), in chunks.

    Each log-probability's gradient with respect to its hidden state is made along with it (one
    vector a token). A head that trains makes its logits once more in the backward pass.
    """
    trains = any(p.requires_grad for p in head.parameters())
    if not torch.is_grad_enabled() or not (hidden.requires_grad or trains):
        chunks = _chunks(len(hidden), head.weight)
        return torch.cat([_logps_at(hidden[rows], head, target[rows]) for rows in chunks])
    logps = _ByHidden.apply(hidden, head, target)
    if trains:
        logps = logps + _ByWeight.apply(head.weight, head.bias, hidden.detach(), head, target)
    return logps


def multiplied_in(head: nn.Linear) -> torch.dtype:
    """Return the precision in which the head multiplies here and now."""
    kind = head.weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype


def residuals(
    hidden: Tensor, head: nn.Linear, target: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield r = softmax(W h + b) − e_y, a chunk of tokens after the other.

    It is −∂ log p[y] / ∂ logits. The difference is taken before anything is rounded to `dtype`, for
    where p[y] is near 1 nothing would be left of it afterwards.

    Args:
        hidden: (T, D) hidden states.
        head: the output head.
        target: (T,) y.
        dtype: what the head multiplies in.

    Yields:
        Which tokens, and their r (tokens, V), in `dtype`.
    """
    weight = head.weight.detach().to(dtype)
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    for rows in _chunks(len(hidden), weight):
        logits = _wide(F.linear(hidden[rows].to(dtype), weight, bias))
        yield rows, _less_one_at(logits.softmax(-1), target[rows]).to(dtype)


def by_head_weight(
    hidden: Tensor, head: nn.Linear, target: Tensor, by_logp: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return −Σ_t c_t r_t h_tᵀ, in W's shape, for c (T,): the gradient of Σ_t c_t log p_t[y_t]."""
    pull = torch.zeros_like(head.weight)
    scaled = hidden.to(dtype) * by_logp[:, None].to(dtype)
    for rows, residual in residuals(hidden, head, target, dtype):
        pull -= residual.T @ scaled[rows]
    return pull


def by_head_bias(
    hidden: Tensor, head: nn.Linear, target: Tensor, by_logp: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return −Σ_t c_t r_t for each of the K columns of c (T, K): (K, V)."""
    pull = by_logp.new_zeros(by_logp.shape[1], len(head.weight))
    for rows, residual in residuals(hidden, head, target, dtype):
        pull -= by_logp[rows].T @ residual.to(by_logp)
    return pull


class _ByHidden(torch.autograd.Function):
    """log softmax(W h_t + b)[y_t] and, made along with it, its gradient −Wᵀ r_t in h_t."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: nn.Linear, target: Tensor) -> Tensor:
        slope = torch.empty_like(hidden)
        parts = []
        for rows in _chunks(len(hidden), head.weight):
            logits = _wide(F.linear(hidden[rows], head.weight, head.bias))
            normaliser = logits.logsumexp(-1, keepdim=True)
            parts.append((logits.gather(-1, target[rows, None]) - normaliser).squeeze(-1))
            residual = _less_one_at(logits.sub_(normaliser).exp_(), target[rows])
            slope[rows] = -(residual.to(head.weight.dtype) @ head.weight).to(slope)
        ctx.save_for_backward(slope)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logp: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (by_logp[:, None] * slope).to(slope), None, None


class _ByWeight(torch.autograd.Function):
    """Zeros (T,), with the gradient that the log-probabilities have in the head's W and b.

    Apart from `_ByHidden`, so that who asks for no weight's gradient does not pay for it.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, hidden: Tensor, head: nn.Linear, at: Tensor
    ) -> Tensor:
        ctx.save_for_backward(hidden, at)
        ctx.head, ctx.dtype = head, multiplied_in(head)
        return torch.zeros_like(hidden[:, 0], dtype=torch.promote_types(ctx.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logp: Tensor) -> tuple[Tensor | None, ...]:
        hidden, target = ctx.saved_tensors
        by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_weight = by_head_weight(hidden, ctx.head, target, by_logp, ctx.dtype)
        if ctx.needs_input_grad[1]:
            by_bias = by_head_bias(hidden, ctx.head, target, by_logp[:, None], ctx.dtype)[0]
        return by_weight, by_bias, None, None, None


def _logps_at(hidden: Tensor, head: nn.Linear, target: Tensor) -> Tensor:
    return _log_softmax_at(F.linear(hidden, head.weight, head.bias), target)


def _log_softmax_at(logits: Tensor, target: Tensor) -> Tensor:
    logits = _wide(logits)
    return logits.gather(-1, target[:, None]).squeeze(-1) - logits.logsumexp(-1)


def _less_one_at(p: Tensor, target: Tensor) -> Tensor:
    """Return p − e_y, in p's place."""
    return p.scatter_add_(-1, target[:, None], torch.full_like(p[:, :1], -1.0))


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _chunks(tokens: int, weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_ENTRIES // len(weight))
    starts = range(0, max(1, tokens), size)  # of no tokens one empty chunk: `cat` needs one
    return [slice(start, start + size) for start in starts]
