"""The noise rate: coverage of its interval, bias, symmetries, and a slow statistic by loops."""

import math
import time

import pytest
import torch

from softpref.statistics import noise_rate
from softpref.statistics.calibration import clean_rows, fit_coefficients, odd_basis
from softpref.statistics.noise_rate import NoiseRate, estimate_noise_rate


def gaussian(count: int, generator: torch.Generator) -> torch.Tensor:
    """PPLDiff of right labels, negative for 88% of them."""
    return torch.randn(count, generator=generator, dtype=torch.float64) - 1.175


def saturating(count: int, generator: torch.Generator) -> torch.Tensor:
    """PPLDiff that is wrong for 12% of pairs whatever its size."""
    size = gaussian(count, generator).abs()
    return torch.where(torch.rand(count, generator=generator) < 0.12, size, -size)


def flip(ppl_diff: torch.Tensor, rate: float, generator: torch.Generator) -> torch.Tensor:
    return torch.where(torch.rand(len(ppl_diff), generator=generator) < rate, -ppl_diff, ppl_diff)


def simulate(density, rate: float, noisy: int, clean: int, seed: int) -> NoiseRate:
    generator = torch.Generator().manual_seed(seed)
    noisy_pairs = flip(density(noisy, generator), rate, generator)
    return estimate_noise_rate(noisy_pairs, density(clean, generator))


def slow_z(rate, noisy, clean, linear, saturating):
    """T(e) / sd T(e) of the docstring, one pair after the other."""
    keep, doubt = 1 - 2 * rate, noise_rate._MIN_DOUBT

    def weigh(x):
        q = 1 / (1 + math.exp(-(linear * x + saturating * math.tanh(2 * x))))
        q = doubt + (1 - 2 * doubt) * q
        p = rate + keep * q
        m = 2 * q - 1
        spread = 4 * p * (1 - p) / len(noisy) + keep**2 * 4 * q * (1 - q) / len(clean)
        return m, m / spread, 4 * p * (1 - p), 4 * q * (1 - q)

    difference = variance = 0.0
    for sample, sign, share, side in ((noisy, 1, keep, 2), (clean, -keep, 1, 3)):
        expected = seen = 0.0
        for x in sample:
            weighed = weigh(x)
            m, psi = weighed[:2]
            residual = psi - share * abs(psi * m)
            difference += sign * residual / len(sample)
            expected += psi**2 * weighed[side]
            seen += residual**2
        variance += sign**2 * max(expected, seen) / len(sample) ** 2
    return difference / math.sqrt(variance)


def test_statistic_equals_the_slow_one():
    generator = torch.Generator().manual_seed(0)
    clean = -gaussian(30, generator)
    noisy = flip(-gaussian(80, generator), 0.25, generator)
    rates = torch.tensor([0.0, 0.1, 0.3, 0.45, 0.5], dtype=torch.float64)
    rows, weights = clean_rows(clean, torch.ones_like(clean))
    flip_rate = torch.zeros(5, 140, dtype=torch.float64)
    flip_rate[:, 60:] = rates[:, None]
    basis = odd_basis(torch.cat([rows, noisy]), 1.0)
    coefficients = fit_coefficients(basis, torch.cat([weights, torch.ones(80)]), flip_rate)
    fast = noise_rate._z(
        rates, *(noise_rate._quantile_bins(sample, 1.0) for sample in (noisy, clean))
    )
    slow = [
        slow_z(rate, noisy.tolist(), clean.tolist(), *pair)
        for rate, pair in zip(rates.tolist(), coefficients.tolist(), strict=True)
    ]
    assert fast.tolist() == pytest.approx(slow, rel=1e-6)


@pytest.mark.parametrize("density", [gaussian, saturating])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.5])
def test_the_rate_is_found_with_many_clean_pairs(density, rate):
    found = simulate(density, rate, noisy=50_000, clean=20_000, seed=5)
    assert found.rate == pytest.approx(rate, abs=0.01)
    assert found.low - 1e-9 <= rate <= found.high + 1e-9
    assert found.high - found.low < 0.04


@pytest.mark.parametrize(("density", "rate"), [(gaussian, 0.3), (saturating, 0.3)])
def test_the_interval_covers_and_the_rate_is_unbiased(monkeypatch, density, rate):
    monkeypatch.setattr(noise_rate, "_GRID", 21)
    monkeypatch.setattr(noise_rate, "_BINS", 128)
    found = [simulate(density, rate, noisy=2000, clean=150, seed=seed) for seed in range(100)]
    covered = sum(each.low <= rate <= each.high for each in found)
    assert covered >= 89
    rates = torch.tensor([each.rate for each in found])
    widths = torch.tensor([each.high - each.low for each in found])
    assert rates.mean().item() == pytest.approx(rate, abs=0.012)
    # An interval of +- 1.96 standard deviations, neither padded nor clipped to nothing.
    assert 3.2 <= (widths.mean() / rates.std()).item() <= 5.2


