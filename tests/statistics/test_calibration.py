"""The odd logistic map: against brute force, against Bayes' rule, and its symmetries."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softpref.statistics.calibration import (
    Calibration,
    cross_fit,
    expected_calibration_error,
    fit_coefficients,
    odd_basis,
)

SHIFT = 1.175  # a Gaussian score with this mean and deviation 1 is right for 88% of pairs


def gaussian(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator, dtype=torch.float64) + SHIFT


def slow_log_likelihood(scores, weights, rates, linear, saturating):
    total = 0.0
    for t, weight, rate in zip(scores, weights, rates, strict=True):
        q = 1 / (1 + math.exp(-(linear * t + saturating * math.tanh(2 * t))))
        total += weight * math.log((1 - rate) * q + rate * (1 - q))
    return total


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4])
def test_fit_is_the_maximum_found_by_brute_force(rate):
    scores = gaussian(40, seed=3)
    scores[::5] *= -1
    weights = torch.linspace(0.5, 2.0, 40, dtype=torch.float64)
    rates = torch.full((40,), rate, dtype=torch.float64)
    rates[:20] = 0.0
    fitted = fit_coefficients(odd_basis(scores, 1.0), weights, rates[None])[0].tolist()
    rows = scores.tolist(), weights.tolist(), rates.tolist()
    grid = [1e-3] + [0.1 * step for step in range(1, 41)]
    best = max((slow_log_likelihood(*rows, a, b), a, b) for a in grid for b in grid)
    assert slow_log_likelihood(*rows, *fitted) >= best[0] - 1e-4
    assert fitted == pytest.approx(best[1:], abs=0.06)


def test_gaussian_scores_give_their_linear_log_odds():
    calibration = Calibration.fit(gaussian(50_000, seed=0))
    scores = torch.linspace(-2, 2, 9, dtype=torch.float64)
    assert torch.allclose(calibration.log_odds(scores), 2 * SHIFT * scores, atol=0.15)


def test_a_score_right_for_a_fixed_share_gives_that_share():
    size = gaussian(50_000, seed=0).abs() + 0.5
    scores = torch.where(torch.arange(50_000) % 20 < 3, -size, size)
    q = torch.sigmoid(Calibration.fit(scores).log_odds(torch.tensor([1.0, 2.0, 4.0])))
    assert torch.allclose(q, torch.full_like(q, 0.85), atol=0.025)


def test_separable_scores_stay_finite_and_doubt_a_little():
    q = Calibration.fit(torch.full((150,), 2.0)).probability_correct(torch.tensor([2.0]), 0.5)
    assert q.item() == pytest.approx(150 / 150.5, abs=1e-4)


@pytest.mark.parametrize("clean", [gaussian(150, 1), -gaussian(150, 1), torch.zeros(20)])
def test_log_odds_are_odd_and_strictly_increasing(clean):
    scores = torch.linspace(-40, 40, 2001, dtype=torch.float64)
    log_odds = Calibration.fit(clean).log_odds(scores)
    assert (log_odds.diff() > 0).all()
    assert torch.allclose(log_odds, -log_odds.flip(0), atol=1e-9)


def test_unit_of_the_score_does_not_matter():
    clean, scores = gaussian(150, 1), gaussian(50, 2)
    expected = Calibration.fit(clean).log_odds(scores)
    assert torch.allclose(Calibration.fit(1e-3 * clean).log_odds(1e-3 * scores), expected)


@settings(max_examples=50)
@given(score=st.floats(-3, 3), rate=st.floats(0.001, 0.5))
def test_probability_correct_is_bayes_rule(score, rate):
    calibration = Calibration(linear=1.5, saturating=0.7, scale=1.2)
    q = 1 / (1 + math.exp(-(1.5 * score / 1.2 + 0.7 * math.tanh(2 * score / 1.2))))
    expected = (1 - rate) * q / ((1 - rate) * q + rate * (1 - q))
    scores = torch.tensor([score], dtype=torch.float64)
    assert calibration.probability_correct(scores, rate).item() == pytest.approx(expected, 1e-9)


def test_probability_correct_at_the_ends_of_the_prior():
    calibration, scores = Calibration.fit(gaussian(150, 1)), gaussian(50, 2)
    assert (calibration.probability_correct(scores, 0.0) == 1).all()
    q = torch.sigmoid(calibration.log_odds(scores))
    assert torch.allclose(calibration.probability_correct(scores, 0.5), q, rtol=1e-12)
    for rate in (-0.01, 0.51, math.nan):
        with pytest.raises(ValueError, match="noise_rate"):
            calibration.probability_correct(scores, rate)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_probability_correct_is_calibrated_on_noisy_pairs(seed):
    generator = torch.Generator().manual_seed(seed)
    is_flipped = torch.rand(20_000, generator=generator) < 0.3
    scores = gaussian(20_000, seed + 10)
    scores = torch.where(is_flipped, -scores, scores)
    calibration = Calibration.fit(gaussian(300, seed + 20))
    probability = calibration.probability_correct(scores, 0.3)
    assert expected_calibration_error(probability, ~is_flipped) <= 0.03
    # The same labels under a wrong prior are visibly off: the check can fail.
    wrong_prior = calibration.probability_correct(scores, 0.5)
    assert expected_calibration_error(wrong_prior, ~is_flipped) > 0.04


def test_cross_fit_never_sees_the_pair_it_judges():
    clean = gaussian(60, 1)
    q = cross_fit(clean, 60, torch.Generator().manual_seed(0))
    for i in (0, 17, 59):
        rest = torch.cat([clean[:i], clean[i + 1 :]])
        expected = torch.sigmoid(Calibration.fit(rest).log_odds(clean[i]))
        assert q[i].item() == pytest.approx(expected.item(), abs=1e-12)


def test_cross_fit_is_decided_by_its_generator():
    clean = gaussian(60, 1)
    first, again, other = (
        cross_fit(clean, 5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for folds in (1, 61):
        with pytest.raises(ValueError, match="folds"):
            cross_fit(clean, folds, torch.Generator())


def test_expected_calibration_error_by_hand():
    probability = torch.tensor([0.9, 0.1, 0.8, 0.3])
    is_correct = torch.tensor([True, False, False, False])
    # Two bins: (0.1, 0.3) holds 0 of 2 right, (0.8, 0.9) holds 1 of 2.
    error = expected_calibration_error(probability, is_correct, bins=2)
    assert error == pytest.approx(0.5 * 0.2 + 0.5 * 0.35, abs=1e-6)


def test_which_of_equal_probabilities_a_cut_parts_does_not_matter():
    probability = torch.tensor([0.5] * 20)
    is_correct = torch.tensor([True] * 10 + [False] * 10)
    assert expected_calibration_error(probability, is_correct) == 0
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert expected_calibration_error(probability, is_correct[shuffled]) == 0


@pytest.mark.parametrize(
    "scores",
    [torch.tensor([1.0, math.nan]), torch.ones(2, 2), torch.tensor([1, 2]), torch.tensor([])],
)
def test_bad_scores_are_named(scores):
    with pytest.raises(ValueError, match="scores_clean"):
        Calibration.fit(scores)
