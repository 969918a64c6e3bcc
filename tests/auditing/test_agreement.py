"""q(|t|) against a slow oracle, against densities that are known, and its symmetries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softpref.algorithm.calibration import expected_calibration_error
from softpref.auditing.agreement import KNOT_WEIGHT, Agreement, left_out
from softpref.training.metrics import auroc

SHIFT = 1.2


def pairs(count, rate, seed):
    """Scores of a unit Gaussian around SHIFT, a share of them turned round; and which."""
    draw = torch.Generator().manual_seed(seed)
    right = torch.randn(count, generator=draw, dtype=torch.float64) + SHIFT
    flipped = torch.rand(count, generator=draw, dtype=torch.float64) < rate
    return torch.where(flipped, -right, right), flipped


def posterior(scores, rate):
    """By the densities: log-odds of a Gaussian and its mirror image are 2 · SHIFT · t."""
    right = torch.sigmoid(2 * SHIFT * scores)
    return (1 - rate) * right / ((1 - rate) * right + rate * (1 - right))


def slow_isotonic(values, weights):
    """Pool neighbours that fall until none does."""
    blocks = [[v, w, 1] for v, w in zip(values, weights, strict=True)]
    i = 0
    while i < len(blocks) - 1:
        if blocks[i][0] < blocks[i + 1][0]:
            i += 1
            continue
        (v, w, n), (v2, w2, n2) = blocks[i], blocks.pop(i + 1)
        blocks[i] = [(v * w + v2 * w2) / (w + w2), w + w2, n + n2]
        i = max(i - 1, 0)
    return np.repeat([b[0] for b in blocks], [b[2] for b in blocks])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 300), st.integers(1, 60), st.floats(0, 0.45))
def test_equals_the_slow_way(seed, noisy_pairs, clean_pairs, rate):
    noisy, _ = pairs(noisy_pairs, rate, seed)
    clean, _ = pairs(clean_pairs, 0.0, seed + 1)
    found = Agreement.fit(noisy, clean, rate)
    of_pair = sorted(
        (abs(t), ((t > 0) - e) / (1 - 2 * e), (1 - 2 * e) ** 2)
        for scores, e in ((noisy, rate), (clean, 0.0))
        for t in scores.tolist()
    )
    knots, seen = {}, 0.0
    for size, z, weight in of_pair:
        knots.setdefault(int((seen + weight / 2) / KNOT_WEIGHT), []).append((size, z, weight))
        seen += weight
    weights = [sum(w for *_, w in knot) for knot in knots.values()]
    sizes = [sum(s * w for s, _, w in knot) / total
             for knot, total in zip(knots.values(), weights, strict=True)]  # fmt: skip
    means = [sum(z * w for _, z, w in knot) / total
             for knot, total in zip(knots.values(), weights, strict=True)]  # fmt: skip
    highest = 1 - 1 / (2 * (len(of_pair) + 2))
    truth = np.clip(slow_isotonic(means, weights), 0.5, highest)
    assert found.sizes.tolist() == pytest.approx(sizes, abs=1e-9)
    assert found.shares.tolist() == pytest.approx(list(truth), abs=1e-9)


@pytest.mark.parametrize(("rate", "error"), [(0.0, 0.015), (0.1, 0.015), (0.4, 0.04)])
def test_is_near_the_posterior_of_known_densities(rate, error):
    """At 40% flips a noisy pair says a twentieth of what a clean one says."""
    noisy, flipped = pairs(20_000, rate, 0)
    clean, _ = pairs(150, 0.0, 1)
    p_correct = Agreement.fit(noisy, clean, rate).probability_correct(noisy, rate)
    assert float((p_correct - posterior(noisy, rate)).abs().mean()) < error
    assert expected_calibration_error(p_correct, ~flipped) < 0.03


def test_a_wrong_prior_is_seen_in_the_calibration():
    """The bound above can fail."""
    noisy, flipped = pairs(20_000, 0.4, 0)
    clean, _ = pairs(150, 0.0, 1)
    p_correct = Agreement.fit(noisy, clean, 0.2).probability_correct(noisy, 0.2)
    assert expected_calibration_error(p_correct, ~flipped) > 0.1


def test_swapping_a_pair_turns_the_probability_round_and_more_is_surer():
    noisy, _ = pairs(500, 0.3, 0)
    agreement = Agreement.fit(noisy, pairs(50, 0.0, 1)[0], 0.3)
    grid = torch.linspace(-4, 4, 80, dtype=torch.float64)  # without 0, where both are as good
    right = agreement.probability_right(grid)
    turned = agreement.probability_right(-grid)
    assert torch.allclose(right + turned, torch.ones(80, dtype=torch.float64))
    assert (agreement.probability_correct(grid, 0.3).diff() >= 0).all()
    assert (agreement.probability_correct(grid, 0.0) == 1).all()
    assert 0 < float(right.min()) < 0.5 < float(right.max()) < 1


def test_where_the_model_knows_nothing_the_prior_is_all():
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, generator=draw, dtype=torch.float64)
    p_correct = Agreement.fit(noise[:3800], noise[3800:], 0.3).probability_correct(noise, 0.3)
    assert float((p_correct - 0.7).abs().mean()) < 0.05


def test_clean_pairs_are_judged_by_fits_that_never_saw_them():
    noisy, _ = pairs(300, 0.3, 0)
    clean, _ = pairs(20, 0.0, 1)
    before = left_out(noisy, clean, 0.3, 5, 0)
    changed = clean.clone()
    part = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tensor_split(5)[0]
    changed[part[0]] = -5 * changed[part[0]].abs()
    after = left_out(noisy, changed, 0.3, 5, 0)
    others = [i for i in part.tolist() if i != part[0]]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before, after)


def fluent(count, rate, seed):
    """Two kinds of pairs: of three quarters the model is right, of the rest wrong and very sure."""
    draw = torch.Generator().manual_seed(seed)
    right = torch.randn(count, generator=draw, dtype=torch.float64) + SHIFT
    is_misled = torch.rand(count, generator=draw, dtype=torch.float64) < 0.25
    sure = 3.5 + 0.4 * torch.randn(count, generator=draw, dtype=torch.float64)
    right = torch.where(is_misled, -sure, right)
    flipped = torch.rand(count, generator=draw, dtype=torch.float64) < rate
    return torch.where(flipped, -right, right), flipped


def test_where_the_surest_preferences_are_wrong_the_curve_falls_and_ranks_follow():
    noisy, flipped = fluent(6000, 0.4, 0)
    clean, _ = fluent(150, 0.0, 1)
    found = Agreement.fit(noisy, clean, 0.4)
    assert not found.is_rising
    assert float(found.shares[-5:].max()) < 0.3 < 0.7 < float(found.shares[20:40].min())
    p_correct = found.probability_correct(noisy, 0.4)
    assert auroc(noisy, ~flipped) < 0.65
    assert auroc(p_correct, ~flipped) > 0.85
    assert expected_calibration_error(p_correct, ~flipped) < 0.05


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4])
@pytest.mark.parametrize("count", [500, 2000])
def test_where_stronger_is_righter_the_curve_is_held_to_rise(rate, count):
    chosen = [
        Agreement.fit(pairs(count, rate, seed)[0], pairs(150, 0.0, 1000 + seed)[0], rate).is_rising
        for seed in range(40)
    ]
    assert all(chosen)


def test_a_free_curve_is_odd_too_and_bounded():
    noisy, _ = fluent(6000, 0.4, 0)
    found = Agreement.fit(noisy, fluent(150, 0.0, 1)[0], 0.4)
    right = found.probability_right(noisy)
    assert torch.allclose(found.probability_right(-noisy)[noisy != 0], 1 - right[noisy != 0])
    assert bool(((right > 0) & (right < 1)).all())
