"""J = ∂h/∂θ, the Jacobian of a batch's margins, as a linear operator.

The loss depends on θ only through the margins, so all that the method needs of the language model
is J's products: `vjp(w)` = Σ_i w_i ∇h_i and `jvp(d)` = (⟨∇h_i, d⟩)_i. There is one class for each
way to make them; all agree (one test contract).

Shapes: B pairs. A *gradient* is a tuple with one tensor for each trainable parameter of the policy,
in the order of `policy.parameters()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from softpref.algorithm.head import all_logits
from softpref.algorithm.likelihood import Measured, PplScope, measure
from softpref.algorithm.policy import Gradient, trainable
from softpref.algorithm.rows import PairBatch
from softpref.algorithm.taps import tapped


class Pullback(Protocol):
    """Jᵀ of one micro-batch at the θ it was made at: all that a step without teaching needs.

    Attributes:
        measured: what the forward pass said, without its graph.
    """

    @property
    def measured(self) -> Measured: ...

    def vjp(self, weights: Tensor) -> Gradient:
        """Return Jᵀw = Σ_i w_i ∇h_i for weights (B,)."""
        ...


class MarginJacobian(Pullback, Protocol):
    """J of one micro-batch, both ways."""

    def jvp(self, direction: Gradient) -> Tensor:
        """Return J d = (⟨∇h_i, d⟩)_i, shape (B,)."""
        ...


MakeJacobian = Callable[[nn.Module, PairBatch, PplScope], MarginJacobian]


class GraphPullback:
    """Keeps the forward pass's graph for one `vjp`, an ordinary backward pass that frees it."""

    def __init__(self, policy: nn.Module, batch: PairBatch, ppl_scope: PplScope) -> None:
        with_graph = measure(policy, batch, ppl_scope)
        self._margin = with_graph.margin
        self._parameters = trainable(policy)
        self.measured = with_graph.detach()

    def vjp(self, weights: Tensor) -> Gradient:
        return torch.autograd.grad(self._margin, self._parameters, weights, materialize_grads=True)


class DoubleBackwardJacobian:
    """Follows the equations as they stand: what the others are held against.

    Jᵀw is linear in w, so its derivative with respect to w is J: the forward product comes from
    differentiating the backward one. That needs attention and log-probabilities that can be
    differentiated twice, and keeps the graph: three times DPO's time and memory.
    """

    def __init__(self, policy: nn.Module, batch: PairBatch, ppl_scope: PplScope) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            with_graph = measure(policy, replace(batch, read=all_logits), ppl_scope)
        self._margin = with_graph.margin
        self._parameters = trainable(policy)
        self.measured = with_graph.detach()

    def vjp(self, weights: Tensor) -> Gradient:
        return torch.autograd.grad(
            self._margin, self._parameters, weights, retain_graph=True, materialize_grads=True
        )

    def jvp(self, direction: Gradient) -> Tensor:
        weights = torch.zeros_like(self._margin, requires_grad=True)
        backward = torch.autograd.grad(
            self._margin, self._parameters, weights, create_graph=True, materialize_grads=True
        )
        reached = [(b, d) for b, d in zip(backward, direction, strict=True) if b.requires_grad]
        (product,) = torch.autograd.grad([b for b, _ in reached], weights, [d for _, d in reached])
        return product


class KeptJacobian:
    """Holds every pair's own gradient ∇h_i; products are small sums.

    Args:
        measured: what the forward passes said of the B pairs, without graph.
        gradients: for each trainable parameter (B, *its shape).
    """

    def __init__(self, measured: Measured, gradients: list[Tensor]) -> None:
        self.measured, self._gradients = measured, gradients

    def vjp(self, weights: Tensor) -> Gradient:
        return tuple(torch.tensordot(weights, g.to(weights), dims=1) for g in self._gradients)

    def jvp(self, direction: Gradient) -> Tensor:
        pairs = zip(self._gradients, direction, strict=True)
        return torch.stack([g.flatten(1).to(d) @ d.flatten() for g, d in pairs]).sum(0)


