"""Win rates against slow and obvious versions, and what their intervals are worth."""

from __future__ import annotations

import math
import random
import re
import time
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from softpref.judging.outcomes import Outcome
from softpref.judging.rates import (
    agreement,
    bootstrap_interval,
    controlled_rate,
    judged_rate,
    length_controlled_rate,
)
from softpref.judging.style import _counts, style_difference
from softpref.statistics.win_rate import wilson_interval


def outcomes(results, lengths=None, prompts=None, flipped=()):
    return [
        Outcome(
            str(i), prompts[i] if prompts else str(i), result, i in flipped,
            "timeout" if result == "failed" else None, lengths[i] if lengths else 0,
        )
        for i, result in enumerate(results)
    ]  # fmt: skip


results_of = st.lists(st.sampled_from(["win", "loss", "tie", "failed"]), min_size=1, max_size=30)


@settings(max_examples=60)
@given(results_of)
def test_rate_and_bounds_by_counting(results):
    rate = judged_rate(outcomes(results), resamples=20)
    wins, losses, failed = (results.count(r) for r in ("win", "loss", "failed"))
    assert (rate.wins, rate.losses, rate.failed) == (wins, losses, failed)
    assert rate.ties == results.count("tie")
    assert rate.asked == len(results)
    assert rate.rate == (wins / (wins + losses) if wins + losses else None)
    if wins + losses + failed:
        as_losses = [1 if r == "win" else 0 for r in results if r != "tie"]
        as_wins = [0 if r == "loss" else 1 for r in results if r != "tie"]
        assert rate.bounds == (fmean(as_losses), fmean(as_wins))
    if rate.rate is not None:
        assert rate.bounds[0] <= rate.rate <= rate.bounds[1]
        assert rate.interval[0] - 1e-12 <= rate.rate <= rate.interval[1] + 1e-12


def test_certainty_is_not_had_from_a_few_prompts():
    rate = judged_rate(outcomes(["win"] * 6, prompts=["a", "a", "a", "b", "b", "c"]))
    assert rate.rate == 1
    assert rate.clustered_interval == wilson_interval(3, 3)
    assert judged_rate(outcomes(["tie"])).clustered_interval == (0, 1)


@settings(max_examples=30)
@given(results_of)
def test_the_other_side_sees_the_mirror_image(results):
    mirrored = [{"win": "loss", "loss": "win"}.get(r, r) for r in results]
    lengths = [7 * i % 11 - 5 for i in range(len(results))]
    ours = judged_rate(outcomes(results, lengths), resamples=50)
    theirs = judged_rate(outcomes(mirrored, [-length for length in lengths]), resamples=50)
    if ours.rate is None:
        return
    assert theirs.rate == pytest.approx(1 - ours.rate)
    assert theirs.interval == pytest.approx(tuple(1 - end for end in ours.interval[::-1]))
    assert (theirs.length_controlled is None) == (ours.length_controlled is None)
    if ours.length_controlled is not None:
        assert theirs.length_controlled == pytest.approx(1 - ours.length_controlled, abs=1e-6)


def test_length_control_is_the_ridged_logistic_fit():
    generator = random.Random(0)
    lengths = [generator.gauss(40, 100) for _ in range(300)]
    won = [generator.random() < 1 / (1 + math.exp(-0.3 - length / 60)) for length in lengths]
    is_win = torch.tensor(won).double()
    difference = torch.tensor(lengths).double()
    spread = difference.square().mean().sqrt()
    x = (difference / spread).tanh().tolist()

    def loss(coefficients):
        a, b = coefficients
        terms = (
            math.log1p(math.exp(-(a + b * at) if win else (a + b * at)))
            for at, win in zip(x, won, strict=True)
        )
        return sum(terms) + 1e-3 * b * b / 2

    slow = minimize(loss, [0.0, 0.0], tol=1e-12).x[0]
    found = length_controlled_rate(is_win, 1 - is_win, difference, torch.ones(1, 300))
    assert float(found) == pytest.approx(1 / (1 + math.exp(-slow)), abs=1e-5)


def test_style_control_is_the_logistic_fit_of_statsmodels():
    """The expected rate is σ(0.4870…), the constant of statsmodels 0.15.0, which has no ridge.

    sm.GLM(won, sm.add_constant(x), family=sm.families.Binomial()).fit().params
    """
    generator = random.Random(3)
    x, won = [], []
    for _ in range(240):
        at = [generator.uniform(-1, 1) if generator.random() < 0.7 else 0.0 for _ in range(4)]
        chance = 1 / (1 + math.exp(-(0.4 + 1.5 * at[0] + 0.8 * at[1] - 0.5 * at[2])))
        x.append(at)
        won.append(generator.random() < chance)
    is_win = torch.tensor(won).double()
    found = controlled_rate(is_win, 1 - is_win, torch.tensor(x), torch.ones(1, 240).double())
    assert float(found) == pytest.approx(0.6194064741256172, abs=2e-5)


def test_style_is_counted_as_in_arena():
    text = "# A\n\n## B\n- **x**\n  * y __z__\n1. w\n```\n# no\n- **no**\n```\n#no"
    length, headers, lists, bold = style_difference(text, "- a\n**b**")
    assert length == (len(text) - 9) / (len(text) + 9)
    assert (headers, lists, bold) == (1.0, 2 / 4, 1 / 3)
    assert style_difference("a", "a") == (0, 0, 0, 0)


LIST_ITEM = re.compile(r"^\s*(?:\d+\.|[-*+])\s", re.MULTILINE)  # Arena's, in quadratic time


@given(st.text("\n\t\r\u2028 -*1.a", max_size=12))
def test_list_items_are_arenas(text):
    assert _counts(text)[2] == len(LIST_ITEM.findall(text))


