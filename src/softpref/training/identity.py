"""Which options are part of a run: one that is resumed with another of them is another run.

The others change nothing that a step does (how it is computed, logged, saved, evaluated), are
fixed, or are told by what else identifies a run: the pairs, the policy, the size of a step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Set
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from softpref.errors import UsageError
from softpref.options import facts_of
from softpref.training.config import MSPOConfig
from softpref.training.states import JSON, read_state

logger = logging.getLogger(__name__)

OF_THE_OPTIMIZER = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay",
    "optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm",
)  # fmt: skip
OF_THE_STEPS = (
    "max_steps", "num_train_epochs", "seed", "data_seed", "dataloader_drop_last",
    "ignore_data_skip", "max_length", "bf16",
)  # fmt: skip
IDENTITY = (
    *OF_THE_OPTIMIZER,
    *OF_THE_STEPS,
    *(name for name, facts in facts_of(MSPOConfig).items() if facts.get("identity")),
)
"""Of `train`."""
SFT_IDENTITY = (
    *OF_THE_OPTIMIZER, *OF_THE_STEPS,
    "fp16", "label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices",
    "train_sampling_strategy", "shuffle_dataset", "packing", "packing_strategy", "loss_type",
    "assistant_only_loss", "truncation_mode", "router_aux_loss_coef", "eos_token", "pad_token",
)  # fmt: skip
"""Of `sft`; an older version of a library lacks some."""
OF_WHAT_IS_SAVED = ("optim", "tuning", "lora_r", "lora_target_modules")  # not even by --force


def refuse_other_run(
    checkpoint: Path, identity: Mapping[str, JSON], args: TrainingArguments
) -> None:
    """Refuse to resume from a checkpoint of another run; with `force`, log what differs.

    An option that the checkpoint lacks, because it is newer, counts as left open there.

    Args:
        checkpoint: where the other run's identity was written.
        identity: this run's.
        args: this run's options.

    Raises:
        UsageError: something differs.
    """
    _, old = read_state(checkpoint, "identity")
    new = json.loads(json.dumps(identity))
    old = json.loads(json.dumps(_defaults(args, new.keys() - old.keys()))) | old
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    changes = [f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in changed]
    told = f"{checkpoint}: cannot resume, this is another run: {'; '.join(changes)}."
    if shapes := [key for key in changed if key in OF_WHAT_IS_SAVED]:
        raise UsageError(
            f"{told} What was saved does not fit another {shapes[0]}: restore the old value, "
            "or start a new run with another output_dir."
        )
    if changes and getattr(args, "force", False):
        logger.warning("warning: %s comes from another run: %s", checkpoint, "; ".join(changes))
    elif changes:
        raise UsageError(
            f"{told} Restore the old values, start a new run with another output_dir, or "
            "resume anyway with --force true."
        )


def _defaults(args: TrainingArguments, names: Set[str]) -> dict[str, Any]:
    """Return what the options among the names are where a user leaves them open.

    Those that a recipe fills, for what the method reads, are as this run's recipe has them.
    """
    options: Any = args
    found = {}
    for field, facts in zip(fields(options), facts_of(type(options)).values(), strict=True):
        if field.name in names:
            make = field.default_factory
            default = field.default if make is MISSING else make()
            if "recipe" in facts and getattr(options, field.name) is not None:
                default = getattr(facts["recipe"], options.recipe)
            found[field.name] = default
    return found
