"""How surely a pair's signals say that its label is right, learned from trusted and noisy pairs.

    g   = s(g_A(t) + g_B)                                                 t: minus PPLDiff
    g_B = θ_0 g_A + tanh(2 t / s) [E, E_j E_k / 3]·θ_E + O·θ_O            E even, O odd signals

with ridge penalties, by the likelihood of noisy_logistic.py. Not in the paper, whose labels come
from PPLDiff alone. Each model is fitted on all pairs, and again on folds, so that no pair is judged
by a fit that has read its label; s, odd and rising, calibrates what these say.

Flips may be more likely where a pair is hard: ε is then a pair's own (flip_rates.py).

Shapes: N pairs, of which n are noisy and come first, and m trusted; K columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softpref.statistics.calibration import (
    SWAPPED_WEIGHT,
    fit_coefficients,
    odd_basis,
    robust_scale,
)
from softpref.statistics.flip_rates import FlipRates, fit_flip_rates
from softpref.statistics.fluency_curve import Curve, fit_curve
from softpref.statistics.folds import deal, gain, left_out
from softpref.statistics.noise_rate import NoiseRate, estimate_noise_rate
from softpref.statistics.noisy_logistic import LEAST_RATE, fit, log_likelihood, slope
from softpref.statistics.pair_signals import PairSignals, SignalColumns

PENALTIES = (1.0, 4.0, 16.0, 64.0)
CURVE_AGAIN_PENALTY = 4.0
FOLD_TOLERANCE = 1e-2
"""Nats of all pairs: far less than a choice depends on."""
LEAST_GAIN = 1.0
"""Nats by which further columns must foretell left-out pairs better; those without meaning mostly
lose some."""
SPEAKS_GATE = 1.645
"""Standard errors by which evidence must foretell left-out trusted pairs better than a toss: 5%."""
LEAST_NOISE = 0.003
"""At a noise rate of 0 one surprising label would outweigh all others."""
NO_LABEL = 0.5
"""The noise rate at which a label says nothing."""
FLIP_RATES_GATE, HOPELESS, SETTLED = 7.0, 2.0, 1.0
"""Nats by which a rate for each pair must beat one for all: chance does so once in a thousand sets;
nats below which a further round is not worth it; nats that a last round adds."""
FLIP_RATE_ROUNDS = 12


@dataclass(frozen=True)
class Evidence:
    """A fitted model of what signals say about labels.

    Attributes:
        curve: stage A.
        columns: how signals become columns.
        theta: stage B, (K,); zeros where it is left out.
        pull: (m, K) how much of θ is due to each trusted pair, λ_k θ_k = Σ_j (r_j − q_j) x_jk over
            all pairs j.
        calibration: s, (2,) coefficients of g/size and tanh(2 g/size).
        size: the median |g| before it.
        noisy: (n,) g of the noisy pairs, by fits that left them out.
        trusted: (m,) likewise.
        noisy_parts: what each kind of signal adds to `noisy`, (n,) each, by the same fits.
        noise: share of flipped labels among the noisy pairs, by these.
        flip_rates: a rate for each pair; None where one for all does.
    """

    curve: Curve
    columns: SignalColumns
    theta: Tensor
    pull: Tensor
    calibration: Tensor
    size: float
    noisy: Tensor
    trusted: Tensor
    noisy_parts: Mapping[str, Tensor]
    noise: NoiseRate
    flip_rates: FlipRates | None

    @property
    def speaks(self) -> bool:
        """Whether left-out trusted pairs are foretold better than by a toss (one-sided 5% test).

        If not, nothing in the signals distinguishes right labels from wrong ones.
        """
        nobody_knows = torch.zeros_like(self.trusted)
        return gain(self.trusted, nobody_knows, nobody_knows) > SPEAKS_GATE

    def parts(self, pairs: PairSignals) -> dict[str, Tensor]:
        """Return what each kind of signal adds to g, nats, (N,) each."""
        curve = self.curve.log_odds(pairs.fluency)
        columns = self.columns(pairs, curve)
        x, widths = torch.cat(list(columns.values()), dim=1), [c.shape[1] for c in columns.values()]
        parts = by_kind(x, self.theta, widths)
        raw = curve + parts.sum(1)
        return _named(columns, curve, parts, odd_basis(raw, self.size) @ self.calibration)

    def log_odds(self, pairs: PairSignals) -> Tensor:
        """Return g, nats, (N,), of pairs that were not in the fit."""
        return torch.stack(list(self.parts(pairs).values())).sum(0)

    def influence(self, pairs: PairSignals) -> Tensor:
        """Return what each trusted pair adds to each pair's g_B, nats, (N, m)."""
        columns = self.columns(pairs, self.curve.log_odds(pairs.fluency))
        return torch.cat(list(columns.values()), dim=1) @ self.pull.T

    def rates(self, pairs: PairSignals) -> Tensor:
        """Return ε of noisy pairs, (N,): the probability of a flip before g is known."""
        if self.flip_rates:
            return self.flip_rates(pairs)
        return torch.full((len(pairs),), max(self.noise.expected, LEAST_NOISE)).double()

    def probability_correct(self, log_odds: Tensor, rate: Tensor) -> Tensor:
        """Return the probability that each noisy label is right, (N,), for g and ε (N,).

            p = σ(g + log((1 − ε) / ε))

        Where evidence does not speak, all are 1 − ε.
        """
        known = log_odds if self.speaks else torch.zeros_like(log_odds)
        return (known + torch.log1p(-rate) - rate.log()).sigmoid()


