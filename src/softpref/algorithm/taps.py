"""Taps on linear layers: each pair's own gradient of their weights, from one backward pass.

Shapes: B pairs; tokens t of the flattened (R · N); a layer's input a (…, in) and its output's
gradient δ (…, out).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from softpref.algorithm.policy import trainable
from softpref.algorithm.rows import PairBatch


class NotTappedError(RuntimeError):
    """A trained layer's gradients cannot be told apart by pair."""


class Spans:
    """Sums over each pair's own tokens; pair i's are `spans[i]` of the flattened (R · N)."""

    def __init__(self, batch: PairBatch) -> None:
        self._spans, device = batch.spans, batch.input_ids.device
        in_place = sorted(range(len(batch)), key=batch.spans.__getitem__)
        stops = [batch.spans[i][1] for i in in_place]
        # A group reaches over the padding before its pair, where δ is 0.
        self._offsets = torch.tensor(stops, dtype=torch.int32, device=device)
        self._place_of_pair = torch.tensor(in_place, device=device).argsort()

    def products(self, delta: Tensor, a: Tensor) -> Tensor:
        """Return Σ_t δ_t a_tᵀ of each pair, (B, out, in), for δ (R · N, out) and a (R · N, in)."""
        entry = delta.element_size()
        aligned = all(entry * width % 16 == 0 for width in (delta.shape[1], a.shape[1]))
        if aligned and delta.dtype != torch.float64:  # what grouped_mm can do
            by_place = grouped_mm(delta.contiguous().T, a.contiguous(), offs=self._offsets)
            return by_place[self._place_of_pair]
        return torch.stack([delta[start:stop].T @ a[start:stop] for start, stop in self._spans])

    def sums(self, delta: Tensor) -> Tensor:
        """Return Σ_t δ_t of each pair, (B, out), for δ (R · N, out)."""
        return torch.stack([delta[start:stop].sum(0) for start, stop in self._spans])


class Taps:
    """Collects ∇h_i of every trainable parameter while Σ_i h_i is differentiated.

    Attributes:
        gradients: for each trainable parameter (B, *its shape), once `collect` has run.
    """

    def __init__(self, policy: nn.Module, batch: PairBatch) -> None:
        self._spans, self._tokens = Spans(batch), batch.input_ids.numel()
        self._pairs, self._parameters = len(batch), trainable(policy)
        self._found: dict[Tensor, Tensor] = {}
        self._anchor = torch.zeros((), device=batch.input_ids.device, requires_grad=True)
        self.gradients: list[Tensor] = []

    def on(self, layer: nn.Linear) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        """Return the forward hook that taps a layer."""

        def keep(inputs: Tensor, by_output: Tensor) -> None:
            if by_output.numel() != self._tokens * layer.out_features:
                raise NotTappedError("a trained layer does not see one vector a token")
            a, delta = inputs.flatten(0, -2).to(by_output), by_output.flatten(0, -2)
            if layer.weight.requires_grad:
                self._add(layer.weight, self._spans.products(delta, a))
            if layer.bias is not None and layer.bias.requires_grad:
                self._add(layer.bias, self._spans.sums(delta))

        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return _Tap.apply(output, arguments[0], self._anchor, keep)

        return hook

    def collect(self, margins: Tensor) -> None:
        """Run the backward pass of Σ_i h_i, shape (), for the taps alone."""
        torch.autograd.grad(margins, self._anchor, allow_unused=True)
        for p in self._parameters:
            if p not in self._found:
                self._found[p] = p.new_zeros((self._pairs, *p.shape))
        self.gradients = [self._found[p] for p in self._parameters]

    def _add(self, parameter: Tensor, found: Tensor) -> None:
        before = self._found.get(parameter)
        self._found[parameter] = found if before is None else before + found


class _Tap(torch.autograd.Function):
    """The identity, which hands a layer's input and its output's gradient to `keep`.

    The input is saved as autograd saves tensors, so gradient checkpointing recomputes it. The
    anchor is what the backward pass is asked for, so that it passes through the taps and makes no
    weight's gradient on the way.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, anchor: Tensor, keep: Callable) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.keep = keep
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: Tensor) -> tuple:
        (inputs,) = ctx.saved_tensors
        ctx.keep(inputs, by_output)
        return by_output, None, by_output.new_zeros((), dtype=torch.float32), None


@contextmanager
def tapped(policy: nn.Module, batch: PairBatch) -> Iterator[Taps]:
    """Hold taps on every layer of which a parameter trains; the policy is as before afterwards."""
    taps = Taps(policy, batch)
    hooks = [layer.register_forward_hook(taps.on(layer)) for layer in trained_layers(policy)]
    try:
        yield taps
    finally:
        for hook in hooks:
            hook.remove()


def trained_layers(policy: nn.Module) -> list[nn.Linear]:
    """Return the linear layers that hold trainable parameters of their own."""
    return [
        module
        for module in policy.modules()
        if isinstance(module, nn.Linear)
        and any(p.requires_grad for p in module.parameters(recurse=False))
    ]


def untapped(policy: nn.Module) -> list[str]:
    """Return the names of the trainable parameters that are no linear layer's."""
    inside = {id(p) for layer in trained_layers(policy) for p in layer.parameters(recurse=False)}
    return [n for n, p in policy.named_parameters() if p.requires_grad and id(p) not in inside]
