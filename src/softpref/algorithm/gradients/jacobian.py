"""J = ∂h/∂θ, the Jacobian of a batch's margins, as a linear operator.

The loss depends on θ only through the margins, so all that the method needs of the language model
is J's products: `vjp(w)` = Σ_i w_i ∇h_i and `jvp(d)` = (⟨∇h_i, d⟩)_i. There is one small class for
each way to make them; those that make both are held to one test contract.

Shapes: B pairs. A *gradient* is a tuple with one tensor for each trainable parameter of the policy,
in the order of `policy.parameters()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from softpref.algorithm.gradients.forms import (
    Direction,
    EmbeddingRows,
    Form,
    GradientForm,
    HeadLogps,
    Outer,
    Whole,
    dense,
    plus,
)
from softpref.algorithm.gradients.shards import pulled_back, whole
from softpref.algorithm.gradients.taps import Taps, numbers_by_token
from softpref.algorithm.likelihood import Measured, PplScope, measure
from softpref.algorithm.policy import Gradient, trainable
from softpref.algorithm.rows import PairBatch


class Pullback(Protocol):
    """Jᵀ of one micro-batch at the θ it was made at: all that a step without teaching needs.

    Attributes:
        pairs: B.
    """

    @property
    def pairs(self) -> int: ...

    def measure(self) -> Measured:
        """Return what the forward pass says of the pairs, without its graph; it may be run now."""
        ...

    def vjp(self, weights: Tensor) -> Direction:
        """Return Jᵀw = Σ_i w_i ∇h_i for weights (B,)."""
        ...


class MarginJacobian(Pullback, Protocol):
    """J of one micro-batch, both ways."""

    def vjp(self, weights: Tensor) -> Gradient: ...

    def jvp(self, direction: Direction) -> Tensor:
        """Return J d = (⟨∇h_i, d⟩)_i, shape (B,)."""
        ...


MakePullback = Callable[[nn.Module, PairBatch, PplScope], Pullback]
MakeJacobian = Callable[[nn.Module, PairBatch, PplScope], MarginJacobian]
Unseen = Set[nn.Parameter]
"""Trained parameters that taps do not see, or see wrongly."""
ALL_SEEN: Unseen = frozenset()
Held = tuple[Sequence[nn.Parameter], Form]
PACK = 2**24
"""Numbers that are put side by side at once: 64 MiB in float32."""


class _HeldGraph:
    """A forward pass whose graph is held: h of B pairs, and what else was measured, without it."""

    def __init__(self, with_graph: Measured) -> None:
        self._margin, self._measured = with_graph.margin, with_graph.detach()
        self.pairs = len(with_graph.margin)

    def measure(self) -> Measured:
        return self._measured


class GraphPullback(_HeldGraph):
    """Keeps the forward pass's graph for one `vjp`, an ordinary backward pass that frees it."""

    def __init__(self, policy: nn.Module, batch: PairBatch, ppl_scope: PplScope) -> None:
        super().__init__(measure(policy, batch, ppl_scope))
        self._parameters = trainable(policy)

    def vjp(self, weights: Tensor) -> Gradient:
        return pulled_back(self._margin, self._parameters, weights)


class FactoredPullback(_HeldGraph):
    """An ordinary backward pass, but a gradient that is fewer numbers as factors stays factors.

    Where a layer (out, in) sees T tokens with T · (out + in) < out · in, its gradient is left as
    Σ_t w_t δ_t a_tᵀ: it takes less room than the matrix, and what is multiplied by it costs less by
    as much (Gram form). An embedding's is left as the rows it touches.
    """

    def __init__(
        self, policy: nn.Module, batch: PairBatch, ppl_scope: PplScope, untapped: Unseen = ALL_SEEN
    ) -> None:
        reads_head = batch.head_positions == "scored"
        head = cast(Any, policy).get_output_embeddings() if reads_head else None
        tokens = {head.weight: len(batch.responses.target)} if head else {}
        factored = {
            p
            for p, numbers in numbers_by_token(policy).items()
            if tokens.get(p, batch.input_ids.numel()) * numbers < p.numel()
        } - untapped
        self._parameters = trainable(policy)
        self._whole = [p for p in self._parameters if p not in factored]
        self._taps = Taps(policy, batch, set(self._whole))
        super().__init__(self._taps.measure(ppl_scope))

    def vjp(self, weights: Tensor) -> Direction:
        found: dict[nn.Parameter, GradientForm] = {}

        def take(parameter: nn.Parameter, form: Form) -> None:
            # `numbers_by_token` names weights of these forms alone.
            assert isinstance(form, (Outer, EmbeddingRows, HeadLogps))
            factors = form.factors()
            found[parameter] = plus(found[parameter], factors) if parameter in found else factors

        whole = self._taps.backward(self._margin, weights, take, self._whole)
        found |= zip(self._whole, whole, strict=True)
        return tuple(found[p] if p in found else torch.zeros_like(p) for p in self._parameters)


