"""Taps on layers: per-pair gradients of their weights from one backward pass.

Shapes: B pairs; tokens t of the flattened (R · N); a layer's input a (…, in) and its output's
gradient δ (…, out).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from softpref.algorithm.gradients.forms import EmbeddingRows, Form, HeadLogps, Outer, Spans, Whole
from softpref.algorithm.gradients.head import linear_logps, multiplied_in
from softpref.algorithm.gradients.shards import pulled_back
from softpref.algorithm.likelihood import Measured, PplScope, measure
from softpref.algorithm.policy import Gradient
from softpref.algorithm.rows import PairBatch

Found = Iterator[tuple[nn.Parameter, Form]]
ReadOff = Callable[[Any, Tensor, Tensor, Spans], Found]
Take = Callable[[nn.Parameter, Form], None]


class NotTappedError(RuntimeError):
    """The gradients of some layers cannot be separated by pair.

    Attributes:
        parameters: these layers'.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__("a trained layer does not see one vector a token")
        self.parameters = frozenset(parameters)


class Taps:
    """The taps of one batch: on every layer of which a parameter trains that is not left out.

    They hang on the policy during `measure` and `backward` alone; a backward pass needs them too,
    for gradient checkpointing runs layers again in it.
    """

    def __init__(
        self, policy: nn.Module, batch: PairBatch, leave_out: Set[nn.Parameter] = frozenset()
    ) -> None:
        self._policy, self._spans, self._leave_out = policy, Spans(batch), leave_out
        self._layers = [
            (layer, read_off)
            for layer, read_off in tappable(policy)
            if not leave_out >= set(trained(layer))
        ]
        self._batch = batch
        self._anchor = torch.zeros((), device=batch.input_ids.device, requires_grad=True)
        self._take: Take | None = None
        self._missed: set[nn.Parameter] = set()
        # What is gathered stands in a layer for its shard while the layer is run.
        self._own = {
            layer: dict(layer.named_parameters(recurse=False)) for layer, _ in tappable(policy)
        }

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """Hold the hooks on the policy, which is as before afterwards."""
        hooks = [
            layer.register_forward_hook(partial(self._tap, read_off), with_kwargs=True)
            for layer, read_off in self._layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def measure(self, ppl_scope: PplScope) -> Measured:
        """Run the forward pass; see `likelihood.measure`."""
        with self._attached():
            return measure(self._policy, self._batch, ppl_scope, self._logps)

    def backward(
        self,
        margin: Tensor,
        weights: Tensor,
        take: Take | None,
        parameters: Iterable[nn.Parameter] = (),
        keep_graph: bool = False,
    ) -> Gradient:
        """Run the backward pass of Σ_i w_i h_i and hand over every form that passes by.

        A parameter that several layers share is handed over several times. No tapped weight's
        gradient is made on the way.

        Args:
            margin: (B,) h.
            weights: (B,) w.
            take: what is called with each parameter and the form of w_i ∇h_i, if anything is.
            parameters: of which the gradient is made as usual, and returned.
            keep_graph: whether there will be another backward pass.

        Raises:
            NotTappedError: layers do not see one vector a token.
        """
        self._take = take
        with self._attached():
            _, *gradient = pulled_back(
                margin, [self._anchor, *parameters], weights, keep_graph=keep_graph
            )
        if take and self._missed:
            raise NotTappedError(self._missed)
        return tuple(gradient)

    def _tap(
        self, read_off: ReadOff, layer: nn.Module, arguments: tuple, named: dict, output: Any
    ) -> Any:
        """Forward hook: tap the layer's output."""
        given = [*arguments, *named.values()]
        if len(given) != 1 or not isinstance(output, Tensor):
            self._missed |= self._in_policy(layer, trained(layer))
            return output

        def keep(inputs: Tensor, by_output: Tensor) -> None:
            self._hand_over(layer, read_off(layer, inputs, by_output, self._spans))

        return _Tap.apply(output, given[0], self._anchor, keep)

    def _logps(self, hidden: Tensor, head: nn.Linear, target: Tensor) -> Tensor:
        """Read log-probabilities off the head as `linear_logps` does, with a tap on them."""
        logps = linear_logps(hidden, head, target)
        if not trained(head):
            return logps
        dtype, pairs = multiplied_in(head), len(self._batch)
        pair = self._batch.responses.sequence % pairs

        def keep(hidden: Tensor, by_logp: Tensor) -> None:
            form = HeadLogps(hidden, target, by_logp, head, pair, pairs, dtype)
            self._hand_over(head, _head(form, head))

        return _Tap.apply(logps, hidden, self._anchor, keep)

    def _in_policy(self, layer: nn.Module, parameters: Iterable[nn.Parameter]) -> set[nn.Parameter]:
        """Return what stands between passes where these stand in a layer now."""
        now, own = dict(layer.named_parameters(recurse=False)), self._own[layer]
        between = {parameter: own[name] for name, parameter in now.items()}
        return {between[parameter] for parameter in parameters}

    def _hand_over(self, layer: nn.Module, found: Iterable[tuple[nn.Parameter, Form]]) -> None:
        if self._take is None:
            return
        try:
            for parameter, form in found:
                (own,) = self._in_policy(layer, [parameter])
                if own.requires_grad and own not in self._leave_out:
                    self._take(own, form)
        except NotTappedError as error:  # the pass continues, to find all such layers at once
            self._missed |= self._in_policy(layer, error.parameters)


class _Tap(torch.autograd.Function):
    """The identity, which hands a layer's input and its output's gradient to `keep`.

    The input is saved as autograd saves tensors, so gradient checkpointing recomputes it. The
    anchor, which gets no gradient, is what the backward pass is asked for, so that it passes
    through the taps and makes no weight's gradient on the way. What is returned shares the output's
    storage but is no view of it, because some models add to it in place later.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, anchor: Tensor, keep: Callable) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.keep = keep
        return output.data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: Tensor) -> tuple:
        (inputs,) = ctx.saved_tensors
        ctx.keep(inputs.detach(), by_output)
        return by_output, None, None, None


def trained(layer: nn.Module) -> list[nn.Parameter]:
    """Return the layer's own trainable parameters."""
    return [p for p in layer.parameters(recurse=False) if p.requires_grad]


def tappable(policy: nn.Module) -> Iterator[tuple[nn.Module, ReadOff]]:
    """Yield the layers of a known kind that hold trainable parameters, and how each is read."""
    for layer in policy.modules():
        read_off = _kind(layer) if trained(layer) else None
        if read_off:
            yield layer, read_off


def untapped(policy: nn.Module) -> frozenset[nn.Parameter]:
    """Return the trainable parameters that are in no layer of a known kind."""
    seen = {p for layer, _ in tappable(policy) for p in trained(layer)}
    return frozenset(p for p in policy.parameters() if p.requires_grad and p not in seen)


def numbers_by_token(policy: nn.Module) -> dict[nn.Parameter, int]:
    """Return how many numbers a token leaves of a matrix' gradient when that is held by tokens.

    Only of matrices that one layer uses: what two layers leave is not of one form.
    """
    held = [(p, read_off) for layer, read_off in tappable(policy) for p in trained(layer)]
    uses = Counter(p for p, _ in held)
    return {
        p: p.shape[1] + 1 if read_off is _embedding else sum(p.shape)
        for p, read_off in held
        if p.ndim == 2 and uses[p] == 1
    }


def _is_transposed(layer: nn.Module) -> bool:
    """Return whether this is transformers' linear layer with a weight (in, out)."""
    return type(layer).__name__ == "Conv1D"


def _kind(layer: nn.Module) -> ReadOff | None:
    if isinstance(layer, nn.Linear) or _is_transposed(layer):
        return _linear
    if isinstance(layer, nn.Embedding):
        return _embedding
    own = dict(layer.named_parameters(recurse=False))
    if "weight" in own and own.keys() <= {"weight", "bias"} and own["weight"].ndim == 1:
        return _norm
    return None


def _linear(layer: Any, a: Tensor, delta: Tensor, spans: Spans) -> Found:
    """Yield the forms of y = W a + b: ∇_W h_i = Σ_t δ_t a_tᵀ and ∇_b h_i = Σ_t δ_t."""
    delta, a = _by_token(layer, delta, spans), _by_token(layer, a, spans).to(delta)
    yield layer.weight, Outer(a, delta, spans) if _is_transposed(layer) else Outer(delta, a, spans)
    if layer.bias is not None and layer.bias.requires_grad:
        yield layer.bias, Whole(spans.sums(delta), spans)


def _embedding(layer: Any, ids: Tensor, delta: Tensor, spans: Spans) -> Found:
    """Yield the form of y_t = W[ids_t], scaled in some models; `padding_idx` has no gradient."""
    delta, ids = _by_token(layer, delta, spans), ids.flatten()
    delta = delta * getattr(layer, "embed_scale", 1.0)
    if layer.padding_idx is not None:
        delta = delta.masked_fill((ids == layer.padding_idx)[:, None], 0)
    yield layer.weight, EmbeddingRows(ids, delta, len(layer.weight), spans)


def _head(read: HeadLogps, head: Any) -> Found:
    yield head.weight, read
    if head.bias is not None and head.bias.requires_grad:
        yield head.bias, read.bias()


def _norm(layer: Any, inputs: Tensor, delta: Tensor, spans: Spans) -> Found:
    """Yield the forms of y = w ∘ x̂ + b, or (1 + w) ∘ x̂: ∇_w h_i = Σ_t δ_t ∘ x̂_t.

    Whatever makes x̂, it is the layer at weight 1 less the layer at weight 0.
    """
    own = dict(layer.named_parameters(recurse=False))
    zeros = {name: torch.zeros_like(p) for name, p in own.items()}
    ones = zeros | {"weight": torch.ones_like(layer.weight)}
    inputs = inputs.to(layer.weight.dtype)
    if inputs.ndim == 4 and inputs.stride(1) < inputs.stride(2):  # heads before tokens
        inputs, delta = inputs.transpose(1, 2), delta.transpose(1, 2)
    normed = functional_call(layer, ones, (inputs,)) - functional_call(layer, zeros, (inputs,))
    width = len(layer.weight)
    if normed.shape != delta.shape or delta.numel() % (len(spans.pair) * width):
        raise NotTappedError(trained(layer))

    def by_pair(of_vectors: Tensor) -> Whole:
        of_tokens = of_vectors.reshape(len(spans.pair), -1, width)
        by_token = of_tokens.sum(1) if of_tokens.shape[1] > 1 else of_tokens.squeeze(1)
        return Whole(spans.sums(by_token), spans)

    yield layer.weight, by_pair(delta * normed.to(delta))
    if "bias" in own:
        yield own["bias"], by_pair(delta)


def _by_token(layer: nn.Module, vectors: Tensor, spans: Spans) -> Tensor:
    """Return (…, width) as (R · N, width)."""
    if vectors.shape[:-1].numel() != len(spans.pair):
        raise NotTappedError(trained(layer))
    return vectors.flatten(0, -2)
