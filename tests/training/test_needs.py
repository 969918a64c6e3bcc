"""The noise rate of each source."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from softpref.statistics.noise_rate import NoiseRate, estimate_noise_rate
from softpref.training.needs import noise_by_source


def test_rates_by_pair_move_the_rate_of_each_source():
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn(600, generator=draw).double() - 2
    flipped = torch.rand(600, generator=draw) < 0.2
    doubts = torch.where(flipped, -truth, truth)
    trusted = torch.randn(150, generator=draw).double() - 2
    pairs = Dataset.from_dict({"source": ["a"] * 200 + ["b"] * 400})
    same = noise_by_source(pairs, doubts, trusted, torch.full((600,), 0.2))
    assert same == noise_by_source(pairs, doubts, trusted)
    assert same["a"] == estimate_noise_rate(doubts[:200], trusted)
    rates = torch.cat([torch.full((200,), 0.3), torch.full((400,), 0.1)]).double()
    found = noise_by_source(pairs, doubts, trusted, rates)
    assert [found[name].rate for name in "ab"] == pytest.approx([0.3, 0.1])
    width = same["b"].high - same["b"].low
    assert found["b"].high - found["b"].low == pytest.approx(min(width, found["b"].high))


def test_an_interval_moves_with_its_rate_and_stays_a_share():
    moved = NoiseRate(0.1, 0.05, 0.2, 0.12).around(0.3)
    assert (moved.rate, moved.expected) == (0.3, 0.3)
    assert (moved.low, moved.high) == pytest.approx((0.25, 0.4))
    assert NoiseRate(0.3, 0.1, 0.45, 0.3).around(0.05).low == 0
    assert NoiseRate(0.1, 0.05, 0.4, 0.1).around(0.3).high == 0.5
