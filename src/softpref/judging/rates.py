"""Win rates and their intervals.

Shapes: n outcomes; R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from softpref.judging.outcomes import Outcome
from softpref.statistics.win_rate import wilson_interval

RESAMPLES = 2000
FEW_PROMPTS = 20  # with fewer prompts, the bootstrap is unreliable
_AT_ONCE = 100  # resamples
_NEWTON_STEPS = 100
_CONVERGED = 1e-8
_RIDGE = 1e-3  # keeps the fit finite where the longer response always wins
_RESULTS = ("win", "loss", "tie")

Interval = tuple[float, float]
Statistic = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class JudgedRate:
    """A win rate with its intervals and counts; rates are shares in [0, 1].

    Attributes:
        asked: number of comparisons, including failed ones.
        wins: of the response.
        losses: of the response.
        strong_wins: those of them where every verdict says `much better`; of `grades: five` alone.
        strong_losses: likewise.
        ties: verdicts of a tie, and verdicts that changed with the order.
        flipped: only the latter.
        failed: comparisons with a failed call.
        rate: wins / (wins + losses); None if nothing was decided.
        interval: Wilson's 95%, for independent comparisons.
        clustered_interval: 95% bootstrap over prompts, also valid if prompts repeat. If all were
            won or all lost, Wilson's over prompts; below 20 prompts, the wider of both.
        bounds: the rate if all failures were losses, and if all were wins.
        length_difference: mean of response minus baseline, characters.
        length_controlled: the rate at equal length, by `length_controlled_rate`; None if one side
            is always longer, so that it is not identified.
        length_controlled_interval: likewise.
        style_controlled: the rate at equal length, headers, lists and bold text, by
            `controlled_rate` on the differences of `style_difference`; None if one side always has
            more of one of them.
        style_controlled_interval: likewise.
        first_share: share of verdicts for the response shown first, without ties.
    """

    asked: int
    wins: int
    losses: int
    strong_wins: int
    strong_losses: int
    ties: int
    flipped: int
    failed: int
    rate: float | None
    interval: Interval
    clustered_interval: Interval
    bounds: Interval
    length_difference: float
    length_controlled: float | None
    length_controlled_interval: Interval
    style_controlled: float | None
    style_controlled_interval: Interval
    first_share: float | None


def judged_rate(
    outcomes: Sequence[Outcome],
    first_share: float | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> JudgedRate:
    """Return the win rate of outcomes with its intervals and counts.

    Args:
        outcomes: at least one.
        first_share: of the verdicts behind them.
        resamples: R.
        seed: of the resampling.
    """
    is_win, is_loss = (_is(outcomes, result) for result in ("win", "loss"))
    wins, losses, failed = (sum(o.result == r for o in outcomes) for r in ("win", "loss", "failed"))
    decided = wins + losses
    lengths = torch.tensor([float(outcome.length_difference) for outcome in outcomes])
    styles = torch.tensor([outcome.style_difference for outcome in outcomes])

    def rate(weights: Tensor) -> Tensor:
        won = weights @ is_win
        return won / (won + weights @ is_loss)

    def controlled(weights: Tensor) -> Tensor:
        return length_controlled_rate(is_win, is_loss, lengths, weights)

    def styled(weights: Tensor) -> Tensor:
        return controlled_rate(is_win, is_loss, styles, weights)

    found = [
        _at_once(each, len(outcomes)) if decided else None for each in (rate, controlled, styled)
    ]
    by_prompts = [
        _by_prompts(statistic, value, outcomes, resamples, seed)
        for statistic, value in zip((rate, controlled, styled), found, strict=True)
    ]
    return JudgedRate(
        asked=len(outcomes),
        wins=wins,
        losses=losses,
        strong_wins=sum(o.is_strong and o.result == "win" for o in outcomes),
        strong_losses=sum(o.is_strong and o.result == "loss" for o in outcomes),
        ties=len(outcomes) - decided - failed,
        flipped=sum(outcome.flipped for outcome in outcomes),
        failed=failed,
        rate=wins / decided if decided else None,
        interval=wilson_interval(wins, decided),
        clustered_interval=by_prompts[0],
        bounds=_bounds(wins, decided, failed),
        length_difference=fmean(outcome.length_difference for outcome in outcomes),
        length_controlled=found[1],
        length_controlled_interval=by_prompts[1],
        style_controlled=found[2],
        style_controlled_interval=by_prompts[2],
        first_share=first_share,
    )


def _at_once(statistic: Statistic, count: int) -> float | None:
    value = float(statistic(torch.ones(1, count).double()))
    return None if math.isnan(value) else value


def _by_prompts(
    statistic: Statistic,
    found: float | None,
    outcomes: Sequence[Outcome],
    resamples: int,
    seed: int,
) -> Interval:
    """Return the interval by prompts of a statistic whose value is `found`."""
    if found is None:
        return 0.0, 1.0
    decided = [outcome for outcome in outcomes if outcome.result in ("win", "loss")]
    settled = len({outcome.prompt for outcome in decided})
    over_prompts = wilson_interval(found * settled, settled)
    if len({outcome.result for outcome in decided}) == 1:  # every resample would be the same
        return over_prompts
    prompts = [outcome.prompt for outcome in outcomes]
    low, high = bootstrap_interval(statistic, prompts, resamples, seed)
    if settled < FEW_PROMPTS:
        return min(low, over_prompts[0]), max(high, over_prompts[1])
    return low, high


def _is(outcomes: Sequence[Outcome], result: str) -> Tensor:
    return torch.tensor([outcome.result == result for outcome in outcomes]).double()


def _bounds(wins: int, decided: int, failed: int) -> Interval:
    if decided + failed == 0:
        return 0.0, 1.0
    return wins / (decided + failed), (wins + failed) / (decided + failed)


def length_controlled_rate(
    is_win: Tensor, is_loss: Tensor, length_difference: Tensor, weights: Tensor
) -> Tensor:
    """Return the estimated win rate for responses of equal length.

        P(win) = σ(a + b tanh(Δ / s)),   the rate at Δ = 0 is σ(a)

    following Dubois et al. 2024 without their prompt difficulty term; s is the root mean square of
    Δ over decided outcomes.

    Args:
        is_win: (n,) 0 or 1.
        is_loss: (n,) likewise; both are 0 for a tie or a failure.
        length_difference: (n,), characters, response minus baseline.
        weights: (R, n), the count of each outcome.

    Returns:
        (R,), as `controlled_rate`.
    """
    decided = (is_win + is_loss) > 0
    difference = length_difference.double()
    spread = difference[decided].square().mean().sqrt().clamp_min(1.0)
    return controlled_rate(is_win, is_loss, (difference / spread).tanh()[:, None], weights)


def controlled_rate(
    is_win: Tensor, is_loss: Tensor, differences: Tensor, weights: Tensor
) -> Tensor:
    """Return the estimated win rate for responses without differences.

        P(win) = σ(a + b · x),   the rate at x = 0 is σ(a)

    fitted to decided outcomes. A ridge of 1e-3 on b keeps the fit finite. NaN if a is not
    identified, that is, if some difference is on one side of 0 in all decided outcomes.

    Args:
        is_win: (n,) 0 or 1.
        is_loss: (n,) likewise; both are 0 for a tie or a failure.
        differences: x, (n, k), response minus baseline.
        weights: (R, n), the count of each outcome.

    Returns:
        (R,).
    """
    decided = (is_win + is_loss) > 0
    x, won, counts = differences[decided].double(), is_win[decided], weights[:, decided].double()
    x = x[:, x.any(0)]  # without differences that are 0 everywhere, whose coefficients are 0
    if not x.shape[1]:
        return counts @ won / counts.sum(-1)
    columns = torch.cat([x.new_ones(len(x), 1), x], -1)
    # The intercept needs a tiny ridge: a sample of wins alone has no finite intercept.
    ridge = _RIDGE * torch.tensor([1e-3] + [1.0] * x.shape[1], dtype=torch.float64)
    width = columns.shape[1]
    products = torch.einsum("ni,nj->nij", columns, columns).flatten(1)
    coefficients = torch.zeros(len(weights), width, dtype=torch.float64)
    for _ in range(_NEWTON_STEPS):
        expected = (coefficients @ columns.T).sigmoid()
        slope = (counts * (won - expected)) @ columns - ridge * coefficients
        curved = counts * expected * (1 - expected)
        curvature = (curved @ products).unflatten(-1, (width, width)) + ridge.diag()
        step = torch.linalg.solve(curvature, slope).clamp(-1.0, 1.0)  # a full step can overshoot
        coefficients += step
        if float(step.abs().max()) < _CONVERGED:
            break
    below, above, equal = (counts @ side.double() > 0 for side in (x < 0, x > 0, x == 0))
    identified = ((below == above) | equal).all(-1)
    return coefficients[:, 0].sigmoid().where(identified, torch.nan)


def bootstrap_interval(
    statistic: Statistic, clusters: Sequence[str], resamples: int, seed: int
) -> Interval:
    """Return the 95% percentile interval of a statistic, by a bootstrap over clusters.

    Resamples with a non-finite statistic are dropped; (0, 1) if none is left.

    Args:
        statistic: maps weights (R, n), the counts of each item, to (R,).
        clusters: (n,) names; items with the same name are correlated.
        resamples: R.
        seed: of the draws.
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    member = torch.tensor([names[name] for name in clusters])
    generator = torch.Generator().manual_seed(seed)
    values = []
    for start in range(0, resamples, _AT_ONCE):
        count = min(_AT_ONCE, resamples - start)
        drawn = torch.randint(len(names), (count, len(names)), generator=generator)
        times = torch.zeros(count, len(names), dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones_like(times))
        values.append(statistic(times[:, member]))
    found = torch.cat(values)
    found = found[found.isfinite()]
    if not len(found):
        return 0.0, 1.0
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=found.dtype)).tolist()
    return low, high


