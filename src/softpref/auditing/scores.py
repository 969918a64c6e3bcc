"""Scores of pairs by one pass of a model, the basis of an audit's evidence.

Shapes: n pairs of the audited set.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from softpref.algorithm.ranks import ALONE, Ranks
from softpref.auditing.options import AuditOptions
from softpref.data.bad_rows import BadRow
from softpref.data.column_cache import ColumnCache
from softpref.data.fingerprints import count_sft_targets
from softpref.data.sources import LoadedPairs
from softpref.models.layout import choose_layout, longest_pairs
from softpref.models.loading import (
    context_length,
    load_policy,
    load_tokenizer,
    loaded_from,
    on_accelerator,
    tokenizer_of,
)
from softpref.models.reference import fingerprint_weights, with_reference
from softpref.models.scoring import Scorer, starting_ppl_diff
from softpref.training.preparation import Prepared, prepare, require_fit

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoredSets:
    """The audited and the trusted pairs with their scores.

    Attributes:
        pairs: the audited pairs, tokenized and scored, without those that are also trusted pairs.
        clean: the trusted pairs, tokenized and scored.
        ppl_diff: (n,) of `pairs`, nats per token.
        contradicting: number of distinct pairs that are labelled both ways, by file or files.
        sft_targets: number of pairs of which SFT has seen a response.
        source: the file or files of `pairs`.
        clean_source: the file of the trusted pairs.
        unused: rows of `source` that could not be used, with reasons.
    """

    pairs: Dataset
    clean: Dataset
    ppl_diff: Tensor
    contradicting: Mapping[str, int]
    sft_targets: int
    source: str
    clean_source: str
    unused: tuple[BadRow, ...] = ()


@contextmanager
def scorer_for(
    model: nn.Module | str,
    loaded: LoadedPairs,
    clean: LoadedPairs,
    options: AuditOptions,
    option: str = "--model",
    processing_class: PreTrainedTokenizerBase | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[Scorer, Prepared]]:
    """Yield who scores, and both sets tokenized for it; arguments are those of `score_sets`.

    Raises:
        UsageError: there is no such model, or a set cannot be used.
    """
    remote, bits = options.trust_remote_code, options.bits()
    if isinstance(model, str):
        tokenizer = processing_class or load_tokenizer(
            model, trust_remote_code=remote, option=option
        )
        dtype = torch.bfloat16 if options.bf16 else torch.float32
        policy = load_policy(model, trust_remote_code=remote, dtype=dtype, bits=bits, option=option)
    else:
        policy = model
        tokenizer = processing_class or tokenizer_of(model, policy, trust_remote_code=remote)
    limits = (options.max_length, context_length(policy))
    prepared = prepare(loaded, clean, None, tokenizer, *limits, options.on_bad_row)
    if policy is not model:
        on_accelerator(policy)
    require_fit(policy, tokenizer, prepared)
    layout = choose_layout("auto", policy, longest_pairs(*prepared.named().values()))
    logger.info("layout: %s", layout.why)
    with layout.applied(policy) as collate:
        scorer = Scorer(policy, collate, options.ppl_scope, options.batch_size, options.bf16, ranks)
        yield scorer, prepared


def score_sets(
    model: nn.Module | str,
    loaded: LoadedPairs,
    clean: LoadedPairs,
    options: AuditOptions,
    cache: ColumnCache,
    option: str = "--model",
    processing_class: PreTrainedTokenizerBase | None = None,
    ranks: Ranks = ALONE,
) -> ScoredSets:
    """Score both sets; an interrupted audit resumes with the scores in the cache.

    Args:
        model: a directory or hub id, or a model, which stays as it is.
        loaded: the pairs to audit.
        clean: the trusted pairs.
        options: lengths, batch size and precision.
        cache: the store of scores.
        option: the option that named the model, for messages.
        processing_class: the tokenizer; the model's own by default.
        ranks: the processes that share the scoring.

    Raises:
        UsageError: there is no such model, or a set cannot be used.
    """
    made = scorer_for(model, loaded, clean, options, option, processing_class, ranks)
    with made as (scorer, prepared):
        assert prepared.clean is not None
        weights = fingerprint_weights(scorer.policy)
        scored, trusted = (
            with_reference(scorer, pairs, weights, cache, what)
            for pairs, what in ((prepared.train, "scoring"), (prepared.clean, "clean"))
        )
    unused = prepared.record["train"]["bad_rows"]
    name = model if isinstance(model, str) else loaded_from(model)
    return ScoredSets(
        scored,
        trusted,
        starting_ppl_diff(scored),
        loaded.where["contradicting"],
        count_sft_targets(name, scored) if name and Path(name).is_dir() else 0,
        loaded.source,
        clean.source,
        tuple(BadRow(**{"source": loaded.source} | bad) for bad in unused),
    )
