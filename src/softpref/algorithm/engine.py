"""Which way to make J suits a policy: by what trains, by trial, and by memory."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from softpref.algorithm.jacobian import (
    DoubleBackwardJacobian,
    GraphPullback,
    MakeJacobian,
    Pullback,
    per_adapter,
    per_adapter_recompute,
    per_pair,
    per_pair_recompute,
)
from softpref.algorithm.policy import moved, nudge, trainable
from softpref.algorithm.rows import PairBatch
from softpref.algorithm.taps import NotTappedError, untapped

Engine = Literal[
    "auto", "lora", "lora_recompute", "per_pair", "per_pair_recompute", "double_backward"
]
MAKERS: dict[str, MakeJacobian] = {
    "lora": per_adapter,
    "lora_recompute": per_adapter_recompute,
    "per_pair": per_pair,
    "per_pair_recompute": per_pair_recompute,
    "double_backward": DoubleBackwardJacobian,
}
KEEP_BUDGET_GIB = 4.0
LARGEST_ERROR = 1e-3
LARGEST_ERROR_16_BIT = 5e-2


class EngineError(ValueError):
    """The engine that was asked for does not exist, or would be wrong for this policy."""


def choose_engine(
    engine: Engine,
    policy: nn.Module,
    probe: PairBatch,
    pairs: int,
    keep_budget_gib: float = KEEP_BUDGET_GIB,
) -> tuple[MakeJacobian, str]:
    """Return the way to make J, and in words what was chosen and why.

    `auto` takes `lora` where trial shows that taps see all of every pair's gradient, and
    `per_pair` where not; past the memory budget the `_recompute` form of either.

    Args:
        engine: what was asked for.
        policy: the policy.
        probe: a few pairs to try on.
        pairs: how many pairs take part in a step.
        keep_budget_gib: most memory for the pairs' own gradients, GiB.

    Raises:
        EngineError: `engine` names none, or one that this policy refuses.
    """
    if engine not in get_args(Engine):
        raise EngineError(f"engine must be one of {get_args(Engine)}, not {engine!r}")
    tried = engine == "auto" or engine.startswith("lora")
    refusal = refuse_taps(policy, probe) if tried else None
    if engine != "auto":
        if refusal:
            raise EngineError(f"engine {engine}: {refusal}; choose auto or per_pair")
        return MAKERS[engine], f"{engine}, as asked for"
    needed = pairs * sum(p.numel() * p.element_size() for p in trainable(policy)) / 2**30
    kept, why = ("per_pair", f"since {refusal}") if refusal else ("lora", "one pass for all pairs")
    if needed <= keep_budget_gib:
        size = f"{1024 * needed:,.0f} MiB"
        return MAKERS[kept], f"{kept}, {why}; the gradients of {pairs} pairs are kept ({size})"
    return (
        MAKERS[f"{kept}_recompute"],
        f"{kept}_recompute, {why}; the gradients of {pairs} pairs would take {needed:,.1f} GiB "
        f"of the {keep_budget_gib:g} allowed, so each is computed again where it is needed",
    )


def refuse_taps(policy: nn.Module, probe: PairBatch) -> str | None:
    """Return why `lora` would be wrong for this policy, or None where it was found right.

    Names prove nothing: an adapter may use its layer's weight without calling the layer. So the
    probe's Jᵀw is compared with an ordinary backward pass, away from the start, where an adapter's
    zeros would hide half of the gradient.
    """
    outside = untapped(policy)
    if outside:
        return f"{len(outside)} trained tensors are no linear layer's ({outside[0]}, ...)"
    with moved(policy, nudge(policy), 1.0):
        weights = torch.linspace(-1, 2, len(probe), device=probe.input_ids.device)
        try:
            found = _product(per_adapter(policy, probe, "response"), weights)
        except NotTappedError as reason:
            return str(reason)
        truth = _product(GraphPullback(policy, probe, "response"), weights)
    error = float((found - truth).norm() / truth.norm().clamp_min(1e-30))
    low = any(p.dtype in (torch.bfloat16, torch.float16) for p in policy.parameters())
    if error <= (LARGEST_ERROR_16_BIT if low or torch.is_autocast_enabled() else LARGEST_ERROR):
        return None
    return f"its trained layers do more than multiply (a trial was off by {error:.0%})"


def _product(pullback: Pullback, weights: Tensor) -> Tensor:
    product = pullback.vjp(weights.to(pullback.measured.margin))
    return torch.cat([g.flatten().double() for g in product])
