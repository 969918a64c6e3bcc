"""Policies and tokenizers from a directory or hub id, and the adapters put on them."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils.hub import has_file

from softpref.algorithm.policy import trainable
from softpref.errors import UsageError, first_line
from softpref.models.library_errors import in_one_sentence
from softpref.models.quantized import refuse_to_train_all, warn_of_other_base
from softpref.models.sharding import sharded_over
from softpref.models.weights import HUB_ID, base_model, load_whole, located, of_base, with_adapter
from softpref.quantization import Bits

logger = logging.getLogger(__name__)

Tuning = Literal["lora", "full"]
CONTEXT_NAMES = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length",
    "seq_length",
)  # fmt: skip


def load_tokenizer(
    source: str, *, trust_remote_code: bool, option: str = "--model"
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can end a response.

    Raises:
        UsageError: there is none at `source`, or it has no EOS token.
    """
    place = f"{option} {source}"
    tokenizer = read_tokenizer(source, place, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"{place}: its tokenizer has no EOS token, so no response could ever end; set "
            "`eos_token` in tokenizer_config.json."
        )
    return tokenizer


def read_tokenizer(source: str, place: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, an adapter's from its base model where it brings none.

    Raises:
        UsageError: there is none; the message begins with `place`.
    """
    base = None
    if HUB_ID.fullmatch(source) and not Path(source).exists():
        logger.info(f"{place}: not a directory here, so it is taken for a hub id")
    with in_one_sentence(place, "no tokenizer", source):
        if not has_file(source, "tokenizer_config.json"):
            base = base_model(source, place)
    what = f"no tokenizer, nor one of {of_base(base, source)}" if base else "no tokenizer"
    with in_one_sentence(place, what, base or source):
        tokenizer = AutoTokenizer.from_pretrained(
            base or source, trust_remote_code=trust_remote_code
        )
        tokenizer(["a"], verbose=False)  # some settings are first read here
        return tokenizer


def load_policy(
    source: str,
    *,
    trust_remote_code: bool,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    sharding: DistributedConfig | None = None,
    bits: Bits | None = None,
    option: str = "--model",
) -> nn.Module:
    """Load a model, or an adapter with its base model; sharded or quantized if told how.

    Every tensor comes from a safetensors file, and none is missing. The dtype `auto` is that of the
    files.

    Raises:
        UsageError: no causal language model can be loaded from `source`.
    """
    place = f"{option} {source}"
    if not Path(source).exists() and not HUB_ID.fullmatch(source):
        raise UsageError(f"{place}: no such directory.")
    base = base_model(source, place)
    what = "no causal language model could be loaded"
    if base:
        what = f"{of_base(base, source)} could not be loaded"
        if base_model(base, place):
            raise UsageError(
                f"{place}: its base model {base} is an adapter itself: merge that into its own "
                "base model first (`softpref merge`, or merge_and_unload of PEFT)."
            )
    policy = load_whole(
        AutoModelForCausalLM, base or located(source), place, what, bits, dtype=dtype,
        trust_remote_code=trust_remote_code, distributed_config=sharding,
    )  # fmt: skip
    _refuse_odd_ids(policy, base or source, place)
    if not base:
        return policy
    warn_of_other_base(policy, source, place)
    return with_adapter(policy, located(source), base, place)


def _refuse_odd_ids(policy: nn.Module, source: str, place: str) -> None:
    """Refuse an EOS token of generation that is no id, which only a run's end would notice."""
    ids = getattr(policy.generation_config, "eos_token_id", None)
    if not all(type(one) is int for one in (ids if isinstance(ids, list) else [ids or 0])):
        raise UsageError(
            f"{place}: eos_token_id is {ids!r} in {Path(source) / 'generation_config.json'}, or in "
            "config.json where there is none; give a token id or a list of them."
        )


def on_accelerator(model: Any) -> Any:
    """Move a model to the accelerator, if there is one, and return it."""
    if torch.accelerator.is_available():  # else a device may be named that torch was built for
        model.to(torch.accelerator.current_accelerator())
    return model


def load_classifier(
    source: str, *, bits: Bits | None = None, dtype: torch.dtype | None = None, option: str
) -> nn.Module:
    """Load a sequence classifier, all of its tensors from safetensors files.

    Without a dtype, it has that of its files.

    Raises:
        UsageError: there is none at `source`.
    """
    place = f"{option} {source}"
    if base_model(source, place):
        raise UsageError(
            f"{place}: is an adapter: merge it into its base model first (`softpref merge`, or "
            "merge_and_unload of PEFT)."
        )
    what = "no sequence classifier"
    return load_whole(
        AutoModelForSequenceClassification,
        located(source),
        place,
        what,
        bits,
        trust_remote_code=False,  # else transformers would ask on the terminal
        **({"dtype": dtype} if dtype else {}),
    )


def tokenizer_of(
    model: nn.Module | str, policy: nn.Module, *, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a run's model, from where it lies or says that it was loaded from.

    Raises:
        UsageError: there is none there, or nowhere to look.
    """
    source = model if isinstance(model, str) else loaded_from(policy)
    if not source:
        raise UsageError("the model was not loaded from anywhere: give its processing_class.")
    return load_tokenizer(source, trust_remote_code=trust_remote_code)


def loaded_from(model: nn.Module) -> str:
    """Return where a model, or an adapter's base model, says that it was loaded from, if at all."""
    return str(getattr(getattr(model, "config", None), "name_or_path", ""))


def load_to_train(
    source: str,
    tuning: Tuning,
    dtype: torch.dtype,
    processes: int,
    bits: Bits | None,
    *,
    trust_remote_code: bool,
) -> nn.Module:
    """Load the policy that a run starts from, in the precision it needs.

    Weights that train are float32 (a step of 1e-6 vanishes in bfloat16). For full fine-tuning an
    adapter is merged into its base.

    Args:
        source: a directory or hub id.
        tuning: what is to train.
        dtype: of the frozen base under an adapter.
        processes: that the base is sharded over; 1 leaves it whole.
        bits: of the frozen base's linear layers; None leaves them as they are.
        trust_remote_code: whether to run code that comes with the model.

    Raises:
        UsageError: as in `load_policy`.
    """
    policy = load_policy(
        source,
        trust_remote_code=trust_remote_code,
        dtype=dtype if tuning == "lora" else torch.float32,
        sharding=sharded_over(processes) if processes > 1 else None,
        bits=bits,
    )
    if tuning == "lora":
        return policy
    refuse_to_train_all(policy)
    if not isinstance(policy, PeftModel):
        return policy
    if processes > 1:
        raise UsageError(
            f"--model {source}: an adapter is not merged into a base in shards: merge it first "
            "(`softpref merge`, or merge_and_unload of PEFT), or leave --shard out."
        )
    merged = policy.merge_and_unload().requires_grad_(True)  # the adapter had frozen it
    merged.name_or_path = source
    return merged


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


def make_trainable(policy: nn.Module, tuning: Tuning, adapter: PeftConfig | None) -> nn.Module:
    """Put a fresh adapter on the policy if it is to train one and has none yet; without dropout.

    Args:
        policy: changed in place; the adapted policy is another object.
        tuning: what is to train.
        adapter: the adapter that was asked for; None is `lora_config()` where one is needed.

    Raises:
        UsageError: policy, tuning and adapter contradict each other.
    """
    switch_dropout_off(policy)
    if tuning == "full":
        if adapter is not None or isinstance(policy, PeftModel):
            raise UsageError(
                "--tuning full, but an adapter was given: merge it into its base model "
                "(merge_and_unload) or choose --tuning lora."
            )
        if _has_16_bit_weights(policy):
            raise UsageError(
                "--tuning full needs float32 weights, because small steps vanish in 16 bits: load "
                "the model with dtype=torch.float32, and set bf16=True for speed."
            )
        return policy
    if isinstance(policy, PeftModel):
        if adapter is not None:
            raise UsageError(
                "the model has an adapter already: leave peft_config and --lora_* out."
            )
        if not trainable(policy):
            raise UsageError("the adapter is frozen: load it with is_trainable=True.")
        if _has_16_bit_weights(policy):
            raise UsageError(
                "the adapter needs float32 weights, because small steps vanish in 16 bits: load it "
                "with autocast_adapter_dtype=True; its base model may stay in 16 bits."
            )
        return policy
    try:
        adapted = get_peft_model(policy, adapter or lora_config())
    except ValueError as error:
        raise UsageError(f"--lora_target_modules: {first_line(error)}.") from None
    switch_dropout_off(adapted)
    return adapted


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
    config = cast(PretrainedConfig, policy.config)
    for part in (config.get_text_config(), config):
        for name in CONTEXT_NAMES:
            length = getattr(part, name, None)
            if isinstance(length, int) and length > 0:
                return length - _first_position(policy)
    return sys.maxsize


def _first_position(policy: nn.Module) -> int:
    """Return the position of the first token: RoBERTa and its relatives count from padding's on.

    Such a model is known by its embedding of positions, which has a row for padding.
    """
    embeddings = (m for name, m in policy.named_modules() if name.endswith("position_embeddings"))
    paddings = (getattr(embedding, "padding_idx", None) for embedding in embeddings)
    return next((padding + 1 for padding in paddings if padding is not None), 0)
