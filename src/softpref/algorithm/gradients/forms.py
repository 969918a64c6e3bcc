"""The forms in which every pair's own gradient of one trained tensor W can be held.

A *form* holds ∇_W h_i for the B pairs of a micro-batch and answers two products: `vjp(w)` =
Σ_i w_i ∇_W h_i, in W's shape, and `jvp(d)` = (⟨∇_W h_i, d⟩)_i. A layer that multiplies by W adds
the outer product of two vectors to its pair's gradient for each token, so two thin matrices often
take less room than B gradients, and a direction d that comes from few clean tokens less than W.

Shapes: B pairs; T tokens, of pairs `pair` (T,); W is (m, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from softpref.algorithm.gradients.head import CHUNK_ENTRIES, by_head_bias, by_head_weight, residuals
from softpref.algorithm.likelihood import sums_by
from softpref.algorithm.rows import PairBatch


@dataclass(frozen=True)
class Factors:
    """Σ_s left_s right_sᵀ, a gradient (m, n) as left (S, m) and right (S, n)."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """Return the sum, (m, n)."""
        return self.left.T @ self.right

    def joined(self, other: Factors) -> Factors:
        """Return the sum of both, over the tokens of both."""
        left, right = torch.cat([self.left, other.left]), torch.cat([self.right, other.right])
        return Factors(left, right)

    def is_smaller_than_dense(self) -> bool:
        """Return whether this is fewer numbers than the sum itself."""
        m, n = self.left.shape[1], self.right.shape[1]
        return len(self.left) * (m + n) < m * n


@dataclass(frozen=True)
class FewRows:
    """An embedding's gradient (m, n) of which few rows are not 0: `values` (S, n) at `ids` (S,)."""

    ids: Tensor
    values: Tensor
    rows: int

    def dense(self) -> Tensor:
        """Return the gradient, (m, n)."""
        zeros = self.values.new_zeros(self.rows, self.values.shape[1])
        return zeros.index_add(0, self.ids, self.values)

    def joined(self, other: FewRows) -> FewRows:
        """Return the sum of both, over the tokens of both."""
        ids, values = torch.cat([self.ids, other.ids]), torch.cat([self.values, other.values])
        return FewRows(ids, values, self.rows)

    def is_smaller_than_dense(self) -> bool:
        """Return whether this is fewer numbers than the gradient itself."""
        return len(self.ids) < self.rows


GradientForm = Tensor | Factors | FewRows
"""One tensor's gradient, whole or in a form of fewer numbers."""
Direction = tuple[GradientForm, ...]
"""A gradient of which some tensors are not held whole."""


def plus(a: GradientForm, b: GradientForm) -> GradientForm:
    """Return a + b, in the form of both while that is fewer numbers."""
    if type(a) is type(b) and not isinstance(a, Tensor):
        both: Factors | FewRows = cast(Any, a).joined(b)
        if both.is_smaller_than_dense():
            return both
    return dense(a) + dense(b)


def dense(held: GradientForm) -> Tensor:
    """Return a gradient as one tensor."""
    return held if isinstance(held, Tensor) else held.dense()


def parts(held: GradientForm) -> tuple[Tensor, ...]:
    """Return the tensors that hold a gradient."""
    if isinstance(held, Tensor):
        return (held,)
    return (held.left, held.right) if isinstance(held, Factors) else (held.values,)


class Form(Protocol):
    """∇_W h_i of B pairs, in whatever form."""

    def vjp(self, weights: Tensor) -> Tensor:
        """Return Σ_i w_i ∇_W h_i, in W's shape, for weights (B,)."""
        ...

    def jvp(self, direction: GradientForm) -> Tensor:
        """Return (⟨∇_W h_i, d⟩)_i, shape (B,)."""
        ...