class DoubleBackwardJacobian(_HeldGraph):
    """Follows the equations as they stand: what the others are held against.

    Jᵀw is linear in w, so its derivative with respect to w is J: the forward product comes from
    differentiating the backward one. That needs attention and log-probabilities that can be
    differentiated twice, and keeps the graph: three times DPO's time and memory.
    """

    def __init__(self, policy: nn.Module, batch: PairBatch, ppl_scope: PplScope) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            super().__init__(measure(policy, replace(batch, head_positions="all"), ppl_scope))
        self._parameters = trainable(policy)

    def vjp(self, weights: Tensor) -> Gradient:
        return torch.autograd.grad(
            self._margin, self._parameters, weights, retain_graph=True, materialize_grads=True
        )

    def jvp(self, direction: Direction) -> Tensor:
        weights = torch.zeros_like(self._margin, requires_grad=True)
        backward = torch.autograd.grad(
            self._margin, self._parameters, weights, create_graph=True, materialize_grads=True
        )
        reached = [
            (b, dense(d)) for b, d in zip(backward, direction, strict=True) if b.requires_grad
        ]
        (product,) = torch.autograd.grad([b for b, _ in reached], weights, [d for _, d in reached])
        return product


class KeptJacobian:
    """Holds every pair's own gradient ∇h_i, of each tensor in the form of the fewest numbers.

    Args:
        measured: what the forward pass said of the B pairs, without graph.
        forms: forms of which the gradient is the sum, each with the parameter it is of; one of
            several parameters holds their flattened gradients side by side.
        parameters: all trainable ones.
    """

    def __init__(
        self, measured: Measured, forms: Sequence[Held], parameters: Sequence[nn.Parameter]
    ) -> None:
        self.pairs, self._measured = len(measured.margin), measured
        self._forms, self._parameters = forms, parameters

    def measure(self) -> Measured:
        return self._measured

    def vjp(self, weights: Tensor) -> Gradient:
        total: dict[nn.Parameter, Tensor] = {}
        for parameters, form in self._forms:
            parts = form.vjp(weights).flatten().split([p.numel() for p in parameters])
            for p, part in zip(parameters, parts, strict=True):
                gradient = part.view_as(p).to(p)
                total[p] = total[p] + gradient if p in total else gradient
        return tuple(total[p] if p in total else torch.zeros_like(p) for p in self._parameters)

    def jvp(self, direction: Direction) -> Tensor:
        along = dict(zip(self._parameters, direction, strict=True))
        total = torch.zeros_like(self._measured.margin)
        for parameters, form in self._forms:
            d = [along[p] for p in parameters]
            total += form.jvp(d[0] if len(d) == 1 else torch.cat([dense(e).flatten() for e in d]))
        return total


class _Pack:
    """Collects gradients that are held whole, and puts them side by side: one product for all.

    They are put so whenever there are `PACK` numbers of them, since that takes as much room again
    for a moment; what is larger stays by itself.
    """

    def __init__(self) -> None:
        self.held: list[Held] = []
        self._waiting: dict[torch.dtype, list[tuple[nn.Parameter, Whole]]] = {}

    def take(self, parameter: nn.Parameter, form: Form) -> None:
        """Add a form of a parameter's gradient."""
        form = form.smallest() if isinstance(form, Outer) else form
        if not isinstance(form, Whole) or form.spans is None or form.gradients.numel() >= PACK:
            self.held.append(([parameter], form))
            return
        waiting = self._waiting.setdefault(form.gradients.dtype, [])
        waiting.append((parameter, form))
        if sum(whole.gradients.numel() for _, whole in waiting) >= PACK:
            self._join(waiting)

    def close(self) -> list[Held]:
        """Return all that was taken."""
        for waiting in self._waiting.values():
            if waiting:
                self._join(waiting)
        return self.held

    def _join(self, waiting: list[tuple[nn.Parameter, Whole]]) -> None:
        side_by_side = torch.cat([whole.gradients.flatten(1) for _, whole in waiting], 1)
        self.held.append(([p for p, _ in waiting], Whole(side_by_side, waiting[0][1].spans)))
        waiting.clear()


def kept(
    policy: nn.Module, batch: PairBatch, ppl_scope: PplScope, untapped: Unseen = ALL_SEEN
) -> KeptJacobian:
    """Make J from one forward and one backward pass over all pairs together.

    Taps on the layers collect each pair's own gradients during the backward pass of Σ_i h_i (see
    taps.py). Nothing is run twice and no graph is kept. Exact with any attention kernel, mixed
    precision and gradient checkpointing. The gradients of `untapped` are made by an ordinary
    backward pass a pair, and held whole.

    Raises:
        NotTappedError: a layer does not see one vector a token, and is not in `untapped`.
    """
    parameters, pack = trainable(policy), _Pack()
    if len(untapped) < len(parameters):
        taps = Taps(policy, batch, untapped)
        with_graph = taps.measure(ppl_scope)
        measured, ones = with_graph.detach(), torch.ones_like(with_graph.margin)
        taps.backward(with_graph.margin, ones, pack.take)
        del with_graph
    if untapped:
        alone = list(gradients_by_pair(policy, batch, ppl_scope, untapped))
        measured = Measured.concatenate([measured for measured, _ in alone])
        for i, p in enumerate(p for p in parameters if p in untapped):
            pack.take(p, Whole(torch.stack([gradient[i] for _, gradient in alone])))
    return KeptJacobian(measured, pack.close(), parameters)


