"""What is said of single pairs: nats that add up, trusted pairs that are alike, plain words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from softpref.auditing import explanations
from softpref.auditing.explanations import explain_pairs, explanation_text
from softpref.training import evidence as fitting
from softpref.training.evidence import SIGNAL_NAMES, evidence_of

TOPICS = 4


def read(count, rate, seed):
    """Pairs as a pass leaves them: a response's topic alone, one of four, says which is better."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=draw)

    topic = torch.randint(TOPICS, (count,), generator=draw)
    flipped = torch.rand(count, generator=draw) < rate
    state = random(count, TOPICS) / 4
    state[torch.arange(count), topic] += 1.0
    state[flipped] *= -1
    lengths = torch.randint(5, 20, (2, count), generator=draw)
    numbers = {
        "starting_ppl_diff": random(count),
        "ref_chosen_logp": random(count) - 20,
        "ref_rejected_logp": random(count) - 20,
        "chosen_spread": random(count).abs(),
        "rejected_spread": random(count).abs(),
        "likeness": random(count),
        "distance": random(count).abs(),
        "overlap": random(count).abs(),
    }
    ids = dict(zip(("chosen_ids", "rejected_ids"), lengths.tolist(), strict=True))
    columns = {name: values.tolist() for name, values in numbers.items()}
    columns |= {name: [[1] * length for length in each] for name, each in ids.items()}
    columns["state"] = state.tolist()
    return Dataset.from_dict(columns), flipped, topic


NOISY, FLIPPED, TOPIC = read(300, 0.3, 0)
TRUSTED, _, TRUSTED_TOPIC = read(60, 0.0, 1)


@pytest.fixture(scope="module")
def fitted():
    return evidence_of(NOISY, TRUSTED, SIGNAL_NAMES, 0)


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (SIGNAL_NAMES, ["fluency", "length", "content"]),
        (["ppl_diff"], ["fluency"]),
        (["ppl_diff", "length"], ["fluency", "length"]),
        (["ppl_diff", "content"], ["fluency", "content"]),
    ],
)
@pytest.mark.parametrize("most_fitted", [10_000, 200])
def test_the_kinds_in_use_add_up_to_what_is_found(monkeypatch, names, kinds, most_fitted):
    monkeypatch.setattr(fitting, "MOST_FITTED", most_fitted)
    evidence, log_odds = evidence_of(NOISY, TRUSTED, names, 0)
    monkeypatch.setattr(type(evidence), "speaks", True)
    explained = explain_pairs(evidence, NOISY, names, 0)
    assert list(explained.evidence) == kinds
    assert torch.allclose(explained.log_odds, log_odds)


def test_what_each_kind_is_made_of(fitted):
    parts = fitted[0].noisy_parts
    found = explain_pairs(fitted[0], NOISY, SIGNAL_NAMES, 0).evidence
    made_of = {
        "fluency": ["curve", "even", "ppl_diff"],
        "length": ["length", "length_ratio", "log_probability"],
        "content": ["content"],
    }
    assert {name for names in made_of.values() for name in names} == set(parts)
    for kind, names in made_of.items():
        assert torch.allclose(found[kind], torch.stack([parts[name] for name in names]).sum(0))


def test_evidence_is_of_what_tells_labels_apart_and_has_its_sign(fitted):
    found = explain_pairs(fitted[0], NOISY, SIGNAL_NAMES, 0).evidence
    sizes = {kind: float(nats.abs().mean()) for kind, nats in found.items()}
    assert sizes["content"] > 1.5
    assert sizes["fluency"] + sizes["length"] < sizes["content"] / 3
    assert float((found["content"][FLIPPED] < 0).double().mean()) > 0.95
    assert float((found["content"][~FLIPPED] > 0).double().mean()) > 0.95


def test_what_is_said_of_a_pair_has_not_read_its_label(fitted):
    """Whole and in parts, noisy pairs are judged by the fits that left them out."""
    in_fit = fitted[0].parts(fitting.signals_of(NOISY, SIGNAL_NAMES))
    found = fitted[0].noisy_parts
    assert torch.allclose(torch.stack(list(found.values())).sum(0), fitted[0].noisy)
    side = torch.where(FLIPPED, -1.0, 1.0)
    assert not torch.allclose(in_fit["content"], found["content"])
    assert float((side * found["content"]).mean()) > 1


def test_the_trusted_pairs_that_are_named_say_the_same_of_the_same_topic(fitted):
    closest = explain_pairs(fitted[0], NOISY, SIGNAL_NAMES, 0).closest
    assert closest.shape == (300, 2)
    alike = (TRUSTED_TOPIC[closest] == TOPIC[:, None]).double().mean()
    assert float(alike) > 0.6  # by chance 0.25


def test_pairs_are_taken_in_parts(fitted, monkeypatch):
    whole = explain_pairs(fitted[0], NOISY, SIGNAL_NAMES, 0)
    monkeypatch.setattr(explanations, "CHUNK_PAIRS", 7)
    parts = explain_pairs(fitted[0], NOISY, SIGNAL_NAMES, 0)
    assert torch.equal(whole.closest, parts.closest)


def test_where_evidence_does_not_speak_no_pair_has_any(fitted):
    silent = replace(fitted[0], trusted=-fitted[0].trusted)
    explained = explain_pairs(silent, NOISY, SIGNAL_NAMES, 0)
    assert not explained.log_odds.any()
    assert not explained.log_odds.signbit().any()  # no −0 in a file
    assert explained.closest.shape == (300, 0)


def test_no_trusted_pair_is_named_where_the_curve_is_all():
    evidence, _ = evidence_of(NOISY, TRUSTED, ["ppl_diff"], 0)
    speaking = replace(
        evidence, trusted=torch.ones(60).double(), pull=torch.zeros_like(evidence.pull)
    )
    assert explain_pairs(speaking, NOISY, ["ppl_diff"], 0).closest.shape == (300, 0)


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        ({"fluency": -0.5, "length": -0.1, "content": -1.4},
         "what the responses say speaks against the label (−1.4 nats), fluency too (−0.5), length "
         "hardly (−0.1); closest trusted pairs: rows 12 and 40"),
        ({"fluency": 2.0, "length": -1.0, "content": 0.5},
         "fluency speaks for the label (+2.0 nats), length against it (−1.0), what the responses "
         "say for it (+0.5); closest trusted pairs: rows 12 and 40"),
        ({"fluency": -0.04, "length": 0.15},
         "hardly anything speaks for or against the label (fluency +0.0, length +0.1 nats); "
         "closest trusted pairs: rows 12 and 40"),
    ],
)  # fmt: skip
def test_reasons_in_plain_words(evidence, words):
    assert explanation_text(evidence, True, [12, 40], "") == words


def test_reasons_that_claim_nothing():
    nothing = "nothing in the data distinguishes right labels from wrong ones"
    assert explanation_text({"fluency": 0.0}, False, [], "") == nothing
    both = explanation_text({"fluency": 0.0}, False, [], "elsewhere")
    assert both == f"{nothing}; the same two responses are labelled the other way round elsewhere"
    assert (
        explanation_text({"fluency": 1.0}, True, [], "")
        == "fluency speaks for the label (+1.0 nats)"
    )
