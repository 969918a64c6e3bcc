"""Every option of an alignment run, and the two recipes that fill what the user leaves open."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import transformers
from torch.distributed.fsdp import FSDPModule
from transformers import TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig

from softpref.algorithm.engine import KEEP_BUDGET_GIB, Engine
from softpref.algorithm.methods import METHOD_OPTIONS, METHODS, PERPCORRECT_MODES, Method
from softpref.algorithm.signals import SIGNALS, Signal
from softpref.errors import UsageError
from softpref.options import did_you_mean, option, refuse_non_finite
from softpref.training.column_cache import REFERENCE_CACHE
from softpref.training.layout import Layout
from softpref.training.recompute import KWARGS, set_both_names
from softpref.training.run_length import MOST_MICRO_BATCHES, choose_meta_lr, choose_steps

logger = logging.getLogger(__name__)

RECIPES: dict[str, dict[str, Any]] = {
    # Table 5 and Appendix C, to the letter; 64 pairs a step are 8 micro-batches of 8. The paper is
    # silent on what follows the warm-up: the learning rate stays where it is.
    "faithful": {
        "learning_rate": 5e-7,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 100,
        "weight_decay": 0.01,
        "gradient_accumulation_steps": 8,
        "meta_lr": 1e-4,
        "meta_batch_size": 64,
        "meta_every": 1,
        "ppl_scope": "sequence_per_response_token",
        "warm_start": False,
        "tuning": "full",
    },
    # What we would use ourselves; tuned in the synthetic world on seeds 1000 and up.
    "recommended": {
        "learning_rate": {"lora": 1e-4, "full": 5e-6},
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "weight_decay": 0.0,
        "gradient_accumulation_steps": MOST_MICRO_BATCHES,
        # More clean pairs, or more often, was no better over five seeds (docs/performance.md).
        "meta_batch_size": 8,
        "meta_every": 4,
        "ppl_scope": "response",
        "warm_start": True,
        "tuning": "lora",
    },
}

# What both recipes share.
COMMON = {
    "num_train_epochs": 1.0,
    "meta_hidden": 128,
    "signals": ["ppl_diff"],
    "lookahead": "sgd",
    "clean_gradient": "lookahead",
    "zscore": "frozen",
    "engine": "auto",
    "keep_budget_gib": KEEP_BUDGET_GIB,
    "perpcorrect_mode": "threshold",
}

# Options of transformers that must keep this value here, and why.
FIXED: dict[str, tuple[Any, str]] = {
    "fp16": (False, "gradients are exact only without loss scaling: use --bf16"),
    "label_smoothing_factor": (0.0, "how far to believe a label is the method's business"),
    "neftune_noise_alpha": (None, "the three steps must see the same function"),
    "torch_compile": (False, "the step is not compiled"),
    "load_best_model_at_end": (False, "labels belong to the last step: take a checkpoint by hand"),
    "include_num_input_tokens_seen": ("no", "tokens are not counted"),
    "train_sampling_strategy": ("random", "steps deal with lengths by themselves"),
    "auto_find_batch_size": (False, "set --per_device_train_batch_size"),
}

STEP_OPTIONS = ("gradient_accumulation_steps", "num_train_epochs")
"""What depends on the number of pairs, where the recommended recipe chooses it."""
LARGEST_RATE = 1e6
LEAST_VALUES = {
    "lora_r": 1,
    "lora_alpha": 1,
    "max_length": 2,
    "meta_batch_size": 1,
    "meta_hidden": 1,
    "lookahead_lr": 0,
    "keep_budget_gib": 0,
    "max_skipped_steps": 0,
    "meta_every": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
}


@dataclass
class MSPOConfig(TrainingArguments):
    """Options of `MSPOTrainer`; what is left open is filled by the recipe.

    Raises:
        UsageError: a value is impossible, or the chosen method would ignore an option that was set.
    """

    method: Literal[
        "mspo", "mspo_static", "evidence", "dpo", "gdpo", "cdpo", "rdpo", "perpcorrect", "oracle"
    ] = option("Alignment method; docs/methods.md says what each does.", "mspo")
    recipe: Literal["recommended", "faithful"] = option(
        "`recommended`: what we would use; `faithful`: the paper to the letter.", "recommended"
    )
    tuning: Literal["lora", "full"] = option("Train a LoRA adapter or all weights.")
    beta: float = option("β of the DPO loss, 1/nats.", 0.1)
    max_length: int = option("Longest prompt plus response, tokens.", 1024)
    ppl_scope: Literal["response", "sequence", "sequence_per_response_token"] = option(
        "Which tokens count in PPLDiff."
    )
    lora_r: int | None = option("Rank of the LoRA adapter; default 16.")
    lora_alpha: int | None = option("LoRA's alpha; default 32.")
    lora_target_modules: list[str] | None = option("Modules to adapt; default: every linear one.")
    layout: Layout = option(
        "`auto`: a prompt's two responses share it, where a trial shows the model allows that; "
        "`padded`: one row a response.",
        "auto",
    )
    shard_base: bool = option(
        "Shard the frozen base under an adapter over the processes, for a model that does not fit "
        "one device.",
        False,
    )
    on_bad_row: Literal["stop", "skip"] = option("Stop at a bad row, or leave it out.", "stop")
    max_skipped_steps: int = option(
        "Steps that may come out non-finite: they are not taken and their pairs are named; one "
        "more ends the run.",
        3,
    )
    force: bool = option("Resume though the checkpoint is of another run; what differs is said.",
                         False)  # fmt: skip
    trust_remote_code: bool = option("Run code that comes with the model.", False)
    reference_cache: str | None = option(REFERENCE_CACHE)

    meta_lr: float | None = option("The meta-learner's learning rate; default: set by run length.")
    meta_batch_size: int = option("Clean pairs per meta-update.")
    meta_every: int = option("Steps between meta-updates.")
    meta_hidden: int = option("Width of the meta-learner's two hidden layers; default 128.")
    signals: list[str] | None = option(
        f"What mspo's meta-learner sees of a pair, of {', '.join(SIGNALS)}; default ppl_diff."
    )
    lookahead_lr: float | None = option("α of the look-ahead; default: the policy's current one.")
    lookahead: Literal["sgd", "adamw"] = option("Look-ahead optimizer; default sgd (Eq. 8).")
    clean_gradient: Literal["lookahead", "current"] = option(
        "Where the clean gradient is taken: `lookahead`, after the look-ahead (Eq. 9, exact, "
        "default); `current`, at the policy as it is, an approximation that runs clean and noisy "
        "pairs together and errs in proportion to α."
    )
    warm_start: bool = option("Fit the meta-learner to the clean pairs before training.")
    zscore: Literal["frozen", "running"] = option(
        "PPLDiff's mean and deviation: from the first 1,000 training pairs under the starting "
        "policy (frozen, default), or followed during training (running)."
    )
    noise_rate: float | None = option("Share of flipped labels; default: estimated.")
    perpcorrect_mode: Literal["threshold", "official"] = option(
        "How perpcorrect finds wrong labels: `threshold` (default), by PPLDiff of the starting "
        "policy; `official`, its authors' way, by six rounds of surrogates trained on the clean "
        "and the surest pairs."
    )
    engine: Engine = option("How the meta-gradient is made; all are exact; default: by memory.")
    keep_budget_gib: float = option(
        "Most memory for the pairs' own gradients, or for graphs beside the first, GiB; default 4."
    )

    learning_rate: float = option("The policy's peak learning rate.")
    lr_scheduler_type: str = option("Learning-rate schedule, by transformers' names.")
    warmup_steps: float = option("Warm-up steps; below 1, a share of all steps.")
    weight_decay: float = option("AdamW's weight decay of the policy.")
    num_train_epochs: float = option(
        "Passes over the training pairs; default 1, recommended: up to 3 where pairs are few."
    )
    per_device_train_batch_size: int = option("Pairs per micro-batch.", 8)
    gradient_accumulation_steps: int = option(
        "Micro-batches per step; default 8 if faithful, recommended: 4, fewer where pairs are few."
    )
    activation_checkpointing: bool = option("Recompute activations to save memory.", False)
    logging_steps: float = option("Steps between log lines; below 1, a share of all steps.", 10)
    remove_unused_columns: bool = option("Unused: batches are made from pairs.", False)
    logging_nan_inf_filter: bool = option(
        "Unused: a step that is not finite is not taken, nor logged.", False
    )

    def __post_init__(self) -> None:
        refuse_sharding(self)
        self._refuse_unknown_choices()
        self._refuse_ignored_options()
        self._left_open = {name for name in STEP_OPTIONS if getattr(self, name) is None}
        method = METHODS[self.method]
        for name, value in (COMMON | RECIPES[self.recipe]).items():
            read = name not in METHOD_OPTIONS or name in method.options
            if read and getattr(self, name) is None:
                setattr(self, name, value)
        if isinstance(self.learning_rate, dict):
            self.learning_rate = self.learning_rate[self.tuning]
        self._refuse_impossible_values()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False
            self.use_cpu = True  # else bf16 would be refused
        # Without it the order of the data would follow whoever seeded torch last.
        self.data_seed = self.seed if self.data_seed is None else self.data_seed
        self.activation_checkpointing_kwargs = KWARGS
        set_both_names(self)
        super().__post_init__()
        self._refuse_impossible_combinations()

    def _refuse_impossible_combinations(self) -> None:
        if self.perpcorrect_mode == "official" and self.world_size > 1:
            raise UsageError(
                "--perpcorrect_mode official runs in one process: start it without torchrun, or "
                "choose --perpcorrect_mode threshold."
            )
        for name, (value, why) in FIXED.items():
            if getattr(self, name) != value:
                raise UsageError(f"--{name}: {why}.")
        if self.tuning == "full" and (self.lora_r or self.lora_alpha or self.lora_target_modules):
            raise UsageError("--tuning full does not read --lora_*: leave them out.")
        if self.clean_gradient == "current" and self.lookahead_lr is not None:
            raise UsageError(
                "--clean_gradient current does not look ahead: leave --lookahead_lr out."
            )
        if self.perpcorrect_mode == "official" and self.noise_rate is not None:
            raise UsageError(
                "--perpcorrect_mode official finds its own noise rate: leave --noise_rate out, or "
                "choose --perpcorrect_mode threshold."
            )
        if self.lookahead == "adamw" and "adamw" not in str(self.optim).lower():
            raise UsageError(
                f"--lookahead adamw needs an AdamW optimizer, not --optim {self.optim}."
            )
        if self.engine == "double_backward" and self.activation_checkpointing:
            raise UsageError(
                "--engine double_backward cannot recompute activations: leave "
                "--activation_checkpointing out, or choose --engine auto."
            )
        if self.shard_base:
            refuse_with_shards(self)

    def _refuse_unknown_choices(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            options = [choice for part in (hint, *get_args(hint)) for choice in _choices(part)]
            value = getattr(self, name, None)
            if options and value is not None and value not in options:
                raise UsageError(f"--{name} {value}: choose one of {', '.join(options)}.")

    def _refuse_ignored_options(self) -> None:
        ignored = METHOD_OPTIONS - METHODS[self.method].options
        for name in sorted(ignored):
            if getattr(self, name) is not None:
                raise UsageError(
                    f"--{name}: method {self.method} does not read it; leave it out, or choose a "
                    "method that does."
                )

    def _refuse_impossible_values(self) -> None:
        refuse_non_finite(self)
        for name, least in LEAST_VALUES.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name} {value}: must be at least {least}.")
        for name in self.signals or []:
            if name not in SIGNALS:
                known = f"choose of {', '.join(SIGNALS)}{did_you_mean(name, SIGNALS)}"
                raise UsageError(f"--signals {name}: {known}.")
        if self.signals is not None and not 0 < len(self.signals) == len(set(self.signals)):
            raise UsageError("--signals: give at least one name, and none twice.")
        for name in ("beta", "learning_rate", "meta_lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"--{name} {value}: must be above 0.")
        refuse_too_large(self, "beta", "learning_rate", "meta_lr", "lookahead_lr")
        if self.noise_rate is not None and not 0 <= self.noise_rate < 0.5:
            raise UsageError(f"--noise_rate {self.noise_rate}: must be at least 0 and below 0.5.")

    def resolved_method(self) -> Method:
        """Return the row of the method, in the mode that was chosen of it."""
        chosen = self.perpcorrect_mode  # None but for perpcorrect
        return PERPCORRECT_MODES[chosen] if chosen else METHODS[self.method]

    def resolved_signals(self) -> tuple[Signal, ...]:
        """Return what a meta-learner sees of a pair: as chosen, else the method's PPLDiff."""
        if self.signals:
            return tuple(SIGNALS[name] for name in self.signals)
        return (self.resolved_method().ppl_diff,)

    def resolved_layout(self) -> Layout:
        """Return the layout, padded where `auto` might choose what the engine cannot go through.

        On a CUDA device `auto` may switch to FlexAttention, whose graph serves for one backward
        pass and cannot be differentiated twice.
        """
        goes_back_again = self.engine in ("double_backward", "graph")
        return "padded" if goes_back_again and self.device.type == "cuda" else self.layout

    def choose_steps(self, pairs: int) -> None:
        """Set what the recommended recipe leaves to the number of training pairs, and log it.

        Options that were set stay as they are; with `max_steps` there is nothing to choose.
        """
        if self.recipe != "recommended" or self.max_steps > 0 or not self._left_open:
            return
        given = [None if name in self._left_open else getattr(self, name) for name in STEP_OPTIONS]
        chosen = choose_steps(pairs, self.per_device_train_batch_size * self.world_size, *given)
        for name, value in zip(STEP_OPTIONS, chosen, strict=True):
            setattr(self, name, value)
        open_ones = (name for name in STEP_OPTIONS if name in self._left_open)
        logger.info("recommended for %d pairs: %s", pairs,
                    ", ".join(f"{name} {getattr(self, name):g}" for name in open_ones))  # fmt: skip

    def resolved_meta_lr(self, meta_updates: int) -> float:
        """Return the meta-learner's learning rate for a run of `meta_updates` updates of φ."""
        if self.meta_lr is not None:
            return self.meta_lr
        return choose_meta_lr(meta_updates)


