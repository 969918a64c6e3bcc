"""Which way to make J suits a policy: by what trains, by trial, and by memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from softpref.algorithm.gradients.jacobian import (
    ALL_SEEN,
    DoubleBackwardJacobian,
    FactoredPullback,
    GraphJacobian,
    GraphPullback,
    MakeJacobian,
    MakePullback,
    RecomputedJacobian,
    Unseen,
    kept,
    tapped_gradients,
)
from softpref.algorithm.gradients.shards import laid_out_as, trains_shards, whole
from softpref.algorithm.gradients.taps import NotTappedError, numbers_by_token, untapped
from softpref.algorithm.likelihood import measure
from softpref.algorithm.policy import Gradient, nudge, shifted, trainable
from softpref.algorithm.rows import PairBatch, skips_masked

Engine = Literal["auto", "kept", "graph", "recompute", "double_backward"]
KEEP_BUDGET_GIB = 4.0
_LARGEST_ERROR = 1e-3
_LARGEST_ERROR_16_BIT = 5e-2


class EngineError(ValueError):
    """The engine that was asked for does not exist."""


@dataclass(frozen=True)
class StepSize:
    """How much one step holds.

    Attributes:
        pairs: pairs a step.
        tokens: tokens of these, prompts counted as often as they are run.
        micro_batches: how many micro-batches they come in.
    """

    pairs: int
    tokens: int
    micro_batches: int

    @staticmethod
    def of(batches: list[PairBatch]) -> StepSize:
        """Return the size of a step of these micro-batches."""
        tokens = sum(batch.input_ids.numel() for batch in batches)
        return StepSize(sum(map(len, batches)), tokens, len(batches))


@dataclass(frozen=True)
class EngineChoice:
    """An engine for one policy.

    Attributes:
        make_jacobian: makes J of a noisy micro-batch.
        make_pullback: makes Jᵀ of a clean micro-batch at θ'.
        why: what was chosen and why, for the log.
        by_pair: names of trained tensors that taps do not see, and that go pair by pair.
    """

    make_jacobian: MakeJacobian
    make_pullback: MakePullback
    why: str
    by_pair: tuple[str, ...] = ()


def choose_engine(
    engine: Engine,
    policy: nn.Module,
    probe: PairBatch,
    step: StepSize,
    keep_budget_gib: float = KEEP_BUDGET_GIB,
) -> EngineChoice:
    """Return the way to make J for a policy; all are exact.

    `auto` keeps the pairs' gradients where they fit the memory budget, else the graphs of all
    micro-batches where these do, else nothing. What taps see of the gradients is found by trial,
    and the rest goes pair by pair.

    Args:
        engine: what was asked for.
        policy: the policy.
        probe: a few pairs to try on.
        step: how much one step holds.
        keep_budget_gib: most memory for the pairs' own gradients, or for graphs beside the first,
            GiB.

    Raises:
        EngineError: `engine` names none.
    """
    if engine not in get_args(Engine):
        raise EngineError(f"engine must be one of {get_args(Engine)}, not {engine!r}")
    if engine == "double_backward":
        return EngineChoice(DoubleBackwardJacobian, GraphPullback, f"{engine}, as asked for")
    unseen = find_untapped(policy, probe)
    name, why = engine, "as asked for"
    if engine == "auto":
        name, why = _by_memory(policy, probe, step, keep_budget_gib, unseen)
    names = tuple(name for name, p in policy.named_parameters() if p in unseen)
    if names:
        why += f"; {len(names)} trained tensors that taps do not see go pair by pair ({names[0]}"
        why += ", ...)" if names[1:] else ")"
    makers: dict[str, MakeJacobian] = {
        "kept": partial(kept, untapped=unseen),
        "graph": partial(GraphJacobian, untapped=unseen),
        "recompute": partial(RecomputedJacobian, untapped=unseen),
    }
    make_pullback: MakePullback = partial(FactoredPullback, untapped=unseen)
    if trains_shards(policy):
        make_pullback = GraphPullback  # factors are no shards
    return EngineChoice(makers[name], make_pullback, f"{name}, {why}", names)


def _by_memory(
    policy: nn.Module, probe: PairBatch, step: StepSize, budget_gib: float, unseen: Unseen
) -> tuple[Literal["kept", "graph", "recompute"], str]:
    needed = kept_gib(policy, probe, step, unseen)
    if trains_shards(policy):
        why = "since each pair's gradient would be whole on its process, and weights are in shards"
    elif needed <= budget_gib:
        size = f"{1024 * needed:,.0f} MiB"
        return "kept", f"one pass for all pairs; the gradients of {step.pairs} pairs take {size}"
    else:
        why = (
            f"since the gradients of {step.pairs} pairs would take {needed:,.2f} GiB of the "
            f"{budget_gib:g} allowed"
        )
    three_times = "each micro-batch is run three times"
    if skips_masked(policy):
        return "recompute", f"{why}, and FlexAttention keeps no graph: {three_times}"
    beside_the_first = graph_gib(policy, probe, step) * (1 - 1 / step.micro_batches)
    if beside_the_first <= budget_gib:
        return "graph", f"{why}: the forward pass is kept and gone back through three times"
    graphs = f"the graphs of {step.micro_batches - 1} micro-batches beside the first"
    return "recompute", f"{why}, and {graphs} {beside_the_first:,.2f} GiB: {three_times}"


def kept_gib(
    policy: nn.Module, probe: PairBatch, step: StepSize, unseen: Unseen = ALL_SEEN
) -> float:
    """Return the memory that `kept` holds between its products, by count, GiB in float32."""
    by_token = numbers_by_token(policy)
    if probe.head_positions == "scored":  # it holds what the head reads
        head = cast(Any, policy).get_output_embeddings().weight
        by_token |= {head: head.shape[1] * (1 if head in by_token else 2)}

    def numbers(p: nn.Parameter) -> int:
        whole = step.pairs * p.numel()
        if p in unseen or p not in by_token:
            return whole
        return min(whole, step.tokens * by_token[p])

    return sum(map(numbers, trainable(policy))) * 4 / 2**30


def graph_gib(policy: nn.Module, probe: PairBatch, step: StepSize) -> float:
    """Return the memory of the graphs of a whole step, as the probe's, by tokens, GiB.

    Weights are not counted, nor those that were gathered from shards and have been freed again.
    """
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        measured = measure(policy, probe, "response")  # holds the graph, so that no place is reused
    whole = (p for p in policy.parameters() if not isinstance(p, DTensor))
    weights = {p.untyped_storage().data_ptr() for p in whole}
    total = sum(storage.nbytes() for at, storage in saved.items() if at not in weights)
    del measured
    return total * step.tokens / probe.input_ids.numel() / 2**30


def find_untapped(policy: nn.Module, probe: PairBatch) -> frozenset[nn.Parameter]:
    """Return the trainable parameters whose gradient taps do not see, or see wrongly.

    Names prove nothing: an adapter may use its layer's weight without calling the layer. So each
    tensor's Jᵀw on the probe is compared with an ordinary backward pass, away from the start, where
    an adapter's zeros would hide half of the gradient.
    """
    unseen = untapped(policy)
    parameters = trainable(policy)
    with shifted(policy, nudge(policy), 1.0):
        weights = torch.linspace(-0.9, 2.1, len(probe), device=probe.input_ids.device)
        pullback = GraphPullback(policy, replace(probe, head_positions="all"), "response")
        weights = weights.to(pullback.measure().margin)
        truth = pullback.vjp(weights)
        products = _shards_by_taps if trains_shards(policy) else _kept
        try:
            found = products(policy, probe, weights, unseen)
        except NotTappedError as error:
            unseen |= error.parameters
            found = products(policy, probe, weights, unseen)
    low = any(p.dtype in (torch.bfloat16, torch.float16) for p in policy.parameters())
    low |= torch.is_autocast_enabled(probe.input_ids.device.type)
    tolerance = _LARGEST_ERROR_16_BIT if low else _LARGEST_ERROR
    norms = torch.stack([whole(t).float().norm() for t in truth])
    # A gradient that cancels, as that of a key's bias, is rounding: it is held against the whole.
    least = tolerance * norms.norm()
    errors = torch.stack([whole(f - t).float().norm() for f, t in zip(found, truth, strict=True)])
    right = errors <= tolerance * norms.clamp_min(least)
    return unseen | {
        p for p, is_right in zip(parameters, right.tolist(), strict=True) if not is_right
    }


def _kept(policy: nn.Module, probe: PairBatch, weights: Tensor, unseen: Unseen) -> Gradient:
    return kept(policy, probe, "response", unseen).vjp(weights)


def _shards_by_taps(
    policy: nn.Module, probe: PairBatch, weights: Tensor, unseen: Unseen
) -> Gradient:
    """Return Jᵀw as taps see it, in shards, over all processes, which have the same probe."""
    found = {p: torch.zeros_like(p) for p in trainable(policy)}

    def add(parameter: nn.Parameter, gradient: Tensor) -> None:
        shard = laid_out_as(parameter, gradient.to(parameter.dtype))
        found[parameter] += shard * distributed.get_world_size()

    tapped_gradients(policy, probe, "response", weights, add, unseen)
    return tuple(found.values())
