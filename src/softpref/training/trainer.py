"""`MSPOTrainer`: transformers' Trainer with the step of bilevel.py in the place of a loss.

Shapes: B pairs of one step, over all its micro-batches; n training pairs.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any, cast

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

from softpref.algorithm.bilevel import NonFiniteError, Objective, non_finite_pairs, require_finite
from softpref.algorithm.gradients.forms import dense
from softpref.algorithm.gradients.taps import NotTappedError
from softpref.algorithm.likelihood import Measured
from softpref.algorithm.objective import geometric_loss
from softpref.algorithm.policy import trainable
from softpref.arguments import named_as_arguments
from softpref.data.readers import column
from softpref.errors import UsageError
from softpref.models.reference import fingerprint_tokens
from softpref.training.checkpoints import SafeCheckpoints
from softpref.training.config import MSPOConfig
from softpref.training.drift import require_alike
from softpref.training.identity import IDENTITY
from softpref.training.interrupts import SkippedSteps
from softpref.training.labels import LabelHistory, beliefs, known_flips
from softpref.training.metrics import label_metrics, reward_metrics, truth_metrics
from softpref.training.preparation import GivenPairs, as_given
from softpref.training.refits import refits_of
from softpref.training.samplers import EpochSampler
from softpref.training.saving import allow_sharded_save
from softpref.training.start import prepare_start
from softpref.training.states import JSON
from softpref.training.step import StepResult, StepRunner

logger = logging.getLogger(__name__)

in_python = named_as_arguments(
    MSPOConfig,
    model="model",
    train="train_dataset",
    clean="clean_dataset",
    eval="eval_dataset",
    output="output_dir",
)


class MSPOTrainer(SafeCheckpoints):
    """Aligns a policy with any method of `METHODS`; used like any trainer of transformers.

    The reference is the policy as training found it, its log-probabilities taken before the first
    step: the base model alone under a fresh adapter, else the model with the adapter it came with.
    Dropout is switched off, for good.

    Args:
        model: a causal language model of transformers, plain or PEFT, or where to load one from.
        args: every option of the run.
        train_dataset: noisy pairs, in one of TRL's formats: a Dataset or a list of rows.
        clean_dataset: trusted pairs; needed by every method that teaches a meta-learner.
        eval_dataset: pairs to evaluate on.
        processing_class: the tokenizer; by default the model's own.
        peft_config: the adapter to train; by default LoRA of rank 16 where `args.tuning` is "lora".
        callbacks: as in transformers.

    Raises:
        UsageError: data, model and options do not fit together; the message says what to change.
    """

    args: MSPOConfig
    shares_steps = takes_shards = True

    @in_python
    def __init__(
        self,
        model: nn.Module | str,
        args: MSPOConfig,
        train_dataset: GivenPairs,
        clean_dataset: GivenPairs | None = None,
        eval_dataset: GivenPairs | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        sets = as_given(train_dataset, clean_dataset, eval_dataset)
        start = prepare_start(model, args, sets, processing_class, peft_config)
        self.start, self.method = start, args.resolved_method()
        self.pairs, self.clean, self.teacher = start.sets.train, start.sets.clean, start.teacher
        with allow_sharded_save(start.policy, args):
            super().__init__(
                model=start.policy, args=args, data_collator=list, train_dataset=self.pairs,
                eval_dataset=start.sets.evaluation, processing_class=start.tokenizer,
                callbacks=callbacks,
            )  # fmt: skip
        self.policy = cast(nn.Module, self.model)
        self.history = LabelHistory()
        self._refits = refits_of(start.labeller, start.sets, self._score)
        self._steps = self._step_runner()
        self._is_flipped = known_flips(self.pairs)
        self._window: list[list[dict[str, Any]]] = []
        self._drawn: list[dict[str, Any]] = []
        self._noted: dict[str, list[float]] = defaultdict(list)
        self._skipped = SkippedSteps(args.max_skipped_steps)
        self._say_how()

    @in_python
    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as `SafeCheckpoints.train` does."""
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _step_runner(self) -> StepRunner:
        args, start = self.args, self.start
        objective = Objective(self.method.loss, args.beta, self.ranks)
        size = args.per_device_train_batch_size
        return StepRunner(start.labeller, objective, start.layout.collate, size, args.ppl_scope)

    def get_train_dataloader(self) -> DataLoader:
        """Return batches of the pairs of all ranks: each takes its share within the step."""
        args, seed = self.args, cast(int, self.args.data_seed)
        loader = DataLoader(
            cast(Any, self.pairs),
            batch_size=args.per_device_train_batch_size * self.ranks.count,
            sampler=EpochSampler(len(self.pairs), seed),
            collate_fn=list,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            drop_last=args.dataloader_drop_last,
        )
        return prepare_data_loader(loader, num_processes=1, process_index=0)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Keep all micro-batches of the coming step: they take part in one update together."""
        self._window = list(islice(epoch_iterator, num_batches))
        return self._window, None

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Do the whole step at the window's last micro-batch; the ones before it wait."""
        if inputs is not self._window[-1]:
            return torch.zeros((), device=self.args.device)
        policy = self.policy  # without the wrapper that several processes have around it
        policy.train()
        require_alike(self.ranks, self.state.global_step, policy, self.teacher)
        pairs = [pair for part in self._window for pair in part]
        self._drawn = []
        try:
            done = self._step(policy, pairs)
            require_finite(
                "the noisy batch's loss or its gradient", done.update.loss, *done.update.gradient
            )
        except NonFiniteError as error:
            self._skipped.skip(self.state.global_step + 1, error, self._culprits(policy, pairs))
            policy.zero_grad()  # the optimizer leaves alone what has no gradient
            return torch.zeros((), device=self.args.device)
        except NotTappedError as error:
            raise UsageError(f"--engine: {error}; choose --engine double_backward.") from error
        for parameter, gradient in zip(trainable(policy), done.update.gradient, strict=True):
            parameter.grad = dense(gradient).to(parameter)
        self._note(done)
        return done.update.loss.to(torch.float32)

    def _step(self, policy: nn.Module, pairs: list[dict[str, Any]]) -> StepResult:
        teacher, engine = self.teacher, self.start.engine
        if self._refits:
            self._refits.before_step(self.history)
            pairs = self._refits.with_first_labels(pairs)
        if (
            teacher is None
            or engine is None
            or self.state.global_step % cast(int, self.args.meta_every)
        ):
            return self._steps.plain(policy, pairs)
        clean = self._drawn = teacher.draw()
        if self.args.clean_gradient == "current":
            return self._steps.taught_without_lookahead(policy, pairs, clean, teacher, engine)
        lookahead_lr = self._lookahead_lr()
        return self._steps.taught(policy, pairs, clean, teacher, engine, lookahead_lr)

    def _lookahead_lr(self) -> float:
        assert self.lr_scheduler is not None
        given = self.args.lookahead_lr
        return float(self.lr_scheduler.get_last_lr()[0]) if given is None else given

    def _culprits(self, policy: nn.Module, noisy: list[dict[str, Any]]) -> list[str]:
        """Return the uids of the step's pairs that are not finite by themselves."""
        found = []
        for source, pairs in ((self.pairs, noisy), (self.clean, self._drawn)):
            share = self.ranks.share_evenly(pairs)
            batches = [self.start.layout.collate([pair]).to(self.args.device) for pair in share]
            mine = non_finite_pairs(policy, batches, self.args.ppl_scope)
            (culprits,) = self.ranks.gather([torch.tensor(mine, device=self.args.device)])
            found += [source[i]["uid"] for i in culprits.int().tolist()] if source else []
        return list(dict.fromkeys(found))

    def _note(self, done: StepResult) -> None:
        """Keep the labels of this step, and its metrics for the next log line."""
        update, index = done.update, done.index
        self._noted["loss"].append(float(update.loss))
        ppl_diff = self.method.ppl_diff.of(update.measured)
        if self.teacher and done.meta_loss is not None:
            self._noted["meta/loss"].append(float(done.meta_loss))
            if self.args.zscore == "running":
                meta_learner = self.teacher.meta_learner
                meta_learner.follow(meta_learner.inputs(update.measured))
        self.history.record(self.state.global_step + 1, index, ppl_diff, update)
        if self._refits:
            self._refits.keep(index, update.soft_label)
        metrics = reward_metrics(update.measured, self.args.beta)
        metrics |= label_metrics(update.soft_label, ppl_diff)
        if self._is_flipped is not None:
            metrics |= truth_metrics(update.soft_label.cpu(), self._is_flipped[index.cpu()])
        for name, value in metrics.items():
            self._noted[name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, a training line with the means of what was noted since the one before.

        `labels/auroc` alone is over all pairs seen since the start of the run.
        Skipped steps are no part of the means, and what they would falsify is left out.
        """
        if self._skipped.count:
            logs.pop("train_loss", None)
            logs["skipped_steps"] = self._skipped.count
        if "loss" in logs:
            if not self._noted:
                del logs["loss"]
            if self._skipped.last == self.state.global_step:
                logs.pop("grad_norm", None)
            logs |= {name: sum(values) / len(values) for name, values in self._noted.items()}
            logs |= self.history.auroc(self._is_flipped)
            self._noted.clear()
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the evaluation pairs given at construction: DPO loss (Eq. 2), TRL's metrics.

        Nothing is taught. Other pairs have no reference log-probabilities any more.
        """
        evaluation = self.start.sets.evaluation
        if evaluation is None or eval_dataset is not None:
            raise UsageError("evaluate() measures the eval_dataset that MSPOTrainer was made with.")
        scored = self._score(evaluation, "evaluating")
        metrics = {"loss": float(geometric_loss(scored.margin, 1.0, self.args.beta).mean())}
        metrics |= reward_metrics(scored, self.args.beta)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def label_pairs(self) -> Dataset:
        """Return what the run believes of every training pair, after one pass over them.

        Columns: `uid`; `ppl_diff` under the finished policy, nats per token; `soft_label`, by the
        final labeller, null where none is learned; `p_correct`, the probability that the label is
        right; `evidence` before training and `margin`, nats; `step` it was last trained on, if any.
        """
        scored = self._score(self.pairs, "labelling")
        scored = self._refits.seen(scored) if self._refits else scored
        return beliefs(
            column(self.pairs, "uid"),
            self.history.last_steps(len(self.pairs)),
            scored,
            self._score(self.clean, "labelling, clean") if self.clean else None,
            self.start.labeller,
            self.start.noise.expected if self.start.noise else None,
        )

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, JSON]]:
        """Return the meta-learner, its optimizer, the clean sampler, and what was noted so far."""
        tensors, values = self.teacher.state() if self.teacher else ({}, {})
        tensors |= self._refits.state() if self._refits else {}
        history = {f"history.{name}": column for name, column in self.history.tensors().items()}
        values |= {"skipped_steps": self._skipped.count, "noted": cast(JSON, dict(self._noted))}
        return tensors | history, values

    def load_extra_state(self, tensors: dict[str, Tensor], values: dict[str, JSON]) -> None:
        """Go on from `extra_state`."""
        self.history.restore(
            {k.removeprefix("history."): v for k, v in tensors.items() if k.startswith("history.")}
        )
        self._skipped.count = cast(int, values["skipped_steps"])
        self._noted.update(cast(dict[str, list[float]], values["noted"]))
        if self.teacher:
            self.teacher.restore(tensors, values)
        if self._refits:
            self._refits.restore(tensors)

    def trained_tensors(self) -> list[Tensor]:
        """Return the policy's trainable weights and the meta-learner's."""
        meta_learner = self.teacher.meta_learner.parameters() if self.teacher else ()
        return [*trainable(self.policy), *meta_learner]

    def identity(self) -> dict[str, JSON]:
        """Return what must not change between an interrupted run and its resumption."""
        return {name: getattr(self.args, name) for name in IDENTITY} | {
            "pairs a step": self.args.pairs_per_step(),
            "starting policy": self.start.fingerprint,
            **self.start.sets.origin(),
            **self._token_fingerprints,
        }

    @cached_property
    def _token_fingerprints(self) -> dict[str, str | None]:
        sets = {"training pairs": self.pairs, "clean pairs": self.clean}
        return {name: pairs and fingerprint_tokens(pairs) for name, pairs in sets.items()}

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: transformers' estimate does not know this step."""
        return 0

    def _score(self, pairs: Dataset, what: str) -> Measured:
        return self.args.scorer(self.policy, self.start.layout.collate).measure(pairs, what)

    def _say_how(self) -> None:
        args, steps = self.args, self.args.total_steps(len(self.pairs))
        logger.info("steps: %d of %d pairs", steps, self.args.pairs_per_step())
        if self.ranks.count > 1:
            count = self.ranks.count
            logger.info(f"processes: {count}, each with its share of a step's pairs")
        logger.info("layout: %s", self.start.layout.why)
        if self.start.engine:
            logger.info("engine: %s", self.start.engine.why)
        warmup = args.get_warmup_steps(steps)
        if warmup > steps / 2:
            logger.warning(
                f"warning: warm-up takes {warmup} of {steps} steps: the policy will hardly move; "
                "lower warmup_steps"
            )
