"""Responses of a policy to prompts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from softpref.algorithm.policy import evaluating
from softpref.models.soundness import embedding_rows


def sample(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float | None,
    seed: int,
    batch_size: int,
) -> list[str]:
    """Return one response to each prompt, without its special tokens.

    Equal arguments give equal responses on equal hardware; the caller's random state is left
    alone. Prompts of like length share a batch, padded on the left.

    Args:
        policy: a causal language model of transformers, plain or PEFT.
        tokenizer: the policy's.
        prompts: token ids, each at least one.
        max_new_tokens: longest response.
        temperature: draws from softmax(logits / temperature), greedily at 0: nothing of the
            model's own generation_config counts but the ids that end a response. None: draws as
            that config says.
        seed: of the draws.
        batch_size: prompts a batch.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    config = _generation_config(policy, tokenizer, max_new_tokens, temperature)
    generate = cast(Callable[..., Tensor], policy.generate)
    device = next(policy.parameters()).device
    responses = [""] * len(prompts)
    starts = range(0, len(prompts), batch_size)
    with evaluating(policy), _steered_by(config, policy), torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in tqdm(
            starts, desc="generating", unit="batch", leave=False, delay=3, disable=None
        ):
            members = order[start : start + batch_size]
            ids, mask = _left_padded([prompts[i] for i in members], config.pad_token_id)
            output = generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                tokenizer=tokenizer,  # a model's own stop_strings are looked for with it
            )
            texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(members, texts, strict=True):
                responses[i] = text
    return responses


def _generation_config(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float | None,
) -> GenerationConfig:
    own = cast(GenerationConfig, policy.generation_config)
    if temperature is None:
        config = copy.deepcopy(own)
    elif temperature > 0:
        config = GenerationConfig(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    else:
        config = GenerationConfig(do_sample=False)
    config.update(
        max_length=None,
        max_new_tokens=max_new_tokens,
        num_return_sequences=1,
        return_dict_in_generate=False,
        eos_token_id=tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id,
        pad_token_id=padding_id(policy, tokenizer),
    )
    return config


def padding_id(policy: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return an id to pad with that the policy can read: padding is often beyond its embedding."""
    known = embedding_rows(policy)
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((one for one in ids if one is not None and one < known), 0)


@contextmanager
def _steered_by(config: GenerationConfig, policy: nn.Module) -> Iterator[None]:
    """Put a config in the place of the model's own, from which generate() fills unset values.

    Under an adapter the base model holds it.
    """
    name = "generation_config"
    holders = [vars(m) for m in policy.modules() if isinstance(vars(m).get(name), GenerationConfig)]
    own = [holder[name] for holder in holders]
    try:
        for holder in holders:
            holder[name] = config
        yield
    finally:
        for holder, its_own in zip(holders, own, strict=True):
            holder[name] = its_own


def _left_padded(rows: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask, both (B, longest row), the rows flush right."""
    longest = max(map(len, rows))
    ids = [[pad_token_id] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)
