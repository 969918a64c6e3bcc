"""Every option of an alignment run, and the two recipes that fill what the user leaves open."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from peft import LoraConfig
from torch import nn
from transformers import TrainingArguments

from softpref.algorithm.gradients.engine import KEEP_BUDGET_GIB, Engine
from softpref.algorithm.likelihood import PplScope
from softpref.algorithm.methods import METHODS, PERPCORRECT_MODES, Method, MethodName
from softpref.algorithm.ranks import Ranks
from softpref.algorithm.robust_losses import LOSSES, LossName
from softpref.algorithm.signals import EVIDENCE, PPL_DIFF, SIGNALS, Signal
from softpref.arguments import named_as_arguments
from softpref.columns import SoftLabelSource
from softpref.data.batches import Collate
from softpref.data.column_cache import REFERENCE_CACHE
from softpref.errors import UsageError
from softpref.models.layout import Layout
from softpref.models.loading import Tuning, lora_config
from softpref.models.recompute import KWARGS, set_both_names
from softpref.models.scoring import Scorer
from softpref.models.sharding import refuse_engines, refuse_impossible_shards
from softpref.options import (
    did_you_mean,
    facts_of,
    option,
    refuse_impossible_seeds,
    refuse_non_finite,
    refuse_too_large,
    refuse_too_small,
    refuse_unknown_choices,
)
from softpref.quantization import QuantizationOptions
from softpref.trackers import chosen_trackers
from softpref.training.conflicts import refuse_conflicts
from softpref.training.porting import PortedOptions
from softpref.training.recipes import MOST_MICRO_BATCHES, Recipe, choose_meta_lr, choose_steps
from softpref.training.teacher import TeachingOptions

logger = logging.getLogger(__name__)

TAUGHT = ("mspo", "mspo_static")
NOISE_RATE_READ_BY = (*TAUGHT, "evidence", "cdpo", "rdpo", "perpcorrect")

STEP_OPTIONS = ("gradient_accumulation_steps", "num_train_epochs")
"""What depends on the number of pairs, where the recommended recipe chooses it."""


def _meta_option(text: str, **facts: Any) -> Any:
    """Declare an option that methods with a meta-learner read, and that identifies a run."""
    return option(text, read_by=TAUGHT, identity=True, **facts)


@dataclass
class MSPOConfig(PortedOptions, QuantizationOptions, TrainingArguments):
    """Options of `MSPOTrainer`; what is left open is filled by the recipe.

    Raises:
        UsageError: a value is impossible, or the chosen method would ignore an option that was set.
    """

    GROUP: ClassVar[str] = "method"  # of options that declare no other

    method: MethodName = option(
        "Alignment method; docs/methods.md says what each does.", "mspo", identity=True
    )
    recipe: Literal["recommended", "faithful"] = option(
        "`recommended`: what we would use; `faithful`: the paper to the letter.", "recommended"
    )
    tuning: Tuning = option(
        "Train a LoRA adapter or all weights.",
        recipe=Recipe("lora", faithful="full"),
        identity=True,
    )
    beta: float = option("β of the DPO loss, 1/nats.", 0.1, identity=True)
    max_length: int = option("Maximum tokens in prompt plus response.", 1024, least=2, group="data")
    ppl_scope: PplScope = option(
        "Which tokens count in PPLDiff.",
        recipe=Recipe("response", faithful="sequence_per_response_token"),
        identity=True,
    )
    lora_r: int | None = option("Rank of the LoRA adapter; default 16.", least=1, identity=True)
    lora_alpha: int | None = option("LoRA's alpha; default 32.", least=1, identity=True)
    lora_target_modules: list[str] | None = option(
        "Modules to adapt; default: every linear one.", identity=True, metavar="NAME"
    )
    layout: Layout = option(
        "`auto`: run each prompt once for both responses if a trial shows that the model allows "
        "it; `padded`: one row per response.",
        "auto",
        group="hardware",
        rare=True,
    )
    shard: bool = option(
        "Shard the weights over the processes, the frozen base under an adapter or all that train, "
        "for a model that does not fit one device.",
        False,
        group="hardware",
    )
    on_bad_row: Literal["stop", "skip"] = option(
        "At a bad row, stop or skip it.", "stop", group="data"
    )
    max_skipped_steps: int = option(
        "Maximum number of non-finite steps to skip; their pairs are named, and one more step ends "
        "the run.",
        3,
        least=0,
        group="other",
        rare=True,
    )
    force: bool = option(
        "Resume even if the checkpoint comes from a different run; differences are logged.",
        False,
        group="output",
    )
    label_pairs: bool | None = option(
        "Write labels.jsonl by one more pass at the end; default: where labels are learned. "
        "`audit --run` labels the pairs later.",
        group="output",
    )
    trust_remote_code: bool = option("Run code that comes with the model.", False, group="other")
    hub_strategy: str = option(
        "When --push_to_hub uploads: only at the `end`.", "end", group="output", rare=True
    )
    reference_cache: str | None = option(REFERENCE_CACHE, group="other", metavar="DIR")

    meta_lr: float | None = _meta_option(
        "The meta-learner's learning rate; default: set by run length.",
        recipe=Recipe(None, faithful=1e-4),
    )
    # More clean pairs, or more often, was no better over five seeds (docs/performance.md).
    meta_batch_size: int | None = _meta_option(
        "Clean pairs per meta-update.", least=1, recipe=Recipe(8, faithful=64)
    )
    meta_every: int | None = _meta_option(
        "Steps between meta-updates.", least=1, recipe=Recipe(4, faithful=1)
    )
    meta_hidden: int | None = _meta_option(
        "Width of the meta-learner's two hidden layers; default 128.",
        least=1,
        recipe=Recipe(128),
        rare=True,
    )
    signals: list[str] | None = option(
        "What mspo's meta-learner sees of a pair: any of ppl_diff, margin, starting_ppl_diff, "
        "evidence; default ppl_diff.",
        recipe=Recipe([PPL_DIFF.name]),
        read_by=("mspo",),
        identity=True,
        metavar="NAME",
    )
    loss: LossName | None = option(
        "Loss of margin and soft label that mspo's meta-learner teaches through; default "
        "geometric, the paper's.",
        recipe=Recipe("geometric"),
        read_by=("mspo",),
        identity=True,
    )
    lookahead_lr: float | None = _meta_option(
        "α of the look-ahead (Eq. 8); default: the policy's current learning rate.",
        least=0,
        rare=True,
    )
    warm_start: bool | None = _meta_option(
        "Fit the meta-learner to the clean pairs before training.",
        recipe=Recipe(True, faithful=False),
    )
    zscore: Literal["frozen", "running"] | None = _meta_option(
        "PPLDiff's mean and deviation: from the first 1,000 training pairs under the starting "
        "policy (frozen, default), or followed during training (running).",
        recipe=Recipe("frozen"),
        rare=True,
    )
    noise_rate: float | None = option(
        "Share of flipped labels; default: estimated.", read_by=NOISE_RATE_READ_BY, identity=True
    )
    soft_label_from: SoftLabelSource | None = option(
        "Soft labels of gdpo and cdpo: the `column` soft_label (default), the Beta mean of "
        "`votes`, or `scores` with a temperature fitted on the trusted pairs.",
        read_by=("gdpo", "cdpo"),
        identity=True,
    )
    perpcorrect_mode: Literal["threshold", "official"] | None = option(
        "How perpcorrect finds wrong labels: `threshold` (default), by PPLDiff of the starting "
        "policy; `official`, its authors' way, by six rounds of surrogates.",
        recipe=Recipe("threshold"), read_by=("perpcorrect",), identity=True,
    )  # fmt: skip
    engine: Engine | None = option(
        "How to compute the meta-gradient, always exactly; default: by memory.",
        recipe=Recipe("auto"),
        read_by=TAUGHT,
        group="hardware",
    )
    keep_budget_gib: float | None = option(
        "Memory limit for per-pair gradients, or for graphs beside the first, GiB; default 4.",
        least=0, recipe=Recipe(KEEP_BUDGET_GIB), read_by=TAUGHT, group="hardware", rare=True
    )  # fmt: skip

    learning_rate: float = option(
        "The policy's peak learning rate.",
        recipe=Recipe({"lora": 1e-4, "full": 5e-6}, faithful=5e-7),
    )
    lr_scheduler_type: str = option(
        "Learning-rate schedule, by transformers' names.",
        # The paper is silent on what follows the warm-up.
        recipe=Recipe("linear", faithful="constant_with_warmup"),
        metavar="NAME",
    )
    warmup_steps: float = option(
        "Warm-up steps; below 1, a share of all steps.", recipe=Recipe(0.1, faithful=100)
    )
    weight_decay: float = option(
        "AdamW's weight decay of the policy.", recipe=Recipe(0.0, faithful=0.01)
    )
    num_train_epochs: float = option(
        "Passes over the training pairs; default 1, or up to 3 if pairs are few (recommended).",
        recipe=Recipe(1.0),
    )
    per_device_train_batch_size: int = option("Pairs per micro-batch.", 8, least=1)
    gradient_accumulation_steps: int = option(
        "Micro-batches per step; default 4, fewer if pairs are few (recommended), or 8 (faithful).",
        least=1,
        recipe=Recipe(MOST_MICRO_BATCHES, faithful=8),  # of 8: the paper's 64 pairs a step
    )
    activation_checkpointing: bool = option("Recompute activations to save memory.", False)
    logging_steps: float = option("Steps between log lines; below 1, a share of all steps.", 10)
    report_to: list[str] | str = option(
        "Trackers to log to: tensorboard, wandb, trackio and others.", "none", metavar="NAME"
    )
    remove_unused_columns: bool = option("Unused: batches are made from pairs.", False)
    logging_nan_inf_filter: bool = option(
        "Unused: a step that is not finite is not taken, nor logged.", False
    )

    def __post_init__(self) -> None:
        with named_as_arguments(type(self)):
            self._resolve()

    def _resolve(self) -> None:
        refuse_engines(self)
        self.report_to = chosen_trackers(self.report_to)
        refuse_unknown_choices(self)
        self._refuse_ignored_options()
        self._left_open = {name for name in STEP_OPTIONS if getattr(self, name) is None}
        for name, facts in facts_of(type(self)).items():
            if "recipe" in facts and self._reads(facts) and getattr(self, name) is None:
                setattr(self, name, getattr(facts["recipe"], self.recipe))
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
        refuse_conflicts(self)

    def _refuse_ignored_options(self) -> None:
        for name, facts in sorted(facts_of(type(self)).items()):
            if not self._reads(facts) and getattr(self, name) is not None:
                raise UsageError(
                    f"--{name}: method {self.method} does not read it; leave it out, or choose a "
                    "method that does."
                )

    def _reads(self, facts: Mapping[str, Any]) -> bool:
        return self.method in facts.get("read_by", (self.method,))

    def _refuse_impossible_values(self) -> None:
        refuse_non_finite(self)
        refuse_impossible_seeds(self)
        refuse_too_small(self)
        for name in self.signals or []:
            if name not in SIGNALS:
                known = f"choose from {', '.join(SIGNALS)}{did_you_mean(name, SIGNALS)}"
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
        if self.perpcorrect_mode:  # None but for perpcorrect
            return PERPCORRECT_MODES[self.perpcorrect_mode]
        method = METHODS[self.method]
        return replace(method, loss=LOSSES[self.loss]) if self.loss else method

    def resolved_signals(self) -> tuple[Signal, ...]:
        """Return what a meta-learner sees of a pair: as chosen, else the method's PPLDiff."""
        if self.signals:
            return tuple(SIGNALS[name] for name in self.signals)
        return (self.resolved_method().ppl_diff,)

    def needs_evidence(self) -> bool:
        """Return whether a run reads evidence: its method does, or its meta-learner."""
        needs = self.resolved_method().needs
        return "evidence" in needs or EVIDENCE in self.resolved_signals()

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
        text = ", ".join(f"{name} {getattr(self, name):g}" for name in open_ones)
        logger.info(f"recommended for {pairs} pairs: {text}")

    def teaching(self, pairs: int) -> TeachingOptions:
        """Return how to teach a meta-learner in a run on so many pairs."""
        every, hidden = cast(int, self.meta_every), cast(int, self.meta_hidden)
        lr = self.meta_lr
        if lr is None:
            lr = choose_meta_lr(math.ceil(self.total_steps(pairs) / every))
        size, warm_start = cast(int, self.meta_batch_size), bool(self.warm_start)
        return TeachingOptions(hidden, self.resolved_signals(), warm_start, lr, size, self.seed)

    def scorer(self, policy: nn.Module, collate: Collate) -> Scorer:
        """Return who measures pairs under a policy as the run's options say."""
        size, ranks = self.per_device_eval_batch_size, Ranks.here(self.device)
        return Scorer(policy, collate, self.ppl_scope, size, self.bf16, ranks)

    def adapter(self) -> LoraConfig | None:
        """Return the adapter that options ask for, None where they ask for none."""
        asked = (self.lora_r, self.lora_alpha, self.lora_target_modules)
        return lora_config(*asked) if any(asked) else None

    def pairs_per_step(self) -> int:
        """Return how many pairs one step takes, over all processes."""
        micro_batches = self.gradient_accumulation_steps * self.world_size
        return self.per_device_train_batch_size * micro_batches

    def total_steps(self, pairs: int) -> int:
        """Return how many steps a run on so many pairs takes."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(math.ceil(pairs / self.pairs_per_step()) * self.num_train_epochs)

    def refuse_with_shards(self) -> None:
        """Refuse what does not go with weights in shards.

        Raises:
            UsageError: an option does not, or a library is too old.
        """
        refuse_impossible_shards(self)
        if self.engine == "double_backward":
            raise UsageError(
                "--engine double_backward: --shard cannot go back through a backward pass; choose "
                "--engine auto."
            )
        if self.tuning == "full" and self.engine == "kept":
            raise UsageError(
                "--engine kept: with --tuning full --shard would hold each pair's gradient "
                "whole on its process; choose --engine auto."
            )


def recipe(name: str) -> dict[str, Any]:
    """Return what a recipe fills in, by option."""
    facts = facts_of(MSPOConfig).items()
    return {option: getattr(of["recipe"], name) for option, of in facts if "recipe" in of}
