"""Pairs in folds, so that none is judged by a fit that has read its label.

Shapes: N pairs; a pair's fold is its number in `fold`, (N,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softpref.statistics.noisy_logistic import log_likelihood

FOLDS, FEW_PAIRS, FOLDS_OF_FEW = 4, 2000, 10
"""Where pairs are few, a fit must not lack a quarter of them."""


def deal(noisy: int, trusted: int, seed: int, content: Tensor | None = None) -> Tensor:
    """Return each pair's fold, (N,), noisy and trusted ones dealt apart.

    Noisy pairs of the same content, a number for each (n,), are in the same fold.
    """
    generator = torch.Generator().manual_seed(seed)
    folds = FOLDS_OF_FEW if noisy + trusted < FEW_PAIRS else FOLDS
    parts = [torch.randperm(count, generator=generator) % folds for count in (noisy, trusted)]
    if content is not None:
        _, place = content.unique(return_inverse=True)
        first = torch.full((noisy,), noisy).scatter_reduce(0, place, torch.arange(noisy), "amin")
        parts[0] = parts[0][first[place]]
    return torch.cat(parts)


def left_out(fold: Tensor, fit_on: Callable[[Tensor], Tensor]) -> Tensor:
    """Return each pair's predictions, (N, ...), by the fit that left its fold out.

    `fit_on` predicts for all pairs, by a fit on those that it is given.
    """
    by_fold = torch.stack([fit_on(fold != part) for part in range(int(fold.max()) + 1)])
    return by_fold[fold, torch.arange(len(fold))]


def gain(richer: Tensor, simpler: Tensor, rate: Tensor) -> float:
    """Return by how many standard errors the richer model's likelihood is larger, from g's (N,)."""
    difference = log_likelihood(richer, rate) - log_likelihood(simpler, rate)
    error = difference.std() * len(difference) ** 0.5
    return float(difference.sum() / (error + 1e-9))