def per_adapter(policy: nn.Module, batch: PairBatch, ppl_scope: PplScope) -> KeptJacobian:
    """Make J from one forward and one backward pass over all pairs together.

    Where only the weights of linear layers train, as with LoRA, a pair's gradient of a layer is
    Σ_t δ_t a_tᵀ over the pair's own tokens t, with the layer's input a and its output's gradient δ:
    taps on the layers collect it during the backward pass of Σ_i h_i. Nothing is run twice and no
    graph is kept. Exact with any attention kernel, mixed precision and gradient checkpointing.

    Raises:
        NotTappedError: a trained layer does not see one vector a token.
    """
    with tapped(policy, batch) as taps:
        with_graph = measure(policy, batch, ppl_scope)
        taps.collect(with_graph.margin.sum())
    return KeptJacobian(with_graph.detach(), taps.gradients)


def per_pair(policy: nn.Module, batch: PairBatch, ppl_scope: PplScope) -> KeptJacobian:
    """Make J from one ordinary forward and backward pass a pair: any policy, one pair at a time."""
    measured, gradients = [], []
    for pair in batch.single_pairs():
        with_graph = measure(policy, pair, ppl_scope)
        gradients.append(
            torch.autograd.grad(with_graph.margin, trainable(policy), materialize_grads=True)
        )
        measured.append(with_graph.detach())
    return KeptJacobian(
        Measured.concatenate(measured),
        [torch.stack(of_parameter) for of_parameter in zip(*gradients, strict=True)],
    )


class RecomputedJacobian:
    """Keeps nothing between its products but the batch, and goes through the policy for each.

    For policies whose B gradients do not fit: the three products of a step are three ordinary
    forward and backward passes instead of one, in no more memory than DPO. θ must be back where it
    was when a product is asked for.

    Args:
        policy: the policy.
        batch: the pairs.
        ppl_scope: which tokens count in PPLDiff.
        make_kept: how `jvp` makes the gradients of one part of the batch, to drop them at once.
        parts: the parts.
    """

    def __init__(
        self,
        policy: nn.Module,
        batch: PairBatch,
        ppl_scope: PplScope,
        make_kept: MakeJacobian,
        parts: Callable[[PairBatch], Iterable[PairBatch]],
    ) -> None:
        self._policy, self._batch, self._ppl_scope = policy, batch, ppl_scope
        self._make_kept, self._parts = make_kept, parts
        self._graph: GraphPullback | None = None
        self._measured: Measured | None = None

    @property
    def measured(self) -> Measured:
        if self._measured is None:
            self._graph = GraphPullback(self._policy, self._batch, self._ppl_scope)
            self._measured = self._graph.measured
        return self._measured

    def vjp(self, weights: Tensor) -> Gradient:
        graph = self._graph or GraphPullback(self._policy, self._batch, self._ppl_scope)
        self._graph = None  # a backward pass frees it
        return graph.vjp(weights)

    def jvp(self, direction: Gradient) -> Tensor:
        kept = (
            self._make_kept(self._policy, part, self._ppl_scope)
            for part in self._parts(self._batch)
        )
        return torch.cat([jacobian.jvp(direction) for jacobian in kept])


def per_adapter_recompute(
    policy: nn.Module, batch: PairBatch, ppl_scope: PplScope
) -> RecomputedJacobian:
    """Make J by taps, holding the gradients of one micro-batch at a time."""
    return RecomputedJacobian(policy, batch, ppl_scope, per_adapter, lambda batch: [batch])


def per_pair_recompute(
    policy: nn.Module, batch: PairBatch, ppl_scope: PplScope
) -> RecomputedJacobian:
    """Make J pair by pair, holding one gradient at a time."""
    return RecomputedJacobian(policy, batch, ppl_scope, per_pair, PairBatch.single_pairs)
