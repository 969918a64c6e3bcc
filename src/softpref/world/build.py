"""Build the synthetic world: a tiny model, its SFT rows, preference pairs and test prompts.

The SFT model has a habit: its SFT rows often replace six symbols by others, so that it finds these
mistakes about as likely as the correct symbols. There PPLDiff carries little information, and only
labels can teach. All other mistakes are rare, and PPLDiff detects them. In the misleading world,
the model also learned to confuse one of four kinds of prompt with another: there PPLDiff favors the
wrong answer.

The teacher rarely errs, and half of the model's errors are habits: with fewer other errors, a
method gains less by following the model's preference instead of the labels.

Answers of six symbols need a larger β than paragraphs (1.5 rather than 0.1), and the SFT model some
1,000 steps: with fewer steps or a small β, DPO adds superfluous symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from softpref.world.language import LENGTHS, corrupt, prompts, replace_by_habit, right_answer

MAX_NEW_TOKENS = max(LENGTHS) + 2
"""Room for one extra symbol and EOS."""

Draw = Callable[[Sequence[str]], list[str]]
"""Draws one response of the SFT model to each prompt."""


@dataclass(frozen=True)
class World:
    """Sizes, error rates as shares of symbols, and systematic errors of the SFT rows.

    Attributes:
        habit: replacements of symbols that the SFT rows make at `habit_rate`.
        kinds: the kinds of prompt.
        misconceptions: kinds of prompt that the SFT rows answer like another kind.
        hidden_size: width of the model.
    """

    sft_rows: int = 8000
    train_pairs: int = 6000
    clean_pairs: int = 150
    eval_pairs: int = 500
    test_prompts: int = 1000
    sft_error_rate: float = 0.12
    habit: Mapping[str, str] = field(
        default_factory=lambda: {"a": "e", "c": "g", "d": "h", "f": "j", "i": "l", "k": "b"}
    )
    habit_rate: float = 0.45
    teacher_error_rate: float = 0.01
    kinds: tuple[str, ...] = ("sort", "reverse", "shift")
    misconceptions: Mapping[str, str] = field(default_factory=dict)
    hidden_size: int = 96


INFORMATIVE = World()
MISLEADING = World(
    kinds=("sort", "reverse", "shift", "rotate"), misconceptions={"rotate": "reverse"}
)
WORLDS = {"informative": INFORMATIVE, "misleading": MISLEADING}


@dataclass(frozen=True)
class WorldData:
    """Correctly labelled pairs (`prompt`, `chosen`, `rejected`) and prompts, all distinct."""

    train: list[dict[str, str]]
    clean: list[dict[str, str]]
    eval: list[dict[str, str]]
    test_prompts: list[str]


def sft_rows(world: World, seed: int) -> list[dict[str, str]]:
    """Return rows (`prompt`, `chosen`) for SFT from scratch, with habitual and random errors."""
    random = Random(f"{seed}/sft")
    return [
        {"prompt": prompt, "chosen": _sft_answer(world, prompt, random)}
        for prompt in islice(prompts(Random(seed), world.kinds), world.sft_rows)
    ]


def make_data(world: World, seed: int, draw: Draw) -> WorldData:
    """Return pairs, which prefer a teacher's answer to the SFT model's, and test prompts.

    A prompt with equal answers, or with an empty answer of the model, gives no pair. Prompts are
    disjoint from those of `sft_rows` with the same world and seed.
    """
    fresh = islice(prompts(Random(seed), world.kinds), world.sft_rows, None)
    random = Random(f"{seed}/teacher")
    train, clean, held_out = (
        _make_pairs(count, fresh, world.teacher_error_rate, random, draw)
        for count in (world.train_pairs, world.clean_pairs, world.eval_pairs)
    )
    return WorldData(train, clean, held_out, list(islice(fresh, world.test_prompts)))


def tiny_llama(
    tokenizer: PreTrainedTokenizerBase, seed: int, hidden_size: int = World.hidden_size
) -> LlamaForCausalLM:
    """Return an untrained Llama, with some 350,000 parameters at the default width."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # With tied embeddings, DPO raises the probability of non-symbols as it lowers symbols.
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _sft_answer(world: World, prompt: str, random: Random) -> str:
    kind, rest = prompt.split(" ", 1)
    believed = right_answer(f"{world.misconceptions.get(kind, kind)} {rest}")
    habitual = replace_by_habit(believed, world.habit, world.habit_rate, random)
    return corrupt(habitual, world.sft_error_rate, random)


def _make_pairs(
    count: int, fresh: Iterator[str], teacher_error_rate: float, random: Random, draw: Draw
) -> list[dict[str, str]]:
    pairs: list[dict[str, str]] = []
    while len(pairs) < count:
        asked = list(islice(fresh, count - len(pairs)))
        for prompt, own in zip(asked, draw(asked), strict=True):
            taught = corrupt(right_answer(prompt), teacher_error_rate, random)
            if own and own != taught:
                pairs.append({"prompt": prompt, "chosen": taught, "rejected": own})
    return pairs