def test_style_is_counted_in_linear_time():
    start = time.process_time()
    assert _counts("\n" * 100_000) == [100_000, 0, 0, 0]
    assert time.process_time() - start < 1


def test_style_control_takes_away_what_headers_did():
    generator = random.Random(1)
    found = []
    for i in range(3000):
        headers = generator.choice([1.0, 1.0, 0.0, -1.0])
        wins = generator.random() < {1.0: 0.8, 0.0: 0.5, -1.0: 0.2}[headers]
        result = "win" if wins else "loss"
        found.append(Outcome(str(i), str(i), result, False, None, 0, (0.0, headers, 0.0, 0.0)))
    rate = judged_rate(found, resamples=100)
    assert rate.rate > 0.55
    assert rate.style_controlled == pytest.approx(0.5, abs=0.03)
    low, high = rate.style_controlled_interval
    assert 0.47 < low < rate.style_controlled < high < 0.57
    always = [each for each in found if each.style_difference[1] > 0]
    assert judged_rate(always, resamples=10).style_controlled is None


def test_length_control_takes_away_what_length_did():
    generator = random.Random(1)
    lengths = [generator.choice([150, 150, 150, -150]) for _ in range(4000)]
    results = [
        "win" if generator.random() < (0.8 if length > 0 else 0.2) else "loss" for length in lengths
    ]
    rate = judged_rate(outcomes(results, lengths), resamples=200)
    assert rate.rate > 0.62
    assert rate.length_controlled == pytest.approx(0.5, abs=0.03)
    low, high = rate.length_controlled_interval
    assert low < 0.5 < high


def test_weights_are_repetitions():
    is_win = torch.tensor([1.0, 0, 0, 0, 1]).double()
    is_loss = torch.tensor([0.0, 1, 0, 1, 0]).double()
    length = torch.tensor([3.0, -3, 0, 3, -3])  # of one spread, repeated or not
    weights = torch.tensor([[2.0, 2, 1, 1, 1], [1, 1, 5, 3, 3]]).double()
    found = length_controlled_rate(is_win, is_loss, length, weights)
    for row, rate in zip(weights.int(), found, strict=True):
        places = torch.arange(5).repeat_interleave(row)
        again = length_controlled_rate(
            is_win[places], is_loss[places], length[places], torch.ones(1, len(places))
        )
        assert float(rate) == pytest.approx(float(again), abs=1e-9)


def test_resampling_draws_whole_prompts():
    prompts = ["a"] * 10 + ["b"] * 10
    seen = []

    def statistic(weights):
        seen.append(weights)
        return weights[:, 0]

    bootstrap_interval(statistic, prompts, 150, seed=0)
    weights = torch.cat(seen)
    assert len(weights) == 150
    assert bool((weights[:, :10] == weights[:, :1]).all())
    assert bool((weights.sum(1) == 20).all())


@pytest.mark.parametrize(("repeats", "clustered"), [(1, True), (8, True), (8, False)])
def test_intervals_cover_where_their_assumption_holds(repeats, clustered):
    """Eight answers to a prompt hang together: there Wilson's interval is too narrow."""
    generator = random.Random(2)
    covered, sets, prompts_a_set = 0, 300, 60
    for seed in range(sets):
        results, prompts = [], []
        for prompt in range(prompts_a_set):
            chance = generator.choice([0.2, 0.9]) if repeats > 1 else 0.55
            for _ in range(repeats):
                results.append("win" if generator.random() < chance else "loss")
                prompts.append(str(prompt))
        found = judged_rate(outcomes(results, prompts=prompts), resamples=300, seed=seed)
        low, high = found.clustered_interval if clustered else found.interval
        covered += low <= 0.55 <= high
    if clustered:
        assert 0.91 <= covered / sets <= 0.98
    else:
        assert covered / sets < 0.85


def test_kappa_by_hand_and_at_its_ends():
    results = ["win"] * 20 + ["loss"] * 10 + ["tie"] * 5 + ["win"] * 5 + ["failed"] * 3
    others = ["win"] * 20 + ["loss"] * 10 + ["tie"] * 5 + ["loss"] * 5 + ["win"] * 3
    found = agreement(outcomes(results), outcomes(others))
    by_chance = (25 * 20 + 10 * 15 + 5 * 5) / 40**2
    assert found.comparisons == 40
    assert found.kappa == pytest.approx((35 / 40 - by_chance) / (1 - by_chance))
    assert found.interval[0] < found.kappa < found.interval[1]
    assert agreement(outcomes(results), outcomes(results)).kappa == pytest.approx(1)
    assert agreement(outcomes(["failed"]), outcomes(["win"])) is None
    assert agreement(outcomes(["win"]), outcomes(["win"])).kappa is None


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([0.0] * 100, 0.8), ([100.0] * 100, None), ([-3.0] * 100, None),
        ([300.0 + i for i in range(100)], None), ([0.0, 50.0] * 50, 0.8),
    ],
)  # fmt: skip
def test_there_is_no_rate_at_equal_length_where_nothing_says_it(lengths, expected):
    results = (["win"] * 8 + ["loss"] * 2) * 10
    rate = judged_rate(outcomes(results, lengths), resamples=50)
    assert rate.length_controlled == (expected and pytest.approx(expected, abs=1e-3))
    if expected is None:
        assert rate.length_controlled_interval == (0, 1)


def test_few_prompts_are_not_sure_of_themselves():
    for prompts in (1, 2, 5):
        results = ["win"] * 5 + ["loss"] * 3
        rate = judged_rate(outcomes(results * prompts, prompts=[
            str(i // 8) for i in range(8 * prompts)]))  # fmt: skip
        low, high = rate.clustered_interval
        assert high - low > 0.4
        assert low < 5 / 8 < high
