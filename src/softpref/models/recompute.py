"""Activation checkpointing, which transformers has renamed: the old name is alone before 5.23."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import TrainingArguments

# The other kind of checkpointing cannot be asked for gradients of chosen tensors.
KWARGS = {"use_reentrant": False}


def set_both_names(args: TrainingArguments) -> None:
    """Let `activation_checkpointing` and `gradient_checkpointing` be one option, either set."""
    for name, old in (
        ("activation_checkpointing", "gradient_checkpointing"),
        ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
    ):
        value = getattr(args, name, None) or getattr(args, old)
        setattr(args, name, value)
        setattr(args, old, value)


def checkpoint_activations(policy: nn.Module) -> None:
    """Make the policy recompute its activations in the backward pass, as a Trainer would."""
    model = cast(Any, policy)
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(KWARGS)
