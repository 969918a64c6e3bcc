"""Everything the synthetic world is made of: a tiny model, its SFT rows, preference pairs.

The SFT model has a habit: taught by rows in which four symbols are written as another one about
half of the time, it holds those mistakes as likely as the truth. On such symbols PPLDiff says
nothing and only labels can teach; everywhere else mistakes are rare and PPLDiff tells them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from softpref.evaluation.generate import sample
from softpref.world.language import (
    LENGTHS,
    corrupt,
    mispronounce,
    prompts,
    right_answer,
)

MAX_ANSWER_TOKENS = max(LENGTHS) + 2
"""Room for EOS and for one symbol too many."""


@dataclass(frozen=True)
class World:
    """The world's sizes and error rates; rates are shares of symbols."""

    sft_rows: int = 8000
    train_pairs: int = 6000
    clean_pairs: int = 150
    eval_pairs: int = 500
    test_prompts: int = 1000
    sft_error_rate: float = 0.2
    habit: Mapping[str, str] = field(default_factory=lambda: {"a": "e", "d": "h", "g": "k", "j": "b"})
    habit_rate: float = 0.45
    teacher_error_rate: float = 0.05
