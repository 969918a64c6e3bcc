"""Confident learning over hidden states: what it is given, and what it finds."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from softpref.study import confident
from tests.tiny import tiny_model

D = 8


def random_ids(generator, longest):
    length = int(torch.randint(1, longest, (1,), generator=generator))
    return torch.randint(3, 32, (length,), generator=generator).tolist()


def test_features_are_means_over_the_response_whatever_shares_the_batch(monkeypatch):
    policy = tiny_model()
    monkeypatch.setattr(confident, "load_policy", lambda *_, **__: policy)
    generator = torch.Generator().manual_seed(0)
    parts = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{part: random_ids(generator, 12) for part in parts} for _ in range(20)]

    def alone(prompt, response):
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            states = policy(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        return states[0, len(prompt) :].float().mean(0)

    slow = torch.stack(
        [
            alone(row["prompt_ids"], row["chosen_ids"])
            - alone(row["prompt_ids"], row["rejected_ids"])
            for row in rows
        ]
    )
    found = confident.response_features("", Dataset.from_list(rows))
    torch.testing.assert_close(found, slow, rtol=1e-5, atol=1e-6)


@pytest.fixture
def planted():
    """Differences along one direction, of which 30% are turned round."""
    generator = torch.Generator().manual_seed(1)
    better = torch.randn(2000, D, generator=generator)
    better[:, 0] += 2.5
    flipped = torch.rand(2000, generator=generator) < 0.3
    return torch.where(flipped[:, None], -better, better), flipped


def test_wrong_labels_and_their_share_are_found(planted):
    features, flipped = planted
    quality, noise_rate = confident.self_confidence(features)
    assert float(quality[flipped].mean()) < 0.35 < 0.65 < float(quality[~flipped].mean())
    assert noise_rate == pytest.approx(0.3, abs=0.04)
    assert bool(((quality >= 0) & (quality <= 1)).all())


def test_a_pair_has_no_part_in_its_own_verdict(planted):
    features, _ = planted
    before, _ = confident.self_confidence(features)
    features[7] = -features[7]
    after, _ = confident.self_confidence(features)
    # Its own fold's weights are the old ones, so its probability turns to the other side.
    assert float(after[7]) == pytest.approx(1 - float(before[7]), abs=1e-9)
