"""Log-odds by fluency alone: an odd curve, fitted on trusted and noisy pairs.

Shapes: N pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softpref.statistics.calibration import fit_coefficients, odd_basis, robust_scale
from softpref.statistics.folds import gain, left_out
from softpref.statistics.noisy_logistic import LEAST_RATE, fit

KNOTS = 7
CURVE_PENALTY = 0.3
FREE_CURVE_GATE = 2.0
"""Standard errors by which a free curve must foretell left-out pairs better than a rising one."""


@dataclass(frozen=True)
class Curve:
    """Stage A: log-odds by fluency alone, odd.

    Rising, a t/s + b tanh(2t/s) with a, b > 0, unless a free curve foretells left-out pairs better:
    where a model is fluent in what it gets wrong, its strongest preferences are the wrong ones.

    Attributes:
        scale: s, the median |t|.
        knots: |t| at which a free curve bends, (7,); empty if it rises.
        coefficients: of the basis, (2,) or (9,).
    """

    scale: float
    knots: Tensor
    coefficients: Tensor

    def log_odds(self, fluency: Tensor) -> Tensor:
        """Return g_A, nats, (N,)."""
        basis = _bending if len(self.knots) else _rising
        return basis(fluency, self.scale, self.knots) @ self.coefficients


def _rising(t: Tensor, scale: float, knots: Tensor) -> Tensor:
    return odd_basis(t, scale)


def _bending(t: Tensor, scale: float, knots: Tensor) -> Tensor:
    t = t.double()
    sign = torch.tanh(3 * t / scale)
    hinges = [sign * (t.abs() - knot).clamp_min(0) / scale for knot in knots]
    return torch.stack([sign, t / scale / 2, *hinges], dim=1)


def fit_curve(t: Tensor, rate: Tensor, fold: Tensor) -> tuple[Curve, Tensor]:
    """Return stage A, and out-of-fold g_A for each pair, (N,).

    Args:
        t: (N,) fluency, minus PPLDiff.
        rate: (N,) the probability that each pair's label is flipped.
        fold: (N,) see `folds`.
    """
    scale = robust_scale(t)
    sizes = t.abs().double().sort().values
    places = torch.linspace(0.1, 0.95, KNOTS, dtype=torch.float64) * (len(sizes) - 1)
    knots = sizes[places.long()]
    rising, bending = _rising(t, scale, knots), _bending(t, scale, knots)

    def fit_rising(these: Tensor) -> Tensor:
        weight = torch.ones(int(these.sum()), dtype=torch.float64)
        return fit_coefficients(rising[these], weight, rate[these].clamp_min(LEAST_RATE)[None])[0]

    def fit_bending(these: Tensor) -> Tensor:
        penalty = torch.full((bending.shape[1],), CURVE_PENALTY, dtype=torch.float64)
        return fit(bending[these], rate[these], penalty, torch.zeros(()).double())

    all_pairs = torch.ones(len(t), dtype=torch.bool)
    by_rising = left_out(fold, lambda these: rising @ fit_rising(these))
    by_bending = left_out(fold, lambda these: bending @ fit_bending(these))
    if gain(by_bending, by_rising, rate) > FREE_CURVE_GATE:
        return Curve(scale, knots, fit_bending(all_pairs)), by_bending
    return Curve(scale, knots[:0], fit_rising(all_pairs)), by_rising
