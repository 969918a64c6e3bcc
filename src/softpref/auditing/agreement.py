"""How often a model's preference is right, by its size, and so how likely each label is right.

A score t is odd: swapping a pair's responses turns it into −t (here t = −PPLDiff). Its sign is what
the model prefers; given |t|, that is right with probability q(|t|), whatever the label says. With a
share e of flipped labels, the label agrees with the model with probability e + (1 − 2e) q(|t|):
noisy pairs tell of q as well as clean ones, and they are many.

Shapes: n noisy pairs, m clean pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

LARGEST_RATE = 0.49
"""A larger share of flips leaves noisy pairs without a word to say; 1 − 2e stays above 0."""
KNOT_WEIGHT = 25.0
"""Clean pairs, or as much as they say in noisy ones, to a knot: fewer would follow their chance."""


@dataclass(frozen=True)
class Agreement:
    """q(|t|), never falling and at least one half, between knots a straight line.

    Not in the paper, whose soft labels are no probabilities. What two coefficients could not follow
    (`softpref.algorithm.calibration`) it does: its one assumption is that a stronger preference is
    not less often right.

    Attributes:
        sizes: (K,) knots |t|, rising, in the score's unit.
        shares: (K,) q at them.
    """

    sizes: Tensor
    shares: Tensor

    @classmethod
    def fit(cls, noisy: Tensor, clean: Tensor, noise_rate: float) -> Agreement:
        """Fit by isotonic least squares.

        Each pair's z = (a − e) / (1 − 2e), a = 1 where its label agrees with the model, has mean q;
        e is `noise_rate` for noisy pairs and 0 for clean ones, the weight (1 − 2e)². Pairs of like
        |t| are taken together, `KNOT_WEIGHT` to a knot. q is kept within
        [1/2, 1 − 1 / (2 (n + m + 2))].

        Args:
            noisy: (n,) odd scores, larger where the label looks more right.
            clean: (m,) those of pairs known to be labelled right.
            noise_rate: share of the noisy labels that are flipped.
        """
        rate = min(noise_rate, LARGEST_RATE)
        scores = torch.cat([noisy, clean]).double()
        rates = torch.cat([torch.full_like(noisy, rate), torch.zeros_like(clean)]).double()
        right = ((scores > 0).double() + (scores == 0) / 2 - rates) / (1 - 2 * rates)
        order = scores.abs().argsort(stable=True)
        weight = (1 - 2 * rates[order]) ** 2
        bins = ((weight.cumsum(0) - weight / 2) / KNOT_WEIGHT).long()
        total = torch.zeros(int(bins[-1]) + 1, dtype=torch.float64).index_add_(0, bins, weight)

        def mean(values: Tensor) -> Tensor:
            return torch.zeros_like(total).index_add_(0, bins, weight * values[order]) / total

        fitted = isotonic_regression(mean(right).numpy(), weights=total.numpy())
        highest = 1 - 1 / (2 * (len(scores) + 2))
        return cls(mean(scores.abs()), torch.from_numpy(fitted.x).clamp(0.5, highest))

    def probability_right(self, scores: Tensor) -> Tensor:
        """Return how likely the response that scores > 0 speak for is the better, (n,) float64.

        q(|t|) where t > 0, 1 − q(|t|) where t < 0: what is known of a label before any prior.
        """
        size = np.interp(scores.abs().double().numpy(), self.sizes.numpy(), self.shares.numpy())
        share = torch.from_numpy(size)
        return torch.where(scores.double() >= 0, share, 1 - share)

    def probability_correct(self, scores: Tensor, noise_rate: float) -> Tensor:
        """Return the probability that each label is right, (n,) float64.

            p = (1 − e) r / ((1 − e) r + e (1 − r)),  r = `probability_right`

        e, the prior, is the share of flipped labels; 0 makes every label right.
        """
        right = self.probability_right(scores)
        kept, flipped = (1 - noise_rate) * right, noise_rate * (1 - right)
        return kept / (kept + flipped)


def left_out(noisy: Tensor, clean: Tensor, noise_rate: float, folds: int, seed: int) -> Tensor:
    """Return `probability_right` of each clean pair by a fit that never saw it, (m,) float64.

    Args:
        noisy: (n,) odd scores.
        clean: (m,) odd scores of pairs known to be labelled right.
        noise_rate: share of the noisy labels that are flipped.
        folds: how many parts the clean pairs are dealt into.
        seed: of the deal.
    """
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed))
    right = torch.empty(len(clean), dtype=torch.float64)
    for part in order.tensor_split(folds):
        seen = torch.ones(len(clean), dtype=torch.bool)
        seen[part] = False
        right[part] = Agreement.fit(noisy, clean[seen], noise_rate).probability_right(clean[part])
    return right
