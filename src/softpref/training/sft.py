"""Supervised fine-tuning on the chosen responses: `softpref sft`, with TRL's SFTTrainer.

Importing TRL takes seconds, so nothing else imports this module before it is needed. TRL sends
telemetry when a trainer is made unless HF_HUB_DISABLE_TELEMETRY=1 is set, which the command line
does and this module leaves to its caller.
"""

import hashlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, set_seed

from softpref.algorithm.bilevel import NonFiniteError, require_finite
from softpref.algorithm.gradients.shards import is_sharded
from softpref.algorithm.policy import trainable
from softpref.columns import ColumnOptions
from softpref.data.bad_rows import OnBadRow, place
from softpref.data.fingerprints import SFT_TARGETS, target_fingerprint, write_sft_targets
from softpref.data.label_columns import ties
from softpref.data.mixing import MIX, mixed, shares_of
from softpref.data.readers import dataset_rows
from softpref.data.sources import load_pairs, names_of
from softpref.data.temporary import fsync_all
from softpref.data.tokens import tokenize_chosen
from softpref.errors import UsageError, require_package
from softpref.models.loading import context_length, load_policy, load_tokenizer, lora_config
from softpref.models.quantized import (
    quantization_of,
    record_quantization,
    refuse_to_train_all,
    settle_quantized,
)
from softpref.models.recompute import set_both_names
from softpref.models.reference import fingerprint_weights
from softpref.models.sharding import refuse_impossible_shards, sharded_over, train_all_shards
from softpref.models.soundness import require_known_padding, require_known_tokens, require_sound
from softpref.options import (
    option,
    refuse_impossible_seeds,
    refuse_non_finite,
    refuse_too_large,
    require,
)
from softpref.places import directory_to_write
from softpref.quantization import QuantizationOptions
from softpref.trackers import chosen_trackers
from softpref.training.checkpoints import SafeCheckpoints
from softpref.training.identity import SFT_IDENTITY
from softpref.training.output import first_writes, resume_point, run_directory
from softpref.training.progress_lines import show_progress_lines
from softpref.training.publishing import upload_sealed
from softpref.training.saving import allow_sharded_save
from softpref.training.states import JSON

require_package("trl", "sft", "fine-tuning")
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # noqa: E402

logger = logging.getLogger(__name__)


NO_ADAPTER_ON_SHARDS = "--lora_r: --shard shards weights to train them; leave one of the two out."
STANDSTILL = 0.02
"""Share of the first logged loss by which it falls at least where something is learned."""


class SoftprefSFTTrainer(SafeCheckpoints, SFTTrainer):
    """TRL's SFTTrainer with safe checkpoints that belong to one set of data.

    Several processes share a step as TRL has it: each its part of the batch, gradients averaged by
    tokens.

    Args:
        data_fingerprint: identifies the training data; resuming with another is refused.
        kwargs: those of `trl.SFTTrainer`.
    """

    shares_steps = takes_shards = True

    def __init__(self, *, data_fingerprint: str, **kwargs: Any) -> None:
        start = fingerprint_weights(kwargs["model"])
        if not (kwargs.get("peft_config") or trainable(kwargs["model"])):
            refuse_to_train_all(kwargs["model"], "--lora_r 16")
        with allow_sharded_save(kwargs["model"], kwargs["args"]):
            super().__init__(**kwargs)
        if quantization_of(kwargs["model"]):
            for parameter in trainable(cast(nn.Module, self.model)):
                parameter.data = parameter.data.float()  # TRL's bfloat16 swallows small steps
        template = str(getattr(kwargs["processing_class"], "chat_template", None))
        self._made_of: dict[str, JSON] = {
            "data": data_fingerprint,
            "starting model": start,
            "lora_r": getattr(kwargs.get("peft_config"), "r", None),
            "chat template": hashlib.sha256(template.encode()).hexdigest()[:16],
        }

    def identity(self) -> dict[str, JSON]:
        """Return data, model and options: with others a resumed run would be a third run."""
        args = self.args
        responses = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return (
            self._made_of
            | {name: getattr(args, name) for name in SFT_IDENTITY if hasattr(args, name)}
            | {"responses a step": responses * self.ranks.count}
        )

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, JSON]]:
        """Return TRL's count of tokens, and what it noted since the last log line."""
        noted = {name: [*map(float, values)] for name, values in self._metrics["train"].items()}
        return {}, {"tokens": int(self._total_train_tokens), "noted": cast(JSON, noted)}

    def load_extra_state(self, tensors: dict[str, Tensor], values: dict[str, JSON]) -> None:
        """Go on from `extra_state`; checkpoints of an older version have none."""
        self._total_train_tokens = cast(int, values.get("tokens", 0))
        self._metrics["train"].update(cast(dict[str, list[float]], values.get("noted", {})))

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Add a micro-batch's gradient, before the optimizer moves anything.

        Raises:
            UsageError: the loss or the gradient is not finite.
        """
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        held = [loss]
        if self.accelerator.scaler is None:  # float16's scaler leaves such a step out by itself
            held += [p.grad for p in trainable(model) if p.grad is not None]
        try:
            require_finite("the loss or its gradient", *held)
        except NonFiniteError as error:
            raise UsageError(
                f"step {self.state.global_step + 1}: {error}. The model was not moved. In the "
                "first step, look for weights of --model that are not finite; else lower "
                "--learning_rate, with a new --output."
            ) from error
        return loss


@dataclass
class SFTOptions(SFTConfig):
    """TRL's options, with full precision unless asked otherwise, and one pass over the data."""

    num_train_epochs: float = option("Passes over the chosen responses.", 1.0)
    bf16: bool = option("Train in bfloat16 mixed precision.", False)
    activation_checkpointing: bool = option("Recompute activations to save memory.", False)
    gradient_checkpointing: bool = option(
        "Older name of --activation_checkpointing.", False, rare=True
    )
    report_to: list[str] | str = option(
        "Trackers to log to: tensorboard, wandb, trackio and others.",
        "none",
        group="output",
        metavar="NAME",
    )
    hub_strategy: str = option(
        "When --push_to_hub uploads: only at the `end`.", "end", group="output", rare=True
    )
    logging_nan_inf_filter: bool = option("Unused: what is not finite ends the run.", False)
    shard: bool = option(
        "Shard all weights over the processes, for a model that does not fit one device.",
        False,
        group="hardware",
    )
    force: bool = option(
        "Resume even if the checkpoint comes from other data.", False, group="output"
    )

    def __post_init__(self) -> None:
        self.report_to = chosen_trackers(self.report_to)
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        set_both_names(self)
        refuse_non_finite(self)
        refuse_impossible_seeds(self)
        refuse_too_large(self, "learning_rate")
        super().__post_init__()
        if self.shard:
            refuse_impossible_shards(self)
            # Else the whole gradient would wait on each process for the last micro-batch.
            accelerator: Any = self.accelerator_config
            accelerator.gradient_accumulation_kwargs = {"sync_each_batch": True}


