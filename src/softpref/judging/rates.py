"""Win rates, and how sure they are.

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
FEW_PROMPTS = 20  # below, resampling them says too little
_AT_ONCE = 100  # resamples
_NEWTON_STEPS = 100
_CONVERGED = 1e-8
_RIDGE = 1e-3  # keeps the fit finite where the longer response always wins
_RESULTS = ("win", "loss", "tie")

Interval = tuple[float, float]
Statistic = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class JudgedRate:
    """A win rate with everything that says how far to believe it; rates are shares in [0, 1].

    Attributes:
        asked: comparisons, failed ones among them.
        wins: of the response; `losses` and `ties` likewise.
        losses: see `wins`.
        ties: verdicts of a tie, and verdicts that changed with the order.
        flipped: the latter alone.
        failed: comparisons with a failed call.
        rate: wins / (wins + losses); None where nothing was decided.
        interval: Wilson's 95%; it takes comparisons for independent.
        clustered_interval: bootstrap over prompts, 95%; right also where prompts repeat. Where all
            were won or all lost, Wilson's over prompts; below 20 prompts, the wider of both.
        bounds: the rate if all failures were losses, and if all were wins.
        length_difference: mean of response minus baseline, characters.
        length_controlled: the rate at no difference in length, by `length_controlled_rate`; None
            where one side is always the longer, so that nothing says what it would be.
        length_controlled_interval: likewise.
        first_share: how often, of all verdicts but ties, the response shown first was preferred.
    """

    asked: int
    wins: int
    losses: int
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
    first_share: float | None


def judged_rate(
    outcomes: Sequence[Outcome],
    first_share: float | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> JudgedRate:
    """Return the win rate of outcomes and what belongs to it.

    Args:
        outcomes: at least one.
        first_share: of the verdicts behind them.
        resamples: R.
        seed: of the resampling.
    """
    is_win, is_loss = (_is(outcomes, result) for result in ("win", "loss"))
    wins, losses, failed = (sum(o.result == r for o in outcomes) for r in ("win", "loss", "failed"))
    decided = wins + losses
    prompts = [outcome.prompt for outcome in outcomes]
    lengths = torch.tensor([float(outcome.length_difference) for outcome in outcomes])

    def rate(weights: Tensor) -> Tensor:
        won = weights @ is_win
        return won / (won + weights @ is_loss)

    def controlled(weights: Tensor) -> Tensor:
        return length_controlled_rate(is_win, is_loss, lengths, weights)

    settled = len({o.prompt for o in outcomes if o.result in ("win", "loss")})

    def interval(statistic: Statistic, found: float | None) -> Interval:
        if found is None:
            return 0.0, 1.0
        by_prompts = wilson_interval(found * settled, settled)
        if not wins or not losses:  # every resample would be alike
            return by_prompts
        low, high = bootstrap_interval(statistic, prompts, resamples, seed)
        if settled < FEW_PROMPTS:
            return min(low, by_prompts[0]), max(high, by_prompts[1])
        return low, high

    won = wins / decided if decided else None
    at_equal_length = _at_equal_length(controlled, len(outcomes)) if decided else None

    return JudgedRate(
        asked=len(outcomes),
        wins=wins,
        losses=losses,
        ties=len(outcomes) - decided - failed,
        flipped=sum(outcome.flipped for outcome in outcomes),
        failed=failed,
        rate=won,
        interval=wilson_interval(wins, decided),
        clustered_interval=interval(rate, won),
        bounds=_bounds(wins, decided, failed),
        length_difference=fmean(outcome.length_difference for outcome in outcomes),
        length_controlled=at_equal_length,
        length_controlled_interval=interval(controlled, at_equal_length),
        first_share=first_share,
    )


def _at_equal_length(controlled: Statistic, count: int) -> float | None:
    rate = float(controlled(torch.ones(1, count).double()))
    return None if math.isnan(rate) else rate


def _is(outcomes: Sequence[Outcome], result: str) -> Tensor:
    return torch.tensor([outcome.result == result for outcome in outcomes]).double()


def _bounds(wins: int, decided: int, failed: int) -> Interval:
    if decided + failed == 0:
        return 0.0, 1.0
    return wins / (decided + failed), (wins + failed) / (decided + failed)


def length_controlled_rate(
    is_win: Tensor, is_loss: Tensor, length_difference: Tensor, weights: Tensor
) -> Tensor:
    """Return the win rate that would be seen if both responses were equally long.

        P(win) = σ(a + b tanh(Δ / s)),   the rate at Δ = 0 is σ(a)

    fitted to decided outcomes, after Dubois et al. 2024 without their term for a prompt's
    difficulty; s is the root mean square of Δ over them. A ridge of 1e-3 on b keeps it finite. NaN
    where nothing identifies a: where all Δ lie on one side of 0.

    Args:
        is_win: (n,) 0 or 1.
        is_loss: (n,) likewise; neither is a tie or a failure.
        length_difference: (n,), characters, response minus baseline.
        weights: (R, n), how often each outcome counts.

    Returns:
        (R,).
    """
    decided = (is_win + is_loss) > 0
    difference = length_difference[decided].double()
    spread = difference.square().mean().sqrt().clamp_min(1.0)
    columns = torch.stack([torch.ones_like(difference), (difference / spread).tanh()], -1)
    won, counts = is_win[decided], weights[:, decided].double()
    # The intercept needs next to none, but a sample that was all won has no finite one.
    ridge = _RIDGE * torch.tensor([1e-3, 1.0], dtype=torch.float64)
    coefficients = torch.zeros(len(weights), 2, dtype=torch.float64)
    for _ in range(_NEWTON_STEPS):
        expected = (coefficients @ columns.T).sigmoid()
        slope = (counts * (won - expected)) @ columns - ridge * coefficients
        curved = counts * expected * (1 - expected)
        curvature = torch.einsum("rn,ni,nj->rij", curved, columns, columns) + ridge.diag()
        step = torch.linalg.solve(curvature, slope).clamp(-1.0, 1.0)  # far off it overshoots
        coefficients += step
        if float(step.abs().max()) < _CONVERGED:
            break
    sides = [(counts * side).sum(-1) > 0 for side in (difference < 0, difference > 0)]
    identified = (sides[0] == sides[1]) | ((counts * (difference == 0)).sum(-1) > 0)
    return coefficients[:, 0].sigmoid().where(identified, torch.nan)


def bootstrap_interval(
    statistic: Statistic, clusters: Sequence[str], resamples: int, seed: int
) -> Interval:
    """Return the 95% percentile interval of a statistic, whole clusters drawn with replacement.

    Resamples in which the statistic is not finite are left out; (0, 1) where all are.

    Args:
        statistic: from weights (R, n), how often each item was drawn, to (R,).
        clusters: (n,) names; items of one name hang together.
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
    """How far two judges agree: Cohen's κ, its 95% interval by prompts, over how many.

    κ is None where both said one thing throughout.
    """

    kappa: float | None
    interval: Interval
    comparisons: int


