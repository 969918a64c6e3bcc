"""What callers bring from TRL and transformers, and what it is called here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from softpref.algorithm.policy import trainable
from softpref.errors import UsageError
from softpref.options import did_you_mean

_BY_METHOD = "choose a method, such as dpo, rdpo, ipo or evidence (softpref train --help lists all)"
_FROM_START = "the reference is the policy as training found it, scored before the first step"
ARGUMENTS: dict[str, str] = {
    "ref_model": f"{_FROM_START}: give the model to start from as model",
    "data_collator": "batches are made from the pairs' tokens",
    "model_init": "give the model itself",
    "compute_loss_func": f"the loss is the method's: {_BY_METHOD}",
    "optimizer_cls_and_kwargs": "give optimizers=(optimizer, scheduler), or the option optim",
    "preprocess_logits_for_metrics": "compute_metrics gets implicit rewards, not logits",
    "quantization_config": "load the model with it, and give the model",
    "tokenizer": "write processing_class",
    "formatting_func": "rename columns before, or read a file with load_pairs(columns=...)",
}
"""Arguments of TRL's and transformers' trainers that ours does not take, and what to do."""
OPTIONS: dict[str, str] = {
    "loss_type": _BY_METHOD,
    "loss_weights": _BY_METHOD,
    "label_smoothing": "choose method='cdpo' and noise_rate=...",
    "max_prompt_length": "max_length bounds prompt plus response; longer prompts are skipped",
    "max_completion_length": "max_length bounds prompt plus response",
    "truncation_mode": "responses are cut at their end",
    "precompute_ref_log_probs": f"{_FROM_START}; reference_cache keeps the scores",
    "precompute_ref_batch_size": "write per_device_eval_batch_size",
    "reference_free": _FROM_START,
    "sync_ref_model": _FROM_START,
    "ref_model_mixup_alpha": _FROM_START,
    "ref_model_sync_steps": _FROM_START,
    "model_adapter_name": "give the model with its adapter",
    "ref_adapter_name": _FROM_START,
    "force_use_ref_model": _FROM_START,
    "ref_model_init_kwargs": _FROM_START,
    "model_init_kwargs": "load the model with them, and give the model",
    "disable_dropout": "dropout is always off",
    "pad_to_multiple_of": "batches are padded to their longest row",
    "activation_offloading": "activation_checkpointing saves memory",
    "router_aux_loss_coef": "the loss is DPO's alone",
    "padding_free": "layout='auto' shares prompts where that is exact",
    "dataset_num_proc": "tokenizing takes one process",
    "pad_token": "set it in the tokenizer",
    "chat_template_path": "set it in processing_class",
    "generate_during_eval": "softpref generate and softpref compare judge responses",
    "rpo_alpha": _BY_METHOD,
    "f_divergence_type": _BY_METHOD,
    "f_alpha_divergence_coef": _BY_METHOD,
    "discopop_tau": _BY_METHOD,
    "use_weighting": _BY_METHOD,
    "ld_alpha": _BY_METHOD,
}
"""Options of TRL's `DPOConfig` that ours does not have, and what to do."""


def refuse_arguments(others: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse arguments of other trainers that are set to something.

    Args:
        others: the arguments that `MSPOTrainer` does not have.
        known: those that it has.

    Raises:
        UsageError: the message says what to do instead.
    """
    for name, value in others.items():
        if name not in ARGUMENTS:
            raise UsageError(
                f"{name}: MSPOTrainer has no such argument{did_you_mean(name, known)}."
            )
        if value is not None:
            raise UsageError(f"{name}: {ARGUMENTS[name]}.")


def require_config(args: object, kind: type) -> None:
    """Refuse another library's options, or a model, in the place of ours.

    Raises:
        UsageError: the message says what to give.
    """
    if not isinstance(args, kind):
        raise UsageError(
            f"args is of type {type(args).__name__}: give softpref.{kind.__name__}(...), which has "
            "every option of transformers' TrainingArguments and beta, max_length and method."
        )


def require_trained(
    optimizers: tuple[Optimizer | None, LRScheduler | None], policy: nn.Module
) -> None:
    """Refuse an optimizer that does not have just the policy's trained weights.

    Raises:
        UsageError: the message says how to make one.
    """
    if not isinstance(optimizers, tuple) or len(optimizers) != 2:
        raise UsageError("optimizers: give a pair, (optimizer, scheduler); either may be None.")
    optimizer, scheduler = optimizers
    if optimizer is None:
        if scheduler is not None:
            raise UsageError("optimizers: give the optimizer of this schedule with it.")
        return
    own = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    if own != {id(weight) for weight in trainable(policy)}:
        raise UsageError(
            "optimizers: the optimizer has other weights than those that train: put the adapter on "
            "first (model = get_peft_model(model, LoraConfig(...))), or set tuning='full'; then "
            "give it the parameters with requires_grad."
        )


class PortedOptions:
    """Options that name what to do about an option of another library."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuse unknown options before the dataclass does, which has no remedy.

        Raises:
            UsageError: an option is unknown.
        """
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        for name in sorted(options.keys() - known):
            remedy = OPTIONS.get(name) or f"there is no such option{did_you_mean(name, known)}"
            raise UsageError(f"{name}: {remedy}.")
        return super().__new__(cls)