def test_many_noisy_pairs_do_not_make_the_shape_speak_for_the_rate(monkeypatch):
    """A likelihood interval for this f, whose q jumps at 0, covers none of these."""
    monkeypatch.setattr(noise_rate, "_GRID", 21)
    found = [simulate(saturating, 0.1, noisy=50_000, clean=150, seed=seed) for seed in range(20)]
    assert sum(each.low <= 0.1 <= each.high for each in found) >= 17


def test_swapping_every_noisy_pair_gives_one_minus_the_rate_up_to_a_half():
    generator = torch.Generator().manual_seed(2)
    clean = gaussian(150, generator)
    swapped = estimate_noise_rate(-flip(gaussian(5000, generator), 0.2, generator), clean)
    assert (swapped.rate, swapped.high) == (0.5, 0.5)
    swapped = estimate_noise_rate(-flip(gaussian(5000, generator), 0.7, generator), clean)
    assert swapped.low <= 0.3 <= swapped.high < 0.5


def test_negating_both_samples_or_changing_their_unit_changes_nothing():
    generator = torch.Generator().manual_seed(2)
    clean, noisy = gaussian(150, generator), flip(gaussian(3000, generator), 0.2, generator)
    expected = estimate_noise_rate(noisy, clean)
    for factor in (1, -1, 1024):
        found = estimate_noise_rate(factor * noisy, factor * clean)
        assert [found.rate, found.low, found.high] == pytest.approx(
            [expected.rate, expected.low, expected.high], abs=1e-3
        )


def test_an_empty_signal_leaves_every_rate_possible():
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2000, generator=generator)
    found = estimate_noise_rate(noisy, torch.randn(150, generator=generator))
    assert found.low == 0.0
    assert found.high == 0.5
    found = estimate_noise_rate(torch.zeros(100), torch.zeros(20))
    assert (found.low, found.high) == (0.0, 0.5)


def test_more_flips_give_a_larger_rate():
    generator = torch.Generator().manual_seed(4)
    clean, noisy = gaussian(150, generator), gaussian(3000, generator)
    found = [
        estimate_noise_rate(torch.cat([-noisy[:count], noisy[count:]]), clean).rate
        for count in range(0, 1501, 300)
    ]
    assert found == sorted(found)
    assert found[0] < 0.05 < 0.42 < found[-1]


def test_a_hundred_thousand_pairs_take_less_than_a_second_and_no_luck():
    generator = torch.Generator().manual_seed(4)
    clean, noisy = gaussian(150, generator), flip(gaussian(100_000, generator), 0.3, generator)
    start = time.process_time()
    found = estimate_noise_rate(noisy, clean)
    assert time.process_time() - start < 1.0 * torch.get_num_threads()
    assert found == estimate_noise_rate(noisy, clean)


@pytest.mark.parametrize(
    "bad", [torch.full((20,), math.inf), torch.ones(20, 1), torch.ones(20, dtype=torch.long)]
)
def test_bad_tensors_are_named(bad):
    good = torch.linspace(-2, 1, 20)
    with pytest.raises(ValueError, match="ppl_diff_noisy"):
        estimate_noise_rate(bad, good)
    with pytest.raises(ValueError, match="ppl_diff_clean"):
        estimate_noise_rate(good, bad)


def test_sizes_are_checked():
    good = torch.linspace(-2, 1, 20)
    with pytest.raises(ValueError, match="ppl_diff_clean holds 9 pairs; at least 10"):
        estimate_noise_rate(good, good[:9])
    with pytest.raises(ValueError, match="ppl_diff_noisy holds 0 pairs"):
        estimate_noise_rate(good[:0], good)
    estimate_noise_rate(good[:1], good[:10])


def test_expected_is_what_to_act_on():
    """Near the estimate where that is certain; a quarter, not zero, where nothing is known."""
    generator = torch.Generator().manual_seed(11)
    clean = torch.randn(150, generator=generator) - 1.2
    noisy = torch.randn(5000, generator=generator) - 1.2
    flipped = torch.rand(5000, generator=generator) < 0.3
    told = estimate_noise_rate(torch.where(flipped, -noisy, noisy), clean)
    assert abs(told.expected - told.rate) < 0.01
    blind = estimate_noise_rate(torch.randn(5000, generator=generator), clean - clean.mean())
    assert 0.1 < blind.expected < 0.4
    assert NoiseRate.given(0.2).expected == 0.2


@pytest.mark.parametrize(
    ("found", "told", "words"),
    [
        (NoiseRate(0.1, 0.05, 0.18, 0.11), 0.11, "11.0% (95% interval 5.0% to 18.0%)"),
        (NoiseRate(0.0, 0.0, 0.38, 0.14), None, "at most 38%, with 95% confidence"),
        (NoiseRate(0.2, 0.12, 0.4, 0.2), None, "between 12% and 40%, with 95% confidence"),
        (NoiseRate.unknown(), None, "unknown, the signals say too little about the labels "
         "(95% interval 0.0% to 50.0%)"),
        (NoiseRate.given(0.2), 0.2, "20.0% (95% interval 20.0% to 20.0%)"),
    ],
)  # fmt: skip
def test_a_wide_interval_is_told_without_a_number(found, told, words):
    assert str(found) == words
    assert found.record()["rate"] == found.told == told
