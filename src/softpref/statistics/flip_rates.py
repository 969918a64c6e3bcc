"""A probability of a flip for every pair: hard pairs may be labelled wrong more often.

Shapes: N pairs; F signals, 1 or 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from softpref.statistics.noisy_logistic import log_likelihood
from softpref.statistics.pair_signals import PairSignals

DIFFICULTY = ("log_probability",)
"""Odd signals whose size says how easy a pair is, beside fluency."""
QUANTILES = 65
_PENALTY = 4.0
_LEAST_RATE = 1e-3
_ITERATIONS = 60


@dataclass(frozen=True)
class FlipRates:
    """ε = σ(w_0 + w·E) / 2, where E, −1 to 1, are a pair's ranks by the sizes of its signals.

    Attributes:
        quantiles: of each signal's size, (65,).
        weights: w, (1 + F,).
        gain: nats of likelihood over one rate for all.
    """

    quantiles: Mapping[str, Tensor]
    weights: Tensor
    gain: float

    def __call__(self, pairs: PairSignals) -> Tensor:
        """Return ε for each pair, (N,)."""
        return _rates(self.weights, _ranks(sizes(pairs), self.quantiles))


def fit_flip_rates(pairs: PairSignals, log_odds: Tensor) -> FlipRates:
    """Fit w by the likelihood of noisy_logistic.py, g (N,) given, a ridge on all but w_0.

    Only noisy pairs are to be given, and g by fits that left them out: a g that has read a label
    agrees with it, and flips look fewer.
    """
    places = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
    quantiles = {name: values.quantile(places) for name, values in sizes(pairs).items()}
    ranks = _ranks(sizes(pairs), quantiles)
    weights, value = _fit(ranks, log_odds)
    _, constant = _fit(ranks[:, :0], log_odds)
    return FlipRates(quantiles, weights, value - constant)


def sizes(pairs: PairSignals) -> dict[str, Tensor]:
    """Return what says how easy pairs are to judge, by name, (N,) each."""
    named = {name: pairs.odd[name].double().abs() for name in DIFFICULTY if name in pairs.odd}
    return {"fluency": pairs.fluency.double().abs()} | named


def _ranks(values: Mapping[str, Tensor], quantiles: Mapping[str, Tensor]) -> Tensor:
    ranks = []
    for name, known in quantiles.items():
        at = torch.searchsorted(known, values[name]).clamp(1, QUANTILES - 1)
        low, high = known[at - 1], known[at]
        part = ((values[name] - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
        ranks.append(2 * (at - 1 + part) / (QUANTILES - 1) - 1)
    return torch.stack(ranks, dim=1)


def _rates(weights: Tensor, ranks: Tensor) -> Tensor:
    return torch.sigmoid(weights[0] + ranks @ weights[1:]).div(2).clamp_min(_LEAST_RATE)


def _fit(ranks: Tensor, log_odds: Tensor) -> tuple[Tensor, float]:
    """Return w, (1 + F,), and the log-likelihood at it, nats."""
    weights = torch.zeros(1 + ranks.shape[1], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [weights], max_iter=_ITERATIONS, line_search_fn="strong_wolfe", tolerance_change=1e-10
    )

    def loss() -> Tensor:
        search.zero_grad()
        value = _PENALTY / 2 * weights[1:].square().sum()
        value = value - log_likelihood(log_odds, _rates(weights, ranks)).sum()
        value.backward()
        return value

    search.step(loss)
    with torch.no_grad():
        fitted = weights.detach()
        return fitted, float(log_likelihood(log_odds, _rates(fitted, ranks)).sum())