class Spans:
    """Which token of the flattened (R · N) is whose, and sums over each pair's own tokens.

    Such sums come by *place*: in the order in which the pairs lie in the rows, which is not the
    order of the pairs.

    Attributes:
        pair: (R · N,) each token's pair; padding, where δ is 0, is counted as pair 0's.
        pairs: B.
    """

    def __init__(self, batch: PairBatch) -> None:
        self.pair, self.pairs = batch.pair.flatten().clamp_min(0), len(batch)
        device = batch.input_ids.device
        in_place = sorted(range(len(batch)), key=batch.spans.__getitem__)
        self._spans = [batch.spans[i] for i in in_place]
        # A group reaches over the padding before its pair, where δ is 0.
        stops = [stop for _, stop in self._spans]
        self._offsets = torch.tensor(stops, dtype=torch.int32, device=device)
        self._in_place = torch.tensor(in_place, device=device)
        self._place_of_pair = self._in_place.argsort()
        self._is_in: dict[torch.dtype, Tensor] = {}

    def by_place(self, of_pairs: Tensor) -> Tensor:
        """Return what is by pair, (B, ...), by place."""
        return of_pairs[self._in_place]

    def by_pair(self, of_places: Tensor) -> Tensor:
        """Return what is by place, (B, ...), by pair."""
        return of_places[self._place_of_pair]

    def products(self, delta: Tensor, a: Tensor) -> Tensor:
        """Return Σ_t δ_t a_tᵀ by place, (B, out, in), for δ (R · N, out) and a (R · N, in)."""
        entry = delta.element_size()
        aligned = all(entry * width % 16 == 0 for width in (delta.shape[1], a.shape[1]))
        if aligned and delta.dtype != torch.float64:  # what grouped_mm can do
            return grouped_mm(delta.contiguous().T, a.contiguous(), offs=self._offsets)
        return torch.stack([delta[start:stop].T @ a[start:stop] for start, stop in self._spans])

    def sums(self, delta: Tensor) -> Tensor:
        """Return Σ_t δ_t by place, (B, width), for δ (R · N, width), as one matrix product."""
        dtype = delta.dtype
        if dtype not in self._is_in:
            self._is_in[dtype] = (self.pair == self._in_place[:, None]).to(dtype)
        return self._is_in[dtype] @ delta


class Whole:
    """The gradients themselves, (B, *W's shape): by place where `spans` are given, else by pair."""

    def __init__(self, gradients: Tensor, spans: Spans | None = None) -> None:
        self.gradients, self.spans = gradients, spans

    def vjp(self, weights: Tensor) -> Tensor:
        weights = weights if self.spans is None else self.spans.by_place(weights)
        return torch.tensordot(weights, self.gradients.to(weights), dims=1)

    def jvp(self, direction: GradientForm) -> Tensor:
        d = dense(direction)
        products = self.gradients.flatten(1).to(d) @ d.flatten()
        return products if self.spans is None else self.spans.by_pair(products)