def refuse_too_large(options: object, *names: str) -> None:
    """Refuse rates that no float32 could be multiplied by.

    Raises:
        UsageError: the message names the option.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value > LARGEST_RATE:
            raise UsageError(f"--{name} {value}: must be at most {LARGEST_RATE:g}.")


def refuse_sharding(args: TrainingArguments) -> None:
    """Refuse engines that split a model over processes; on a CPU accelerate would ignore them.

    Raises:
        UsageError: DeepSpeed or FSDP is asked for, by options or by accelerate's launcher.
    """
    for name, given in (("DeepSpeed", args.deepspeed), ("FSDP", args.fsdp)):
        launched = os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true"
        if given or launched:
            raise UsageError(
                f"{name} is not supported: train goes on several GPUs without it, by torchrun or "
                "accelerate launch (softpref env --accelerate gpus). For a model too large for one "
                "train has --shard_base true; --bf16 true and --activation_checkpointing true save "
                "memory."
            )


def can_shard() -> bool:
    """Return whether transformers shards a model as it loads it, and torch recovers from errors."""
    return hasattr(DistributedConfig, "fsdp_size") and hasattr(FSDPModule, "reset_iter_state")


def refuse_with_shards(args: MSPOConfig) -> None:
    """Refuse what does not go with a sharded base.

    Raises:
        UsageError: an option does not, or a library is too old.
    """
    if not can_shard():
        raise UsageError(
            "--shard_base needs transformers 5.15 and torch 2.13 or newer; installed are "
            f"transformers {transformers.__version__} and torch {torch.__version__}."
        )
    if args.world_size == 1:
        raise UsageError(
            "--shard_base needs several processes: start them by torchrun or accelerate launch "
            "(softpref env --accelerate gpus)."
        )
    if args.use_cpu and torch.accelerator.is_available():
        raise UsageError(
            "--use_cpu true: --shard_base loads shards onto accelerators; leave it out."
        )
    for name, value, why, remedy in (
        ("tuning", "full", "shards the base under an adapter and trains no shard", "lora"),
        ("engine", "double_backward", "cannot go back through a backward pass", "auto"),
        ("clean_gradient", "current", "needs as many passes on each process", "lookahead"),
    ):
        if getattr(args, name) == value:
            raise UsageError(f"--{name} {value}: --shard_base {why}; choose --{name} {remedy}.")


def _choices(hint: Any) -> tuple[str, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()
