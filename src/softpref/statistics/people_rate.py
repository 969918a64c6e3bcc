"""The win rate that people would give, from a few of their verdicts and many of a judge's.

Shapes: N comparisons, the first dimension of `judged`; n of them with people's verdicts; C prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softpref.statistics.win_rate import student_97_5, wilson_interval

_FEW = 20  # prompts that people decided; with fewer, no variance by prompts is reliable
_ROUNDS = 3  # of weight and rate; the rate then changes by less than 1e-4


@dataclass(frozen=True)
class PeopleRate:
    """The win rate that people would give; rates are shares in [0, 1].

    Attributes:
        verdicts: number of comparisons with people's verdicts.
        wins: of the response, by people; the mean where several people judged a comparison.
        losses: likewise.
        ties: likewise.
        alone: the rate of people's verdicts alone, wins / (wins + losses); None if they decided
            nothing.
        alone_interval: its 95% interval by prompts.
        rate: with the judge's verdicts; equal to `alone` if these are worth nothing.
        interval: its 95% interval by prompts.
        judge_weight: λ, from 0, where the judge is worth nothing, to 1.
        worth: the number of people's verdicts that, alone, would give an interval as short.
        unlike: distance, in standard errors, between the judge's mean verdict on comparisons with
            people's verdicts and on all; far from 0, the former are not a random sample.
    """

    verdicts: int
    wins: float
    losses: float
    ties: float
    alone: float | None
    alone_interval: tuple[float, float]
    rate: float | None
    interval: tuple[float, float]
    judge_weight: float
    worth: float
    unlike: float


def people_rate(
    people: Tensor, labelled: Tensor, judged: Tensor, prompts: Sequence[str]
) -> PeopleRate:
    """Return the win rate that people would give, by prediction-powered inference.

    PPI++ (Angelopoulos, Duchi & Zrnic 2023) for the ratio θ = E[win] / E[win + loss]: with
    g = win − θ (win + loss) of people's verdicts and g′ of the judge's, θ solves

        mean_n g + λ (mean_N g′ − mean_n g′) = 0

    and λ in [0, 1] minimises the variance, which is summed by prompts, each term divided by one
    minus its leverage. The interval is Student's, on the logit scale. λ = 0 where it is not above 0
    by more than its own 95% interval.

    Args:
        people: (n, 2), shares of win and loss; the rest are ties.
        labelled: (n,), their places among all comparisons; a random sample of them.
        judged: (N, 2), 0 or 1; both are 0 for a tie or a failure.
        prompts: (N,), comparisons of one prompt are correlated.
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(prompts))}
    member = torch.tensor([names[name] for name in prompts])
    sample = _Sample(people.double(), labelled, judged.double(), member, len(names))
    wins, losses = people.double().sum(0).tolist()
    alone, alone_interval = sample.alone()
    corrected = sample.corrected(alone) if alone is not None else None
    rate, interval, weight, worth = corrected or (alone, alone_interval, 0.0, float(len(people)))
    return PeopleRate(
        verdicts=len(people),
        wins=wins,
        losses=losses,
        ties=len(people) - wins - losses,
        alone=alone,
        alone_interval=alone_interval,
        rate=rate,
        interval=interval,
        judge_weight=weight,
        worth=worth,
        unlike=sample.unlike(),
    )


