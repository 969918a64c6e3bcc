"""A model as it is saved: with its generation config, and with a base in shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig, TrainingArguments

from softpref.algorithm.gradients.shards import is_sharded


def save_model(model: nn.Module, directory: Path, state_dict: dict[str, Any] | None = None) -> None:
    """Save a model or adapter, its generation config as it is.

    transformers refuses one that sets, say, a temperature without do_sample, as many published
    models have it. It does so at the end of a run, once the trainer has aligned a token id in it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model_with_saving: Any = model
    own = vars(model).get("generation_config")  # an adapter has none of its own, and saves none
    if own is None:
        model_with_saving.save_pretrained(directory, state_dict=state_dict)
        return
    try:
        model_with_saving.generation_config = GenerationConfig()
        model_with_saving.save_pretrained(directory, state_dict=state_dict)
    finally:
        model_with_saving.generation_config = own
    own.to_json_file(directory / "generation_config.json", use_diff=True)


@contextmanager
def allow_sharded_save(policy: nn.Module, args: TrainingArguments) -> Iterator[None]:
    """Let a Trainer be made of a sharded base, though it is to save its optimizer's state too.

    transformers refuses, for the state of shards is in shards. An adapter's is whole.
    """
    asked_for = args.save_only_model
    args.save_only_model |= is_sharded(policy)
    try:
        yield
    finally:
        args.save_only_model = asked_for
