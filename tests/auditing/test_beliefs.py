"""Ranks, flags and reasons."""

from __future__ import annotations

import torch
from datasets import Dataset

from softpref.algorithm.noise_rate import NoiseRate
from softpref.auditing.beliefs import believe, flag, longer_is_chosen, reason, reliability


def test_the_most_suspect_pair_is_first_and_ppl_diff_breaks_ties():
    draw = torch.Generator().manual_seed(0)
    ppl_diff = torch.randn(400, generator=draw) - 0.8
    clean = torch.randn(60, generator=draw) - 0.8
    beliefs = believe(ppl_diff, clean, NoiseRate.given(0.2))
    assert beliefs.rank.sort().values.tolist() == list(range(1, 401))
    order = beliefs.rank.argsort()
    assert (beliefs.p_correct[order].diff() >= 0).all()
    assert (ppl_diff[order].diff() <= 0).all()
    flags = [flag(float(beliefs.p_correct[i])) for i in order]
    assert flags == sorted(flags, key=["suspect", "unsure", "fine"].index)
    assert (beliefs.p_correct[order][: flags.count("suspect")] < 0.5).all()


def test_clean_pairs_that_the_model_contradicts_are_named():
    draw = torch.Generator().manual_seed(0)
    clean = torch.randn(60, generator=draw) - 3
    clean[7] = 4.0
    beliefs = believe(torch.randn(400, generator=draw) - 3, clean, NoiseRate.given(0.0))
    assert beliefs.doubted_clean == [7]


def test_reliability_by_equally_many():
    stated = torch.arange(20) / 20
    bins = reliability(stated, stated > 0.45)
    assert [b["pairs"] for b in bins] == [2] * 10
    assert [b["right"] for b in bins] == [0.0] * 5 + [1.0] * 5
    assert abs(bins[0]["stated"] - 0.025) < 1e-6


def test_reasons_in_plain_words():
    assert "contradicts the label (PPLDiff +1.20 nats per token)" in reason(1.2, 0.97, "")
    assert "right in 97% of cases" in reason(1.2, 0.97, "")
    assert "agrees with the label" in reason(-1.2, 0.97, "")
    assert "hardly prefers either" in reason(0.01, 0.55, "")
    assert reason(1.2, 0.97, "elsewhere").endswith("labelled the other way round elsewhere")


def test_ties_in_length_count_half():
    lists = {"chosen_ids": [[1, 2], [1], [1]], "rejected_ids": [[1], [1], [1, 2]]}
    assert longer_is_chosen(Dataset.from_dict(lists)) == 0.5
