"""J = ∂h/∂θ, the Jacobian of a batch's margins, as a linear operator.

The loss depends on θ only through the margins, so all that the method needs of the language model
is J's products: `vjp(w)` = Σ_i w_i ∇h_i and `jvp(d)` = (⟨∇h_i, d⟩)_i. There is one class for each
way to make them; all agree (one test contract).

Shapes: B pairs. A *gradient* is a tuple with one tensor for each trainable parameter of the policy,
in the order of `policy.parameters()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from softpref.algorithm.likelihood import Measured, PairBatch, PplScope, measure

Gradient = tuple[Tensor, ...]
Engine = Literal["auto", "per_pair", "per_pair_recompute", "double_backward"]

KEEP_BUDGET_BYTES = 4 * 2**30


def trainable(policy: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that a step may move."""
    return [p for p in policy.parameters() if p.requires_grad]


class MarginJacobian(Protocol):
    """J of one micro-batch at the θ it was made at.

    Attributes:
        measured: what the forward pass said, without its graph.
    """

    measured: Measured

    def vjp(self, weights: Tensor) -> Gradient:
        """Return Jᵀw = Σ_i w_i ∇h_i for weights (B,)."""
        ...

    def jvp(self, direction: Gradient) -> Tensor:
        """Return J d = (⟨∇h_i, d⟩)_i, shape (B,)."""
        ...


MakeJacobian = Callable[[nn.Module, PairBatch, PplScope], MarginJacobian]


class GraphJacobian:
    """Keeps the forward pass's graph: `vjp` is an ordinary backward, `jvp` two.

    Jᵀw is linear in w, so its derivative with respect to w is J: the forward product comes from
    differentiating the backward one. `vjp` works with every attention kernel; `jvp` needs one that
    can be differentiated twice.
    """

    def __init__(self, policy: nn.Module, batch: PairBatch, ppl_scope: PplScope) -> None:
        with_graph = measure(policy, batch, ppl_scope)
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


def double_backward(policy: nn.Module, batch: PairBatch, ppl_scope: PplScope) -> GraphJacobian:
    """Make J as the equations stand, twice differentiable: what the others are held against."""
    with sdpa_kernel(SDPBackend.MATH):
        return GraphJacobian(policy, batch, ppl_scope)


class PairJacobian:
    """Keeps every pair's own gradient ∇h_i, from one ordinary backward a pair.

    Exact with any attention kernel, mixed precision and gradient checkpointing, since nothing is
    differentiated twice. Holds B gradients.
    """

    def __init__(self, policy: nn.Module, batch: PairBatch, ppl_scope: PplScope) -> None:
        measured, gradients = [], []
        for pair in batch.single_pairs():
            with_graph = measure(policy, pair, ppl_scope)
            gradients.append(
                torch.autograd.grad(with_graph.margin, trainable(policy), materialize_grads=True)
            )
            measured.append(with_graph.detach())
        self.measured = Measured.concatenate(measured)
        self._gradients = [
            torch.stack(of_parameter) for of_parameter in zip(*gradients, strict=True)
        ]

    def vjp(self, weights: Tensor) -> Gradient:
        return tuple(torch.tensordot(weights.to(g), g, dims=1) for g in self._gradients)

    def jvp(self, direction: Gradient) -> Tensor:
        products = [
            (g * d).flatten(1).sum(1) for g, d in zip(self._gradients, direction, strict=True)
        ]
        return torch.stack(products).sum(0)


class RecomputedPairJacobian:
    """Keeps nothing but the batch and goes through the policy again for every product.

    For policies whose B gradients do not fit: three more passes, no more memory than DPO. θ must be
    back where it was when a product is asked for.
    """

    def __init__(self, policy: nn.Module, batch: PairBatch, ppl_scope: PplScope) -> None:
        self._policy, self._batch, self._ppl_scope = policy, batch, ppl_scope
        with torch.no_grad():
            self.measured = measure(policy, batch, ppl_scope)

    def vjp(self, weights: Tensor) -> Gradient:
        return GraphJacobian(self._policy, self._batch, self._ppl_scope).vjp(weights)

    def jvp(self, direction: Gradient) -> Tensor:
        return torch.cat(
            [
                PairJacobian(self._policy, pair, self._ppl_scope).jvp(direction)
                for pair in self._batch.single_pairs()
            ]
        )


def choose_engine(engine: Engine, policy: nn.Module, pairs: int) -> tuple[MakeJacobian, str]:
    """Return the way to make J for a step over `pairs` pairs, and in words what was chosen and why.

    `auto` keeps every pair's gradient where they fit into 4 GiB and recomputes them where not.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {get_args(Engine)}, not {engine!r}")
    needed = pairs * sum(p.numel() * p.element_size() for p in trainable(policy))
    if engine == "double_backward":
        return double_backward, "double_backward: as the equations stand, three times DPO's memory"
    if engine == "per_pair" or (engine == "auto" and needed <= KEEP_BUDGET_BYTES):
        size = f"{needed / 2**20:,.0f} MiB"
        return PairJacobian, f"per_pair: the gradients of {pairs} pairs are kept ({size})"
    return (
        RecomputedPairJacobian,
        f"per_pair_recompute: the gradients of {pairs} pairs would take {needed / 2**30:,.1f} GiB, "
        "so each is computed again where it is needed",
    )
