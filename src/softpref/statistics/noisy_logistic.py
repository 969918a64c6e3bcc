"""Logistic regression on labels of which a known share is wrong.

A pair's log-odds g = offset + x·θ are odd: swapping its responses changes their sign, so there is
no intercept. Shapes: N pairs, K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LEAST_RATE = 1e-6
_MAX_ITERATIONS = 30
_GIVE_UP = 1e8  # damping at which no step gains any more


def log_likelihood(log_odds: Tensor, noise_rate: Tensor) -> Tensor:
    """Return log[(1 − ε) σ(g) + ε σ(−g)], nats, (N,): forward correction (Patrini et al. 2017).

    Args:
        log_odds: (N,) g, of the response labelled better.
        noise_rate: (N,) ε, the probability that the pair's label is flipped; 0 where it is trusted.
    """
    rate = noise_rate.clamp_min(LEAST_RATE)
    kept = torch.log1p(-rate) + logsigmoid(log_odds)
    return torch.logaddexp(kept, rate.log() + logsigmoid(-log_odds))


def slope(log_odds: Tensor, noise_rate: Tensor) -> Tensor:
    """Return the derivative of `log_likelihood` in g, r − q, (N,); see `fit`."""
    rate = noise_rate.clamp_min(LEAST_RATE)
    return (log_odds + torch.log1p(-rate) - rate.log()).sigmoid() - log_odds.sigmoid()


def fit(
    x: Tensor,
    noise_rate: Tensor,
    penalty: Tensor,
    offset: Tensor,
    start: Tensor | None = None,
    tolerance: float = 1e-4,
) -> Tensor:
    """Return θ, (K,), by damped Fisher scoring; a step that does not gain is tried again, shorter.

        θ = argmax Σ_i log[(1 − ε_i) σ(g_i) + ε_i σ(−g_i)] − Σ_k λ_k θ_k² / 2

    With q = σ(g) and l = log((1 − ε)/ε), a pair's derivative in g is r − q and its information
    (r − q)(q − r'), r = σ(g + l) and r' = σ(g − l): a noisy pair says (1 − 2ε)² of a trusted one.

    Args:
        x: (N, K) columns, float64.
        noise_rate: (N,) ε.
        penalty: (K,) λ, positive.
        offset: (N,) what is known of g already.
        start: (K,) where the search begins; zeros by default.
        tolerance: gain of a step, nats of all pairs together, at which the search ends.
    """
    labelled, used = noise_rate != 0.5, x.any(0)  # at one half a label says nothing
    offset = offset.expand(len(x))[labelled]
    x, noise_rate = x[labelled][:, used], noise_rate[labelled]
    penalty, rate = penalty[used], noise_rate.clamp_min(LEAST_RATE)
    prior = torch.log1p(-rate) - rate.log()
    theta = x.new_zeros(x.shape[1]) if start is None else start[used]
    rough = x.float()  # exact enough for the length and direction of a step

    def loss(at: Tensor) -> Tensor:
        return (penalty * at**2).sum() / 2 - log_likelihood(offset + x @ at, noise_rate).sum()

    least, damping = loss(theta), 1e-3
    for _ in range(_MAX_ITERATIONS):
        g = offset + x @ theta
        q, right, wrong = g.sigmoid(), (g + prior).sigmoid(), (g - prior).sigmoid()
        pull = right - q
        gradient = x.T @ pull - penalty * theta
        weight = (pull * (q - wrong)).float()
        information = ((rough * weight[:, None]).T @ rough).double() + penalty.diag()
        new = least.new_tensor(torch.inf)
        while new > least and damping < _GIVE_UP:
            system = information + damping * information.diagonal().diag()
            proposed = theta + torch.linalg.solve(system, gradient)
            new = loss(proposed)
            damping = damping * 10 if new > least else max(damping / 5, 1e-6)
        if new > least:
            break
        gain, least, theta = least - new, new, proposed
        if gain < tolerance:
            break
    return x.new_zeros(len(used)).masked_scatter(used, theta)