class GraphJacobian(_HeldGraph):
    """Keeps the forward pass's graph, and goes back through it for each product.

    For policies whose B gradients do not fit: taps multiply every ∇h_i by d as it passes by and
    keep none. One forward and three backward passes, in little more memory than DPO takes for the
    same micro-batch.
    """

    def __init__(
        self, policy: nn.Module, batch: PairBatch, ppl_scope: PplScope, untapped: Unseen = ALL_SEEN
    ) -> None:
        self._policy, self._batch, self._ppl_scope = policy, batch, ppl_scope
        self._untapped, self._taps = untapped, Taps(policy, batch, untapped)
        super().__init__(self._taps.measure(ppl_scope))

    def vjp(self, weights: Tensor) -> Gradient:
        parameters = trainable(self._policy)
        return self._taps.backward(self._margin, weights, None, parameters, keep_graph=True)

    def jvp(self, direction: Direction) -> Tensor:
        return self._multiply(direction, keep_graph=True)

    def last_jvp(self, direction: Direction) -> Tensor:
        """Return `jvp`, and free the graph."""
        return self._multiply(direction, keep_graph=False)

    def _multiply(self, direction: Direction, keep_graph: bool) -> Tensor:
        along = dict(zip(trainable(self._policy), direction, strict=True))
        total, ones = torch.zeros_like(self._margin), torch.ones_like(self._margin)

        def multiply(parameter: nn.Parameter, form: Form) -> None:
            held = along[parameter]
            total.add_(form.jvp(whole(held) if isinstance(held, Tensor) else held))

        if len(self._untapped) < len(along):
            self._taps.backward(self._margin, ones, multiply, keep_graph=keep_graph)
        if self._untapped:
            by_pair = gradients_by_pair(self._policy, self._batch, self._ppl_scope, self._untapped)
            d = [dense(along[p]) for p in along if p in self._untapped]
            total += torch.stack([_inner(gradient, d) for _, gradient in by_pair])
        return total


class RecomputedJacobian:
    """Goes through the policy for each product, and keeps nothing but what was measured.

    For steps of many micro-batches, whose graphs do not fit side by side: three ordinary forward
    and backward passes. The first `measure` keeps its graph for the `vjp` that follows, so call
    both for one micro-batch before the next. θ must be back where it was when a product is asked
    for.
    """

    def __init__(
        self, policy: nn.Module, batch: PairBatch, ppl_scope: PplScope, untapped: Unseen = ALL_SEEN
    ) -> None:
        self._again = policy, batch, ppl_scope
        self._untapped, self.pairs = untapped, len(batch)
        self._graph: GraphPullback | None = None
        self._measured: Measured | None = None

    def measure(self) -> Measured:
        if self._measured is None:
            self._graph = GraphPullback(*self._again)
            self._measured = self._graph.measure()
        return self._measured

    def vjp(self, weights: Tensor) -> Gradient:
        graph = self._graph or GraphPullback(*self._again)
        self._graph = None  # a backward pass frees it
        return graph.vjp(weights)

    def jvp(self, direction: Direction) -> Tensor:
        return GraphJacobian(*self._again, self._untapped).last_jvp(direction)


def tapped_gradients(
    policy: nn.Module,
    batch: PairBatch,
    ppl_scope: PplScope,
    weights: Tensor,
    take: Callable[[nn.Parameter, Tensor], None],
    untapped: Unseen = ALL_SEEN,
) -> Measured:
    """Hand over Σ_i w_i ∇h_i, tensor by tensor, as taps see it; hold none, and return `measure`.

    What several layers share is handed over in parts, of which its gradient is the sum. Each
    process has those of its own pairs, whole, whether the tensors lie in shards or not.

    Raises:
        NotTappedError: a layer does not see one vector a token, and is not in `untapped`.
    """
    taps = Taps(policy, batch, untapped)
    measured = taps.measure(ppl_scope)
    weights, ones = weights.to(measured.margin), torch.ones_like(measured.margin)
    taps.backward(measured.margin, weights, lambda p, form: take(p, form.vjp(ones)))
    return measured.detach()


def gradients_by_pair(
    policy: nn.Module, batch: PairBatch, ppl_scope: PplScope, parameters: Set[nn.Parameter]
) -> Iterator[tuple[Measured, Gradient]]:
    """Yield each pair's measurements and its ∇h_i, by an ordinary backward pass of its own.

    The gradients are of `parameters`, in the order of `policy.parameters()`.
    """
    wanted = [p for p in trainable(policy) if p in parameters]
    for pair in batch.single_pairs():
        alone = measure(policy, pair, ppl_scope)
        yield (
            alone.detach(),
            torch.autograd.grad(
                alone.margin, wanted, torch.ones_like(alone.margin), materialize_grads=True
            ),
        )


def _inner(a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
    return torch.stack([(x * y.to(x)).sum() for x, y in zip(a, b, strict=True)]).sum()