@dataclass
class SFTFiles(ColumnOptions, QuantizationOptions):
    """What `softpref sft` reads and where it writes."""

    GROUP: ClassVar[str] = "data"

    model: str = option(
        "The model to fine-tune: a directory or hub id.", "", required=True, metavar="DIR|ID"
    )
    train: list[str] | str = option(
        "Pairs, of which the chosen responses are learned: files or hub ids.",
        "",
        required=True,
        metavar="FILE",
    )
    output: str = option(
        "Directory for the model; new, or of the same command, interrupted.",
        "",
        required=True,
        metavar="DIR",
    )
    lora_r: int | None = option(
        "Train a LoRA adapter of this rank instead of all weights.", group="method"
    )
    on_bad_row: Literal["stop", "skip"] = option("Stop at a bad row, or leave it out.", "stop")
    mix: list[float] | None = option(MIX, metavar="SHARE")


def fine_tune_files(files: SFTFiles, config: SFTOptions) -> None:
    """Fine-tune a model on a file's chosen responses.

    Raises:
        UsageError: something is wrong with data, model or options, and nothing was written; or a
            step is not finite, and no more than the checkpoints before it was.
    """
    require(files)
    if files.lora_r and config.shard:
        raise UsageError(NO_ADAPTER_ON_SHARDS)
    if (bits := files.bits()) and not files.lora_r:
        raise UsageError(f"--load_in_{bits}bit: packed weights cannot train: give --lora_r 16.")
    with first_writes(directory_to_write(files.output), config.process_index):
        output, config.resume_from_checkpoint = run_directory(
            files.output, config.resume_from_checkpoint, finished=SFT_TARGETS
        )
        _fine_tune_into(output, files, config)


def _fine_tune_into(output: Path, files: SFTFiles, config: SFTOptions) -> None:
    config.output_dir = str(output)
    shares = shares_of(names_of(files.train), files.mix) if files.mix else None
    loaded = load_pairs(files.train, on_bad_row=files.on_bad_row, columns=files.columns())
    if shares:
        loaded = mixed(loaded, shares, config.seed)
    logger.info("train: %d chosen responses from %s", len(loaded.pairs), loaded.source)
    if tied := sum(ties(loaded.pairs)):
        logger.info("train: %d pairs are ties, of which the chosen response is learned too", tied)
    set_seed(config.seed)
    tokenizer = load_tokenizer(files.model, trust_remote_code=config.trust_remote_code)
    policy = load_policy(
        files.model,
        trust_remote_code=config.trust_remote_code,
        dtype=torch.bfloat16 if config.bf16 and files.bits() else torch.float32,
        sharding=sharded_over(config.world_size) if config.shard else None,
        bits=files.bits(),
    )
    adapter = lora_config(files.lora_r) if files.lora_r else None
    fine_tune(
        policy, tokenizer, loaded.pairs, config, adapter,
        name=loaded.source, on_bad_row=files.on_bad_row,
    )  # fmt: skip
    logger.info("written: %s", output)


