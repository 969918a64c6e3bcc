"""Tiny random models of several architectures, random pairs for them, and the slow truth."""

from __future__ import annotations

import random
from dataclasses import fields

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from softpref.algorithm.bilevel import clean_gradient
from softpref.algorithm.gradients.jacobian import GraphPullback
from softpref.algorithm.likelihood import Measured
from softpref.algorithm.objective import GEOMETRIC, Objective
from softpref.algorithm.rows import OF_THE_PAIR

VOCABULARY = 32
ARCHITECTURES = {
    "llama": dict(intermediate_size=24, num_key_value_heads=2),
    "gpt2": dict(),
    "phi": dict(intermediate_size=24, partial_rotary_factor=0.5),
    "qwen2": dict(intermediate_size=24, num_key_value_heads=2),
    "gemma": dict(intermediate_size=24, num_key_value_heads=1, head_dim=8),
}


def tiny_model(
    architecture: str = "llama",
    dtype: torch.dtype = torch.float64,
    attention: str = "eager",
    spread: float = 0.2,
    **sizes,
) -> nn.Module:
    torch.manual_seed(0)
    common = dict(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = AutoConfig.for_model(
        architecture, **common | ARCHITECTURES.get(architecture, {}) | sizes
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    # A trained model's gradients are not all alike: make the random one less uniform.
    with torch.no_grad():
        for p in model.parameters():
            p.add_(spread * torch.randn_like(p))
    return model.eval()


def without_float32(model: nn.Module) -> nn.Module:
    """Give RMSNorm the model's own precision; transformers computes it in float32 everywhere.

    A rounding there is up to 1e-6 of a gradient in which most cancels.
    """
    for module in model.modules():
        kind = type(module)
        if "RMSNorm" in kind.__name__:  # of a class of its own, so that copies norm by their own
            module.__class__ = type(kind.__name__, (kind,), {"forward": _rms_norm})
    return model


def _rms_norm(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    eps = getattr(self, "variance_epsilon", None) or self.eps
    plus = 1.0 if "Gemma" in type(self).__name__ else 0.0
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (plus + self.weight)


def with_lora(model: nn.Module, spread: float = 0.3, **kwargs) -> nn.Module:
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | kwargs
    peft = get_peft_model(model, LoraConfig(**options))
    torch.manual_seed(1)
    with torch.no_grad():  # B starts at zero, where half of the gradient vanishes
        for name, p in peft.named_parameters():
            if "lora_" in name:
                p.copy_(spread * torch.randn_like(p))
    return peft.to(next(model.parameters()).dtype).eval()


def dpo_gradient(policy: nn.Module, batches: list, beta: float) -> tuple:
    pullbacks = (GraphPullback(policy, batch, "response") for batch in batches)
    return clean_gradient(pullbacks, Objective(GEOMETRIC, beta), pairs=sum(map(len, batches)))


def slow_logp(policy: nn.Module, prompt: list[int], response: list[int]) -> float:
    """One token at a time, each from a forward pass over what stands before it."""
    total, ids = 0.0, list(prompt)
    for token in response:
        logits = policy(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        total += float(F.log_softmax(logits, -1)[token])
        ids.append(token)
    return total


def random_pairs(count: int, seed: int = 0, longest: int = 9) -> list[dict]:
    draw = random.Random(seed)

    def ids(shortest: int = 1) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(shortest, longest))]

    return [
        {
            "prompt_ids": [1, *ids()],
            "chosen_ids": ids(),
            "rejected_ids": ids(),
            "ref_chosen_logp": -draw.uniform(1, 40),
            "ref_rejected_logp": -draw.uniform(1, 40),
        }
        for _ in range(count)
    ]


def measured(**columns: list[float]) -> Measured:
    """What might be measured of pairs: the columns given, at least one, else 0 or nothing."""
    given = {name: torch.tensor(values) for name, values in columns.items()}
    zeros = torch.zeros_like(next(iter(given.values())))
    nothing = {name: torch.full_like(zeros, value) for name, value in OF_THE_PAIR.items()}
    return Measured(
        **{f.name: given.get(f.name, nothing.get(f.name, zeros)) for f in fields(Measured)}
    )
