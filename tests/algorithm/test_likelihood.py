from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from softpref.algorithm.likelihood import measure
from softpref.data import make_batch
from tests.tiny import ARCHITECTURES, VOCABULARY, random_pairs, slow_logp, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logps_equal_a_token_by_token_loop(architecture):
    policy, pairs = tiny_model(architecture), random_pairs(5)
    with torch.no_grad():
        measured = measure(policy, make_batch(pairs), "response")
        for i, pair in enumerate(pairs):
            chosen = slow_logp(policy, pair["prompt_ids"], pair["chosen_ids"])
            rejected = slow_logp(policy, pair["prompt_ids"], pair["rejected_ids"])
            assert float(measured.chosen_logp[i]) == pytest.approx(chosen, abs=1e-6)
            assert float(measured.rejected_logp[i]) == pytest.approx(rejected, abs=1e-6)
            margin = (chosen - pair["ref_chosen_logp"]) - (rejected - pair["ref_rejected_logp"])
            assert float(measured.margin[i]) == pytest.approx(margin, abs=1e-6)
            ppl_diff = rejected / len(pair["rejected_ids"]) - chosen / len(pair["chosen_ids"])
            assert float(measured.ppl_diff[i]) == pytest.approx(ppl_diff, abs=1e-6)


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_padding_order_and_batch_mates_change_nothing(count, seed, shuffle):
    policy, pairs = tiny_model("gpt2", attention="sdpa"), random_pairs(count, seed)
    order = list(range(count))
    shuffle.shuffle(order)
    with torch.no_grad():
        together = measure(policy, make_batch([pairs[i] for i in order]), "response")
        for position, i in enumerate(order):
            alone = measure(policy, make_batch([pairs[i]]), "response")
            torch.testing.assert_close(together.margin[position], alone.margin[0])
            torch.testing.assert_close(together.ppl_diff[position], alone.ppl_diff[0])


class FixedProbabilities(nn.Module):
    """Predicts each token with the probability given for it, always; token 8 has the rest."""

    def __init__(self, probability: dict[int, float]) -> None:
        super().__init__()
        self.logits = torch.full((VOCABULARY,), -1e9, dtype=torch.float64)
        for token, p in (probability | {8: 1 - sum(probability.values()) + 1e-300}).items():
            self.logits[token] = math.log(p)

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, VOCABULARY))


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        # prompt tokens 5 5 (the first has no prediction), chosen 6 6 6, rejected 7; in units of
        # log 2 token 5 costs 1, token 6 costs 2, token 7 costs 2.
        ("response", 6 / 3 - 2 / 1),
        ("sequence", (1 + 6) / 4 - (1 + 2) / 2),
        ("sequence_per_response_token", (1 + 6) / 3 - (1 + 2) / 1),
    ],
)
def test_ppl_scope_by_hand(scope, expected):
    policy = FixedProbabilities({5: 1 / 2, 6: 1 / 4, 7: 1 / 4})
    pair = {"prompt_ids": [5, 5], "chosen_ids": [6, 6, 6], "rejected_ids": [7]}
    measured = measure(policy, make_batch([pair]), scope)
    assert float(measured.ppl_diff[0]) == pytest.approx(expected * math.log(2), abs=1e-12)
    assert float(measured.chosen_logp[0]) == pytest.approx(-6 * math.log(2))


def test_prompt_tokens_never_count_in_the_margin():
    cheap = FixedProbabilities({5: 1 / 2, 6: 1 / 4, 7: 1 / 4})
    dear = FixedProbabilities({5: 1 / 1024, 6: 1 / 4, 7: 1 / 4})
    pair = {"prompt_ids": [5, 5, 5], "chosen_ids": [6], "rejected_ids": [7, 7],
            "ref_chosen_logp": 0.0, "ref_rejected_logp": 0.0}  # fmt: skip
    margins = [measure(p, make_batch([pair]), "response").margin for p in (cheap, dear)]
    torch.testing.assert_close(margins[0], margins[1])


def test_ppl_diff_is_never_differentiated():
    measured = measure(tiny_model(), make_batch(random_pairs(2)), "response")
    assert measured.margin.requires_grad
    assert not measured.ppl_diff.requires_grad


def test_low_precision_logits_are_summed_in_float32():
    measured = measure(tiny_model(dtype=torch.bfloat16), make_batch(random_pairs(2)), "response")
    assert measured.chosen_logp.dtype == torch.float32
