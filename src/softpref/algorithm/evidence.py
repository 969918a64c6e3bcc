"""How surely a pair's signals say that its label is right, learned from trusted and noisy pairs.

    g   = s(g_A(t) + g_B)                                                 t: minus PPLDiff
    g_B = θ_0 g_A + tanh(2 t / s) [E, E_j E_k / 3]·θ_E + O·θ_O            E even, O odd signals

with ridge penalties, by the likelihood of noisy_logistic.py. Not in the paper, whose labels come
from PPLDiff alone. Each model is fitted on all pairs, and again on folds, so that no pair is judged
by a fit that has read its label; s, odd and rising, calibrates what these say.

Shapes: N pairs, of which n are noisy and come first, and m trusted; K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softpref.algorithm.calibration import fit_coefficients, odd_basis, robust_scale
from softpref.algorithm.noise_rate import NoiseRate, estimate_noise_rate
from softpref.algorithm.noisy_logistic import LEAST_RATE, fit, log_likelihood, slope
from softpref.algorithm.pair_signals import Columns, PairSignals

FOLDS, FEW_PAIRS, FOLDS_OF_FEW = 4, 2000, 10
"""Where pairs are few, a fit must not lack a quarter of them."""
ROUNDS = 2
"""Of rate and curve by turns; a third changes nothing."""
KNOTS = 7
CURVE_PENALTY = 0.3
FREE_CURVE_GATE = 2.0
"""Standard errors by which a free curve must foretell left-out pairs better than a rising one."""
PENALTIES = (1.0, 4.0, 16.0, 64.0)
CURVE_AGAIN_PENALTY = 4.0
FOLD_TOLERANCE = 1e-2
"""Nats of all pairs: far less than a choice depends on."""
LEAST_GAIN = 1.0
"""Nats by which further columns must; columns without meaning mostly lose some."""
SPEAKS_GATE = 1.0
"""Standard errors by which evidence must foretell left-out trusted pairs better than a toss."""
LEAST_NOISE = 0.003
"""At a noise rate of 0 one surprising label would outweigh all others."""


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
    """Return stage A, and g_A of each pair by a fit that left its fold out, (N,)."""
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


@dataclass(frozen=True)
class Evidence:
    """A fitted model of what signals say about labels.

    Attributes:
        curve: stage A.
        columns: how signals become columns.
        theta: stage B, (K,); zeros where it is left out.
        pull: (m, K) how much of θ is due to each trusted pair, λ_k θ_k = Σ_j (r_j − q_j) x_jk over
            all pairs j.
        noisy: (n,) g of the noisy pairs, by fits that left them out.
        trusted: (m,) likewise.
        noisy_parts: what each kind of signal adds to `noisy`, (n,) each, by the same fits.
        noise: share of flipped labels among the noisy pairs, by these.
        calibration: s, (2,) coefficients of g/size and tanh(2 g/size).
        size: the median |g| before it.
    """

    curve: Curve
    columns: Columns
    theta: Tensor
    pull: Tensor
    calibration: Tensor
    size: float
    noisy: Tensor
    trusted: Tensor
    noisy_parts: Mapping[str, Tensor]
    noise: NoiseRate

    @property
    def speaks(self) -> bool:
        """Whether left-out trusted pairs are foretold better than by a toss, by a standard error.

        If not, nothing in the signals tells right labels from wrong ones.
        """
        nobody_knows = torch.zeros_like(self.trusted)
        return gain(self.trusted, nobody_knows, nobody_knows) > SPEAKS_GATE

    def parts(self, pairs: PairSignals) -> dict[str, Tensor]:
        """Return what each kind of signal adds to g, nats, (N,) each."""
        curve = self.curve.log_odds(pairs.fluency)
        columns = self.columns(pairs, curve)
        x, widths = torch.cat(list(columns.values()), dim=1), [c.shape[1] for c in columns.values()]
        parts = by_kind(x, self.theta, widths)
        return _named(columns, curve, parts, self._calibrated(curve + parts.sum(1)))

    def log_odds(self, pairs: PairSignals) -> Tensor:
        """Return g, nats, (N,), of pairs that were not in the fit."""
        return torch.stack(list(self.parts(pairs).values())).sum(0)

    def _calibrated(self, raw: Tensor) -> Tensor:
        return odd_basis(raw, self.size) @ self.calibration

    def influence(self, pairs: PairSignals) -> Tensor:
        """Return what each trusted pair adds to each pair's g_B, nats, (N, m)."""
        columns = self.columns(pairs, self.curve.log_odds(pairs.fluency))
        return torch.cat(list(columns.values()), dim=1) @ self.pull.T

    def probability_correct(self, log_odds: Tensor) -> Tensor:
        """Return the probability that each noisy label is right, (N,), for g of these pairs (N,).

            p = σ(g + log((1 − ε) / ε))

        ε is the noise rate that is expected; where evidence does not speak, all are 1 − ε.
        """
        rate = torch.tensor(max(self.noise.expected, LEAST_NOISE), dtype=torch.float64)
        known = log_odds if self.speaks else torch.zeros_like(log_odds)
        return (known + torch.log1p(-rate) - rate.log()).sigmoid()


