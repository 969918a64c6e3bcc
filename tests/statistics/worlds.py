"""Pairs whose right labels are known, with signals that say something of them or nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softpref.statistics.pair_signals import PairSignals


@dataclass(frozen=True)
class World:
    """Noisy and trusted pairs, and which of the noisy ones are labelled wrong, (n,)."""

    noisy: PairSignals
    trusted: PairSignals
    is_flipped: Tensor


def world(
    seed: int, noisy: int, trusted: int, *, rate: float = 0.3, fluency: float = 0.0,
    content: float = 0.0, size: int = 4, even: int = 2,
) -> World:  # fmt: skip
    """Draw Gaussian signals, shifted in favour of the right response.

    Args:
        seed: of everything.
        noisy: pairs, each flipped with probability `rate`.
        trusted: pairs labelled right.
        rate: share of flips.
        fluency: its shift, in standard deviations.
        content: shift of the first number of a vector.
        size: of the vector.
        even: how many even signals there are; they say nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    count = noisy + trusted

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    states = normal(count, size)
    states[:, 0] += content
    right = PairSignals(
        normal(count) + fluency,
        {"content": states, "length": normal(count)},
        {f"even{i}": normal(count) for i in range(even)},
    )
    is_flipped = torch.rand(count, generator=generator) < rate
    is_flipped[noisy:] = False
    pairs = swapped(right, is_flipped)
    return World(at(pairs, slice(0, noisy)), at(pairs, slice(noisy, count)), is_flipped[:noisy])


def swapped(pairs: PairSignals, which: Tensor) -> PairSignals:
    """Return the pairs with the responses of some, (N,) bool, exchanged."""
    sign = torch.where(which, -1.0, 1.0).double()
    odd = {name: torch.einsum("n...,n->n...", values, sign) for name, values in pairs.odd.items()}
    return PairSignals(pairs.fluency * sign, odd, pairs.even)


def at(pairs: PairSignals, which: slice) -> PairSignals:
    """Return some of the pairs."""
    odd, even = ({name: values[which] for name, values in kind.items()}
                 for kind in (pairs.odd, pairs.even))  # fmt: skip
    return PairSignals(pairs.fluency[which], odd, even)
