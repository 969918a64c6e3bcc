"""What the algorithm asks of a language model as a module: its moving parts, and to hold still.

A *gradient* is a tuple with one tensor for each trainable parameter, in the order of
`policy.parameters()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from softpref.algorithm.gradients.shards import laid_out_as, local, whole

Gradient = tuple[Tensor, ...]


def trainable(policy: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that a step may move."""
    return [p for p in policy.parameters() if p.requires_grad]


@contextmanager
def shifted(policy: nn.Module, direction: Gradient, step_size: float) -> Iterator[None]:
    """Hold the policy at θ' = θ − α d inside the block.

    The parameters' storage is swapped, not written, so that θ comes back bit for bit and graphs
    made at θ stay usable. Shards, which are gathered from where they lie, are written, and a copy
    of theirs put back; graphs gather again what they need. Low-precision copies that a surrounding
    autocast region keeps are dropped on both ways, for they would stand in for the other θ.
    """
    parameters = trainable(policy)
    home = [local(p).clone() if isinstance(p, DTensor) else p.data for p in parameters]
    try:
        moves = [local(d).to(here) for d, here in zip(direction, home, strict=True)]
        away = torch._foreach_sub(home, moves, alpha=step_size)
        del direction, moves  # as large as θ
        _put(parameters, away)
        del away  # of shards a copy
        torch.clear_autocast_cache()
        yield
    finally:
        _put(parameters, home)
        torch.clear_autocast_cache()


def _put(parameters: Sequence[nn.Parameter], data: Sequence[Tensor]) -> None:
    for p, numbers in zip(parameters, data, strict=True):
        if isinstance(p, DTensor):
            local(p).copy_(numbers)
        else:
            p.data = numbers


@contextmanager
def evaluating(policy: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the block: the three steps must see the same function."""
    modes = {module: module.training for module in policy.modules()}
    policy.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def nudge(policy: nn.Module, seed: int = 0) -> Gradient:
    """Return a small random direction, of a thirtieth of each tensor's spread or of 1 where all 0.

    What is checked of a policy is checked off its starting point too: an adapter that starts at
    zero hides there whether it is seen at all.
    """
    generator = torch.Generator().manual_seed(seed)
    scales = [float(whole(p.detach()).square().mean().sqrt()) or 1.0 for p in trainable(policy)]
    return tuple(
        laid_out_as(p, torch.randn(p.shape, generator=generator).to(p.device, p.dtype))
        * (scale / 30)
        for p, scale in zip(trainable(policy), scales, strict=True)
    )
