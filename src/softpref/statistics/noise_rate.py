"""How many labels are wrong: the share of flipped pairs, with an interval.

Shapes: N noisy pairs in M bins, n clean pairs in up to M bins, R candidate rates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softpref.statistics.calibration import (
    check_scores,
    clean_rows,
    fit_coefficients,
    odd_basis,
    robust_scale,
)

FEWEST_CLEAN_PAIRS = 10
_BINS = 512
_GRID = 51
CHI2_95 = 3.8415  # 95% quantile of chi-squared with one degree of freedom
SHARP, KNOWN = 0.15, 0.4
"""Widths of the 95% interval up to which a single number, or the interval, is worth telling."""
_MIN_DOUBT = 0.01  # no pair's order is taken as surer than 1 - this


@dataclass(frozen=True)
class NoiseRate:
    """Estimated share of flipped labels, in [0, 0.5].

    Attributes:
        rate: the estimate; where PPLDiff says little, any value, often 0.
        low: the lower end of its 95% interval.
        high: the upper end.
        expected: the mean of all rates, each weighed by how well it fits: the prior to act on. It
            is near `rate` where that is certain and 0.25 where nothing is known.
    """

    rate: float
    low: float
    high: float
    expected: float

    @property
    def told(self) -> float | None:
        """The number to tell: `expected`, or None where the interval is wider than 15 points."""
        return self.expected if self.high - self.low <= SHARP else None

    def record(self) -> dict[str, float | None]:
        """Return what is written of it: a `rate` of None is unknown."""
        return {"rate": self.told, "low": self.low, "high": self.high, "expected": self.expected}

    def __repr__(self) -> str:
        return f"<NoiseRate {self}>"

    def __str__(self) -> str:
        return rate_text(self.told, self.low, self.high)

    def around(self, rate: float) -> NoiseRate:
        """Return another rate, the mean of rates by pair, with this interval moved along."""
        low, high = rate - self.rate + self.low, rate - self.rate + self.high
        return NoiseRate(rate, max(low, 0.0), min(high, 0.5), rate)

    @staticmethod
    def given(rate: float) -> NoiseRate:
        """Return a rate that is known."""
        return NoiseRate(rate, rate, rate, rate)

    @staticmethod
    def unknown() -> NoiseRate:
        """Return what is known where nothing is."""
        return NoiseRate(0.25, 0.0, 0.5, 0.25)


def rate_text(rate: float | None, low: float, high: float) -> str:
    """Return a noise rate as text: the interval alone where no single number is known."""
    interval = f"95% interval {low:.1%} to {high:.1%}"
    if rate is not None:
        return f"{rate:.1%} ({interval})"
    if high - low > KNOWN:
        return f"unknown, the signals say too little about the labels ({interval})"
    return f"{bounds(low, high)}, with 95% confidence"


def bounds(low: float, high: float) -> str:
    """Return an interval as text, one-sided where it begins at 0."""
    return f"at most {high:.0%}" if low < 0.005 else f"between {low:.0%} and {high:.0%}"


def estimate_noise_rate(ppl_diff_noisy: Tensor, ppl_diff_clean: Tensor) -> NoiseRate:
    """Estimate the share of flipped labels from PPLDiff, given pairs known to be right.

    Model: a right label's PPLDiff x has density f, a flipped one's f(-x), a noisy pair's
    (1 - e) f(x) + e f(-x). |x| says nothing of e; its sign does: it points to the right label with
    probability q(|x|), so to the given one with p = e + (1 - 2e) q. With m = 2q - 1, for each e,

        T(e) = mean_noisy[psi - (1-2e) |psi m|] - (1-2e) mean_clean[psi - |psi m|]
        psi(x) = m / (4p(1-p) / N + (1-2e)^2 4q(1-q) / n), odd in x

    has mean 0 at the true e whatever f and q are. q, fitted to both samples by maximum likelihood
    with e held (`fit_coefficients`), sets only the weights psi, the efficient ones, and var(T),
    each sample's part of which is the larger of the one expected and the one seen. With
    z = T / sd(T), the rate is where z crosses 0, or the end of [0, 0.5] beyond which it would; the
    interval is where z^2 <= 3.84 (at an end, plus z^2 there): about [0, 0.5] where PPLDiff carries
    nothing, one-sided and covering more than 95% where the rate is 0 or 0.5. `expected` weighs
    every e by exp(-z^2 / 2). (A likelihood interval
    would read e off the assumed shape of q, and be wrong with many pairs.) Both samples negated
    give the same answer.

    Not in the paper. It assumes that flips do not depend on PPLDiff. Where pairs of small |PPLDiff|
    are flipped more often than others, the rate comes out too low, since those pairs say least.

    Args:
        ppl_diff_noisy: (N,), nats per token, as labelled.
        ppl_diff_clean: (n,), nats per token, of pairs known to be right; at least 10.

    Raises:
        ValueError: A tensor is not 1-D, floating, finite or long enough; the message names it.
    """
    check_scores("ppl_diff_noisy", ppl_diff_noisy)
    check_scores("ppl_diff_clean", ppl_diff_clean, at_least=FEWEST_CLEAN_PAIRS)
    scale = robust_scale(ppl_diff_clean)
    # Scores point to the right label, whichever sign that is.
    if torch.tanh(ppl_diff_clean.double() / scale).sum() < 0:
        scale = -scale
    noisy, clean = (_quantile_bins(sample, scale) for sample in (ppl_diff_noisy, ppl_diff_clean))

    low, high = 0.0, 0.5
    for _ in range(2):  # the second pass looks closely at what the first one found
        rates = torch.linspace(low, high, _GRID, dtype=torch.float64, device=noisy[0].device)
        z = _z(rates, noisy, clean)
        nearest, inside = _locate(z)
        weight = torch.softmax(-z.square() / 2, 0)
        step = (high - low) / (_GRID - 1)
        found = NoiseRate(
            rates[nearest].item(),
            rates[inside].min().item(),
            rates[inside].max().item(),
            (weight @ rates).item(),
        )
        low, high = max(found.low - step, 0.0), min(found.high + step, 0.5)
    return found


def _locate(z: Tensor) -> tuple[int, Tensor]:
    """Index of the rate and mask (R,) of the 95% interval, from z (R,), rising with the rate."""
    nearest = int(z.abs().argmin())
    if z[0] > 0:
        nearest = 0
    elif z[-1] < 0:
        nearest = len(z) - 1
    # At an end of the range z need not reach 0; what is left of it counts against no other rate.
    inside = z**2 <= CHI2_95 + (z[nearest] ** 2).clamp(max=CHI2_95)
    inside[nearest] = True
    return nearest, inside


def _quantile_bins(ppl_diff: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return means and counts, (M,) each, of bins of neighboring scores, PPLDiff / scale."""
    in_order = ppl_diff.sort(descending=scale < 0).values
    parts = in_order.tensor_split(min(_BINS, len(in_order)))
    means = torch.stack([(part.double() / scale).mean() for part in parts])
    return means, torch.tensor([len(part) for part in parts]).to(means)


