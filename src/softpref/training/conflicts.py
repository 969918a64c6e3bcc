"""Options of an alignment run that exclude each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from softpref.errors import UsageError
from softpref.quantization import LOAD_IN

if TYPE_CHECKING:
    from softpref.training.config import MSPOConfig

# Options of transformers that must keep this value here, and why.
FIXED: dict[str, tuple[Any, str]] = {
    "fp16": (
        False,
        "gradients are exact only without loss scaling: use --bf16 true; on a T4 or V100, which "
        "have no bfloat16, leave both out and give --load_in_4bit true, for float32 adapters over "
        "a 4-bit base",
    ),
    "label_smoothing_factor": (0.0, "how far to believe a label is the method's business"),
    "neftune_noise_alpha": (None, "the three steps must see the same function"),
    "torch_compile": (False, "the step is not compiled"),
    "load_best_model_at_end": (False, "labels belong to the last step: take a checkpoint by hand"),
    "include_num_input_tokens_seen": ("no", "tokens are not counted"),
    "train_sampling_strategy": ("random", "steps deal with lengths by themselves"),
    "auto_find_batch_size": (False, "set --per_device_train_batch_size"),
    "batch_eval_metrics": (False, "compute_metrics is called once for each evaluation set"),
}


def refuse_conflicts(config: MSPOConfig) -> None:
    """Refuse options that do not go together, and values of transformers' that do not go here.

    Raises:
        UsageError: the message names the options and the remedy.
    """
    if config.perpcorrect_mode == "official" and config.world_size > 1:
        raise UsageError(
            "--perpcorrect_mode official runs in one process: start it without torchrun, or "
            "choose --perpcorrect_mode threshold."
        )
    for name, (value, why) in FIXED.items():
        if getattr(config, name) != value:
            raise UsageError(f"--{name}: {why}.")
    if config.tuning == "full" and (
        config.lora_r or config.lora_alpha or config.lora_target_modules
    ):
        raise UsageError("--tuning full does not read --lora_*: leave them out.")
    if config.perpcorrect_mode == "official" and config.noise_rate is not None:
        raise UsageError(
            "--perpcorrect_mode official finds its own noise rate: leave --noise_rate out, or "
            "choose --perpcorrect_mode threshold."
        )
    if config.engine == "double_backward" and config.activation_checkpointing:
        raise UsageError(
            "--engine double_backward cannot recompute activations: leave "
            "--activation_checkpointing out, or choose --engine auto."
        )
    packed = next((name for name in LOAD_IN if getattr(config, name)), None)
    if packed and config.tuning == "full":
        raise UsageError(
            f"--{packed}: packed weights cannot train: choose --tuning lora, or remove it."
        )
    if packed and config.shard:
        raise UsageError(
            f"--{packed} and --shard: packed weights are not sharded; give one of them."
        )
    config.bits()  # needs a package
    if config.shard:
        config.refuse_with_shards()
