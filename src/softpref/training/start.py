"""All that a run has before its first step, made from its options and sets in one place."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from typing import cast

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from softpref.algorithm.gradients.engine import Engine, EngineChoice
from softpref.algorithm.gradients.shards import is_sharded
from softpref.algorithm.labeller import Labeller
from softpref.algorithm.ranks import Ranks
from softpref.data.batches import Collate
from softpref.data.column_cache import ColumnCache
from softpref.data.label_columns import labelled
from softpref.models.layout import LayoutChoice, choose_layout, layout_with_adapter, longest_pairs
from softpref.models.loading import (
    context_length,
    load_to_train,
    make_trainable,
    switch_dropout_off,
    tokenizer_of,
)
from softpref.models.quantized import refuse_to_train_all, require_name, settle_quantized
from softpref.models.recompute import checkpoint_activations
from softpref.models.reference import (
    SIGNAL_COLUMNS,
    fingerprint_tokens,
    fingerprint_weights,
    with_reference,
)
from softpref.models.scoring import Scorer
from softpref.models.sharding import freeze_base_shards, train_all_shards
from softpref.models.soundness import require_known_padding
from softpref.statistics.evidence import Evidence
from softpref.statistics.noise_rate import NoiseRate
from softpref.training.config import MSPOConfig
from softpref.training.drift import require_same_start
from softpref.training.engines import engine_for
from softpref.training.evidence import with_evidence
from softpref.training.needs import labeller_of, noise_of, require_needs, with_given_labels
from softpref.training.perpcorrect.rounds import Correction, correct
from softpref.training.perpcorrect.surrogates import Surrogates
from softpref.training.preparation import Prepared, prepare, require_fit
from softpref.training.reliabilities import with_annotator_index
from softpref.training.sets import Sets
from softpref.training.soft_labels import log_columns_read, with_soft_labels
from softpref.training.teacher import Teacher, make_teacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """A run before its first step.

    Attributes:
        policy: what trains, with its adapter, on its device.
        tokenizer: the policy's.
        sets: the tokenized pairs, with what the reference says of them and given labels.
        fingerprint: of the model's weights as the run found them.
        layout: how batches are made and read.
        engine: how the meta-gradient is made; None where nothing is taught.
        labeller: who says how far to believe a pair.
        teacher: teaches the labeller; None where nothing is taught.
        noise: the share of flipped labels; None where nothing says it.
        correction: the labels that PerpCorrect's official rounds made.
        evidence: what signals say of the labels; None where nobody asks.
    """

    policy: nn.Module
    tokenizer: PreTrainedTokenizerBase
    sets: Prepared
    fingerprint: str
    layout: LayoutChoice
    engine: EngineChoice | None
    labeller: Labeller
    teacher: Teacher | None
    noise: NoiseRate | None
    correction: Correction | None
    evidence: Evidence | None

    @property
    def prior(self) -> float | None:
        """The noise rate that beliefs about single pairs rest on; None where there are none.

        Evidence that does not speak claims nothing; a meta-learner may see more than that.
        """
        is_silent = self.evidence is not None and not self.evidence.speaks
        if self.noise is None or (is_silent and self.teacher is None):
            return None
        return self.noise.expected


def prepare_start(
    model: nn.Module | str,
    config: MSPOConfig,
    sets: Sets,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter: PeftConfig | None = None,
) -> Start:
    """Do all that comes before the first step: read, tokenize, score the reference, fit.

    Args:
        model: what to align, or where to load it from; changed in place.
        config: the run's options; those that the number of pairs decides are set.
        sets: training, clean and evaluation pairs.
        tokenizer: the model's own by default.
        adapter: the adapter to train, by default that of the options.

    Raises:
        UsageError: data, model and options do not fit together; the message says what to change.
    """
    set_seed(config.seed)
    method, adapter = config.resolved_method(), adapter or config.adapter()
    policy, tokenizer, prepared = load_checked(model, config, sets, tokenizer)
    fingerprint = fingerprint_weights(policy)
    switch_dropout_off(policy)
    probe = longest_pairs(*prepared.named().values())
    layout = choose_layout(config.resolved_layout(), policy, probe)
    cache = ColumnCache(config.reference_cache)
    scorer = config.scorer(policy, layout.apply(policy))
    prepared = _with_reference(scorer, prepared, fingerprint, cache)
    evidence = correction = None
    if config.needs_evidence() and prepared.clean is not None:
        prepared, evidence = with_evidence(prepared, prepared.clean, config.seed)
    # The signals have done their part: a batch does not carry them.
    prepared = prepared.map(lambda pairs, _: pairs.remove_columns(list(SIGNAL_COLUMNS)))
    if "corrected_labels" in method.needs:
        noisy = dataclasses.replace(prepared, train=labelled(prepared.train))
        correction = correct(Surrogates(policy, noisy, config, adapter, fingerprint, cache))
    train = with_given_labels(prepared.train, method, correction, config.beta)
    if "annotator" in method.reads:
        train = with_annotator_index(train)
    prepared = dataclasses.replace(prepared, train=train)
    as_scored, policy = policy, make_trainable(policy, config.tuning, adapter)
    if policy is not as_scored:
        layout = layout_with_adapter(layout, config.resolved_layout(), policy, probe)
    layout.apply(policy)
    noise = noise_of(config.noise_rate, prepared, correction, evidence)
    teacher = None
    if method.teaches and prepared.clean is not None and noise is not None:
        teaching, ranks = config.teaching(len(train)), Ranks.here(config.device)
        teacher = make_teacher(teaching, train, prepared.clean, noise.expected, ranks)
    engine = _engine_of(policy, train, layout.collate, config) if teacher else None
    labeller = labeller_of(method, prepared, noise, teacher, evidence, config.beta)
    taught = layout, engine, labeller, teacher, noise
    return Start(policy, tokenizer, prepared, fingerprint, *taught, correction, evidence)


def load_checked(
    model: nn.Module | str,
    config: MSPOConfig,
    sets: Sets,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase, Prepared]:
    """Load model and tokenizer, tokenize the sets, and refuse what does not fit together."""
    policy, trusted_code = model, config.trust_remote_code
    require_name(model, config.bits())
    if isinstance(policy, str):
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        processes = config.world_size if config.shard else 1
        policy = load_to_train(
            policy, config.tuning, dtype, processes, config.bits(), trust_remote_code=trusted_code
        )
    elif config.tuning == "full":
        refuse_to_train_all(policy)
    settle_quantized(policy)
    tokenizer = tokenizer or tokenizer_of(model, policy, trust_remote_code=trusted_code)
    limits = config.max_length, context_length(policy)
    given = (sets.train, sets.clean, sets.evaluation)
    prepared = prepare(*given, tokenizer, *limits, config.on_bad_row)
    method = config.resolved_method()
    prepared = with_soft_labels(prepared, config.soft_label_from, method.reads)
    require_needs(method, prepared, config.noise_rate, config.meta_batch_size)
    log_columns_read(prepared)
    config.choose_steps(len(prepared.train))
    if config.shard or is_sharded(policy):
        make_ready = train_all_shards if config.tuning == "full" else freeze_base_shards
        make_ready(policy, config.world_size)
        config.refuse_with_shards()
    else:
        policy.to(config.device)
    require_fit(policy, tokenizer, prepared)
    if config.tuning == "full":
        require_known_padding(policy, tokenizer)
    return policy, tokenizer, prepared


def _with_reference(
    scorer: Scorer, prepared: Prepared, fingerprint: str, cache: ColumnCache
) -> Prepared:
    """Add what the reference says to every set, and log who it is."""
    if scorer.ranks.count > 1:  # each set is scored together, so all must have the same ones
        told = [fingerprint_tokens(pairs) for pairs in prepared.named().values()]
        require_same_start(scorer.ranks, "the data", json.dumps(told))
    name = getattr(scorer.policy.config, "name_or_path", "") or "the model"
    is_adapted = isinstance(scorer.policy, PeftModel)
    adapter = "with the adapter it came with" if is_adapted else "alone"
    logger.info("reference: %s %s, before the first step", name, adapter)
    return prepared.map(
        lambda pairs, which: with_reference(
            scorer, pairs, fingerprint, cache, f"reference, {which}"
        )
    )


def _engine_of(
    policy: nn.Module, pairs: Dataset, collate: Collate, config: MSPOConfig
) -> EngineChoice:
    if config.activation_checkpointing:  # as `train` will, for it decides on the graphs' size
        checkpoint_activations(policy)
        policy.train()
    pairs_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    engine, budget = cast(Engine, config.engine), cast(float, config.keep_budget_gib)
    micro_batches = config.gradient_accumulation_steps
    return engine_for(policy, pairs, collate, pairs_per_step, micro_batches, engine, budget)