def agreement(
    first: Sequence[Outcome], second: Sequence[Outcome], *, seed: int = 0
) -> Agreement | None:
    """Return the agreement of two judges over the comparisons that both decided or called ties.

        κ = (p_o − p_e) / (1 − p_e)   (Cohen 1960)

    with p_o the share of equal results and p_e what the judges' own shares of wins, losses and ties
    would make of it by chance. None where no comparison was judged by both.
    """
    other = {outcome.uid: outcome.result for outcome in second}
    both = [
        (outcome.prompt, outcome.result, other[outcome.uid])
        for outcome in first
        if "failed" not in (outcome.result, other.get(outcome.uid, "failed"))
    ]
    if not both:
        return None
    says = [
        torch.tensor([[pair[judge] == result for result in _RESULTS] for pair in both]).double()
        for judge in (1, 2)
    ]
    same = (says[0] * says[1]).sum(-1)

    def kappa(weights: Tensor) -> Tensor:
        total = weights.sum(-1, keepdim=True)
        by_chance = ((weights @ says[0] / total) * (weights @ says[1] / total)).sum(-1)
        return (weights @ same / total[:, 0] - by_chance) / (1 - by_chance)

    prompts = [prompt for prompt, _, _ in both]
    whole = float(kappa(torch.ones(1, len(both)).double()))
    if math.isnan(whole):
        return Agreement(None, (-1.0, 1.0), len(both))
    return Agreement(whole, bootstrap_interval(kappa, prompts, RESAMPLES, seed), len(both))
