"""PerpCorrect's picture of noisy PPLDiff: right labels to one side of 0, flipped ones mirrored.

Shapes: N pairs, K bins of their histogram, M candidate means, S candidate deviations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from softpref.statistics.calibration import check_scores

_BINS = 100
_GRID = 33  # candidates along each of μ and σ
_ZOOM = 4  # how much closer each pass looks than the one before
_PASSES = 18  # the last one sees 1e-11 of the range


@dataclass(frozen=True)
class TwoGaussians:
    """PPLDiff x of noisy pairs as α N(μ, σ²) + (1 − α) N(−μ, σ²), μ ≤ 0 (Kong et al. 2024).

    A right label's x is N(μ, σ²), below 0 where the policy knows better; a flipped one's is its
    mirror image.

    Attributes:
        mean: μ, nats per token, 0 or below.
        deviation: σ, nats per token, above 0.
        share_right: α, the share of labels that are right, in [0.5, 1].
    """

    mean: float
    deviation: float
    share_right: float

    @property
    def noise_rate(self) -> float:
        """1 − α, the share of flipped labels, in [0, 0.5]."""
        return 1 - self.share_right

    @property
    def threshold(self) -> float:
        """τ, nats per token: labels of pairs above it are more likely wrong than right.

            τ = argmax α Φ((τ − μ)/σ) + (1 − α) (1 − Φ((τ + μ)/σ)) = σ² ln(α / (1 − α)) / (2|μ|)

        It is ∞ (every label believed) at α = 1, and at μ = 0, where PPLDiff says nothing. The
        authors' code looks for τ numerically, and between μ and −μ alone; the formula has no such
        bounds, and with them the top pairs would be reversed where no label is wrong.
        """
        if self.share_right == 1 or self.mean == 0:
            return math.inf
        odds = self.share_right / self.noise_rate
        return self.deviation**2 * math.log(odds) / (2 * abs(self.mean))

    @property
    def separation(self) -> float:
        """The share of labels told right by the best cut between μ and −μ, in [0.5, 1].

        The authors' measure of a round. The bounds make it one: without them every fit with α = 1
        would have 1, whether its PPLDiff says anything or not.
        """
        return self.told_right(min(self.threshold, -self.mean))

    def told_right(self, threshold: float) -> float:
        """Return α Φ((τ − μ)/σ) + (1 − α) (1 − Φ((τ + μ)/σ)), the share that a cut at τ gets right.

        Args:
            threshold: τ, nats per token; may be infinite.
        """
        kept = _below((threshold - self.mean) / self.deviation)
        reversed_ = _below(-(threshold + self.mean) / self.deviation)
        return self.share_right * kept + self.noise_rate * reversed_

    @staticmethod
    def fit(ppl_diff: Tensor) -> TwoGaussians:
        """Return the density nearest to the histogram of PPLDiff, by least squares.

            min Σ_k (α N(c_k; μ, σ²) + (1 − α) N(c_k; −μ, σ²) − n_k / (N w))²

        over the centres c_k of 100 bins of width w between the smallest and largest value. For
        given μ and σ the best α has a closed form; these two are found on a grid that closes in on
        its best point, so that no start can lead astray.

        Departs from the authors' code, which fits to the bins' left edges (half a bin off) from a
        start of its own, and lets α be anything in [0, 1]: below 0.5 most labels would be wrong,
        and a surrogate that does not know better yet would have all of them reversed.

        Args:
            ppl_diff: (N,), nats per token, as labelled; at least 2.

        Raises:
            ValueError: ppl_diff is not 1-D, floating, finite and long enough, or has no spread.
        """
        check_scores("ppl_diff", ppl_diff, at_least=2)
        x = ppl_diff.double()
        low, high = x.min().item(), x.max().item()
        width = (high - low) / _BINS
        if not width > 0:
            raise ValueError("ppl_diff is the same for every pair")
        centres = low + width * (torch.arange(_BINS, dtype=x.dtype, device=x.device) + 0.5)
        density = torch.histc(x, _BINS, low, high) / (len(x) * width)
        # |μ|, and ln σ. A bin tells no deviation below half its width from any other.
        limits = torch.tensor(
            [[0.0, max(abs(low), abs(high))], [math.log(width / 2), math.log(high - low)]],
            dtype=x.dtype,
            device=x.device,
        )
        bounds = limits
        for _ in range(_PASSES):
            steps = torch.linspace(0, 1, _GRID, dtype=x.dtype, device=x.device)
            sizes, logs = bounds[:, :1] + (bounds[:, 1:] - bounds[:, :1]) * steps
            error, share_right = _errors(centres, density, -sizes, logs.exp())
            i, j = divmod(int(error.argmin()), _GRID)
            reach = (bounds[:, 1:] - bounds[:, :1]) / (2 * _ZOOM)
            nearby = torch.stack([sizes[i], logs[j]])[:, None] + torch.cat([-reach, reach], 1)
            bounds = nearby.clamp(limits[:, :1], limits[:, 1:])
        return TwoGaussians(-sizes[i].item(), logs[j].exp().item(), share_right[i, j].item())


def _errors(
    centres: Tensor, density: Tensor, means: Tensor, deviations: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared distance to the density (K,) at the best α, and that α, (M, S) each."""
    right = _density(centres, means[:, None, None], deviations[:, None])
    flipped = _density(centres, -means[:, None, None], deviations[:, None])
    apart = right - flipped
    # At μ = 0 the two are one and any α does: 0.5, the rate of one who knows nothing.
    tiny = torch.finfo(apart.dtype).tiny
    slope = ((density - flipped) * apart).sum(-1) / apart.square().sum(-1).clamp(min=tiny)
    share_right = slope.clamp(0.5, 1.0)
    misfit = flipped + share_right[..., None] * apart - density
    return misfit.square().sum(-1), share_right


def _density(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """N(x; μ, σ²)."""
    z = (x - mean) / deviation
    return (-z.square() / 2).exp() / (deviation * math.sqrt(2 * math.pi))


def _below(z: float) -> float:
    """Φ(z), without loss far below 0."""
    return math.erfc(-z / math.sqrt(2)) / 2
