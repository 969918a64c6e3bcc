"""How often each annotator's labels are right, from evidence, agreement and trusted pairs.

Dawid and Skene (1979) for pairs. Content c has a truth z = ±1: which of its responses is better.
Voter v says s = ±1, and is right with probability r_v = σ(θ_v), whatever the others say:

    P(votes on c) = Σ_z ½ Π_v σ(z s_cv θ_v)

Evidence is a voter too: its sign votes, with a reliability of its own for each group of contents of
similar |evidence|. So its scale is not trusted and no shape is assumed. Trusted pairs have a known
z; they say how reliable each group is, and so are labels that annotators gave to them.

Shapes: L labels; C contents; V voters, the K annotators first; G contents with different votes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from softpref.statistics.calibration import check_scores
from softpref.statistics.noise_rate import CHI2_95, KNOWN, SHARP

MOST_GROUPS, TRUSTED_PER_GROUP = 5, 15
"""Groups of evidence: more of them lose less to rounding, and each must be learned."""
FEWEST_LABELS, MOST_ANNOTATORS = 10, 1000
"""Annotators with fewer labels, or beyond so many, count as one and have no estimate."""
_PRIOR, _GROUP_PRIOR = 0.5, 0.1  # labels that are right, and as many that are wrong
_START = 0.7
_MAX_ITERATIONS = 2000
_TOLERANCE = 1e-7
_BISECTIONS = 40
_LEAST_CURVATURE = 1e-6
_CHUNK = 10_000  # contents


@dataclass(frozen=True)
class Reliability:
    """The share of an annotator's labels that are right.

    Attributes:
        labels: number of labels, a repeated one counted once.
        estimate: the share, in [0, 1]; where little is known, any value.
        low: the lower end of its 95% interval.
        high: the upper end.
    """

    labels: int
    estimate: float
    low: float
    high: float

    @property
    def known(self) -> float | None:
        """The estimate, or None where the interval is wider than 15 points."""
        return self.estimate if self.high - self.low <= SHARP else None


def reliability_text(known: float | None, low: float, high: float) -> str:
    """Return a reliability as text: the interval alone where no single number is known."""
    interval = f"95% interval {low:.1%} to {high:.1%}"
    if known is not None:
        return f"{known:.1%} ({interval})"
    if high - low > KNOWN:
        return f"unknown, too little is known of these pairs ({interval})"
    return f"between {low:.0%} and {high:.0%}, with 95% confidence"


def estimate_reliability(
    content: Tensor, annotator: Tensor, side: Tensor, evidence: Tensor, truth: Tensor
) -> list[Reliability]:
    """Return the reliability of annotators 0 to K − 1, by EM.

        right_cv = P(z = s_cv | all votes on c)         0 or 1 where z is known
        r_v      = (α + Σ_c right_cv) / (2α + n_v)      α = ½; 0.1 for a group of evidence

    The interval is that of the likelihood of r_v alone, given all that the others say, stretched by
    what they may be wrong about: { r : 2 (max ℓ − ℓ(r)) ≤ 3.84 λ }, λ = I_vv (I⁻¹)_vv, where

        ℓ(r) = Σ_c log(r p_cv + (1 − r)(1 − p_cv)),     p_cv = P(z = s_cv | the other votes)
        I    = diag(n r (1 − r)) − Σ_c π_c (1 − π_c) s_c s_cᵀ,    π_c = P(z = 1 | all votes)

    I is the observed information of θ (Louis 1982). Where nothing is known, the interval is about
    0 to 1. If neither evidence nor a known truth says which side is right, agreement does, given
    that labels are right more often than not. Errors must not depend on evidence or on each other,
    given z.

    Args:
        content: (L,) int64, which of the C contents a label is about.
        annotator: (L,) int64; −1 for an unknown one.
        side: (L,) 1 or −1, which response the label prefers.
        evidence: (C,) odd, positive where it speaks for side 1; 0 where there is none.
        truth: (C,) 1 or −1 for trusted contents, 0 for others.

    Raises:
        ValueError: evidence is not 1-D, floating and finite.
    """
    check_scores("evidence", evidence, at_least=0)
    names = int(annotator.max()) + 1 if len(annotator) else 0
    voter = torch.where(annotator < 0, names, annotator)
    pairs = _once(content, voter, side)
    counts = torch.bincount(pairs[:, 1], minlength=names + 1)[:names]
    in_order = counts.argsort(descending=True, stable=True)[:MOST_ANNOTATORS]
    own = in_order[counts[in_order] >= FEWEST_LABELS]
    place = torch.full((names + 1,), len(own))
    place[own] = torch.arange(len(own))
    found = [Reliability(int(count), 0.5, 0.0, 1.0) for count in counts]
    if not len(own):
        return found
    labels = _once(pairs[:, 0], place[pairs[:, 1]], pairs[:, 2])
    votes = torch.cat([labels, _votes_of_evidence(evidence, truth, len(own) + 1)])
    model = _distinct(votes, truth.double()).fitted(len(own) + 1)
    right, ends = model.right[: len(own)], model.intervals(len(own))
    low, high = torch.minimum(ends[0], right), torch.maximum(ends[1], right)
    for name, *values in zip(own.tolist(), right, low, high, strict=True):
        found[name] = Reliability(int(counts[name]), *(value.item() for value in values))
    return found


def _once(content: Tensor, voter: Tensor, side: Tensor) -> Tensor:
    """Return content, voter and side of votes, (L, 3) or fewer: a repeated one counts once."""
    voters = int(voter.max()) + 1 if len(voter) else 1
    code = ((content * voters + voter) * 2 + (side > 0)).unique()
    return torch.stack([code // 2 // voters, code // 2 % voters, code % 2 * 2 - 1], dim=1)


def _votes_of_evidence(evidence: Tensor, truth: Tensor, first: int) -> Tensor:
    """Return content, voter and side of evidence, (C, 3) or fewer; groups count from `first`."""
    size, content = evidence.double().abs(), evidence.nonzero().squeeze(1)
    trusted = size[(truth != 0) & (evidence != 0)]
    groups = max(1, min(MOST_GROUPS, len(trusted) // TRUSTED_PER_GROUP))
    edges = trusted.sort().values[torch.arange(1, groups) * len(trusted) // groups]
    group = torch.bucketize(size[content], edges)
    return torch.stack([content, first + group, evidence[content].sign().long()], dim=1)


def _distinct(votes: Tensor, truth: Tensor) -> _Votes:
    """Count contents with the same votes as one, also where both sides are exchanged."""
    content, voter, side = votes.unbind(1)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2**62), 2**62, (2, int(voter.max()) + 2), generator=generator)
    odd = (truth.long() * codes[0, -1]).index_add_(0, content, side * codes[0, voter])
    even = (truth.long().abs() * codes[1, -1]).index_add_(0, content, codes[1, voter])
    key = odd.abs() + even  # sums of random 64-bit codes wrap around, and stay as random
    _, group, weight = key.unique(return_inverse=True, return_counts=True)
    places = torch.arange(len(key))
    first = torch.full_like(weight, len(key)).scatter_reduce_(0, group, places, "amin")
    kept = first[group[content]] == content
    content, side = group[content[kept]], side[kept].double()
    return _Votes(content, voter[kept], side, truth[first], weight.double())


def _bisect(inside: Tensor, outside: Tensor, test: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the last values, (K,), on the way from inside to outside that pass the test."""
    for _ in range(_BISECTIONS):
        middle = (inside + outside) / 2
        passes = test(middle)
        inside = torch.where(passes, middle, inside)
        outside = torch.where(passes, outside, middle)
    return inside


