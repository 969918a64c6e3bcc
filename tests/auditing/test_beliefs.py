"""Probabilities against densities that are known; ranks and flags; what trusted pairs say."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import log

import pytest
import torch
from datasets import Dataset

from softpref.auditing.beliefs import (
    PairBeliefs,
    flag,
    length_auroc,
    longer_is_chosen,
    pair_beliefs,
    reliability,
)
from softpref.statistics.calibration import expected_calibration_error
from softpref.statistics.evidence import LEAST_NOISE, Evidence, fit_evidence
from softpref.statistics.pair_signals import PairSignals
from softpref.training.metrics import auroc

SHIFT = 1.2


def informative(count, rate, seed):
    """Fluency, a unit Gaussian around SHIFT, of which a share is turned round; and which."""
    draw = torch.Generator().manual_seed(seed)
    right = torch.randn(count, generator=draw, dtype=torch.float64) + SHIFT
    flipped = torch.rand(count, generator=draw, dtype=torch.float64) < rate
    return torch.where(flipped, -right, right), flipped


def misleading(count, rate, seed):
    """Two kinds of pairs: of three quarters the model is right, of the rest wrong and very sure."""
    draw = torch.Generator().manual_seed(seed)
    right = torch.randn(count, generator=draw, dtype=torch.float64) + SHIFT
    is_misled = torch.rand(count, generator=draw, dtype=torch.float64) < 0.25
    sure = 3.5 + 0.4 * torch.randn(count, generator=draw, dtype=torch.float64)
    right = torch.where(is_misled, -sure, right)
    flipped = torch.rand(count, generator=draw, dtype=torch.float64) < rate
    return torch.where(flipped, -right, right), flipped


def fitted(noisy, trusted) -> tuple[Evidence, PairBeliefs]:
    evidence = fit_evidence(PairSignals(noisy, {}, {}), PairSignals(trusted, {}, {}))
    return evidence, believed(evidence)


def believed(evidence) -> PairBeliefs:
    return pair_beliefs(
        evidence, evidence.noisy, torch.full_like(evidence.noisy, rate_of(evidence))
    )


def rate_of(evidence) -> float:
    return max(evidence.noise.expected, LEAST_NOISE)


def posterior(fluency, rate):
    """By the densities: log-odds of a Gaussian and its mirror image are 2 · SHIFT · t."""
    right = torch.sigmoid(2 * SHIFT * fluency)
    return (1 - rate) * right / ((1 - rate) * right + rate * (1 - right))


@pytest.mark.parametrize(("rate", "error"), [(0.0, 0.015), (0.1, 0.04), (0.4, 0.05)])
def test_is_near_the_posterior_of_known_densities_at_a_rate_that_it_estimates(rate, error):
    noisy, flipped = informative(6000, rate, 0)
    evidence, beliefs = fitted(noisy, informative(150, 0.0, 1)[0])
    assert float((beliefs.p_correct - posterior(noisy, rate)).abs().mean()) < error
    assert expected_calibration_error(beliefs.p_correct, ~flipped) < 0.05
    assert beliefs.speaks
    assert not beliefs.is_misled
    assert not len(evidence.curve.knots)


def test_a_wrong_prior_is_seen_in_the_calibration():
    """The bound above can fail."""
    noisy, flipped = informative(6000, 0.4, 0)
    evidence, _ = fitted(noisy, informative(150, 0.0, 1)[0])
    believing = replace(evidence, noise=replace(evidence.noise, expected=0.2))
    p_correct = believed(believing).p_correct
    assert expected_calibration_error(p_correct, ~flipped) > 0.1


@pytest.mark.parametrize("seed", [0, 10])
def test_where_the_surest_preferences_are_wrong_ranks_and_rate_follow(seed):
    """The isotonic or spline curve before it had calibration errors of 7 and 23% here."""
    noisy, flipped = misleading(6000, 0.4, seed)
    evidence, beliefs = fitted(noisy, misleading(150, 0.0, seed + 1)[0])
    assert beliefs.is_misled
    assert auroc(noisy, ~flipped) < 0.65
    assert auroc(beliefs.p_correct, ~flipped) > 0.9
    assert auroc(beliefs.rank.double(), ~flipped) > 0.9
    assert expected_calibration_error(beliefs.p_correct, ~flipped) < 0.06
    assert abs(evidence.noise.rate - 0.4) < 0.03


def test_a_curve_that_bends_and_does_not_fall_misleads_nobody():
    evidence, _ = fitted(misleading(6000, 0.4, 0)[0], misleading(150, 0.0, 1)[0])
    curve = evidence.curve
    rising = replace(curve, coefficients=curve.coefficients.abs())
    assert not believed(replace(evidence, curve=rising)).is_misled
    richer = replace(evidence, theta=torch.tensor([0.0, 0.1]).double())
    assert not believed(richer).is_misled


def test_where_nothing_is_known_nothing_is_claimed():
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, generator=draw, dtype=torch.float64)
    evidence, beliefs = fitted(noise[:1850], noise[1850:])
    assert not beliefs.speaks
    assert torch.allclose(beliefs.p_correct, torch.tensor(1 - evidence.noise.expected).double())
    assert beliefs.doubted_clean == []
    assert beliefs.ece == 0
    assert 0.4 < beliefs.trusted_auroc < 0.6


def test_the_probability_is_the_evidence_and_the_rate():
    evidence, beliefs = fitted(informative(400, 0.2, 0)[0], informative(60, 0.0, 1)[0])
    rate = evidence.noise.expected
    found = beliefs.p_correct.logit() - log((1 - rate) / rate)
    assert torch.allclose(found, evidence.noisy, atol=1e-6)


def test_the_most_suspect_pair_is_first():
    _, beliefs = fitted(informative(400, 0.2, 0)[0], informative(60, 0.0, 1)[0])
    assert beliefs.rank.sort().values.tolist() == list(range(1, 401))
    p_correct = beliefs.p_correct[beliefs.rank.argsort()]
    assert (p_correct.diff() >= 0).all()
    flags = [flag(float(p)) for p in p_correct]
    assert flags == sorted(flags, key=["suspect", "unsure", "fine"].index)
    assert (p_correct[: flags.count("suspect")] < 0.5).all()


def test_trusted_pairs_that_evidence_contradicts_are_named():
    draw = torch.Generator().manual_seed(0)
    trusted = torch.randn(60, generator=draw).double() + 3
    trusted[7] = -4.0
    _, beliefs = fitted(torch.randn(400, generator=draw).double() + 3, trusted)
    assert beliefs.doubted_clean == [7]


def test_the_auroc_of_trusted_pairs_as_given_against_swapped_ones():
    evidence, _ = fitted(informative(100, 0.2, 0)[0], informative(20, 0.0, 1)[0])
    trusted = torch.tensor([2.0, -1.0, 0.5, 1.0]).double()
    found = believed(replace(evidence, trusted=trusted)).trusted_auroc
    wins = [(g > -other) + (g == -other) / 2 for g, other in product(trusted.tolist(), repeat=2)]
    assert found == pytest.approx(sum(wins) / 16)


def of_lengths(*both):
    lists = [[[1] * one for one in lengths] for lengths in zip(*both, strict=True)]
    return Dataset.from_dict(dict(zip(("chosen_ids", "rejected_ids"), lists, strict=True)))


def test_the_length_rule_is_that_of_the_better_sign():
    longer = of_lengths((5, 1), (3, 2), (2, 3))  # by 4, 1, −1
    assert length_auroc(longer) == pytest.approx((3 + 2.5 + 1.5) / 9)
    assert length_auroc(of_lengths((1, 5), (2, 3), (3, 2))) == pytest.approx(length_auroc(longer))
    assert length_auroc(of_lengths((2, 2))) == 0.5


def test_ties_in_length_count_half():
    assert longer_is_chosen(of_lengths((2, 1), (1, 1), (1, 2))) == 0.5


def test_reliability_by_equally_many():
    stated = torch.arange(20) / 20
    bins = reliability(stated, stated > 0.45)
    assert [b["pairs"] for b in bins] == [2] * 10
    assert [b["right"] for b in bins] == [0.0] * 5 + [1.0] * 5
    assert abs(bins[0]["stated"] - 0.025) < 1e-6
