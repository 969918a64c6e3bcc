"""What each method makes of a pair's label, against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softpref.algorithm.bilevel import move
from softpref.algorithm.gradients.jacobian import GraphPullback
from softpref.algorithm.labeller import AsGiven, Constant, Threshold
from softpref.algorithm.methods import METHODS, PERPCORRECT_MODES, KnownBeforeTraining, Method
from softpref.algorithm.objective import Objective
from softpref.data import make_batch
from tests.tiny import measured, random_pairs, tiny_model


def labeller_of(method, noise_rate=0.3, clean=(-1.0, -0.5, 0.2)):
    return METHODS[method].make_labeller(KnownBeforeTraining(noise_rate, torch.tensor(clean)))


def test_labels_by_hand():
    """The pairs' own where they bring any, as ties do under every method."""
    pairs = measured(
        ppl_diff=[9.0, -9.0, 9.0], starting_ppl_diff=[-0.5, 0.1, 9.0],
        given_label=[0.2, 1.0, float("nan")],
    )  # fmt: skip
    expected = {
        "dpo": [0.2, 1.0, 1.0], "rdpo": [0.2, 1.0, 0.7 / 0.4], "gdpo": [0.2, 1.0, 0.9],
        "cdpo": [0.2, 1.0, 0.7], "oracle": [0.2, 1.0, 1.0], "perpcorrect": [0.2, 1.0, 0.0],
        "ropo": [0.2, 1.0, 1.0], "re_po": [0.2, 1.0, 0.9],
    }  # fmt: skip
    for method, labels in expected.items():
        assert labeller_of(method).label(pairs).tolist() == pytest.approx(labels), method


def test_evidence_that_says_nothing_leaves_dpo():
    make, clean = METHODS["evidence"].make_labeller, torch.zeros(3)
    pairs = measured(evidence=[1.0, -2.0], margin=[0.0, 0.0], given_label=[float("nan")] * 2)
    assert make(KnownBeforeTraining(0.3, clean)).label(pairs).tolist() == [1.0, 1.0]
    strong, weak = make(KnownBeforeTraining(0.3, clean, evidence_speaks=True)).label(pairs).tolist()
    assert strong > 0.7 > weak


def test_what_methods_need_is_named():
    for name, method in (METHODS | PERPCORRECT_MODES).items():
        assert isinstance(method, Method)
        assert method.needs <= {"noise_rate", "clean", "corrected_labels", "evidence"}
        assert method.source
        assert method.teaches == name.startswith("mspo")


def pulls(policy, batch, method, labeller):
    jacobian = GraphPullback(policy, batch, "response")
    moved = move([jacobian], labeller, Objective(METHODS[method].loss, 0.1), pairs=len(batch))
    return moved.loss, torch.cat([g.flatten() for g in moved.gradient])


def test_oracle_on_flipped_pairs_is_dpo_on_the_true_ones():
    policy, true = tiny_model(), random_pairs(4)
    flipped = [dict(pair, given_label=1.0) for pair in true]
    for i in (1, 2):
        a, b = true[i], flipped[i]
        b["chosen_ids"], b["rejected_ids"] = a["rejected_ids"], a["chosen_ids"]
        b["ref_chosen_logp"], b["ref_rejected_logp"] = a["ref_rejected_logp"], a["ref_chosen_logp"]
        b["given_label"] = 0.0
    oracle = pulls(policy, make_batch(flipped), "oracle", AsGiven(1.0))
    dpo = pulls(policy, make_batch(true), "dpo", Constant(1.0))
    for mine, theirs in zip(oracle, dpo, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def slow_accuracy(threshold, clean, noise_rate):
    """How often the rule is right about clean pairs as given and swapped, one at a time."""
    total = 0.0
    for x in clean:
        total += (1 - noise_rate) * (x <= threshold) + noise_rate * (-x > threshold)
    return total / len(clean)


@settings(max_examples=60)
@given(
    clean=st.lists(st.floats(-3, 3).map(lambda x: round(x, 2)), min_size=1, max_size=12),
    noise_rate=st.floats(0, 0.5),
)
def test_no_threshold_is_right_more_often(clean, noise_rate):
    found = Threshold.fit(torch.tensor(clean, dtype=torch.float64), noise_rate).threshold
    ends = sorted({*clean, *(-x for x in clean)})
    candidates = [ends[0] - 1, *ends, *((a + b) / 2 for a, b in zip(ends, ends[1:], strict=False))]
    best = max(slow_accuracy(t, clean, noise_rate) for t in candidates)
    assert slow_accuracy(found, clean, noise_rate) == pytest.approx(best)


def test_the_threshold_believes_more_where_fewer_labels_are_flipped():
    torch.manual_seed(0)
    clean = torch.randn(500) - 0.7
    thresholds = [Threshold.fit(clean, rate).threshold for rate in (0.02, 0.2, 0.4, 0.5)]
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[0] > 0.5
    assert abs(thresholds[-1]) < 0.3