def fit_evidence(
    noisy: PairSignals, trusted: PairSignals, seed: int = 0, content: Tensor | None = None
) -> Evidence:
    """Fit both stages, without the noisy labels and, at the noise rate that these say, with them.

    Noisy labels are not read where left-out trusted pairs are foretold worse for it: where wrong
    labels depend on the signals, as judges' do, they teach the judge's mistakes.

    Args:
        noisy: pairs of which an unknown share is labelled wrong.
        trusted: pairs known to be labelled right.
        seed: of the deal into folds.
        content: (n,) a number for each noisy pair that those with the same responses share; a fit
            that leaves one of them out leaves all of them out.
    """
    n, pairs = len(noisy), noisy + trusted
    fold = deal(n, len(trusted), seed, content)
    alone = _choose(_Model.of(pairs, _rates(pairs, n, NO_LABEL), fold), fold)
    rate = estimate_noise_rate(-alone.g[:n], -alone.g[n:]).expected
    both = _choose(_Model.of(pairs, _rates(pairs, n, rate), fold), fold)
    model, flip_rates = _vary(both, noisy, fold)
    if _value(alone.g[n:]) > _value(model.g[n:]) + LEAST_GAIN:
        model, found = alone, fit_flip_rates(noisy, alone.g[:n])
        flip_rates = found if found.gain > FLIP_RATES_GATE else None
    noise = estimate_noise_rate(-model.g[:n], -model.g[n:])
    if flip_rates:
        noise = noise.around(float(flip_rates(noisy).mean()))
    g = model.g
    return Evidence(
        model.curve, model.columns, model.theta, model.pull(n), model.calibration, model.size,
        g[:n], g[n:], model.named_parts(n), noise, flip_rates,
    )  # fmt: skip


@dataclass(frozen=True)
class _Model:
    """Both stages at given rates, and what they say of left-out pairs.

    Attributes:
        pairs: the N pairs.
        rate: (N,) ε.
        columns: how signals become columns.
        curve: stage A.
        by_curve: (N,) g_A of left-out pairs.
        kinds: columns of each kind, (N, K_kind) each; zeros where a kind is left aside.
        penalty: λ of stage B, (K,).
        theta: stage B, (K,); zeros where it is left out.
        parts: (N, kinds) what each kind adds to g_B of left-out pairs.
        g: (N,) g of left-out pairs.
        calibration: s, its coefficients, (2,).
        size: the median |g| before it.
    """

    pairs: PairSignals
    rate: Tensor
    columns: SignalColumns
    curve: Curve
    by_curve: Tensor
    kinds: Mapping[str, Tensor]
    penalty: Tensor
    theta: Tensor
    parts: Tensor
    g: Tensor
    calibration: Tensor
    size: float

    @staticmethod
    def of(pairs: PairSignals, rate: Tensor, fold: Tensor) -> _Model:
        """Return stage A alone."""
        columns = SignalColumns.of(pairs)
        curve, by_curve = fit_curve(pairs.fluency, rate, fold)
        kinds = columns(pairs, by_curve)
        nothing = torch.zeros(sum(each.shape[1] for each in kinds.values())).double()
        parts = torch.zeros(len(pairs), len(kinds)).double()
        g, calibration, size = _calibrated(by_curve, rate)
        return _Model(
            pairs, rate, columns, curve, by_curve, kinds, torch.ones_like(nothing), nothing, parts,
            g, calibration, size,
        )  # fmt: skip

    def corrected(self, penalty: Tensor, left_aside: Iterable[str], fold: Tensor) -> _Model:
        """Return the same with stage B, by this penalty (K,) and without some kinds."""
        kinds = {name: x * (name not in left_aside) for name, x in self.kinds.items()}
        x, widths = torch.cat(list(kinds.values()), dim=1), [k.shape[1] for k in kinds.values()]
        theta = fit(x, self.rate, penalty, self.by_curve, self.theta)

        def without_others(these: Tensor) -> Tensor:
            found = fit(
                x[these], self.rate[these], penalty, self.by_curve[these], theta, FOLD_TOLERANCE
            )
            return by_kind(x, found, widths)

        parts = left_out(fold, without_others)
        g, calibration, size = _calibrated(self.by_curve + parts.sum(1), self.rate)
        return replace(
            self, kinds=kinds, penalty=penalty, theta=theta, parts=parts, g=g,
            calibration=calibration, size=size,
        )  # fmt: skip

    @property
    def value(self) -> float:
        """Return the log-likelihood of left-out pairs, nats, before g is calibrated on them."""
        return float(log_likelihood(self.by_curve + self.parts.sum(1), self.rate).sum())

    def pull(self, noisy: int) -> Tensor:
        """Return how much of θ is due to each trusted pair, (m, K)."""
        x = torch.cat(list(self.kinds.values()), dim=1)
        surprise = slope(self.by_curve + x @ self.theta, self.rate)
        pull = surprise[noisy:, None] * x[noisy:] / self.penalty
        return pull * bool(self.theta.any())

    def named_parts(self, noisy: int) -> dict[str, Tensor]:
        """Return what each kind adds to g of the noisy pairs, (n,) each."""
        return _named(self.kinds, self.by_curve[:noisy], self.parts[:noisy], self.g[:noisy])