def fit_evidence(noisy: PairSignals, trusted: PairSignals, seed: int = 0) -> Evidence:
    """Fit both stages and the noise rate by turns.

    Args:
        noisy: pairs of which an unknown share is labelled wrong.
        trusted: pairs known to be labelled right.
        seed: of the deal into folds.
    """
    n, pairs = len(noisy), noisy + trusted
    is_noisy = torch.arange(len(pairs)) < n
    fold = deal(n, len(trusted), seed)

    def rates(of_noisy: float) -> Tensor:
        return is_noisy.double() * max(of_noisy, LEAST_NOISE)

    expected = estimate_noise_rate(-noisy.fluency, -trusted.fluency).expected
    for _ in range(ROUNDS):
        curve, by_curve = fit_curve(pairs.fluency, rates(expected), fold)
        expected = estimate_noise_rate(-by_curve[:n], -by_curve[n:]).expected
    columns = Columns.of(pairs)
    kinds, rate = columns(pairs, by_curve), rates(expected)
    g, gained = by_curve, LEAST_GAIN
    widths = [each.shape[1] for each in kinds.values()]
    theta = torch.zeros(sum(widths)).double()
    pull = theta.expand(len(trusted), -1)
    parts = torch.zeros(len(pairs), len(widths)).double()
    for left_aside in ({"even"}, set()):  # even signals must be worth their many columns
        x = torch.cat([each * (name not in left_aside) for name, each in kinds.items()], dim=1)
        found = _correct(x, widths, rate, by_curve, fold)
        if log_likelihood(found.g, rate).sum() > log_likelihood(g, rate).sum() + gained:
            g, parts, theta = found.g, found.parts, found.theta
            pull = found.slope[n:, None] * x[n:] / found.penalty
    size = robust_scale(g)
    basis = odd_basis(g, size)
    calibration = fit_coefficients(basis, torch.ones_like(g), rate.clamp_min(LEAST_RATE)[None])[0]
    g = basis @ calibration
    noise = estimate_noise_rate(-g[:n], -g[n:])
    noisy_parts = _named(kinds, by_curve[:n], parts[:n], g[:n])
    return Evidence(
        curve, columns, theta, pull, calibration, size, g[:n], g[n:], noisy_parts, noise
    )


@dataclass(frozen=True)
class _Correction:
    """Stage B by one choice of columns, and g of left-out pairs by it, whole and in parts."""

    g: Tensor
    parts: Tensor
    theta: Tensor
    penalty: Tensor
    slope: Tensor


def _correct(
    x: Tensor, widths: Sequence[int], rate: Tensor, by_curve: Tensor, fold: Tensor
) -> _Correction:
    """Fit θ with the penalty that foretells left-out pairs best."""
    fits = []
    for candidate in PENALTIES:
        penalty = torch.full((x.shape[1],), candidate, dtype=torch.float64)
        penalty[0] = CURVE_AGAIN_PENALTY
        theta = fit(x, rate, penalty, by_curve)

        def fit_on(these: Tensor, penalty: Tensor = penalty, theta: Tensor = theta) -> Tensor:
            without_others = fit(
                x[these], rate[these], penalty, by_curve[these], theta, FOLD_TOLERANCE
            )
            return by_kind(x, without_others, widths)

        parts = left_out(fold, fit_on)
        surprise = slope(by_curve + x @ theta, rate)
        fits.append(_Correction(by_curve + parts.sum(1), parts, theta, penalty, surprise))
    return max(fits, key=lambda one: float(log_likelihood(one.g, rate).sum()))


def deal(noisy: int, trusted: int, seed: int) -> Tensor:
    """Return each pair's fold, (N,), noisy and trusted ones dealt apart."""
    generator = torch.Generator().manual_seed(seed)
    folds = FOLDS_OF_FEW if noisy + trusted < FEW_PAIRS else FOLDS
    parts = [torch.randperm(count, generator=generator) % folds for count in (noisy, trusted)]
    return torch.cat(parts)


def by_kind(x: Tensor, theta: Tensor, widths: Sequence[int]) -> Tensor:
    """Return what each kind of columns adds to x·θ, (N, kinds)."""
    each = zip(x.split(list(widths), dim=1), theta.split(list(widths)), strict=True)
    return torch.stack([columns @ coefficients for columns, coefficients in each], dim=1)


def _named(names: Iterable[str], curve: Tensor, parts: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Return g by kinds: parts (N, kinds) of g_B, with g_A in the first, scaled to sum to g."""
    raw = curve + parts.sum(1)
    scale = torch.where(raw == 0, 1.0, g / raw)
    found = dict(zip(names, (parts * scale[:, None]).unbind(1), strict=True))
    return found | {"curve": found["curve"] + curve * scale}


def left_out(fold: Tensor, fit_on: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what is said of each pair, (N, ...), by the fit that left its fold out.

    `fit_on` says it of all pairs, by a fit on those that it is given.
    """
    by_fold = torch.stack([fit_on(fold != part) for part in range(int(fold.max()) + 1)])
    return by_fold[fold, torch.arange(len(fold))]


def gain(richer: Tensor, simpler: Tensor, rate: Tensor) -> float:
    """Return by how many standard errors the richer model's likelihood is larger, from g's (N,)."""
    difference = log_likelihood(richer, rate) - log_likelihood(simpler, rate)
    error = difference.std() * len(difference) ** 0.5
    return float(difference.sum() / (error + 1e-9))
