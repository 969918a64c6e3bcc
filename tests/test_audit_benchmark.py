"""What benchmarks/evidence.py hands to the ways to find wrong labels, and how it measures them."""

from __future__ import annotations

import argparse

import pytest
import torch
from benchmarks import finders
from benchmarks.audit_table import draw, tables
from benchmarks.evidence import splits
from benchmarks.finders import PENALTIES, Found, measure, ridge, word_differences

from softpref.statistics.noise_rate import NoiseRate
from softpref.statistics.pair_signals import PairSignals

PAIRS = 120


@pytest.fixture
def planted():
    """Pairs whose better response says "yes", is longer by one token and has a state of its own."""
    draw_from = torch.Generator().manual_seed(3)
    content = torch.randn(PAIRS, 8, generator=draw_from).double()
    content[:, 0] += 2
    fluency = torch.randn(PAIRS, generator=draw_from).double()
    signals = PairSignals(
        fluency,
        {"length": torch.ones(PAIRS).double(), "content": content},
        {"tokens": torch.rand(PAIRS, generator=draw_from).double()},
    )
    words = word_differences([(f"Yes, number {i}.", f"no {i % 7}") for i in range(PAIRS)])
    return signals, words


def options(**changed):
    given = {"first": 0, "splits": 2, "trusted": 40, "trusted_errors": 0.0, "rate": 0.25}
    return argparse.Namespace(**given | changed)


def test_flips_swap_every_odd_column_and_nothing_else(planted):
    signals, words = planted
    for split, flips in splits(signals, words, None, options()):
        assert int(flips.sum()) == 20
        sign = 1 - 2 * flips.double()
        assert torch.equal(split.noisy.odd["length"], sign)
        assert torch.equal(split.noisy_words.sum(1).sign(), sign)
        assert bool((split.noisy.even["tokens"] >= 0).all())
        assert torch.equal(split.trusted.odd["length"], torch.ones(40).double())


def test_given_errors_stay_with_their_pairs(planted):
    signals, words = planted
    wrong = signals.fluency > 0
    for split, flips in splits(signals, words, wrong, options()):
        assert torch.equal(split.noisy.fluency.abs(), -split.noisy.fluency)
        assert int(flips.sum()) > 0


@pytest.mark.parametrize("way", ["length rule", "ridge of words", "ridge of states"])
def test_ways_find_what_is_planted(planted, way):
    (split, flips), *_ = splits(*planted, None, options())
    assert measure(way, split, flips)["auroc"] > 95


def test_the_length_rule_turns_where_trusted_pairs_are_shorter(planted):
    signals, words = planted
    shorter = PairSignals(
        signals.fluency, signals.odd | {"length": -signals.odd["length"]}, signals.even
    )
    (split, flips), *_ = splits(shorter, words, None, options())
    assert measure("length rule", split, flips)["auroc"] == 100


def test_words_are_counted_whatever_their_case():
    (row,) = word_differences([("One two TWO", "two three")])
    (turned,) = word_differences([("two three", "One two TWO")])
    assert torch.equal(row, -turned)
    assert sorted(row[row != 0].tolist()) == [-1, 1, 1]


@pytest.mark.parametrize("noise", [0.1, 3.0])
def test_the_ridge_s_penalty_foretells_left_out_pairs_best(noise):
    draw_from = torch.Generator().manual_seed(0)
    trusted = 1 / 3 + noise * torch.randn(12, 5, generator=draw_from).double()
    noisy = torch.randn(4, 5, generator=draw_from).double()
    size = trusted.square().sum(1).mean()

    def weights(x, penalty):
        system = x.T @ x + penalty * size * torch.eye(5).double()
        return torch.linalg.solve(system, x.sum(0))

    def error(penalty):
        rest = [torch.arange(12) != j for j in range(12)]
        return sum((1 - trusted[j] @ weights(trusted[rest[j]], penalty)) ** 2 for j in range(12))

    best = min(PENALTIES, key=error)
    torch.testing.assert_close(ridge(trusted, noisy), noisy @ weights(trusted, best))


def test_measures_of_claims(planted, monkeypatch):
    split, flips = next(splits(*planted, None, options()))
    p = torch.where(flips, 0.2, 0.9).double()
    p[torch.nonzero(~flips)[:5]] = 0.4  # five right labels among 25 suspects
    known = Found(p, p, NoiseRate(0.2, 0.1, 0.24, 0.21))
    monkeypatch.setitem(finders.WAYS, "evidence", lambda _: known)
    found = measure("evidence", split, flips)
    assert (found["suspects"], found["precision"]) == (25, pytest.approx(80))
    assert (found["rate"], found["covered"], found["told"]) == (pytest.approx(21), 0, 1)
    sure = Found(p, torch.ones_like(p))
    monkeypatch.setitem(finders.WAYS, "evidence", lambda _: sure)
    assert measure("evidence", split, flips)["precision"] is None


@pytest.fixture
def results():
    way = {
        "auroc": [70.0, 72.0], "average_precision": [50.0, 50.0], "seconds": [0.1, 0.2],
        "speaks": [1.0, 0.0], "ece": [5.0, 7.0], "suspects": [4.0, 0.0], "precision": [75.0, None],
        "rate": [20.0, 30.0], "low": [10.0, 20.0], "high": [30.0, 40.0], "covered": [1.0, 0.0],
        "told": [0.0, 1.0],
    }  # fmt: skip
    ways = dict.fromkeys(finders.WAYS, way)
    return {"a $set": {"noisy_pairs": 9, "true_rate": [25.0, 60.0], "ways": ways}}


def test_tables_speak_of_missing_values_and_of_majorities_of_errors(results):
    page = tables(results, {"model": "m"})
    assert "in 1 of 1 splits in which at most half" in page
    assert "in 0 of 1 in which more" in page
    assert "| 71.0 ± 12.7 |" in page
    assert "| 75.0 (1 of 2) |" in page


def test_a_single_split_has_no_interval(results):
    (of_set,) = results.values()
    of_set["true_rate"] = [25.0]
    of_set["ways"] = {
        way: {name: values[:1] for name, values in numbers.items()}
        for way, numbers in of_set["ways"].items()
    }
    assert "inf" not in tables(results, {"model": "m"})
    draw(results).canvas.draw()