def fine_tune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    config: SFTConfig,
    peft_config: PeftConfig | None = None,
    *,
    name: str = "the pairs",
    on_bad_row: OnBadRow = "stop",
) -> Path:
    """Train a model on the chosen responses, with the loss on the response tokens only.

    Saves the model (or adapter), the tokenizer and `sft_targets.json`, the fingerprints of what it
    was trained on. Resumes if `config.resume_from_checkpoint` is a checkpoint or True.

    Args:
        model: the model to train, in place; without an adapter if `peft_config` is given.
        tokenizer: its tokenizer; plain text ends with its end-of-sequence token.
        pairs: rows with prompt and chosen, as text or as lists of messages, tokenized as `train`
            has them: cut at `config.max_length` or the model's context.
        config: TRL's training arguments.
        peft_config: the adapter to train instead of the whole model.
        name: what messages call the pairs: their file.
        on_bad_row: whether a row that cannot be used is an error or left out.

    Returns:
        `config.output_dir`.

    Raises:
        UsageError: a row cannot be used, the model cannot read it, the set-up cannot be
            checkpointed, the checkpoint cannot be resumed from, or a step is not finite.
    """
    _hold_if_sharded(model, config, peft_config)
    settle_quantized(model)
    limits = {
        "max_length": config.max_length or sys.maxsize,
        "context_length": context_length(model),
    }
    rows = tokenize_chosen(pairs, tokenizer, name=name, on_bad_row=on_bad_row, **limits)
    require_sound(model)
    require_known_padding(model, tokenizer)
    require_known_tokens(model, tokenizer, _placed(rows, pairs, name))
    kept = pairs.select_columns(["prompt", "chosen"]).select(rows["index"][:])
    targets = [target_fingerprint(row["prompt"], row["chosen"]) for row in kept]
    config.completion_only_loss = True
    trainer = SoftprefSFTTrainer(
        model=model,
        args=config,
        train_dataset=rows.remove_columns("index"),
        processing_class=tokenizer,
        peft_config=peft_config,
        data_fingerprint=hashlib.sha256("".join(targets).encode()).hexdigest()[:16],
    )
    show_progress_lines(trainer)
    trainer.train(resume_from_checkpoint=resume_point(config.resume_from_checkpoint))
    _warn_of_standstill([line["loss"] for line in trainer.state.log_history if "loss" in line])
    trainer.save_model(_internal_call=True)  # by which nothing is pushed yet
    if trainer.ranks.is_first:
        _finish(trainer, targets)
    return Path(str(config.output_dir))


def _hold_if_sharded(model: nn.Module, config: SFTConfig, adapter: PeftConfig | None) -> None:
    if not is_sharded(model):
        return
    if adapter is not None:
        raise UsageError(NO_ADAPTER_ON_SHARDS)
    train_all_shards(model, config.world_size, divisor=config.world_size)


def _finish(trainer: SoftprefSFTTrainer, targets: list[str]) -> None:
    """Write what the saved model was trained on, and push both if asked to."""
    args, output = trainer.args, Path(str(trainer.args.output_dir))
    fsync_all(output)
    record_quantization(cast(nn.Module, trainer.model), output)
    write_sft_targets(output, targets)
    if args.push_to_hub:
        files = {path.name: path for path in sorted(output.iterdir()) if path.is_file()}
        repo, revision = str(trainer.hub_model_id), args.hub_revision
        upload_sealed(files, repo, "model", token=args.hub_token, revision=revision)


def _placed(rows: Dataset, pairs: Dataset, name: str) -> Iterator[tuple[str, list[int]]]:
    """Yield where each tokenized row stands, and its ids."""
    numbers = pairs["row"] if "row" in pairs.features else range(1, len(pairs) + 1)
    sources = pairs["source"] if {"row", "source"} <= pairs.features.keys() else None
    for row in dataset_rows(rows):
        at = row["index"]
        yield place(sources[at] if sources else name, numbers[at]), row["input_ids"]


def _warn_of_standstill(losses: list[float]) -> None:
    if len(losses) > 1 and losses[0] - losses[-1] < STANDSTILL * losses[0]:
        logger.warning(
            "warning: the loss hardly moved, %.3f at first and %.3f at last (nats per token): give "
            "a higher --learning_rate (small models take 1e-3), or more --num_train_epochs",
            losses[0],
            losses[-1],
        )
