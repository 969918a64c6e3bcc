"""Policies and tokenizers from a directory or hub id, and the adapters that go on them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.distributed.configuration_utils import DistributedConfig

from softpref.algorithm.policy import trainable
from softpref.errors import UsageError
from softpref.training.config import MSPOConfig
from softpref.training.sharding import shards_for

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def load_tokenizer(source: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can end a response.

    Raises:
        UsageError: there is none at `source`, or it has no EOS token.
    """
    adapter = Path(source) / "adapter_config.json"
    if adapter.is_file() and not (Path(source) / "tokenizer_config.json").is_file():
        source = str(PeftConfig.from_pretrained(source).base_model_name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {source}: no tokenizer ({_first(error)}).") from None
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"--model {source}: its tokenizer has no EOS token, so no response could ever end; set "
            "`eos_token` in tokenizer_config.json."
        )
    return tokenizer


def load_policy(
    source: str,
    *,
    trust_remote_code: bool,
    dtype: torch.dtype = torch.float32,
    sharding: DistributedConfig | None = None,
) -> nn.Module:
    """Load a model, or an adapter with its base model; sharded if told how.

    Raises:
        UsageError: no causal language model can be loaded from `source`.
    """
    if not Path(source).exists() and not HUB_ID.fullmatch(source):
        raise UsageError(f"--model {source}: no such directory.")
    adapter = (Path(source) / "adapter_config.json").is_file()
    try:
        base = PeftConfig.from_pretrained(source).base_model_name_or_path if adapter else source
        policy = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, trust_remote_code=trust_remote_code, distributed_config=sharding
        )
        return PeftModel.from_pretrained(policy, source, is_trainable=True) if adapter else policy
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--model {source}: no causal language model could be loaded ({_first(error)}); give "
            "a directory with config.json and safetensors weights, or a hub id."
        ) from None


def tokenizer_of(
    model: nn.Module | str, policy: nn.Module, args: MSPOConfig
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a run's model, from where it lies or says that it was loaded from."""
    source = model if isinstance(model, str) else str(getattr(policy.config, "name_or_path", ""))
    return load_tokenizer(source, trust_remote_code=args.trust_remote_code)


def load_start(source: str, args: MSPOConfig) -> nn.Module:
    """Load the policy that a run starts from, in the precision it needs.

    Weights that train are float32 (a step of 1e-6 vanishes in bfloat16); the frozen base under an
    adapter is bfloat16 where training is. For full fine-tuning an adapter is merged into its base.
    """
    lora = args.tuning == "lora"
    dtype = torch.bfloat16 if args.bf16 and lora else torch.float32
    policy = load_policy(
        source,
        trust_remote_code=args.trust_remote_code,
        dtype=dtype,
        sharding=shards_for(args),
    )
    if isinstance(policy, PeftModel) and not lora:
        return policy.merge_and_unload().requires_grad_(True)  # the adapter had frozen it
    return policy


def lora_config(
    rank: int | None = None, alpha: int | None = None, targets: list[str] | None = None
) -> LoraConfig:
    """Return LoRA on every linear layer but the head, of rank 16 unless set."""
    return LoraConfig(
        r=rank or 16,
        lora_alpha=alpha or 32,
        target_modules=targets or "all-linear",
        task_type="CAUSAL_LM",
    )


def make_trainable(policy: nn.Module, args: MSPOConfig, adapter: PeftConfig | None) -> nn.Module:
    """Put a fresh adapter on the policy if it is to train one and has none yet.

    Raises:
        UsageError: policy, tuning and adapter contradict each other.
    """
    if args.tuning == "full":
        if adapter is not None or isinstance(policy, PeftModel):
            raise UsageError(
                "--tuning full, but an adapter was given: merge it into its base model "
                "(merge_and_unload) or choose --tuning lora."
            )
        if _has_16_bit_weights(policy):
            raise UsageError(
                "--tuning full needs float32 weights, for small steps vanish in 16 bits: load the "
                "model with dtype=torch.float32, and set bf16=True for speed."
            )
        return policy
    if isinstance(policy, PeftModel):
        if adapter is not None or args.lora_r or args.lora_alpha or args.lora_target_modules:
            raise UsageError(
                "the model has an adapter already: leave peft_config and --lora_* out."
            )
        if not trainable(policy):
            raise UsageError("the adapter is frozen: load it with is_trainable=True.")
        if _has_16_bit_weights(policy):
            raise UsageError(
                "the adapter needs float32 weights, for small steps vanish in 16 bits: load it "
                "with autocast_adapter_dtype=True; its base model may stay in 16 bits."
            )
        return policy
    fresh = lora_config(args.lora_r, args.lora_alpha, args.lora_target_modules)
    try:
        return get_peft_model(policy, adapter or fresh)
    except ValueError as error:
        raise UsageError(f"--lora_target_modules: {_first(error)}.") from None


def _has_16_bit_weights(policy: nn.Module) -> bool:
    return any(p.dtype in (torch.bfloat16, torch.float16) for p in trainable(policy))


def switch_dropout_off(policy: nn.Module) -> None:
    """Set every dropout probability of the policy to 0, for good.

    The three steps of an update must see the same function, in training mode too, which gradient
    checkpointing needs. Attention modules keep their probability as a plain attribute.
    """
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def context_length(policy: nn.Module) -> int:
    """Return how many tokens the policy can read; no limit where its config names none."""
    return getattr(policy.config, "max_position_embeddings", None) or sys.maxsize


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