@dataclass(frozen=True)
class _Sample:
    """People's verdicts among a judge's; `member` (N,) is the prompt of each comparison."""

    people: Tensor
    labelled: Tensor
    judged: Tensor
    member: Tensor
    clusters: int

    def alone(self) -> tuple[float | None, tuple[float, float]]:
        """Return the rate of people's verdicts alone, with its interval."""
        won, decided = self.people[:, 0].sum(), self.people.sum()
        if not decided:
            return None, (0.0, 1.0)
        rate = float(won / decided)
        settled = self._settled()
        by_prompts = wilson_interval(rate * settled, settled)
        if not 0 < rate < 1:
            return rate, by_prompts
        low, high = self._interval(rate, self._people_terms(rate), 0.0, None)[0]
        if settled < _FEW:
            return rate, (min(low, by_prompts[0]), max(high, by_prompts[1]))
        return rate, (low, high)

    def corrected(self, rate: float) -> tuple[float, tuple[float, float], float, float] | None:
        """Return rate, interval, λ and worth with the judge; None if it is worth nothing."""
        if not 0 < rate < 1 or self._settled() < _FEW or len(self.people) == len(self.judged):
            return None
        for _ in range(_ROUNDS):
            ours, theirs = self._people_terms(rate), self._judge_terms(rate)
            curved = float(theirs @ theirs)
            slope = float(ours @ theirs) / curved if curved else 0.0
            weight = min(max(slope, 0.0), 1.0)
            won, decided = (
                self._mean(self.people[:, 0], self.judged[:, 0], weight),
                self._mean(self.people.sum(-1), self.judged.sum(-1), weight),
            )
            if not 0 < won < decided:
                return None
            rate = won / decided
        ours, theirs = self._people_terms(rate), self._judge_terms(rate)
        error = float((theirs * (ours - weight * theirs)).square().sum().sqrt()) / curved
        if slope <= student_97_5(self._groups() - 2) * error:
            return None
        interval, variance = self._interval(rate, ours, weight, theirs)
        without = self._interval(rate, ours, 0.0, None)[1]
        return rate, interval, weight, len(self.people) * without / variance

    def unlike(self) -> float:
        """Return the judge's mean verdict on the sample minus on all, in standard errors."""
        terms = self._difference(self.judged[:, 0] - self.judged[:, 1])
        error = float(terms.square().sum().sqrt())
        verdict = self.judged[:, 0] - self.judged[:, 1]
        return float(verdict[self.labelled].mean() - verdict.mean()) / error if error else 0.0

    def _mean(self, ours: Tensor, theirs: Tensor, weight: float) -> float:
        shift = theirs.mean() - theirs[self.labelled].mean()
        return float(ours.mean() + weight * shift)

    def _people_terms(self, rate: float) -> Tensor:
        """Return each prompt's part of mean_n g − E[g], (C,)."""
        g = self.people[:, 0] - rate * self.people.sum(-1)
        return self._by_prompt(g - g.mean(), self.labelled)

    def _judge_terms(self, rate: float) -> Tensor:
        """Return each prompt's part of mean_n g′ − mean_N g′, (C,)."""
        return self._difference(self.judged[:, 0] - rate * self.judged.sum(-1))

    def _difference(self, value: Tensor) -> Tensor:
        """Return each prompt's part of the sample's mean minus the mean of all, (C,)."""
        sampled = value[self.labelled]
        every = torch.arange(len(value))
        return self._by_prompt(sampled - sampled.mean(), self.labelled) - self._by_prompt(
            value - value.mean(), every
        )

    def _by_prompt(self, terms: Tensor, places: Tensor) -> Tensor:
        sums = torch.zeros(self.clusters, dtype=torch.float64)
        return sums.index_add_(0, self.member[places], terms) / len(places)

    def _settled(self) -> int:
        """Return the number of prompts where people decided something."""
        return len(self.member[self.labelled[self.people.sum(-1) > 0]].unique())

    def _groups(self) -> int:
        """Return the number of prompts with people's verdicts."""
        return len(self.member[self.labelled].unique())

    def _interval(
        self, rate: float, ours: Tensor, weight: float, theirs: Tensor | None
    ) -> tuple[tuple[float, float], float]:
        """Return the interval of a rate, and its variance."""
        share = self.member[self.labelled].bincount(minlength=self.clusters) / len(self.labelled)
        leverage, terms, fitted = share.double(), ours, 1
        decided = float(self.people.sum(-1).mean())
        if theirs is not None:
            leverage = leverage + theirs.square() / theirs.square().sum()
            terms, fitted = ours - weight * theirs, 2
            decided = self._mean(self.people.sum(-1), self.judged.sum(-1), weight)
        kept = (1 - leverage).clamp_min(0.1)  # a single prompt may carry all
        variance = float((terms / kept).square().sum()) / decided**2
        freedom = max(self._groups() - fitted, 1)
        half = student_97_5(freedom) * math.sqrt(variance) / (rate * (1 - rate))
        logit = math.log(rate / (1 - rate))
        return (_logistic(logit - half), _logistic(logit + half)), variance


def _logistic(x: float) -> float:
    return math.exp(min(x, 0.0)) / (1 + math.exp(-abs(x)))
