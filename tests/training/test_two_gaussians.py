"""The two-Gaussian picture of PPLDiff: against known draws, and against brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softpref.training.perpcorrect.two_gaussians import TwoGaussians


def drawn(share_right, mean, deviation, count, seed=0):
    """PPLDiff of `count` pairs, and which of their labels are right."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    is_right = torch.rand(count, generator=generator) < share_right
    return deviation * noise + torch.where(is_right, mean, -mean), is_right


def slow_density(x, mean, deviation):
    return math.exp(-(((x - mean) / deviation) ** 2) / 2) / (deviation * math.sqrt(2 * math.pi))


def slow_misfit(x, mean, deviation, share_right):
    """Squared distance to the histogram, bin by bin."""
    low, high = min(x), max(x)
    width = (high - low) / 100
    counts = [0] * 100
    for value in x:
        counts[min(int((value - low) / width), 99)] += 1
    total = 0.0
    for k, count in enumerate(counts):
        centre = low + (k + 0.5) * width
        model = share_right * slow_density(centre, mean, deviation)
        model += (1 - share_right) * slow_density(centre, -mean, deviation)
        total += (model - count / (len(x) * width)) ** 2
    return total


def slow_told_right(threshold, mean, deviation, share_right):
    def below(x):
        return (1 + math.erf(x / math.sqrt(2))) / 2

    kept = below((threshold - mean) / deviation)
    return share_right * kept + (1 - share_right) * (1 - below((threshold + mean) / deviation))


@pytest.mark.parametrize(
    ("share_right", "mean", "deviation"),
    [(0.6, -1.0, 0.8), (0.7, -0.1, 0.05), (0.9, -30.0, 15.0), (0.95, -0.5, 0.4), (0.55, -2.0, 0.5)],
)
def test_what_was_drawn_is_found(share_right, mean, deviation):
    x, _ = drawn(share_right, mean, deviation, 50_000)
    found = TwoGaussians.fit(x)
    assert found.share_right == pytest.approx(share_right, abs=0.02)
    assert found.mean == pytest.approx(mean, rel=0.03)
    assert found.deviation == pytest.approx(deviation, rel=0.03)
    assert found.noise_rate == 1 - found.share_right


def test_without_flips_all_labels_are_right():
    found = TwoGaussians.fit(drawn(1.0, -1.0, 0.5, 20_000)[0])
    assert found.share_right > 0.98
    assert found.mean == pytest.approx(-1.0, abs=0.03)


def test_where_most_are_above_zero_half_the_labels_are_right_at_most():
    """α stays in [0.5, 1] and μ at 0 or below: no fit says that most labels are wrong."""
    found = TwoGaussians.fit(drawn(0.2, -1.0, 0.5, 20_000)[0])
    assert found.share_right == 0.5
    assert found.mean <= 0
    assert found.threshold == 0


@pytest.mark.parametrize("case", [(0.7, -1.0, 0.8), (0.55, -0.3, 0.6), (1.0, -0.2, 0.5)])
def test_nothing_fits_the_histogram_better(case):
    x = drawn(*case, 400)[0]
    found = TwoGaussians.fit(x)
    rows = x.tolist()
    least = slow_misfit(rows, found.mean, found.deviation, found.share_right)
    for factor in (0.98, 1.02):
        for mean, deviation, share_right in (
            (found.mean * factor, found.deviation, found.share_right),
            (found.mean, found.deviation * factor, found.share_right),
            (found.mean, found.deviation, min(1.0, max(0.5, found.share_right * factor))),
        ):
            assert slow_misfit(rows, mean, deviation, share_right) >= least - 1e-12
    for mean in torch.linspace(0, -2, 11).tolist():
        for deviation in torch.linspace(0.1, 1.5, 8).tolist():
            for share_right in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
                assert slow_misfit(rows, mean, deviation, share_right) >= least - 1e-12