@dataclass(frozen=True)
class _Votes:
    """Who says what: `content`, `voter` and `side` of each vote; `truth` and `weight`, (G,)."""

    content: Tensor
    voter: Tensor
    side: Tensor
    truth: Tensor
    weight: Tensor

    def sums(self, value: Tensor, count: int) -> Tensor:
        """Return the sum over each voter's votes, weighed, (V,)."""
        return torch.bincount(
            self.voter, weights=value * self.weight[self.content], minlength=count
        )

    def log_odds(self, theta: Tensor) -> Tensor:
        """Return log P(z = 1) / P(z = −1), (G,), for θ (V,); infinite where z is known."""
        found = torch.zeros(len(self.truth), dtype=torch.float64)
        found.index_add_(0, self.content, self.side * theta[self.voter])
        return torch.where(self.truth != 0, self.truth * math.inf, found)

    def fitted(self, annotators: int) -> _Model:
        """Return the most likely model; the voters after the annotators are groups of evidence."""
        count = int(self.voter.max()) + 1
        prior = torch.full((count,), _PRIOR, dtype=torch.float64)
        prior[annotators:] = _GROUP_PRIOR
        votes = self.sums(torch.ones_like(self.side), count)
        agree = self.side * self.truth[self.content]
        known, agreed = self.sums(agree.abs(), count), self.sums((agree > 0).double(), count)
        right = ((agreed + _START) / (known + 1)).clamp(0.02, 0.98)
        for _ in range(_MAX_ITERATIONS):
            log_odds = self.log_odds(right.logit())
            said = self.sums(torch.sigmoid(self.side * log_odds[self.content]), count)
            before, right = right, (prior + said) / (2 * prior + votes)
            if (right - before).abs().max() < _TOLERANCE:
                break
        return _Model(self, right, votes + 2 * prior)


