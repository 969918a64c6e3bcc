"""Toy pairs in the synthetic language, and runs over them that take a second."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from random import Random

import torch
from datasets import Dataset

from softpref.algorithm.methods import METHODS
from softpref.data.sources import LoadedPairs, load_pairs
from softpref.training.config import MSPOConfig
from softpref.training.trainer import MSPOTrainer
from softpref.world.language import corrupt, make_tokenizer, prompts, right_answer
from tests.tiny import tiny_model, without_float32


def pairs_from_dataset(dataset: Dataset, name: str, **how) -> LoadedPairs:
    """Read a data set; messages call it `name`."""
    return load_pairs(dataset, argument=name, **how)


def toy_pairs(count: int, seed: int = 0, flip_every: int = 0) -> Dataset:
    """Right answers against corrupted ones; every `flip_every`-th pair is labelled wrongly."""
    random, rows = Random(seed), []
    for i, prompt in enumerate(islice(prompts(random), count)):
        right = right_answer(prompt)
        wrong = right
        while wrong == right:
            wrong = corrupt(right, 0.4, random)
        flipped = bool(flip_every) and i % flip_every == 0
        chosen, rejected = (wrong, right) if flipped else (right, wrong)
        rows.append(
            {"prompt": prompt, "chosen": chosen, "rejected": rejected, "is_flipped": flipped}
        )
    return Dataset.from_list(rows)


def toy_config(output: Path, **options) -> MSPOConfig:
    defaults = {
        "tuning": "full",
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "reference_cache": str(output / "cache"),
    }
    if METHODS[options.get("method", "mspo")].teaches:
        defaults |= {"meta_batch_size": 8, "meta_every": 1}
    return MSPOConfig(output_dir=str(output / "run"), **(defaults | options))


def exact_trainer(output: Path, **options) -> MSPOTrainer:
    """Make a run in float64, for comparing runs.

    AdamW turns a gradient of nothing but rounding into a step of either sign. In float32 such a
    gradient is as large as AdamW's eps, and which entries it meets depends on the processor.
    """
    model = without_float32(tiny_model(dtype=torch.float64, attention="sdpa"))
    trainer = toy_trainer(output, model=model, **options)
    if trainer.teacher:
        trainer.start.labeller.double()
    return trainer


def toy_trainer(output: Path, *, model=None, train=None, clean=None, evaluation=None, **options):
    return MSPOTrainer(
        model or tiny_model(dtype=torch.float32, attention="sdpa"),
        toy_config(output, **options),
        train if train is not None else toy_pairs(40, flip_every=3),
        clean if clean is not None else toy_pairs(16, seed=1),
        evaluation,
        processing_class=make_tokenizer(),
    )
