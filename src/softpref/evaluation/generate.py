"""Responses of a policy to plain-text prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from softpref.algorithm.policy import evaluating


def sample(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
) -> list[str]:
    """Return one response to each prompt, without its special tokens.

    Drawn from softmax(logits / temperature), neither top-k nor top-p; greedy at temperature 0.
    Equal arguments give equal responses on equal hardware; the caller's random state is left
    alone. Prompts of like length share a batch, padded on the left.
    """
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    config = _generation_config(policy, tokenizer, max_new_tokens, temperature)
    generate = cast(Callable[..., Tensor], policy.generate)
    device = next(policy.parameters()).device
    responses = [""] * len(prompts)
    starts = range(0, len(prompts), batch_size)
    with evaluating(policy), torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in tqdm(starts, desc="generating", unit="batch", leave=False, delay=3):
            members = order[start : start + batch_size]
            ids, mask = _left_padded([encoded[i] for i in members], config.pad_token_id)
            output = generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
            )
            texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(members, texts, strict=True):
                responses[i] = text
    return responses


def _generation_config(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
) -> GenerationConfig:
    """Set whatever shapes the distribution: unset values would be taken from the model's own."""
    own = cast(GenerationConfig, policy.generation_config).eos_token_id
    ends = tokenizer.eos_token_id if own is None else own
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    drawing = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        repetition_penalty=1.0,
        eos_token_id=ends,
        pad_token_id=pad,
        **drawing,
    )


def _left_padded(rows: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask, both (B, longest row), the rows flush right."""
    longest = max(map(len, rows))
    ids = [[pad_token_id] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)