def test_the_unit_makes_no_difference():
    x = drawn(0.7, -1.0, 0.8, 5_000)[0]
    one, other = TwoGaussians.fit(x), TwoGaussians.fit(1e-3 * x)
    assert other.mean == pytest.approx(1e-3 * one.mean, rel=1e-6)
    assert other.deviation == pytest.approx(1e-3 * one.deviation, rel=1e-6)
    assert other.share_right == pytest.approx(one.share_right, abs=1e-6)


PICTURES = {
    "mean": st.floats(-3, -0.05),
    "deviation": st.floats(0.2, 3),
    "share_right": st.floats(0.5, 0.99),
}


@settings(max_examples=60)
@given(**PICTURES)
def test_no_cut_is_right_more_often(mean, deviation, share_right):
    picture = TwoGaussians(mean, deviation, share_right)
    at_threshold = slow_told_right(picture.threshold, mean, deviation, share_right)
    assert picture.told_right(picture.threshold) == pytest.approx(at_threshold, abs=1e-12)
    reach = 2 * abs(picture.threshold) + 6 * deviation
    everywhere = torch.linspace(-reach, reach, 2001, dtype=torch.float64).tolist()
    values = [slow_told_right(cut, mean, deviation, share_right) for cut in everywhere]
    assert at_threshold >= max(values) - 1e-12
    best = everywhere[values.index(max(values))]
    # Where the curve is flat to the last digit, any cut is as good.
    flat = max(values) - slow_told_right(best + reach / 50, mean, deviation, share_right) < 1e-9
    assert flat or best == pytest.approx(picture.threshold, abs=reach / 900)


@settings(max_examples=60)
@given(**PICTURES)
def test_separation_is_the_best_cut_between_the_means(mean, deviation, share_right):
    cuts = torch.linspace(mean, -mean, 2001, dtype=torch.float64).tolist()
    best = max(slow_told_right(cut, mean, deviation, share_right) for cut in cuts)
    found = TwoGaussians(mean, deviation, share_right).separation
    assert found == pytest.approx(best, abs=1e-5)
    assert 0.5 <= found <= 1


def test_the_threshold_at_the_ends():
    assert TwoGaussians(-0.5, 0.4, 1.0).threshold == math.inf
    assert TwoGaussians(-0.5, 0.4, 0.5).threshold == 0
    assert TwoGaussians(0.0, 0.4, 0.7).threshold == math.inf
    assert TwoGaussians(0.0, 0.4, 0.5).threshold == math.inf
    assert TwoGaussians(-1e-300, 0.4, 0.7).threshold > 1e290
    assert TwoGaussians(-0.5, 0.4, 0.8).told_right(math.inf) == pytest.approx(0.8)
    assert TwoGaussians(-0.5, 0.4, 0.8).told_right(-math.inf) == pytest.approx(0.2)


def test_knowing_nothing_is_no_separation():
    """At μ = 0 half is told right by luck, also where a fit takes all labels for right."""
    assert TwoGaussians(0.0, 0.4, 1.0).separation == pytest.approx(0.5)
    assert TwoGaussians(-0.01, 0.4, 1.0).separation < 0.53
    far, near = (TwoGaussians(mean, 0.4, 0.7).separation for mean in (-0.9, -0.3))
    assert far > near


def test_the_promised_share_is_told_right():
    x, is_right = drawn(0.7, -0.6, 0.5, 50_000)
    found = TwoGaussians.fit(x)
    believed = x <= found.threshold
    assert float((believed == is_right).double().mean()) == pytest.approx(
        found.told_right(found.threshold), abs=0.02
    )


@pytest.mark.parametrize(
    ("ppl_diff", "says"),
    [
        (torch.full((20,), 0.3), "the same for every pair"),
        (torch.tensor([0.1, float("nan"), 0.2]), "not finite"),
        (torch.tensor([0.1]), "at least 2"),
        (torch.zeros(3, 3), "1-D"),
    ],
)
def test_what_cannot_be_fitted_is_refused(ppl_diff, says):
    with pytest.raises(ValueError, match=says):
        TwoGaussians.fit(ppl_diff)


def test_single_precision_is_fitted_in_double():
    x = drawn(0.7, -1.0, 0.8, 2_000)[0].float()
    assert TwoGaussians.fit(x) == TwoGaussians.fit(x.double())
