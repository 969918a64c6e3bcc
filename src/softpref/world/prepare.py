"""Prepare a world for runs: SFT model, pairs, test prompts and the model's scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from softpref.models.sampling import sample
from softpref.training.output import write_lines, write_text
from softpref.training.sft import SFTOptions, fine_tune
from softpref.world.build import MAX_NEW_TOKENS, Draw, World, make_data, sft_rows, tiny_llama
from softpref.world.language import make_tokenizer, score

BASELINE_DRAWS, METHOD_DRAWS = 1_000_000, 2_000_000
"""Seed offsets. With the same draws, similar policies would give equal answers, hence ties."""


@dataclass(frozen=True)
class PreparedWorld:
    """Paths of a prepared world; all exist once `prepare_world` has returned."""

    home: Path
    seed: int

    @property
    def sft(self) -> str:
        """The SFT model's directory."""
        return str(self.home / "sft")

    def pairs(self, name: str) -> str:
        """Return the file of correctly labelled pairs of a set: `train`, `clean` or `eval`."""
        return str(self.home / f"{name}.jsonl")

    def test(self) -> tuple[list[str], list[float]]:
        """Return the test prompts and the scores of the SFT model's answers."""
        saved = json.loads((self.home / "test.json").read_text(encoding="utf-8"))
        return saved["prompts"], saved["sft_scores"]


def prepare_world(world: World, seed: int, home: Path) -> PreparedWorld:
    """Fine-tune the SFT model, draw pairs and test prompts, and score the SFT model's answers.

    `test.json` is written last: if it exists, the world is complete and nothing is done. An
    incomplete world is rebuilt.
    """
    prepared = PreparedWorld(home, seed)
    if (home / "test.json").is_file():
        return prepared
    shutil.rmtree(home / "sft", ignore_errors=True)
    home.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    untrained = tiny_llama(tokenizer, seed, world.hidden_size)
    sft = fine_tune_tiny(untrained, home / "sft", sft_rows(world, seed), tokenizer, seed)
    data = make_data(world, seed, drawing(sft, tokenizer, seed))
    for name in ("train", "clean", "eval"):
        write_lines(home / f"{name}.jsonl", getattr(data, name))
    scores = sampled_scores(sft, tokenizer, data.test_prompts, seed + BASELINE_DRAWS)
    test = {"prompts": data.test_prompts, "sft_scores": scores}
    write_text(home / "test.json", json.dumps(test))
    return prepared


def fine_tune_tiny(
    model: Any,
    directory: Path,
    rows: list[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Any:
    """Fine-tune the world's SFT model, save it, and return it."""
    config = SFTOptions(
        output_dir=str(directory),
        num_train_epochs=8,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        seed=seed,
        logging_strategy="no",
        save_strategy="no",
        use_cpu=True,
    )
    fine_tune(model, tokenizer, Dataset.from_list(rows), config)
    return model


def alignment(method: str, seed: int) -> dict[str, Any]:
    """Return the world's alignment options; answers are short, so β and the rates are larger.

    Of 1, 1.5, 2 and 3, this β gives DPO on true labels the most wins (seeds 1000 and 1001).
    """
    return {
        "method": method,
        "tuning": "full",
        "beta": 1.5,
        "learning_rate": 5e-4,
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 250,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "max_length": 64,
        "seed": seed,
        "logging_strategy": "no",
        "save_strategy": "no",
        "use_cpu": True,
    }


def drawing(policy: Any, tokenizer: PreTrainedTokenizerBase, seed: int) -> Draw:
    """Return a function that samples a response per prompt, with a new seed for every call."""
    calls = count(seed)

    def draw(prompts: Sequence[str]) -> list[str]:
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        how: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 1.0}
        return sample(policy, tokenizer, ids, seed=next(calls), batch_size=500, **how)

    return draw


def sampled_scores(
    policy: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str], seed: int
) -> list[float]:
    """Return the score of one sampled answer to each prompt, as shares of correct symbols."""
    answers = drawing(policy, tokenizer, seed)(prompts)
    return [score(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
