"""`MSPOTrainer`: transformers' Trainer with the step of bilevel.py in the place of a loss.

Shapes: B pairs of one step, over all its micro-batches; n training pairs.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainerCallback

from softpref.algorithm.bilevel import NonFiniteError, non_finite_pairs, total_norm
from softpref.algorithm.gradients.forms import dense
from softpref.algorithm.gradients.taps import NotTappedError
from softpref.algorithm.likelihood import Measured
from softpref.algorithm.objective import Objective
from softpref.algorithm.policy import trainable
from softpref.arguments import named_as_arguments
from softpref.errors import UsageError
from softpref.models.reference import fingerprint_tokens
from softpref.training.checkpoints import SafeCheckpoints
from softpref.training.config import MSPOConfig
from softpref.training.drift import require_alike
from softpref.training.finished import Origin, stamps, write_run
from softpref.training.identity import IDENTITY
from softpref.training.interrupts import SkippedSteps
from softpref.training.labels import LabelHistory, beliefs, known_flips, trusted_numbers
from softpref.training.metrics import (
    evaluation_metrics,
    label_columns,
    means,
    reward_columns,
    truth_metrics,
)
from softpref.training.porting import refuse_arguments, require_config, require_trained
from softpref.training.publishing import push_run
from softpref.training.refits import learning_of
from softpref.training.samplers import train_loader
from softpref.training.saving import allow_sharded_save
from softpref.training.sets import EVAL, Pairs, TrustedPairs, read_in_memory
from softpref.training.start import prepare_start
from softpref.training.states import JSON
from softpref.training.step import StepResult, StepRunner
from softpref.training.tracking import LabelTracking

logger = logging.getLogger(__name__)

SETS = {"train": "train_dataset", "clean": "clean_dataset", "eval": "eval_dataset"}
in_python = named_as_arguments(MSPOConfig, model="model", output="output_dir", **SETS)


class MSPOTrainer(SafeCheckpoints):
    """Aligns a policy with any method of `METHODS`; used like any trainer of transformers.

    The reference is the policy as training found it, its log-probabilities taken before the first
    step: the base model alone under a fresh adapter, else the model with the adapter it came with.
    Dropout is switched off, for good.

    Args:
        model: a causal language model of transformers, plain or PEFT, or where to load one from.
        args: every option of the run.
        train_dataset: noisy pairs, in one of TRL's formats: a Dataset, a list of rows, a DataFrame,
            a path or hub id, or a list of paths.
        clean_dataset: trusted pairs, or how many of the training pairs to hold out; needed by every
            method that teaches a meta-learner.
        eval_dataset: pairs to evaluate on, or a dict of such sets by name.
        processing_class: the tokenizer; by default the model's own.
        peft_config: the adapter to train; by default LoRA of rank 16 where `args.tuning` is "lora".
        callbacks: as in transformers.
        optimizers: an optimizer of the policy's trained weights and its schedule, each None for the
            one that `args` describe.
        compute_metrics: further metrics of an evaluation set, from its implicit rewards:
            `predictions` (n, 2), of chosen and rejected; `label_ids` (n,), 0 for chosen.
        others: arguments of other trainers, such as `ref_model`; they may be None.

    Raises:
        UsageError: data, model and options do not fit together; the message says what to change.
    """

    args: MSPOConfig
    shares_steps = takes_shards = True

    @in_python
    def __init__(
        self,
        model: nn.Module | str,
        args: MSPOConfig | None = None,
        train_dataset: Pairs | None = None,
        clean_dataset: TrustedPairs | None = None,
        eval_dataset: Pairs | Mapping[str, Pairs] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        *,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        **others: Any,
    ) -> None:
        refuse_arguments(others, signature(MSPOTrainer).parameters)
        args = MSPOConfig() if args is None else args
        require_config(args, MSPOConfig)
        given = (train_dataset, clean_dataset, eval_dataset)
        sets = read_in_memory(*given, args.on_bad_row, args.seed, args.soft_label_from, SETS)
        self.origin = Origin.of(model, str(args.output_dir), given, sets)
        start = prepare_start(model, args, sets, processing_class, peft_config)
        require_trained(optimizers, start.policy)
        self.start, self.method = start, args.resolved_method()
        self.pairs, self.clean, self.teacher = start.sets.train, start.sets.clean, start.teacher
        with allow_sharded_save(start.policy, args):
            super().__init__(
                model=start.policy, args=args, data_collator=list, train_dataset=self.pairs,
                eval_dataset=cast(Any, start.sets.evaluation or None), callbacks=callbacks,
                processing_class=start.tokenizer, optimizers=cast(Any, optimizers),
                compute_metrics=compute_metrics,
            )  # fmt: skip
        self.policy = cast(nn.Module, self.model)
        self.history = LabelHistory()
        self._learning = learning_of(start.labeller, start.sets, self._score)
        self._steps = self._step_runner()
        self._is_flipped = known_flips(self.pairs)
        self._window: list[list[dict[str, Any]]] = []
        self._drawn: list[dict[str, Any]] = []
        self._noted: dict[str, list[float]] = defaultdict(list)
        self._skipped = SkippedSteps(args.max_skipped_steps)
        if args.report_to:
            self.add_callback(LabelTracking(self))
        self._evaluated: dict[int, dict[str, float]] = {}
        self._say_how()

    train = in_python(SafeCheckpoints.train)

    @in_python
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and, once it is trained, all that a run leaves: see `write_run`."""
        if _internal_call or self.is_in_train or not self.state.global_step:
            super().save_model(output_dir, _internal_call)
            return
        output = Path(output_dir or str(self.args.output_dir))
        before = stamps(output)
        super().save_model(str(output), _internal_call=True)
        write_run(self, output, before)
        if self.args.push_to_hub and self.ranks.is_first:
            push_run(output, str(self.hub_model_id), self.args)

    def __repr__(self) -> str:
        steps = f"step {self.state.global_step} of {self.args.total_steps(len(self.pairs))}"
        clean = f", {len(self.clean):,} clean" if self.clean else ""
        pairs = f"{len(self.pairs):,} pairs{clean}"
        return f"<MSPOTrainer: {self.args.method}, {self.args.tuning}, {pairs}; {steps}>"

    def _step_runner(self) -> StepRunner:
        args, start = self.args, self.start
        method = self.method
        objective = Objective(method.loss, args.beta, self.ranks, method.temperature)
        size = args.per_device_train_batch_size
        return StepRunner(start.labeller, objective, start.layout.collate, size, args.ppl_scope)

    def get_train_dataloader(self) -> DataLoader:
        """Return batches of the pairs of all ranks: each takes its share within the step."""
        return train_loader(self.pairs, self.args, self.ranks.count)

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
            metrics = self._metrics(done)
        except NonFiniteError as error:
            self._skipped.skip(self.state.global_step + 1, error, self._culprits(policy, pairs))
            policy.zero_grad()  # the optimizer leaves alone what has no gradient
            return torch.zeros((), device=self.args.device)
        except NotTappedError as error:
            raise UsageError(f"--engine: {error}; choose --engine double_backward.") from error
        for parameter, gradient in zip(trainable(policy), done.update.gradient, strict=True):
            parameter.grad = dense(gradient).to(parameter.dtype)
        self._note(done, metrics)
        return done.update.loss.to(torch.float32)

    def _step(self, policy: nn.Module, pairs: list[dict[str, Any]]) -> StepResult:
        teacher, engine = self.teacher, self.start.engine
        if self._learning:
            self._learning.before_step(self.history)
            pairs = self._learning.with_first_labels(pairs)
        if (
            teacher is None
            or engine is None
            or self.state.global_step % cast(int, self.args.meta_every)
        ):
            return self._steps.plain(policy, pairs)
        clean = self._drawn = teacher.draw()
        return self._steps.taught(policy, pairs, clean, teacher, engine, self._lookahead_lr())

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

    def _metrics(self, done: StepResult) -> dict[str, float]:
        """Return what a log line says of a step, in one wait for it.

        Raises:
            NonFiniteError: the step must not be taken.
        """
        update = done.update
        columns = reward_columns(update.measured, self.args.beta)
        columns |= label_columns(update.soft_label, self.method.ppl_diff.of(update.measured))
        numbers = {"loss": update.loss, "norm": total_norm(update.loss, *update.gradient)}
        if done.meta_loss is not None:
            numbers["meta/loss"] = done.meta_loss
        metrics = means(columns, **numbers)
        if not math.isfinite(metrics.pop("norm")):
            raise NonFiniteError("the noisy batch's loss or its gradient is not finite")
        return metrics

    def _note(self, done: StepResult, metrics: dict[str, float]) -> None:
        """Keep the labels of this step, and its metrics for the next log line."""
        update, index = done.update, done.index
        if self.teacher and done.meta_loss is not None and self.args.zscore == "running":
            meta_learner = self.teacher.meta_learner
            meta_learner.follow(meta_learner.inputs(update.measured))
        ppl_diff = self.method.ppl_diff.of(update.measured)
        soft_label = self.history.record(self.state.global_step + 1, index, ppl_diff, update)
        if self._learning:
            self._learning.keep(index, soft_label)
        if self._is_flipped is not None:
            metrics |= truth_metrics(soft_label, self._is_flipped[index])
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

        Several sets are measured one by one, with their names in those of the metrics. Nothing is
        taught. Other pairs have no reference log-probabilities any more.
        """
        sets = self.start.sets.evaluation
        if not sets or eval_dataset is not None:
            raise UsageError("evaluate() measures the eval_dataset that MSPOTrainer was made with.")
        metrics: dict[str, float] = {}
        for name, pairs in sets.items():
            prefix = metric_key_prefix + name.removeprefix(EVAL)
            scored = self._score(pairs, "evaluating")
            found = evaluation_metrics(scored, self.args.beta, prefix, self.compute_metrics)
            self.log(found)
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, found
            )
            metrics |= found
        self._evaluated = {self.state.global_step: metrics}
        return metrics

    @property
    def evaluated(self) -> dict[str, float] | None:
        """What `evaluate` has measured after the last step; None where it has not."""
        return self._evaluated.get(self.state.global_step)

    def label_pairs(self) -> Dataset:
        """Return what the run believes of every training pair, after one pass over them.

        Columns: `uid`; `ppl_diff` under the finished policy, nats per token; `soft_label`, by the
        final labeller, null where none is learned; `p_correct`, the probability that the label is
        right; `evidence` before training and `margin`, nats; `step` it was last trained on, if any.
        """
        scored = self._score(self.pairs, "labelling")
        scored = self._learning.seen(scored) if self._learning else scored
        return beliefs(
            self.pairs,
            self.history.last_steps(len(self.pairs)),
            scored,
            trusted_numbers(self.start.labeller, self.clean, self._score),
            self.start.labeller,
            self.start.prior,
        )

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, JSON]]:
        """Return the meta-learner, its optimizer, the clean sampler, and what was noted so far."""
        tensors, values = self.teacher.state() if self.teacher else ({}, {})
        tensors |= self._learning.state() if self._learning else {}
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
        if self._learning:
            self._learning.restore(tensors)

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
            logger.info(f"processes: {self.ranks.count}, each with its share of a step's pairs")
        logger.info("layout: %s", self.start.layout.why)
        if self.start.engine:
            logger.info("engine: %s", self.start.engine.why)
        warmup = args.get_warmup_steps(steps)
        if warmup > steps / 2:
            logger.warning(
                f"warning: warm-up takes {warmup} of {steps} steps: the policy will hardly move; "
                "lower warmup_steps"
            )
