"""The workload of `softpref bench`: a random Llama, and pairs of random words.

Shapes: B pairs per step; lengths are in tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from softpref.models.loading import Tuning

TUNINGS: tuple[Tuning, ...] = ("lora", "full")
SEED = 1000
CLEAN_SEED = 1001
PROMPT_SPREAD, RESPONSE_SPREAD = 0.25, 0.5
_SPECIAL = ("<pad>", "</s>", "<unk>")


@dataclass(frozen=True)
class ModelSize:
    """The size of a Llama, with the names of its config."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool


@dataclass(frozen=True)
class Shape:
    """Mean lengths, in tokens; the final EOS counts as part of the response."""

    prompt: int
    response: int

    def __str__(self) -> str:
        return f"{self.prompt} + {self.response}"


@dataclass(frozen=True)
class Workload:
    """Everything that comparable contestants have in common.

    Attributes:
        size: the model's size.
        shape: mean lengths of the pairs.
        device: "cpu" or "cuda"; on "cuda" a step runs in bfloat16, else in float32.
        pairs: B, pairs per step.
        batches: number of different batches.
    """

    size: ModelSize
    shape: Shape
    device: str
    pairs: int = 8
    batches: int = 4

    @property
    def dtype(self) -> torch.dtype:
        """The data type of a step."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def model(self, tuning: Tuning) -> Any:
        """Return the model with the same weights at every call; trained weights are float32."""
        config = LlamaConfig(
            **vars(self.size), bos_token_id=None, eos_token_id=1, pad_token_id=0, use_cache=False
        )
        torch.manual_seed(SEED)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(
                config,
                dtype=self.dtype if tuning == "lora" else torch.float32,
                attn_implementation="sdpa",
            )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a tokenizer with one word for every token of the vocabulary."""
        words = [*_SPECIAL, *_words(self.size.vocab_size)]
        tokenizer = Tokenizer(
            WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
        )
        tokenizer.pre_tokenizer = WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )

    def train_pairs(self) -> Dataset:
        """Return the pairs of all batches, in order."""
        return _pairs(self, self.pairs * self.batches, SEED)

    def clean_pairs(self) -> Dataset:
        """Return trusted pairs of the same kind, twice as many as in a step."""
        return _pairs(self, 2 * self.pairs, CLEAN_SEED)


def _words(vocab_size: int) -> list[str]:
    return [f"w{i}" for i in range(len(_SPECIAL), vocab_size)]


def _pairs(workload: Workload, count: int, seed: int) -> Dataset:
    random, words, shape = Random(seed), _words(workload.size.vocab_size), workload.shape

    def text(mean: int, spread: float, other_tokens: int) -> str:
        shortest, longest = math.ceil(mean * (1 - spread)), math.floor(mean * (1 + spread))
        tokens = random.randint(shortest, longest) - other_tokens
        return " ".join(random.choices(words, k=tokens))

    return Dataset.from_list(
        [
            {
                "prompt": text(shape.prompt, PROMPT_SPREAD, 0),
                # The space separates it from the prompt; the caller of the tokenizer appends EOS.
                "chosen": " " + text(shape.response, RESPONSE_SPREAD, 1),
                "rejected": " " + text(shape.response, RESPONSE_SPREAD, 1),
            }
            for _ in range(count)
        ]
    )
