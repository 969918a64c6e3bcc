from __future__ import annotations

import dataclasses

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from softpref.algorithm.likelihood import measure
from softpref.data.batches import make_batch, make_shared_batch
from softpref.models.layout import (
    LayoutChoice,
    choose_layout,
    layout_with_adapter,
    longest_pairs,
    shortest_pairs,
)
from tests.tiny import ARCHITECTURES, VOCABULARY, random_pairs, tiny_model, with_lora

SHARED = "prompts shared, log-probabilities of responses only"


def other_model(architecture, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = AutoConfig.for_model(architecture, **(sizes | kwargs))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def windowed(window, dtype=torch.float32):
    return other_model(
        "mistral", dtype, intermediate_size=24, num_key_value_heads=2, sliding_window=window
    )


def hold_to_truth(policy, collate, pairs):
    with torch.no_grad():
        truth = measure(policy, make_batch(pairs), "response")
        found = measure(policy, collate(pairs), "response")
    torch.testing.assert_close(found.margin, truth.margin, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_ordinary_models_share_prompts(architecture, attention):
    policy, pairs = tiny_model(architecture, torch.float32, attention), random_pairs(4, longest=20)
    layout = choose_layout("auto", policy, pairs)
    collate, why = layout.apply(policy), layout.why
    assert why == SHARED
    assert collate(pairs).position_ids is not None
    hold_to_truth(policy, collate, pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sliding_window_shorter_than_the_longest_pair_falls_back(dtype):
    """The plain mask would bypass the window: wrong numbers, no error."""
    policy, pairs = windowed(6, dtype), random_pairs(4, longest=20)
    layout = choose_layout("auto", policy, pairs)
    collate, why = layout.apply(policy), layout.why
    assert why.startswith("padded rows, log-probabilities of responses only; not prompts shared")
    assert "off by" in why
    if dtype == torch.float32:
        hold_to_truth(policy, collate, pairs)
    assert choose_layout("auto", windowed(64, dtype), pairs).why == SHARED


def test_the_trial_is_made_on_the_longest_pairs():
    short, long = random_pairs(20, 1, longest=3), random_pairs(2, 2, longest=20)
    mixed = Dataset.from_list([*short[:9], *long, *short[9:]])
    longest = longest_pairs(Dataset.from_list(short), None, mixed)
    assert len(longest) == 2
    assert all(pair in longest for pair in long)
    assert choose_layout("auto", windowed(10), longest).why.startswith("padded")
    lengths = [sum(len(p[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids")) for p in mixed]
    found = [
        sum(len(p[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids"))
        for p in shortest_pairs(mixed)
    ]
    assert found == sorted(lengths)[:4]


def test_attention_biases_and_changed_logits_fall_back():
    pairs = random_pairs(4, longest=12)
    for policy, expected in (
        (other_model("bloom"), "padded rows"),  # ALiBi
        (
            other_model(
                "cohere", intermediate_size=24, num_key_value_heads=4, logit_scale=0.5,
            ),
            "prompts shared, all logits",
        ),
        (
            other_model(
                "gemma2", intermediate_size=24, num_key_value_heads=2, head_dim=8,
                final_logit_softcapping=2.0, sliding_window=5,
            ),
            "padded rows, all logits",
        ),
    ):  # fmt: skip
        layout = choose_layout("auto", policy, pairs)
        collate, why = layout.apply(policy), layout.why
        assert why.startswith(expected), why
        hold_to_truth(policy, collate, pairs)


def test_padded_can_be_asked_for_and_adapted_heads_are_read_whole():
    pairs = random_pairs(4)
    layout = choose_layout("padded", tiny_model(dtype=torch.float32), pairs)
    assert layout.why == "padded rows, log-probabilities of responses only"
    assert layout.collate(pairs).position_ids is None
    adapted = with_lora(tiny_model(dtype=torch.float32), target_modules=["lm_head", "q_proj"])
    assert choose_layout("auto", adapted, pairs).why == "prompts shared, all logits"


def with_adapter(pairs, **changes):
    """Return a policy's layout, its adapted self with its layout, and the passes of that choice."""
    policy = tiny_model(dtype=torch.float32)
    before, passes = choose_layout("auto", policy, pairs), []
    adapted = with_lora(policy, **changes)
    adapted.register_forward_pre_hook(lambda *_: passes.append(1))
    return before, adapted, layout_with_adapter(before, "auto", adapted, pairs), len(passes)


def test_a_fresh_adapter_is_tried_in_one_pass():
    before, _, found, passes = with_adapter(random_pairs(2), spread=0.0)
    assert found is before
    assert passes == 1


@pytest.mark.parametrize("changes", [{}, {"target_modules": ["lm_head"], "spread": 0.0}])
def test_an_adapter_that_changes_the_policy_or_its_head_is_tried_anew(changes):
    before, adapted, found, passes = with_adapter(pairs := random_pairs(2), **changes)
    assert found is not before
    assert passes > 1
    assert found.why == choose_layout("auto", adapted, pairs).why
    hold_to_truth(adapted, found.collate, pairs)


def test_a_layout_that_fails_with_the_adapter_falls_back():
    def refuse(module, arguments, named):
        if "position_ids" in named:
            raise ValueError("no positions, please")

    policy, pairs = tiny_model(dtype=torch.float32), random_pairs(2)
    before = choose_layout("auto", policy, pairs)
    policy.register_forward_pre_hook(refuse, with_kwargs=True)
    found = layout_with_adapter(before, "auto", policy, pairs)
    assert found.why.startswith("padded rows, log-probabilities of responses only; not prompts")


def test_flex_attention_sees_the_same_blocks():
    """Forward only, not compiled: torch 2.13's code for a CPU errs under AVX2 and AVX-512."""
    policy, pairs = tiny_model("llama", torch.float32, "sdpa"), random_pairs(6, longest=20)
    shared = make_shared_batch(pairs)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        truth = measure(policy, make_batch(pairs), "response")
        policy.set_attn_implementation("flex_attention")
        found = measure(policy, shared, "response")
        torch.testing.assert_close(found.margin, truth.margin, rtol=1e-4, atol=1e-3)
        without = dataclasses.replace(shared, branch=torch.zeros_like(shared.branch))
        assert (measure(policy, without, "response").margin - truth.margin).abs().max() > 0.1


def test_a_layout_that_is_applied_for_a_while_leaves_the_attention_as_it_was():
    policy = tiny_model(dtype=torch.float32, attention="sdpa")
    with LayoutChoice(make_batch, "eager", "", "", torch.empty(0)).applied(policy) as collate:
        assert (collate, policy.config._attn_implementation) == (make_batch, "eager")
    assert policy.config._attn_implementation == "sdpa"
