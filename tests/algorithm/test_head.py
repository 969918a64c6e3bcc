from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from softpref.algorithm.gradients import head as heads
from softpref.algorithm.gradients.head import (
    all_logits,
    linear_logps,
    refuse_response_head,
    response_head,
)
from softpref.algorithm.likelihood import measure
from softpref.data.batches import make_shared_batch
from tests.tiny import random_pairs, tiny_model, with_lora

TOKENS, HIDDEN, WORDS = 23, 6, 11


def problem(*, head_trains: bool, bias: bool):
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, WORDS, bias=bias, dtype=torch.float64).requires_grad_(head_trains)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    return hidden, head, torch.randint(WORDS, (TOKENS,)), torch.randn(TOKENS, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, WORDS, 5 * WORDS + 1, 10**6])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head_trains", [False, True])
def test_chunked_logps_and_gradients_are_log_softmax(head_trains, bias, chunk, monkeypatch):
    monkeypatch.setattr(heads, "CHUNK_ENTRIES", chunk)
    hidden, head, target, seed = problem(head_trains=head_trains, bias=bias)
    slow = F.log_softmax(head(hidden), -1)[torch.arange(TOKENS), target]
    fast = linear_logps(hidden, head, target)
    torch.testing.assert_close(fast, slow)
    leaves = [hidden, *(head.parameters() if head_trains else ())]
    for found, expected in zip(
        torch.autograd.grad(fast, leaves, seed), torch.autograd.grad(slow, leaves, seed),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(linear_logps(hidden, head, target), slow)


def test_differentiating_twice_raises_instead_of_being_wrong():
    hidden, head, target, seed = problem(head_trains=False, bias=False)
    weights = seed.clone().requires_grad_()
    logps = linear_logps(hidden, head, target)
    (once,) = torch.autograd.grad(logps, hidden, weights, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


class Largest(TorchDispatchMode):
    """Notes the largest tokens × vocabulary tensor; the head's own weight is none."""

    def __init__(self, head):
        super().__init__()
        self.words, self.weight, self.entries = len(head.weight), head.weight.T.shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.dim() > 1 and t.shape[-1] == self.words:
                self.entries = max(self.entries, t.numel() * (t.shape[-2:] != self.weight))
        return out


@pytest.mark.parametrize("head_trains", [False, True])
def test_no_logits_but_a_chunk_of_response_tokens(head_trains, monkeypatch):
    """Neither the number of prompt tokens nor that of response tokens shows in the head's size."""
    words, chunk = 32, 3 * 32
    monkeypatch.setattr(heads, "CHUNK_ENTRIES", chunk)
    policy = tiny_model(dtype=torch.float32, attention="sdpa")
    policy.lm_head.requires_grad_(head_trains)
    for prompt in (2, 40):
        pair = {
            "prompt_ids": [5] * prompt,
            "chosen_ids": [6, 7, 8, 9, 10, 11],
            "rejected_ids": [7, 8, 12, 4],
        }
        with Largest(policy.lm_head) as seen:
            margin = measure(policy, make_shared_batch([pair], "scored"), "response").margin
            margin.sum().backward()
        assert 0 < seen.entries <= chunk, prompt
        with Largest(policy.lm_head) as seen:
            measure(policy, make_shared_batch([pair], "all"), "response")
        assert seen.entries >= prompt * words  # what was spared above


def test_prompt_tokens_are_scored_without_gradient():
    policy = tiny_model(attention="sdpa")
    batch = make_shared_batch(random_pairs(3), "scored")
    for read in (all_logits, partial(response_head, logps=linear_logps)):
        responses, prompts = read(policy, batch.inputs(policy), [batch.responses, batch.prompts])
        assert responses.requires_grad
        assert not prompts.requires_grad


def test_a_head_with_an_adapter_is_refused():
    assert refuse_response_head(tiny_model()) is None
    assert refuse_response_head(with_lora(tiny_model())) is None
    adapted = with_lora(tiny_model(), target_modules=["lm_head"])
    assert "no plain linear layer" in str(refuse_response_head(adapted))
    assert "no plain linear layer" in str(refuse_response_head(nn.Linear(2, 2)))


def test_hooks_are_gone_even_after_an_error():
    policy = tiny_model()
    batch = make_shared_batch(random_pairs(2), "scored")
    with pytest.raises(TypeError):
        response_head(
            policy, batch.inputs(policy) | {"no_such": 1, "input_ids": 3}, [], linear_logps
        )
    assert not policy.lm_head._forward_hooks
    assert not policy.lm_head._forward_pre_hooks