def _z(rates: Tensor, noisy: tuple[Tensor, Tensor], clean: tuple[Tensor, Tensor]) -> Tensor:
    """T(e) over its standard deviation, (R,), for rates (R,) and the bins of both samples."""
    rows, weights = clean_rows(*clean)
    flip_rate = torch.cat([torch.zeros_like(rows), torch.ones_like(noisy[0])]) * rates[:, None]
    coefficients = fit_coefficients(
        odd_basis(torch.cat([rows, noisy[0]]), 1.0), torch.cat([weights, noisy[1]]), flip_rate
    )
    keep = 1 - 2 * rates[:, None]
    noisy_total, clean_total = noisy[1].sum(), clean[1].sum()

    def mean_and_variance(sample: tuple[Tensor, Tensor], share: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of psi - share |psi m| and the variance of that mean, each (R,)."""
        scores, counts = sample
        q = torch.sigmoid(coefficients @ odd_basis(scores, 1.0).T)
        m = (2 * q - 1) * (1 - 2 * _MIN_DOUBT)
        psi = m / ((1 - (keep * m) ** 2) / noisy_total + keep**2 * (1 - m**2) / clean_total)
        weights = counts / counts.sum()
        residual = psi - share * (psi * m).abs()
        # What was seen counts where it is more than expected: q may have another shape.
        expected, seen = (psi**2 * (1 - (share * m) ** 2)) @ weights, residual**2 @ weights
        return residual @ weights, torch.maximum(expected, seen) / counts.sum()

    noisy_mean, noisy_variance = mean_and_variance(noisy, keep)
    clean_mean, clean_variance = mean_and_variance(clean, torch.ones_like(keep))
    variance = noisy_variance + keep[:, 0] ** 2 * clean_variance
    # Where every score is 0, so are both.
    deviation = variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()
    return (noisy_mean - keep[:, 0] * clean_mean) / deviation