@dataclass(frozen=True)
class Agreement:
    """Agreement of two judges: Cohen's κ, its 95% interval by prompts, number of comparisons.

    κ is None if both judges always gave the same single verdict.
    """

    kappa: float | None
    interval: Interval
    comparisons: int


def agreement(
    first: Sequence[Outcome], second: Sequence[Outcome], *, seed: int = 0
) -> Agreement | None:
    """Return the agreement of two judges over the comparisons that both judged.

        κ = (p_o − p_e) / (1 − p_e)   (Cohen 1960)

    with p_o the share of equal results, and p_e its expectation by chance, given each judge's
    shares of wins, losses and ties. None if no comparison was judged by both.
    """
    other = {outcome.uid: outcome.result for outcome in second}
    both = [
        (outcome.prompt, outcome.result, other[outcome.uid])
        for outcome in first
        if "failed" not in (outcome.result, other.get(outcome.uid, "failed"))
    ]
    if not both:
        return None
    results = [
        torch.tensor([[pair[judge] == result for result in _RESULTS] for pair in both]).double()
        for judge in (1, 2)
    ]
    same = (results[0] * results[1]).sum(-1)

    def kappa(weights: Tensor) -> Tensor:
        total = weights.sum(-1, keepdim=True)
        by_chance = ((weights @ results[0] / total) * (weights @ results[1] / total)).sum(-1)
        return (weights @ same / total[:, 0] - by_chance) / (1 - by_chance)

    prompts = [prompt for prompt, _, _ in both]
    whole = float(kappa(torch.ones(1, len(both)).double()))
    if math.isnan(whole):
        return Agreement(None, (-1.0, 1.0), len(both))
    return Agreement(whole, bootstrap_interval(kappa, prompts, RESAMPLES, seed), len(both))