def _choose(model: _Model, fold: Tensor) -> _Model:
    """Add stage B with the columns and the penalty that foretell left-out pairs best."""
    best = model
    for left_aside in ({"even"}, set[str]()):  # even signals must be worth their many columns
        found = None
        for size in PENALTIES:
            penalty = torch.full_like(model.theta, size)
            penalty[0] = CURVE_AGAIN_PENALTY
            next_one = model.corrected(penalty, left_aside, fold)
            if found and next_one.value < found.value:
                break
            found = next_one
        if found and found.value > best.value + LEAST_GAIN:
            best = found
    return best


def _vary(model: _Model, noisy: PairSignals, fold: Tensor) -> tuple[_Model, FlipRates | None]:
    """Fit a rate for each pair and the model by turns, and keep both if they are surely better."""
    n, varied, last = len(noisy), model, 0.0
    left_aside = [name for name, x in model.kinds.items() if not x.any()]
    for _ in range(FLIP_RATE_ROUNDS):
        found = fit_flip_rates(noisy, varied.g[:n])
        if found.gain < HOPELESS:
            return model, None
        if abs(found.gain - last) < SETTLED:
            break
        last = found.gain
        varied = replace(
            _Model.of(model.pairs, _rates(model.pairs, n, found(noisy)), fold), theta=varied.theta
        )
        if model.theta.any():
            varied = varied.corrected(model.penalty, left_aside, fold)
    return (varied, found) if found.gain > FLIP_RATES_GATE else (model, None)


def _value(trusted: Tensor) -> float:
    """Return the log-likelihood of trusted pairs by their g (m,), nats."""
    return float(log_likelihood(trusted, torch.zeros_like(trusted)).sum())


def _rates(pairs: PairSignals, noisy: int, of_noisy: Tensor | float) -> Tensor:
    """Return ε of all pairs, (N,): 0 for trusted ones."""
    rate = torch.zeros(len(pairs), dtype=torch.float64)
    rate[:noisy] = torch.as_tensor(of_noisy).double().clamp_min(LEAST_NOISE)
    return rate


def _calibrated(raw: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return g (N,), and s: its coefficients (2,) and size.

    The trusted pairs also count swapped, as half a pair in all, so that g stays within what so many
    of them can show where none contradicts the others.
    """
    size = robust_scale(raw)
    basis = odd_basis(raw, size)
    trusted = rate == 0
    rows = torch.cat([basis, -basis[trusted]])
    rates = torch.cat([rate, rate[trusted]]).clamp_min(LEAST_RATE)
    weight = torch.ones_like(rates)
    weight[len(rate) :] = SWAPPED_WEIGHT / int(trusted.sum())
    calibration = fit_coefficients(rows, weight, rates[None])[0]
    return basis @ calibration, calibration, size


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
