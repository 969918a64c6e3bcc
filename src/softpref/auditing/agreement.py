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
from scipy.interpolate import make_smoothing_spline
from scipy.optimize import isotonic_regression
from torch import Tensor

LARGEST_RATE = 0.49
"""A larger share of flips leaves noisy pairs without a word to say; 1 − 2e stays above 0."""
KNOT_WEIGHT = 25.0
"""Clean pairs, or as much as they say in noisy ones, to a knot: fewer would follow their chance."""
CURVE_KNOTS = 60
"""Of the curve that may fall; between 20 and 120 their number made no difference."""
SURELY = 3.0
"""Standard errors by which it must foretell pairs it has not seen better than a rising one."""
CLEAR_FALL = 0.1
FOLDS = 5


@dataclass(frozen=True)
class Agreement:
    """q(|t|), between knots a straight line.

    It never falls and is at least one half, unless the data are sure of something else: where a
    model is fluent in what it gets wrong, its strongest preferences are the wrong ones, and a
    smooth curve that may fall tells pairs apart that a rising one cannot.

    Not in the paper, whose soft labels are no probabilities. What two coefficients could not follow
    (`softpref.algorithm.calibration`) it does.

    Attributes:
        sizes: (K,) knots |t|, rising, in the score's unit.
        shares: (K,) q at them.
        is_rising: whether q was held to rise.
    """

    sizes: Tensor
    shares: Tensor
    is_rising: bool = True

    @classmethod
    def fit(cls, noisy: Tensor, clean: Tensor, noise_rate: float) -> Agreement:
        """Fit by least squares: a rising q, and a free one where it is surely better.

        Each pair's z = (a − e) / (1 − 2e), a = 1 where its label agrees with the model, has mean q;
        e is `noise_rate` for noisy pairs and 0 for clean ones, the weight (1 − 2e)². A free q is
        taken where it falls by more than 0.1, and where over held-out pairs of five folds its
        squared error is smaller by more than three standard errors.

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
        seen = _Seen(scores.abs()[order], right[order], ((1 - 2 * rates) ** 2)[order])
        curve = free(seen) if _free_is_surely_better(seen) else None
        return curve if curve and curve.falls else rising(seen)

    @property
    def falls(self) -> bool:
        """Whether q comes to lie clearly below what it was at a smaller size."""
        return float((self.shares.cummax(0).values - self.shares).max()) > CLEAR_FALL

    def probability_right(self, scores: Tensor) -> Tensor:
        """Return how likely the response that scores > 0 speak for is the better, (n,) float64.

        q(|t|) where t > 0, 1 − q(|t|) where t < 0: what is known of a label before any prior.
        """
        size = np.interp(scores.abs().double().numpy(), self.sizes.numpy(), self.shares.numpy())
        share = torch.from_numpy(size)
        right = torch.where(scores.double() >= 0, share, 1 - share)
        return torch.where(scores == 0, 0.5, right)

    def probability_correct(self, scores: Tensor, noise_rate: float) -> Tensor:
        """Return the probability that each label is right, (n,) float64.

            p = (1 − e) r / ((1 − e) r + e (1 − r)),  r = `probability_right`

        e, the prior, is the share of flipped labels; 0 makes every label right.
        """
        right = self.probability_right(scores)
        kept, flipped = (1 - noise_rate) * right, noise_rate * (1 - right)
        return kept / (kept + flipped)


@dataclass(frozen=True)
class _Seen:
    """Pairs by rising size: |t|, z, and their weight, (n,) each."""

    size: Tensor
    right: Tensor
    weight: Tensor

    def only(self, these: Tensor) -> _Seen:
        return _Seen(self.size[these], self.right[these], self.weight[these])

    def knots(self, bins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return weight, and means of size and z, of each bin of pairs, (K,)."""
        count = int(bins[-1]) + 1

        def total(values: Tensor) -> Tensor:
            return torch.zeros(count, dtype=torch.float64).index_add_(0, bins, values)

        weight = total(self.weight)
        return (
            weight,
            total(self.weight * self.size) / weight,
            total(self.weight * self.right) / weight,
        )

    @property
    def highest(self) -> float:
        """The surest that so many pairs can make a share."""
        return 1 - 1 / (2 * (len(self.size) + 2))


def rising(seen: _Seen) -> Agreement:
    """Fit a q that never falls, by isotonic regression on knots of `KNOT_WEIGHT`.

    q is kept within [1/2, 1 − 1 / (2 (n + m + 2))].
    """
    bins = ((seen.weight.cumsum(0) - seen.weight / 2) / KNOT_WEIGHT).long()
    weight, sizes, means = seen.knots(bins)
    fitted = isotonic_regression(means.numpy(), weights=weight.numpy())
    return Agreement(sizes, torch.from_numpy(fitted.x).clamp(0.5, seen.highest))


def free(seen: _Seen) -> Agreement:
    """Fit a q that may fall, by a smoothing spline over the share of pairs with a smaller |t|.

    How smooth is set by generalised cross-validation (`scipy.interpolate.make_smoothing_spline`).
    """
    place = (seen.weight.cumsum(0) - seen.weight / 2) / seen.weight.sum()
    bins = (place * CURVE_KNOTS).long().clamp_max(CURVE_KNOTS - 1)
    bins = bins.unique(return_inverse=True)[1]
    weight, sizes, means = seen.knots(bins)
    places = _Seen(place, seen.right, seen.weight).knots(bins)[1].numpy()
    curve = make_smoothing_spline(places, means.numpy(), w=weight.numpy())
    shares = torch.from_numpy(curve(places)).clamp(1 - seen.highest, seen.highest)
    return Agreement(sizes, shares, is_rising=False)


def _free_is_surely_better(seen: _Seen) -> bool:
    """Compare both by what they foretell of pairs that their fit left out."""
    if len(seen.size) < 2 * CURVE_KNOTS:
        return False
    fold = torch.arange(len(seen.size)) % FOLDS  # of pairs in order of size: all sizes in each
    gain = torch.zeros(len(seen.size), dtype=torch.float64)
    for part in range(FOLDS):
        held_out, rest = fold == part, seen.only(fold != part)
        right, size = seen.right[held_out], seen.size[held_out]
        errors = [(right - make(rest).probability_right(size)).square() for make in (rising, free)]
        gain[held_out] = seen.weight[held_out] * (errors[0] - errors[1])
    error = float(gain.std()) * len(gain) ** 0.5
    return float(gain.sum()) > SURELY * error > 0


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