class Outer:
    """∇_W h_i = Σ_t left_t right_tᵀ over the pair's tokens, left (T, m) and right (T, n)."""

    def __init__(self, left: Tensor, right: Tensor, spans: Spans) -> None:
        self._left, self._right, self._spans = left, right, spans

    def smallest(self) -> Form:
        """Return this, or the gradients themselves where these are fewer numbers."""
        left, right, spans = self._left, self._right, self._spans
        if left.numel() + right.numel() < spans.pairs * left.shape[1] * right.shape[1]:
            return self
        return Whole(spans.products(left, right), spans)

    def factors(self) -> Factors:
        """Return Σ_i ∇_W h_i."""
        return Factors(self._left, self._right)

    def vjp(self, weights: Tensor) -> Tensor:
        left, right, of_token = self._left, self._right, weights[self._spans.pair, None]
        if left.shape[1] <= right.shape[1]:
            return (left * of_token.to(left)).T @ right
        return left.T @ (right * of_token.to(right))

    def jvp(self, direction: GradientForm) -> Tensor:
        """By two inner products a pair of tokens where d is factors, through d where it is not."""
        left, right = self._left, self._right
        if not isinstance(direction, Factors):
            d = dense(direction).to(left)
            narrow = left.shape[1] <= right.shape[1]
            by_token = (
                _row_products(left, right @ d.T) if narrow else _row_products(left @ d, right)
            )
        else:
            step = max(1, CHUNK_ENTRIES // len(direction.left))
            other, another = direction.left.T.to(left), direction.right.T.to(right)
            by_token = torch.cat(
                [
                    _row_products(rows @ other, columns @ another)
                    for rows, columns in zip(left.split(step), right.split(step), strict=True)
                ]
            )
        return sums_by(by_token, self._spans.pair, self._spans.pairs)


class EmbeddingRows:
    """∇_W h_i adds δ_t to row ids_t of W for each token: an embedding's. ids (T,), δ (T, n)."""

    def __init__(self, ids: Tensor, delta: Tensor, rows: int, spans: Spans) -> None:
        self._ids, self._delta, self._rows, self._spans = ids, delta, rows, spans

    def factors(self) -> FewRows:
        """Return Σ_i ∇_W h_i."""
        return FewRows(self._ids, self._delta, self._rows)

    def vjp(self, weights: Tensor) -> Tensor:
        delta = self._delta * weights[self._spans.pair, None].to(self._delta)
        return FewRows(self._ids, delta, self._rows).dense()

    def jvp(self, direction: GradientForm) -> Tensor:
        by_token = _row_products(self._delta, dense(direction)[self._ids])
        return sums_by(by_token, self._spans.pair, self._spans.pairs)


@dataclass(frozen=True, eq=False)
class HeadLogps:
    """∇_W h_i = Σ_t c_t (e_{y_t} − p_t) h_tᵀ: an output head's that gives log p_t[y_t].

    The probabilities p_t are made again for each product, a chunk of tokens at a time
    (`head.residuals`).

    Attributes:
        hidden: (T, n) what the head reads.
        target: (T,) y_t.
        by_logp: (T,) c_t = ∂h_i / ∂ log p_t[y_t].
        head: the head; its weight is W.
        pair: (T,) each token's pair.
        pairs: B.
        dtype: what the head multiplies in.
    """

    hidden: Tensor
    target: Tensor
    by_logp: Tensor
    head: nn.Linear
    pair: Tensor
    pairs: int
    dtype: torch.dtype

    def vjp(self, weights: Tensor) -> Tensor:
        scale = self.by_logp * weights[self.pair]
        return by_head_weight(self.hidden, self.head, self.target, scale, self.dtype)

    def jvp(self, direction: GradientForm) -> Tensor:
        hidden = self.hidden.to(self.dtype)
        if isinstance(direction, Factors):
            left = direction.left.to(hidden)
            right = hidden @ direction.right.T.to(hidden)
        else:
            left, right = dense(direction).T.to(hidden), hidden
        by_token = -torch.cat(
            [
                _row_products(residual @ left.T, right[rows])
                for rows, residual in residuals(hidden, self.head, self.target, self.dtype)
            ]
        )
        return sums_by(by_token * self.by_logp, self.pair, self.pairs)

    def factors(self) -> Factors:
        """Return Σ_i ∇_W h_i."""
        hidden, dtype = self.hidden.to(self.dtype), self.dtype
        found = [residual for _, residual in residuals(hidden, self.head, self.target, dtype)]
        return Factors(torch.cat(found), hidden * -self.by_logp[:, None].to(hidden))

    def bias(self) -> Whole:
        """Return the same of the head's bias, (B, V)."""
        pairs = torch.arange(self.pairs, device=self.pair.device)
        by_pair = self.by_logp[:, None] * (self.pair[:, None] == pairs)
        return Whole(by_head_bias(self.hidden, self.head, self.target, by_pair, self.dtype))


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ_k a_tk b_tk, (T,), in float32 or wider."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return torch.linalg.vecdot(a.to(wide), b.to(wide))
