"""What a signal promises, and V over more than one."""

from __future__ import annotations

from operator import attrgetter

import pytest
import torch

from softpref.algorithm import MetaLearner
from softpref.algorithm.labeller import warm_start
from softpref.algorithm.likelihood import measure
from softpref.algorithm.signals import PPL_DIFF, SIGNALS, Signal
from softpref.data import make_batch
from tests.tiny import measured, random_pairs, tiny_model

OF_THE_PROMPT = Signal("difficulty", attrgetter("given_label"), None, parity=1)


def swapped(pair):
    other = {"chosen": "rejected", "rejected": "chosen"}
    turned = {
        f"{prefix}{a}{suffix}": pair[f"{prefix}{b}{suffix}"]
        for a, b in other.items()
        for prefix, suffix in (("", "_ids"), ("ref_", "_logp"))
    }
    return pair | turned


def test_parity_is_what_swapping_the_responses_does():
    policy, both = tiny_model(), []
    for pairs in (random_pairs(4), list(map(swapped, random_pairs(4)))):
        start = measure(tiny_model(spread=0.1), make_batch(pairs), "response").ppl_diff.tolist()
        known = [{"starting_ppl_diff": x, "evidence": -2 * x} for x in start]
        pairs = [p | more for p, more in zip(pairs, known, strict=True)]
        both.append(measure(policy, make_batch(pairs), "response"))
    for name, signal in SIGNALS.items():
        assert name == signal.name
        given, turned = map(signal.of, both)
        assert given.abs().min() > 0
        torch.testing.assert_close(turned, signal.parity * given, rtol=1e-6, atol=1e-6)


def of_two(seed=0):
    torch.manual_seed(seed)
    return MetaLearner(8, (PPL_DIFF, OF_THE_PROMPT))


def test_evidence_changes_its_sign_with_the_responses_and_not_with_the_prompt():
    meta_learner = of_two()
    meta_learner.standardise(torch.tensor([[0.3, 5.0], [0.1, 7.0], [-0.9, 4.0]]))
    given = measured(ppl_diff=[0.4, -1.0, 0.0], given_label=[5.0, 6.0, 7.0])
    turned = measured(ppl_diff=[-0.4, 1.0, 0.0], given_label=[5.0, 6.0, 7.0])
    evidence = meta_learner.evidence(given)
    torch.testing.assert_close(evidence, -meta_learner.evidence(turned))
    assert evidence[2] == 0
    assert evidence[:2].abs().min() > 1e-3
    other_prompts = measured(ppl_diff=[0.4, -1.0, 0.0], given_label=[9.0, 2.0, 7.0])
    assert not torch.allclose(evidence, meta_learner.evidence(other_prompts), rtol=1e-3)


@pytest.mark.parametrize("count", [2, 7, 64, 1000, 1001])
def test_one_signal_is_standardised_to_the_bit_as_the_vector_it_is(count):
    sample = torch.randn(count, generator=torch.Generator().manual_seed(count)) - 0.4
    for given in (sample, sample[:, None]):
        meta_learner = MetaLearner()
        meta_learner.standardise(given)
        assert torch.equal(meta_learner.mean, sample.mean()[None])
        assert torch.equal(meta_learner.deviation, sample.std()[None])
        mean, deviation = (t.clone() for t in (meta_learner.mean, meta_learner.deviation))
        meta_learner.follow(2 * given)
        assert torch.equal(meta_learner.mean, mean.lerp((2 * sample).mean(), 0.1))
        assert torch.equal(meta_learner.deviation, deviation.lerp((2 * sample).std(), 0.1))


def test_signals_are_standardised_each_by_itself():
    meta_learner = of_two()
    meta_learner.standardise(torch.tensor([[1.0, 3.0], [2.0, 3.0], [6.0, 3.0]]))
    assert meta_learner.mean.tolist() == [3.0, 3.0]
    torch.testing.assert_close(meta_learner.deviation, torch.tensor([7**0.5, 1.0]))


def test_a_column_for_each_signal_is_asked_for():
    alone = MetaLearner()
    assert torch.equal(alone(torch.ones(3)), alone(torch.ones(3, 1)))
    with pytest.raises(ValueError, match="V sees ppl_diff, difficulty"):
        of_two()(torch.zeros(3))


def test_a_warm_start_takes_the_swapped_pairs_prompt_as_it_is():
    """V says P(right | PPLDiff) wherever the other signal is, which it sees on both sides alike."""
    generator = torch.Generator().manual_seed(5)
    ppl_diff = torch.randn(2000, generator=generator) - 1
    clean = torch.stack([ppl_diff, 5 + torch.randn(2000, generator=generator)], -1)
    meta_learner = of_two()
    meta_learner.standardise(clean)
    logit, seen = meta_learner.logit, []
    meta_learner.logit = lambda signals: (seen.append(signals), logit(signals))[1]
    warm_start(meta_learner, clean, -ppl_diff, 0.2)
    assert torch.equal(seen[0], torch.cat([clean, clean * torch.tensor([-1.0, 1.0])]))
    x = torch.linspace(-2, 2, 9)
    truth = torch.sigmoid(-2 * x + torch.logit(torch.tensor(0.8)))
    for difficulty in (4.0, 5.0, 6.0):
        grid = torch.stack([x, torch.full_like(x, difficulty)], -1)
        assert (meta_learner(grid) - truth).abs().max() < 0.15
