import math
from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softpref.statistics.win_rate import WinRate, wilson_interval, win_rate


def test_ties_are_left_out():
    result = win_rate([1, 0.5, 0.5, 0, 0.75], [0, 0.5, 0.25, 1, 0.5])
    assert result == WinRate(0.75, *wilson_interval(3, 4))
    assert result.low < 0.75 < result.high


def test_nothing_decided_leaves_everything_open():
    for scores in ([], [0.5, 0.5]):
        assert win_rate(scores, scores) == WinRate(None, 0.0, 1.0)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe (1998), Table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_agrees_with_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 2000), st.data())
def test_wilson_bounds_are_where_the_normal_test_just_rejects(trials, data):
    successes = data.draw(st.integers(0, trials))
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials + 1e-12
    assert successes / trials - 1e-12 <= high <= 1
    for bound in (low, high):
        if 1e-9 < bound < 1 - 1e-9:
            z = (successes / trials - bound) / math.sqrt(bound * (1 - bound) / trials)
            assert abs(z) == pytest.approx(1.959964, abs=1e-4)


@given(st.lists(st.tuples(*[st.sampled_from([0, 0.2, 0.4, 1])] * 2), min_size=1))
def test_changing_sides_mirrors_the_result(pairs):
    ours, theirs = zip(*pairs, strict=True)
    there, back = win_rate(ours, theirs), win_rate(theirs, ours)
    assert there.low == pytest.approx(1 - back.high, abs=1e-9)
    if there.rate is not None:
        assert there.rate == pytest.approx(1 - back.rate)


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [1.0, 2.0]), ([math.nan], [0.0])])
def test_what_cannot_be_compared_is_refused(ours, theirs):
    with pytest.raises(ValueError, match="NaN|shorter|longer"):
        win_rate(ours, theirs)


def test_result_is_plain_numbers():
    assert all(type(value) in (int, float) for value in astuple(win_rate([1.0], [0.0])))