@dataclass(frozen=True)
class _Model:
    """What was fitted: `right`, r (V,), and how many votes each rests on, n + 2α (V,)."""

    votes: _Votes
    right: Tensor
    count: Tensor

    def information(self) -> Tensor:
        """Return the observed information of θ, (V, V)."""
        votes, size = self.votes, len(self.right)
        log_odds = votes.log_odds(self.right.logit())
        doubt = votes.weight * torch.sigmoid(log_odds) * torch.sigmoid(-log_odds)
        found = (self.count * self.right * (1 - self.right)).diag()
        for start in range(0, len(doubt), _CHUNK):
            these = (votes.content >= start) & (votes.content < start + _CHUNK)
            part = doubt[start : start + _CHUNK]
            said = torch.zeros(len(part), size, dtype=torch.float64)
            at = votes.content[these] - start, votes.voter[these]
            said.index_put_(at, votes.side[these], accumulate=True)
            found -= said.T @ (part[:, None] * said)
        return found

    def intervals(self, annotators: int) -> tuple[Tensor, Tensor]:
        """Return both ends of the intervals of the first voters, (K,) each."""
        information = self.information()
        values, vectors = torch.linalg.eigh(information)
        variance = (vectors**2 / values.clamp_min(_LEAST_CURVATURE)).sum(1)
        stretch = (variance * information.diagonal())[:annotators].clamp_min(1.0)
        votes, theta = self.votes, self.right.logit()
        of = votes.voter < annotators
        content, voter, side = votes.content[of], votes.voter[of], votes.side[of]
        weight = votes.weight[content]
        p = torch.sigmoid(side * votes.log_odds(theta)[content] - theta[voter])

        def sums(value: Tensor) -> Tensor:
            return torch.bincount(voter, weights=value * weight, minlength=annotators)

        def chance(rate: Tensor) -> Tensor:
            return (rate[voter] * p + (1 - rate[voter]) * (1 - p)).clamp_min(1e-300)

        zero, one = torch.zeros(annotators).double(), torch.ones(annotators).double()
        best = _bisect(zero, one, lambda rate: sums((2 * p - 1) / chance(rate)) > 0)
        lowest = sums(chance(best).log()) - stretch * CHI2_95 / 2

        def is_inside(rate: Tensor) -> Tensor:
            return sums(chance(rate).log()) >= lowest

        return _bisect(best, zero, is_inside), _bisect(best, one, is_inside)
